// Quantisation to four bits, with a scale for each block of neighbours in a row.
//
// A warp has kFourBitSlots runs of eight elements for each lane, and loads them at once. The lanes
// that share a block agree on its extent; then each has the values of a run in a word.
#pragma once

#include "cuda/quantize/four_bit.cuh"
#include "cuda/quantize/quantize_rows.cuh"

namespace jaxkern::quantize {

inline constexpr int kFourBitThreads = 256;
template <class T>
inline constexpr int kFourBitSlots = 8 / sizeof(T);

// Runs of a block of threads.
template <class T>
inline constexpr int kFourBitRuns = kFourBitThreads * kFourBitSlots<T>;

// NVFP4 has read x before, for tensor_scale: backwards, L2 still has what was read last.
template <class T, class Format>
__global__ void __launch_bounds__(kFourBitThreads, 4)
    quantize_four_bit_kernel(const QuantizeFourBitParams p) {
  __shared__ typename Format::Shared shared;
  const int64_t runs = p.size / kEight;
  const auto parts = static_cast<unsigned>(tile::ceil_div<int64_t>(runs, kFourBitRuns<T>));
  const unsigned part = gridDim.x - 1 - blockIdx.x, matrix = part / parts;
  const int lane = threadIdx.x % tile::kWarpSize;
  const int lanes = (Format::kBlock > 0 ? Format::kBlock : p.block) / kEight;  // of a block
  const int64_t first = int64_t{part % parts} * kFourBitRuns<T> +
                        static_cast<int>(threadIdx.x - lane) * kFourBitSlots<T> + lane;
  const auto run = [&](int s) { return first + s * tile::kWarpSize; };  // of the matrix
  const auto* const from = static_cast<const Bits<T>*>(p.x) + matrix * p.size;
  auto* const values = static_cast<uint32_t*>(p.values) + matrix * runs;

  Eight<T> x[kFourBitSlots<T>];
#pragma unroll
  for (int s = 0; s < kFourBitSlots<T>; ++s) {
    x[s].load(from + run(s) * kEight, run(s) < runs, true);
  }
  const Format format(p.tensor_scale != nullptr ? p.tensor_scale[matrix] : 0.0f, shared);

  typename Format::Extent extents[kFourBitSlots<T>];
#pragma unroll
  for (int s = 0; s < kFourBitSlots<T>; ++s) extents[s].see(x[s]);
#pragma unroll
  for (int offset = tile::kWarpSize / 2; offset > 0; offset /= 2) {
    if (offset >= lanes) continue;
#pragma unroll
    for (int s = 0; s < kFourBitSlots<T>; ++s) extents[s].join_lane(offset);
  }
#pragma unroll
  for (int s = 0; s < kFourBitSlots<T>; ++s) {
    const auto block = format.block(extents[s]);
    const uint32_t word = format.values(x[s], block);
    if (run(s) < runs) values[run(s)] = word;
    if (run(s) >= runs || (lane & (lanes - 1)) != 0) continue;
    const int64_t at = (matrix * runs + run(s)) >> (__ffs(lanes) - 1);
    static_cast<typename Format::Stored*>(p.scale)[at] = block.stored();
    if constexpr (Format::kHasZeroPoint) p.zero_point[at] = block.zero_point();
  }
}

// --- The largest magnitude --------------------------------------------------------------------

template <class T>
inline constexpr int kNvfp4Lanes = 16 / kVec<T>;

// Of the finite blocks of 16 of each row, in p.outputs[0].scale. blockDim.x is at least
// kNvfp4Lanes.
template <class T>
__global__ void __maxnreg__(64) row_amax_kernel(const QuantizeParams p) {
  __shared__ uint32_t scratch[tile::kMaxWarps];
  const RowPart<Matrix, T, true> part{p, int64_t{blockIdx.x} * blockDim.y + threadIdx.y};
  uint32_t most = 0;
  const auto see = [&](const Load<T>(&x)[1]) {
    Amax<T> amax;
    amax.see(x[0]);
    const uint32_t bits = tile::warp_max(amax.bits(), kNvfp4Lanes<T>);
    most = max(most, bits < kInfinityBits ? bits : 0);
  };
  Load<T> x[kSlots<Matrix>][1];
  part.load_slots(x);
#pragma unroll
  for (int s = 0; s < kSlots<Matrix>; ++s) see(x[s]);
  part.beyond_slots([&](int64_t col) {
    Load<T> beyond[1];
    part.load(beyond, col);
    see(beyond);
  });
  most = tile::row_max(most, scratch);
  if (threadIdx.x == 0 && part.row < p.rows) {
    p.outputs[0].scale[part.row] = __uint_as_float(most);
  }
}

}  // namespace jaxkern::quantize
