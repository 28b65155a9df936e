// Quantisation with a scale for each row, in the natural orientation alone.
//
// Blocks are (threads of a row, rows): the threads that share threadIdx.y own one row of x. Each
// keeps kSlots runs of it in registers from the maximum to the cast; the rest of a wider row is
// read twice.
#pragma once

#include "cuda/quantize/elements.cuh"
#include "cuda/tile/reduce.cuh"

namespace jaxkern::quantize {

inline constexpr int kSlots = 4;
inline constexpr int kMaxThreadsPerRow = 1024;

template <class T, class F>
__global__ void __launch_bounds__(kMaxThreadsPerRow) quantize_rows_kernel(const QuantizeParams p) {
  using Out = Run<uint8_t, kVec<T>>;
  __shared__ uint32_t scratch[tile::kMaxWarps];
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t cols = row < p.rows ? p.cols : 0;  // a row past the end is empty
  const auto* from = static_cast<const Bits<T>*>(p.x) + row * p.cols;
  uint8_t* to = static_cast<uint8_t*>(p.values) + row * p.cols;
  const bool aligned = Load<T>::aligned(p.x, p.cols);
  const bool aligned_out = Out::aligned(p.values, p.cols);

  // The first column in slot s; slot kSlots is the first that is not kept.
  auto slot_col = [](int s) { return (s * int64_t{blockDim.x} + threadIdx.x) * kVec<T>; };
  const int64_t stride = int64_t{blockDim.x} * kVec<T>;

  uint32_t most = 0;
  auto see = [&](const Load<T>& run) {
    for (const uint32_t word : run.words.data) most = larger<T>(most, magnitudes<T>(word));
  };
  Load<T> x[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s)
    x[s].load(from + slot_col(s), inside(slot_col(s), cols), aligned);
#pragma unroll
  for (int s = 0; s < kSlots; ++s) see(x[s]);
  for (int64_t col = slot_col(kSlots); col < cols; col += stride) {
    Load<T> run;
    run.load(from + col, inside(col, cols), aligned);
    see(run);
  }
  const Scale scale = scale_of<F>(tile::row_max(largest<T>(most), scratch));
  if (threadIdx.x == 0 && row < p.rows) p.scale[row] = __uint_as_float(scale.bits);

  auto write = [&](int64_t col, const Load<T>& run) {
    cast<F, T>(run, scale.inverse).store(to + col, inside(col, cols), aligned_out);
  };
#pragma unroll
  for (int s = 0; s < kSlots; ++s) write(slot_col(s), x[s]);
  for (int64_t col = slot_col(kSlots); col < cols; col += stride) {
    Load<T> run;
    run.load(from + col, inside(col, cols), aligned);
    write(col, run);
  }
}

}  // namespace jaxkern::quantize
