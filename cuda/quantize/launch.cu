#include "cuda/quantize/launch.h"

#include <algorithm>
#include <bit>

#include "cuda/host/launch.h"
#include "cuda/quantize/quantize_rows.cuh"
#include "cuda/quantize/quantize_tiles.cuh"

namespace jaxkern {
namespace quantize {
namespace {

int64_t tiles(const QuantizeParams& p) {
  return tile::ceil_div(p.rows, kTile) * tile::ceil_div(p.cols, kTile);
}

template <class T>
bool all_aligned(const QuantizeParams& p) {
  return Load<T>::aligned(p.x, p.cols) && Run<uint8_t, kVec<T>>::aligned(p.values, p.cols) &&
         (p.values_t == nullptr || Run<uint8_t, 16>::aligned(p.values_t, p.rows));
}

template <class T, class F, Scaling kScaling>
cudaError_t launch_tiles(const QuantizeParams& p, cudaStream_t stream) {
  const auto start = [&](auto kernel) {
    return launch(kernel, tiles(p), Threads<T>::kThreads, 0, stream, p);
  };
  return all_aligned<T>(p) ? start(quantize_tiles_kernel<T, F, kScaling, true>)
                           : start(quantize_tiles_kernel<T, F, kScaling, false>);
}

// As few threads per row as hold it in their slots, or else the most there may be.
template <class T, class F>
cudaError_t launch_rows(const QuantizeParams& p, cudaStream_t stream) {
  constexpr int kThreads = 128;  // per block, unless one row takes more
  const int64_t wanted = tile::ceil_div(p.cols, kSlots * kVec<T>);
  const int threads = static_cast<int>(
      std::bit_ceil(static_cast<uint64_t>(std::min<int64_t>(wanted, kMaxThreadsPerRow))));
  const int rows = std::max(1, kThreads / threads);
  return launch(quantize_rows_kernel<T, F>, tile::ceil_div(p.rows, rows), dim3(threads, rows), 0,
                stream, p);
}

template <class T, class F>
cudaError_t launch_rows_and_columns(const QuantizeParams& p, cudaStream_t stream) {
  const size_t bytes = (p.rows + p.cols) * sizeof(int32_t);
  if (cudaError_t error = cudaMemsetAsync(p.workspace, 0, bytes, stream)) return error;
  if (cudaError_t error =
          launch(quantize_amax_kernel<T>, tiles(p), Threads<T>::kThreads, 0, stream, p)) {
    return error;
  }
  return launch_tiles<T, F, Scaling::kRow>(p, stream);
}

template <class T, class F>
cudaError_t launch_scaling(const QuantizeParams& p, cudaStream_t stream) {
  switch (p.scaling) {
    case Scaling::kTensor:
      return launch_tiles<T, F, Scaling::kTensor>(p, stream);
    case Scaling::kRow:
      return p.values_t == nullptr ? launch_rows<T, F>(p, stream)
                                   : launch_rows_and_columns<T, F>(p, stream);
    case Scaling::kBlock1x128:
      return launch_tiles<T, F, Scaling::kBlock1x128>(p, stream);
    case Scaling::kBlock128x128:
      return launch_tiles<T, F, Scaling::kBlock128x128>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_format(const QuantizeParams& p, cudaStream_t stream) {
  switch (p.format) {
    case DType::kFloat8E4M3:
      return launch_scaling<T, tile::e4m3>(p, stream);
    case DType::kFloat8E5M2:
      return launch_scaling<T, tile::e5m2>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace quantize

cudaError_t launch_quantize(const QuantizeParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return quantize::launch_format<float>(p, stream);
    case DType::kBFloat16:
      return quantize::launch_format<tile::bf16>(p, stream);
    case DType::kFloat16:
      return quantize::launch_format<tile::f16>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jaxkern
