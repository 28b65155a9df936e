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

// All columns with this id, of which all are dense if they are one run; all threads of the block
// call.
__device__ inline ColumnRange segment_columns(const int* col_segments, int cols, int id) {
  __shared__ int begin, end, seen;
  __syncthreads();
  if (threadIdx.x == 0) begin = cols, end = 0, seen = 0;
  __syncthreads();
  int own_begin = cols, own_end = 0, own_seen = 0;
#pragma unroll 8
  for (int col = threadIdx.x; col < cols; col += kRangesThreads) {
    const bool mine = col_segments[col] == id;
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
  const bool dense = seen == end - begin;
  return {begin, end, dense ? begin : cols, dense ? end : 0};
}

// The columns with the ids of the `rows` rows from segments[0], and the run of each row. Rows with
// the same id that follow each other are looked up once.
__device__ inline ColumnRange granule_columns(const int* row_segments, int rows,
                                              const int* col_segments, int cols, ColumnRun* runs) {
  __shared__ unsigned first_of_id[kAttentionGranule / tile::kWarpSize];
  const int own = threadIdx.x;
  if (own < kAttentionGranule) {
    const bool first = own < rows && (own == 0 || row_segments[own] != row_segments[own - 1]);
    const unsigned all = __ballot_sync(0xffffffffu, first);
    if (own % tile::kWarpSize == 0) first_of_id[own / tile::kWarpSize] = all;
  }
  __syncthreads();
  uint64_t left = uint64_t{first_of_id[1]} << 32 | first_of_id[0];
  ColumnRange range = {cols, 0, 0, cols};
  ColumnRun run = {0, 0};  // of rows past the end
  while (left != 0) {
    const int row = __ffsll(left) - 1;
    left &= left - 1;
    const ColumnRange of_id = segment_columns(col_segments, cols, row_segments[row]);
    range = range.join(of_id);
    if (own >= row && own < rows) run = {of_id.begin, of_id.end};
  }
  if (own < kAttentionGranule) runs[own] = run;
  return range;
}

// One block: one granule of rows of one sequence.
template <class Mask>
__global__ void __launch_bounds__(kRangesThreads)
    attention_ranges_kernel(const Mask mask, GranuleColumns* granules) {
  static_assert(kAttentionGranule == 2 * tile::kWarpSize, "a bit for each row");
  const int count = tile::ceil_div(mask.rows, kAttentionGranule);
  const int batch = blockIdx.x / count, row = blockIdx.x % count * kAttentionGranule;
  const auto sequence = mask.sequence(batch);
  GranuleColumns& granule = granules[blockIdx.x];
  ColumnRange range = sequence.columns(row, row + kAttentionGranule);
  if (mask.row_segments != nullptr) {
    range = range.meet(granule_columns(mask.row_segments + int64_t{batch} * mask.rows + row,
                                       min(kAttentionGranule, sequence.rows - row),
                                       mask.col_segments + int64_t{batch} * mask.cols,
                                       sequence.cols, granule.runs));
  }
  if (range.empty()) range = ColumnRange::none(mask.cols);
  if (threadIdx.x == 0) granule.range = range;
}

// One thread: one sequence. Widens ranges until neither end falls from one granule to the next.
static __global__ void attention_monotone_ranges_kernel(GranuleColumns* granules, int count) {
  granules += int64_t{blockIdx.x} * count;
  for (int g = 1; g < count; ++g) {
    granules[g].range.end = max(granules[g].range.end, granules[g - 1].range.end);
  }
  for (int g = count - 2; g >= 0; --g) {
    granules[g].range.begin = min(granules[g].range.begin, granules[g + 1].range.begin);
  }
}

// Fills the ranges of a mask that needs them.
template <class Mask>
cudaError_t launch_ranges(const Mask& mask, int64_t batch, GranuleColumns* granules, bool monotone,
                          cudaStream_t stream) {
  if constexpr (!Mask::kBand) return cudaSuccess;
  const int count = static_cast<int>(attention_granules(mask.rows));
  const cudaError_t error = launch(attention_ranges_kernel<Mask>, batch * count, kRangesThreads, 0,
                                   stream, mask, granules);
  if (error != cudaSuccess || !monotone) return error;
  return launch(attention_monotone_ranges_kernel, batch, 1, 0, stream, granules, count);
}

}  // namespace jaxkern
