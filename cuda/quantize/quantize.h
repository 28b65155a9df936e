// Picks the kernel and its grid.
#pragma once

#include <algorithm>
#include <bit>

#include "cuda/host/device.h"
#include "cuda/host/launch.h"
#include "cuda/quantize/quantize_rows.cuh"
#include "cuda/quantize/quantize_tiles.cuh"

namespace jaxkern::quantize {

inline int64_t tiles(const QuantizeParams& p) {
  return tile::ceil_div(p.rows, kTile) * tile::ceil_div(p.cols, kTile);
}

// How many blocks a kernel of tiles has. With `progress` it computes rstd on the way.
template <class T>
int64_t tile_blocks(const QuantizeParams& p) {
  const int64_t units = tile::ceil_div(p.rows, kTile) * TilesAhead<T>::kUnits;
  return tiles(p) + (p.progress != nullptr ? units : 0);
}

template <class Source, class T>
bool all_aligned(const QuantizeParams& p) {
  const auto aligned = [&](const QuantizedMatrix& to) {
    return Run<uint8_t, kVec<T>>::aligned(to.values, p.cols) &&
           (to.values_t == nullptr || Run<uint8_t, 16>::aligned(to.values_t, p.rows));
  };
  return inputs_aligned<Source, T>(p) &&
         std::all_of(p.outputs, p.outputs + Source::kOutputs, aligned);
}

// Has the kernel of tiles compute rstd.
template <class Source, class T>
cudaError_t start_progress(QuantizeParams& p, cudaStream_t stream) {
  int multiprocessors;
  if (cudaError_t error = multiprocessor_count(&multiprocessors)) return error;
  const int64_t at_work = int64_t{multiprocessors} * kBlocksPerSm<Source, T>;
  const int64_t of_panel = TilesAhead<T>::kUnits + tile::ceil_div(p.cols, kTile);
  p.lead = static_cast<int32_t>(tile::ceil_div(at_work, of_panel) + 1);
  p.rstd_in = p.rstd;
  return cudaMemsetAsync(p.progress, 0, quantize_progress(p.rows) * sizeof(int32_t), stream);
}

template <class Source, class T, class F, Scaling kScaling>
cudaError_t launch_tiles(const QuantizeParams& p, cudaStream_t stream) {
  const auto start = [&](auto kernel) {
    return launch(kernel, tile_blocks<T>(p), Threads<T>::kThreads, sizeof(Memory<Source, T>),
                  stream, p);
  };
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
  if constexpr (kNormalises<Source>) {
    const int resident = resident_clusters(kernel, 1, block, 0);
    if (resident == 0) return cudaErrorInvalidValue;
    blocks = std::min<int64_t>(blocks, resident);
  }
  return launch(kernel, blocks, block, 0, stream, p);
}

template <class Source, class T, class F>
cudaError_t launch_rows_and_columns(QuantizeParams p, cudaStream_t stream) {
  const size_t bytes = (p.rows + p.cols) * sizeof(int32_t);
  for (int o = 0; o < Source::kOutputs; ++o) {
    int32_t* workspace = p.outputs[o].workspace;
    if (cudaError_t error = cudaMemsetAsync(workspace, 0, bytes, stream)) return error;
  }
  if (cudaError_t error = launch(quantize_amax_kernel<Source, T>, tile_blocks<T>(p),
                                 Threads<T>::kThreads, sizeof(Patches<Source, T>), stream, p)) {
    return error;
  }
  p.progress = nullptr;  // rstd is there
  return launch_tiles<Source, T, F, Scaling::kRow>(p, stream);
}

template <class Source, class T, class F>
cudaError_t launch_scaling(QuantizeParams p, cudaStream_t stream) {
  const bool rows_alone = quantizes_rows_alone(p.scaling, p.outputs[0].values_t != nullptr);
  if (rows_alone || p.rstd_in != nullptr) p.progress = nullptr;
  if (p.progress != nullptr) {
    if (cudaError_t error = start_progress<Source, T>(p, stream)) return error;
  }
  switch (p.scaling) {
    case Scaling::kTensor:
      if constexpr (std::is_same_v<Source, Matrix>) {
        return launch_tiles<Source, T, F, Scaling::kTensor>(p, stream);
      }
      return cudaErrorInvalidValue;
    case Scaling::kRow:
      return rows_alone ? launch_rows<Source, T>(quantize_rows_kernel<Source, T, F, Scaling::kRow>,
                                                 p, stream)
                        : launch_rows_and_columns<Source, T, F>(p, stream);
    case Scaling::kBlock1x128:
      if constexpr (kNormalises<Source>) {
        if (rows_alone) {
          return launch_rows<Source, T>(quantize_rows_kernel<Source, T, F, Scaling::kBlock1x128>, p,
                                        stream);
        }
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
