// Picks the kernel and its grid.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/quantize/quantize_rows.cuh"
#include "cuda/quantize/quantize_tiles.cuh"

namespace jaxkern::quantize {

template <class Source, class T>
bool all_aligned(const QuantizeParams& p) {
  const auto aligned = [&](const QuantizedMatrix& to) {
    return Run<uint8_t, kVec<T>>::aligned(to.values, p.cols) &&
           (to.values_t == nullptr || Run<uint8_t, 16>::aligned(to.values_t, p.rows));
  };
  return inputs_aligned<Source, T>(p) &&
         std::all_of(p.outputs, p.outputs + Source::kOutputs, aligned);
}

// Blocks fill the GPU, and go from turn to turn.
template <class Source, class T, Scaling kScaling>
cudaError_t launch_tiles(void (*kernel)(QuantizeParams), QuantizeParams p, cudaStream_t stream) {
  constexpr int kThreads = Threads<T>::kThreads, kBytes = sizeof(TilesMemory<Source, T>);
  const int resident = resident_clusters(kernel, 1, kThreads, kBytes);
  if (resident == 0) return cudaErrorInvalidValue;
  const TurnOrder order = turn_order<T, kScaling>(p);
  if (order.units > 0) {
    p.lead = tile::ceil_div(resident, static_cast<int>(order.units + order.tiles)) + 1;
  }
  const int64_t turns = int64_t{order.panels} * (order.units + order.tiles);
  return launch(kernel, std::min<int64_t>(turns, resident), kThreads, kBytes, stream, p);
}

template <class Source, class T, class F, Scaling kScaling>
cudaError_t launch_tiles(const QuantizeParams& p, cudaStream_t stream) {
  const auto start = [&](auto kernel) { return launch_tiles<Source, T, kScaling>(kernel, p, stream); };
  return all_aligned<Source, T>(p) ? start(quantize_tiles_kernel<Source, T, F, kScaling, true>)
                                   : start(quantize_tiles_kernel<Source, T, F, kScaling, false>);
}

// As few threads per row as hold it in their slots, or else the most there may be. With rstd they
// are whole groups, as kBlock1x128 wants them.
template <class Source, class T>
cudaError_t launch_rows(void (*kernel)(QuantizeParams), const QuantizeParams& p,
                        cudaStream_t stream) {
  constexpr int kThreads = 128;  // per block, unless one row takes more
  constexpr int64_t kLeast = kNormalises<Source> ? kGroupLanes<T> : 1,
                    kMost = kMaxThreadsPerRow<Source>;
  const int64_t wanted = tile::ceil_div(p.cols, kSlots<Source> * kVec<T>);
  const int threads =
      static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::clamp(wanted, kLeast, kMost))));
  const int rows = std::max(1, kThreads / threads);
  const dim3 block(threads, rows);
  int64_t blocks = tile::ceil_div(p.rows, rows);
  int bytes = 0;
  if constexpr (kNormalises<Source>) {
    bytes = RowMemory<T>::bytes(block);
    const int resident = resident_clusters(kernel, 1, block, bytes);
    if (resident == 0) return cudaErrorInvalidValue;
    blocks = std::min<int64_t>(blocks, resident);
  }
  return launch(kernel, blocks, block, bytes, stream, p);
}

// A scale for each row takes all of a row, and one for each column all of a column: each
// orientation has a launch of its own.
template <class Source, class T, class F, Scaling kScaling>
cudaError_t launch_rows(const QuantizeParams& p, cudaStream_t stream) {
  return all_aligned<Source, T>(p)
             ? launch_rows<Source, T>(quantize_rows_kernel<Source, T, F, kScaling, true>, p, stream)
             : launch_rows<Source, T>(quantize_rows_kernel<Source, T, F, kScaling, false>, p,
                                      stream);
}

template <class Source, class T, class F>
cudaError_t launch_rows_and_columns(QuantizeParams p, cudaStream_t stream) {
  const bool has_natural = p.outputs[0].values != nullptr;
  if (has_natural) {
    if (cudaError_t error = launch_rows<Source, T, F, Scaling::kRow>(p, stream)) return error;
  }
  if constexpr (kNormalises<Source>) {
    if (p.rstd_in == nullptr && !has_natural) {
      if (cudaError_t error = launch(rstd_kernel<T>, tile::ceil_div(p.rows, RstdUnits<T>::kRows),
                                     Threads<T>::kThreads, 0, stream, p)) {
        return error;
      }
    }
    if (p.rstd_in == nullptr) p.rstd_in = p.rstd;
  }
  for (QuantizedMatrix& to : p.outputs) to.values = nullptr;
  return launch_tiles<Source, T, F, Scaling::kRow>(p, stream);
}

template <class Source, class T, class F>
cudaError_t launch_scaling(QuantizeParams p, cudaStream_t stream) {
  const bool has_transposed = p.outputs[0].values_t != nullptr;
  if (p.scaling == Scaling::kRow && has_transposed) {
    for (int o = 0; o < Source::kOutputs; ++o) {
      const size_t words = p.cols + quantize_progress(p.cols);
      if (cudaError_t error = cudaMemsetAsync(p.outputs[o].workspace, 0, words * sizeof(int32_t), stream)) {
        return error;
      }
    }
    p.progress = p.outputs[0].workspace + p.cols;
    return launch_rows_and_columns<Source, T, F>(p, stream);
  }
  const bool rows_alone = quantizes_rows_alone(p.scaling, has_transposed);
  if (rows_alone || p.rstd_in != nullptr) p.progress = nullptr;
  if (p.progress != nullptr) {
    const size_t words = quantize_progress(p.rows);
    if (cudaError_t error = cudaMemsetAsync(p.progress, 0, words * sizeof(int32_t), stream)) return error;
    p.rstd_in = p.rstd;
  }
  switch (p.scaling) {
    case Scaling::kTensor:
      if constexpr (std::is_same_v<Source, Matrix>) {
        return launch_tiles<Source, T, F, Scaling::kTensor>(p, stream);
      }
      return cudaErrorInvalidValue;
    case Scaling::kRow:
      return launch_rows<Source, T, F, Scaling::kRow>(p, stream);
    case Scaling::kBlock1x128:
      if constexpr (kNormalises<Source>) {
        if (rows_alone) return launch_rows<Source, T, F, Scaling::kBlock1x128>(p, stream);
      }
      return launch_tiles<Source, T, F, Scaling::kBlock1x128>(p, stream);
    case Scaling::kBlock128x128:
      return launch_tiles<Source, T, F, Scaling::kBlock128x128>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <class Source, class T>
cudaError_t launch_format(const QuantizeParams& p, cudaStream_t stream) {
  switch (p.format) {
    case DType::kFloat8E4M3:
      return launch_scaling<Source, T, tile::e4m3>(p, stream);
    case DType::kFloat8E5M2:
      return launch_scaling<Source, T, tile::e5m2>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <class Source>
cudaError_t launch_source(const QuantizeParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::kFloat32:
      return launch_format<Source, float>(p, stream);
    case DType::kBFloat16:
      return launch_format<Source, tile::bf16>(p, stream);
    case DType::kFloat16:
      return launch_format<Source, tile::f16>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jaxkern::quantize
