// Picks the kernel and its grid.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/quantize/quantize_ahead.cuh"
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

template <class Source, class T>
cudaError_t launch_each_tile(void (*kernel)(QuantizeParams), int bytes, const QuantizeParams& p,
                             cudaStream_t stream) {
  const int64_t tiles = tile::ceil_div(p.rows, kTile) * tile::ceil_div(p.cols, kTile);
  return launch(kernel, tiles, Threads<T>::kThreads, bytes, stream, p);
}

// Blocks fill the GPU, and draw turns.
template <class T>
cudaError_t launch_ahead(void (*kernel)(QuantizeParams), QuantizeParams p, cudaStream_t stream) {
  constexpr int kThreads = Threads<T>::kThreads, kBytes = sizeof(AheadMemory<T>);
  const size_t words = quantize_progress(p.rows);
  if (cudaError_t error = cudaMemsetAsync(p.progress, 0, words * sizeof(int32_t), stream)) {
    return error;
  }
  const int resident = resident_clusters(kernel, 1, kThreads, kBytes);
  if (resident == 0) return cudaErrorInvalidValue;
  const TurnOrder order = turn_order<T>(p);
  p.lead = tile::ceil_div(resident, static_cast<int>(order.units + order.tiles)) + 1;
  p.rstd_in = p.rstd;
  const int64_t turns = int64_t{order.panels} * (order.units + order.tiles);
  return launch(kernel, std::min<int64_t>(turns, resident), kThreads, kBytes, stream, p);
}

template <class Source, class T, class F, Scaling kScaling>
cudaError_t launch_tiles(const QuantizeParams& p, cudaStream_t stream) {
  const bool aligned = all_aligned<Source, T>(p);
  if constexpr (kNormalises<Source> && kScaling != Scaling::kRow) {
    if (p.rstd_in == nullptr) {
      return launch_ahead<T>(aligned ? quantize_ahead_kernel<T, F, kScaling, true>
                                     : quantize_ahead_kernel<T, F, kScaling, false>,
                             p, stream);
    }
  }
  return launch_each_tile<Source, T>(aligned ? quantize_tiles_kernel<Source, T, F, kScaling, true>
                                             : quantize_tiles_kernel<Source, T, F, kScaling, false>,
                                     sizeof(TilesMemory<Source, T>), p, stream);
}

// As few threads per row, from `least` on, as hold it in their slots, or else the most there may
// be. With rstd they are whole groups, as kBlock1x128 wants them.
template <class Source, class T>
cudaError_t launch_rows(void (*kernel)(QuantizeParams), const QuantizeParams& p,
                        cudaStream_t stream,
                        int64_t least = kNormalises<Source> ? kGroupLanes<T> : 1) {
  constexpr int kThreads = 128;  // per block, unless one row takes more
  constexpr int64_t kMost = kMaxThreadsPerRow<Source>;
  const int64_t wanted = tile::ceil_div(p.cols, kSlots<Source> * kVec<T>);
  const int threads =
      static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::clamp(wanted, least, kMost))));
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

template <class Source, class T, class F, Scaling kScaling>
cudaError_t launch_rows(const QuantizeParams& p, cudaStream_t stream) {
  return all_aligned<Source, T>(p)
             ? launch_rows<Source, T>(quantize_rows_kernel<Source, T, F, kScaling, true>, p, stream)
             : launch_rows<Source, T>(quantize_rows_kernel<Source, T, F, kScaling, false>, p,
                                      stream);
}

// A scale for each row takes all of a row, and one for each column all of a column: x is read for
// all maxima, and once more. The rows of a norm take the kernel that finds rstd.
template <class Source, class T, class F>
cudaError_t launch_rows_and_columns(QuantizeParams p, cudaStream_t stream) {
  const bool has_natural = p.outputs[0].values != nullptr;
  const size_t words = quantize_workspace(p.scaling, has_natural, true, p.rows, p.cols);
  for (int o = 0; o < Source::kOutputs; ++o) {
    int32_t* workspace = p.outputs[o].workspace;
    if (cudaError_t error = cudaMemsetAsync(workspace, 0, words * sizeof(int32_t), stream)) {
      return error;
    }
  }
  if constexpr (kNormalises<Source>) {
    if (has_natural) {
      if (cudaError_t error = launch_rows<Source, T, F, Scaling::kRow>(p, stream)) return error;
      p.outputs[0].values = nullptr;
    } else if (p.rstd_in == nullptr) {
      if (cudaError_t error = launch(rstd_kernel<T>, tile::ceil_div(p.rows, RstdUnits<T>::kRows),
                                     Threads<T>::kThreads, 0, stream, p)) {
        return error;
      }
    }
    if (p.rstd_in == nullptr) p.rstd_in = p.rstd;
  }
  if (cudaError_t error = launch_each_tile<Source, T>(quantize_amax_kernel<Source, T>,
                                                      sizeof(AmaxMemory<Source, T>), p, stream)) {
    return error;
  }
  return launch_tiles<Source, T, F, Scaling::kRow>(p, stream);
}

template <class Source, class T, class F>
cudaError_t launch_scaling(const QuantizeParams& p, cudaStream_t stream) {
  const bool has_transposed = p.outputs[0].values_t != nullptr;
  switch (p.scaling) {
    case Scaling::kTensor:
      if constexpr (std::is_same_v<Source, Matrix>) {
        return launch_tiles<Source, T, F, Scaling::kTensor>(p, stream);
      }
      return cudaErrorInvalidValue;
    case Scaling::kRow:
      return has_transposed ? launch_rows_and_columns<Source, T, F>(p, stream)
                            : launch_rows<Source, T, F, Scaling::kRow>(p, stream);
    case Scaling::kBlock1x128:
      if constexpr (kNormalises<Source>) {
        if (!has_transposed) return launch_rows<Source, T, F, Scaling::kBlock1x128>(p, stream);
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
