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

constexpr int kRangesThreads = 128;

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

  int own_begin = cols, own_end = 0, own_seen = 0;
  for (int col = threadIdx.x; col < cols; col += kRangesThreads) {
    if (col_segments[col] < lowest || col_segments[col] > highest) continue;
    own_begin = min(own_begin, col);
    own_end = col + 1;
    ++own_seen;
  }
  atomicMin(&begin, own_begin);
  atomicMax(&end, own_end);
  atomicAdd(&seen, own_seen);
  __syncthreads();
  const bool dense = lowest == highest && seen == end - begin;
  return {begin, end, dense ? begin : cols, dense ? end : 0};
}

// One block: one granule of rows of one sequence.
template <class Mask>
__global__ void __launch_bounds__(kRangesThreads)
    attention_ranges_kernel(const Mask mask, int4* ranges) {
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
  if (range.empty()) range = {mask.cols, 0, mask.cols, 0};
  if (threadIdx.x == 0) {
    ranges[blockIdx.x] = make_int4(range.begin, range.end, range.dense_begin, range.dense_end);
  }
}

// One thread: one sequence. Widens ranges until neither end falls from one granule to the next.
static __global__ void attention_monotone_ranges_kernel(int4* ranges, int granules) {
  ranges += int64_t{blockIdx.x} * granules;
  for (int g = 1; g < granules; ++g) ranges[g].y = max(ranges[g].y, ranges[g - 1].y);
  for (int g = granules - 2; g >= 0; --g) ranges[g].x = min(ranges[g].x, ranges[g + 1].x);
}

// Fills the ranges of a mask that needs them.
template <class Mask>
cudaError_t launch_ranges(const Mask& mask, int64_t batch, int4* ranges, bool monotone,
                          cudaStream_t stream) {
  if constexpr (!Mask::kBand) return cudaSuccess;
  const int granules = static_cast<int>(attention_granules(mask.rows));
  const cudaError_t error = launch(attention_ranges_kernel<Mask>, batch * granules, kRangesThreads,
                                   0, stream, mask, ranges);
  if (error != cudaSuccess || !monotone) return error;
  return launch(attention_monotone_ranges_kernel, batch, 1, 0, stream, ranges, granules);
}

}  // namespace jaxkern
