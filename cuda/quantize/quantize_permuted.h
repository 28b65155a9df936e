// Launches the quantisation of rows for products with weights of four bits.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/host/launch.h"
#include "cuda/quantize/quantize_permuted.cuh"

namespace jaxkern::quantize {

// As few threads per row as hold it in their slots, or else the most there may be.
template <class T>
cudaError_t launch_permuted(const QuantizePermutedParams& p, cudaStream_t stream) {
  const int64_t wanted = tile::ceil_div(p.wide, kPermutedSlots * kPermutedGroup);
  const int threads = static_cast<int>(
      std::bit_ceil(static_cast<uint64_t>(std::min<int64_t>(wanted, kPermutedThreads))));
  constexpr int kLeastThreads = 128;  // per block
  const int rows = std::max(1, kLeastThreads / threads);
  return launch(quantize_permuted_kernel<T>, tile::ceil_div(p.rows, rows), dim3(threads, rows), 0,
                stream, p);
}

}  // namespace jaxkern::quantize
