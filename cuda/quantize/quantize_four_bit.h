// Launches of quantisation to four bits.
#pragma once

#include "cuda/quantize/quantize.h"
#include "cuda/quantize/quantize_four_bit.cuh"

namespace jaxkern::quantize {

template <class T, class Format>
cudaError_t launch_four_bit(QuantizeFourBitParams p, cudaStream_t stream) {
  const auto kernel = quantize_four_bit_kernel<T, Format>;
  int64_t blocks = tile::ceil_div<int64_t>(p.size / kEight, kFourBitRuns<T>);
  if constexpr (Format::kStays) {  // as many as the GPU has room for
    const int resident = resident_clusters(kernel, 1, kFourBitThreads, 0);
    if (resident == 0) return cudaErrorInvalidValue;
    blocks = std::min(blocks, tile::ceil_div<int64_t>(resident, p.matrices));
  }
  p.blocks = static_cast<int32_t>(blocks);
  return launch(kernel, p.matrices * blocks, kFourBitThreads, 0, stream, p);
}

template <class T>
cudaError_t launch_four_bit(const QuantizeFourBitParams& p, cudaStream_t stream) {
  switch (p.format) {
    case FourBitFormat::kNvfp4:
      return launch_four_bit<T, Nvfp4<T>>(p, stream);
    case FourBitFormat::kMxfp4:
      return launch_four_bit<T, Mxfp4<T>>(p, stream);
    case FourBitFormat::kInt4:
      return p.zero_point != nullptr ? launch_four_bit<T, Int4<T, true>>(p, stream)
                                     : launch_four_bit<T, Int4<T, false>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_row_amax(const RowAmaxParams& p, cudaStream_t stream) {
  QuantizeParams params = {};
  params.inputs[0] = p.x;
  params.outputs[0].scale = p.amax;
  params.rows = p.rows;
  params.cols = p.cols;
  return launch_rows<Matrix, T>(row_amax_kernel<T>, params, stream, kNvfp4Lanes<T>);
}

}  // namespace jaxkern::quantize
