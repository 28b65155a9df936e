// Quantisation of rows to e4m3 for products with weights of four bits (matmul/four_bit_fp8.cuh): of
// each 16 columns in the order 0, 1, 8, 9, 2, 3, 10, 11, ..., and up to whole panels of the weight.
//
// The threads that share threadIdx.y own a row, and each of them 16 columns at a time, which are 16
// bytes of the result. They keep kPermutedSlots of them from the maximum to the cast; the rest of a
// wider row is read again.
#pragma once

#include "cuda/quantize/elements.cuh"
#include "cuda/tile/reduce.cuh"

namespace jaxkern::quantize {

inline constexpr int kPermutedGroup = 16;  // columns
inline constexpr int kPermutedSlots = 2, kPermutedThreads = 1024;

template <class T>
struct PermutedGroup {
  static constexpr int kRuns = kPermutedGroup / kVec<T>;
  Load<T> runs[kRuns];

  // Columns that do not exist are zero: none or all of a group.
  __device__ __forceinline__ void load(const Bits<T>* from, bool exists) {
#pragma unroll
    for (int i = 0; i < kRuns; ++i) runs[i].load(from + kVec<T> * i, exists ? kVec<T> : 0, true);
  }
  __device__ __forceinline__ void raise(uint32_t& most) const {
#pragma unroll
    for (const Load<T>& run : runs) {
#pragma unroll
      for (const uint32_t word : run.words.data) most = larger<T>(most, magnitudes<T>(word));
    }
  }
  // As e4m3, in order.
  __device__ __forceinline__ uint4 cast_in_order(float inverse) const {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const auto run = cast<tile::e4m3, T>(runs[i], inverse);
#pragma unroll
      for (int k = 0; k < 4 / kRuns; ++k) words[4 / kRuns * i + k] = run.words.data[k];
    }
    constexpr uint32_t kLower = 0x5410, kUpper = 0x7632;
    return {__byte_perm(words[0], words[2], kLower), __byte_perm(words[0], words[2], kUpper),
            __byte_perm(words[1], words[3], kLower), __byte_perm(words[1], words[3], kUpper)};
  }
};

template <class T>
__global__ void __launch_bounds__(kPermutedThreads)
    quantize_permuted_kernel(const QuantizePermutedParams p) {
  __shared__ uint32_t scratch[tile::kMaxWarps];
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int64_t wide = row < p.rows ? p.wide : 0;  // a row past the end is empty
  const Bits<T>* from = static_cast<const Bits<T>*>(p.x) + row * p.cols;
  uint8_t* to = static_cast<uint8_t*>(p.values) + row * p.wide;
  const int64_t stride = int64_t{blockDim.x} * kPermutedGroup,
                first = int64_t{threadIdx.x} * kPermutedGroup;
  const auto load = [&](PermutedGroup<T>& group, int64_t col) {
    group.load(from + col, col < min(p.cols, wide));
  };
  const auto store = [&](const PermutedGroup<T>& group, int64_t col, float inverse) {
    if (col < wide) *reinterpret_cast<uint4*>(to + col) = group.cast_in_order(inverse);
  };

  PermutedGroup<T> slots[kPermutedSlots];
  uint32_t most = 0;
#pragma unroll
  for (int s = 0; s < kPermutedSlots; ++s) load(slots[s], first + stride * s);
#pragma unroll
  for (int s = 0; s < kPermutedSlots; ++s) slots[s].raise(most);
  for (int64_t col = first + stride * kPermutedSlots; col < wide; col += stride) {
    PermutedGroup<T> beyond;
    load(beyond, col);
    beyond.raise(most);
  }
  const Scale scale = scale_of<tile::e4m3>(tile::row_max(largest<T>(most), scratch));
  if (threadIdx.x == 0 && wide > 0) p.scale[row] = __uint_as_float(scale.bits);
#pragma unroll
  for (int s = 0; s < kPermutedSlots; ++s) store(slots[s], first + stride * s, scale.inverse);
  for (int64_t col = first + stride * kPermutedSlots; col < wide; col += stride) {
    PermutedGroup<T> beyond;
    load(beyond, col);
    store(beyond, col, scale.inverse);
  }
}

}  // namespace jaxkern::quantize
