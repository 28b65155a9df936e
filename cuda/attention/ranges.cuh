// Band masks: the range of columns that each granule of rows visits, worked out before the main
// kernel, once for all heads.
//
// Segment ids may be in any order. Where each id is one run, as in packed sequences, ranges are
// exact and a granule inside one run has it all dense; otherwise they are as wide as they must be.
#pragma once

#include <climits>

#include "cuda/attention/mask.cuh"
#include "cuda/host/launch.h"

namespace jaxkern {

constexpr int kRangesThreads = 512;

// The columns whose segment is among those of the rows from `row` up to `row_end`; all threads of
// the block call.
__device__ inline ColumnRange segment_columns(const int* row_segments, const int* col_segments,
                                              int row, int row_end, int cols) {
  __shared__ int lowest, highest, begin, end, seen;
  if (threadIdx.x == 0) lowest = INT_MAX, highest = INT_MIN, begin = cols, end = 0, seen = 0;
  __syncthreads();
  row += threadIdx.x;
  if (row < row_end) {
    atomicMin(&lowest, row_segments[row]);
    atomicMax(&highest, row_segments[row]);
  }
  __syncthreads();

  const int low = lowest, high = highest;
  int own_begin = cols, own_end = 0, own_seen = 0;
#pragma unroll 8
  for (int col = threadIdx.x; col < cols; col += kRangesThreads) {
    const int id = col_segments[col];
    const bool mine = id >= low && id <= high;
    own_begin = mine ? min(own_begin, col) : own_begin;
    own_end = mine ? col + 1 : own_end;
    own_seen += mine;
  }
  own_begin = __reduce_min_sync(0xffffffffu, own_begin);
  own_end = __reduce_max_sync(0xffffffffu, own_end);
  own_seen = __reduce_add_sync(0xffffffffu, own_seen);
  if (threadIdx.x % tile::kWarpSize == 0) {
    atomicMin(&begin, own_begin);
    atomicMax(&end, own_end);
    atomicAdd(&seen, own_seen);
  }
  __syncthreads();
  const bool dense = lowest == highest && seen == end - begin;
  return {begin, end, dense ? begin : cols, dense ? end : 0};  // one_run() or not
}

// One block: one granule of rows of one sequence.
template <class Mask>
__global__ void __launch_bounds__(kRangesThreads)
    attention_ranges_kernel(const Mask mask, ColumnRange* ranges) {
  static_assert(kAttentionGranule <= kRangesThreads, "a thread for each row");
  const int granules = tile::ceil_div(mask.rows, kAttentionGranule);
  const int batch = blockIdx.x / granules, row = blockIdx.x % granules * kAttentionGranule;
  const auto sequence = mask.sequence(batch);
  ColumnRange range = sequence.columns(row, row + kAttentionGranule);
  if (mask.row_segments != nullptr) {
    const int* row_segments = mask.row_segments + int64_t{batch} * mask.rows;
    const int* col_segments = mask.col_segments + int64_t{batch} * mask.cols;
    const int row_end = min(row + kAttentionGranule, sequence.rows);
    range = range.meet(segment_columns(row_segments, col_segments, row, row_end, sequence.cols));
  }
  if (range.empty()) range = ColumnRange::none(mask.cols);
  if (threadIdx.x == 0) ranges[blockIdx.x] = range;
}

// One thread: one sequence. Widens ranges until neither end falls from one granule to the next. A
// wider one is no longer one run.
static __global__ void attention_monotone_ranges_kernel(ColumnRange* ranges, int granules) {
  ranges += int64_t{blockIdx.x} * granules;
  const auto widen = [](ColumnRange& range, int begin, int end) {
    if (begin >= range.begin && end <= range.end) return;
    range = {min(begin, range.begin), max(end, range.end), range.dense_begin, 0};
  };
  for (int g = 1; g < granules; ++g) widen(ranges[g], INT_MAX, ranges[g - 1].end);
  for (int g = granules - 2; g >= 0; --g) widen(ranges[g], ranges[g + 1].begin, 0);
}

// Fills the ranges of a mask that needs them.
template <class Mask>
cudaError_t launch_ranges(const Mask& mask, int64_t batch, ColumnRange* ranges, bool monotone,
                          cudaStream_t stream) {
  if constexpr (!Mask::kBand) return cudaSuccess;
  const int granules = static_cast<int>(attention_granules(mask.rows));
  const cudaError_t error = launch(attention_ranges_kernel<Mask>, batch * granules, kRangesThreads,
                                   0, stream, mask, ranges);
  if (error != cudaSuccess || !monotone) return error;
  return launch(attention_monotone_ranges_kernel, batch, 1, 0, stream, ranges, granules);
}

}  // namespace jaxkern
