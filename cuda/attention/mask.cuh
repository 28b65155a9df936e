// Which columns a row of logits sees. Forward, rows are queries and columns are keys; backward,
// whose tiles are transposed, rows are keys and columns are queries: the same mask, mirrored.
//
// Row r sees the columns from r - lower to r + upper, both moved by the sequence's shift, that lie
// inside the sequence and, with segments, carry the row's id. A kernel asks columns() for the range
// that a tile of rows has to visit and for the dense part of it that needs no test; apply() hides
// the rest of a tile of logits.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>

#include "cuda/attention/params.h"
#include "cuda/tile/reg.cuh"

namespace jaxkern {

// What instances are compiled for. kFull, kCausal: all sequences have the arrays' lengths. kBand:
// any lower and upper, lengths and segments; its ranges of columns come from ranges.cuh, because
// the producer warps that need them have too few registers to work them out.
enum class MaskKind { kFull, kCausal, kBand };

// Columns [begin, end) hold all that some row of a tile sees; all of its rows see [dense_begin,
// dense_end), which may be empty.
struct alignas(16) ColumnRange {
  int begin, end, dense_begin, dense_end;

  static __device__ __forceinline__ ColumnRange none(int cols) { return {cols, 0, cols, 0}; }

  __device__ __forceinline__ bool empty() const { return begin >= end; }
  // Of the rows of both.
  __device__ __forceinline__ ColumnRange join(const ColumnRange& other) const {
    return {min(begin, other.begin), max(end, other.end), max(dense_begin, other.dense_begin),
            min(dense_end, other.dense_end)};
  }
  // Of two masks on the same rows.
  __device__ __forceinline__ ColumnRange meet(const ColumnRange& other) const {
    return {max(begin, other.begin), min(end, other.end), max(dense_begin, other.dense_begin),
            min(dense_end, other.dense_end)};
  }
};

// Columns [begin, end).
struct ColumnRun {
  int begin, end;
};

// A granule of rows under a band mask, from ranges.cuh. With segments, runs[r] are the columns with
// row r's id if for each row they are one run, as in packed sequences.
struct GranuleColumns {
  ColumnRange range;
  ColumnRun runs[kAttentionGranule];

  __device__ __forceinline__ bool has_runs() const { return range.dense_end > 0; }
};
static_assert(sizeof(GranuleColumns) == kAttentionGranuleBytes);

// The mask of one sequence, segments aside.
template <bool kLower, bool kUpper, bool kTransposed>
struct SequenceMask {
  int rows, cols;   // of the sequence
  int first, last;  // row r sees columns r + first .. r + last

  // Of the rows from `row` up to `row_end`.
  __device__ __forceinline__ ColumnRange columns(int row, int row_end) const {
    if (row >= rows) return ColumnRange::none(cols);
    const int last_row = min(row_end, rows) - 1;
    // Backward, queries past the end have no weight whatever their logits are.
    constexpr int kPadding = kTransposed ? static_cast<int>(kAttentionPadding) : 1;
    ColumnRange range = {0, cols, 0, tile::ceil_div(cols, kPadding) * kPadding};
    if constexpr (kLower) {
      range.begin = max(0, row + first);
      range.dense_begin = max(0, last_row + first);
    }
    if constexpr (kUpper) {
      range.end = min(cols, last_row + last + 1);
      range.dense_end = min(range.dense_end, row + last + 1);
    }
    // Backward, keys past the end are hidden; forward, what queries past the end see is dropped.
    if (kTransposed && row_end > rows) range.dense_begin = range.dense_end;
    return range;
  }

  // Hides what is outside the sequence, the band or the runs of the thread's two rows.
  template <int kCols>
  __device__ __forceinline__ void apply(tile::RegisterTile<float, 64, kCols>& logits, int row0,
                                        int col0, const ColumnRun (&runs)[2]) const {
    col0 += tile::fragment_col(0);  // the thread's first column
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row0 + tile::fragment_row(i);
      const int begin = (kLower ? max(runs[i].begin, row + first) : runs[i].begin) - col0;
      int end = min(runs[i].end, cols);
      end = (kUpper ? min(end, row + last + 1) : end) - col0;
      if (kTransposed && row >= rows) end = 0;
#pragma unroll
      for (int j = 0; j < kCols / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          // Constants, not columns: one for each of the tile would need a register.
          const int offset = 8 * j + c;
          if (offset >= end || (kLower && offset < begin)) logits.at(j, i, c) = -INFINITY;
        }
      }
    }
  }
};

// The masks of all sequences, as a kernel gets them.
template <MaskKind kKind, bool kTransposed>
struct AttentionMask {
  static constexpr bool kBand = kKind == MaskKind::kBand;
  static constexpr bool kCausal = kKind == MaskKind::kCausal;
  static constexpr bool kLower = kBand || (kCausal && kTransposed);
  static constexpr bool kUpper = kBand || (kCausal && !kTransposed);
  using Sequence = SequenceMask<kLower, kUpper, kTransposed>;

  int rows, cols;    // of the arrays
  int lower, upper;  // at most rows + cols
  bool bottom_right;
  const int* row_lengths;          // (B), or null with col_lengths
  const int* col_lengths;          // (B)
  const int* row_segments;         // (B, rows), or null with col_segments
  const int* col_segments;         // (B, cols)
  const GranuleColumns* granules;  // (B, attention_granules(rows))

  static AttentionMask of(const AttentionShape& shape, const AttentionOptions& o,
                          const GranuleColumns* granules) {
    const auto pick = [](auto forward, auto backward) { return kTransposed ? backward : forward; };
    const int T = static_cast<int>(shape.T), S = static_cast<int>(shape.S);
    return {
        .rows = pick(T, S),
        .cols = pick(S, T),
        .lower = std::min(pick(o.left, o.right), T + S),
        .upper = std::min(pick(o.right, o.left), T + S),
        .bottom_right = o.bottom_right,
        .row_lengths = pick(o.query_lengths, o.key_lengths),
        .col_lengths = pick(o.key_lengths, o.query_lengths),
        .row_segments = pick(o.query_segments, o.key_segments),
        .col_segments = pick(o.key_segments, o.query_segments),
        .granules = granules,
    };
  }

  __device__ __forceinline__ Sequence sequence(int batch) const {
    int own_rows = rows, own_cols = cols;
    if (kBand && row_lengths != nullptr) {
      own_rows = row_lengths[batch];
      own_cols = col_lengths[batch];
    }
    const int shift = bottom_right ? own_cols - own_rows : 0;
    return {own_rows, own_cols, shift - lower, shift + upper};
  }

  // logits: 64 rows from `row0`, a whole granule, columns from `col0`. Hidden ones become -inf.
  template <int kCols>
  __device__ __forceinline__ void apply(tile::RegisterTile<float, 64, kCols>& logits, int batch,
                                        int row0, int col0) const {
    ColumnRun runs[2] = {{0, INT_MAX}, {0, INT_MAX}};
    if (kBand && row_segments != nullptr) {
      const auto& granule = granules_of(batch)[min(row0, rows - 1) / kAttentionGranule];
      if (granule.has_runs()) {
#pragma unroll
        for (int i = 0; i < 2; ++i) runs[i] = granule.runs[tile::fragment_row(i)];
      } else {
        hide_other_segments(logits, batch, row0, col0);
      }
    }
    sequence(batch).apply(logits, row0, col0, runs);
  }

  // Of kRows rows from `row` on, whole granules.
  template <int kRows>
  __device__ __forceinline__ ColumnRange columns(int batch, int row) const {
    static_assert(kRows % kAttentionGranule == 0, "ranges are kept for granules");
    if constexpr (!kBand) return sequence(batch).columns(row, row + kRows);
    const int count = tile::ceil_div(rows, kAttentionGranule);
    const GranuleColumns* own = granules_of(batch);
    if (row >= rows) return ColumnRange::none(cols);
    ColumnRange all = {cols, 0, 0, cols + static_cast<int>(kAttentionPadding)};
#pragma unroll 1
    for (int i = 0; i < kRows / kAttentionGranule; ++i) {
      const int g = row / kAttentionGranule + i;
      if (g >= count) break;
      all = all.join(own[g].range);
    }
    return all;
  }

 private:
  __device__ __forceinline__ const GranuleColumns* granules_of(int batch) const {
    return granules + int64_t{batch} * tile::ceil_div(rows, kAttentionGranule);
  }

  template <int kCols>
  __device__ __forceinline__ void hide_other_segments(tile::RegisterTile<float, 64, kCols>& logits,
                                                      int batch, int row0, int col0) const {
    // Rows and columns outside the arrays are hidden or dropped already: any id will do.
    const auto id_of = [&](const int* segments, int at, int count) {
      return at < count ? segments[int64_t{batch} * count + at] : 0;
    };
    const int own[2] = {id_of(row_segments, row0 + tile::fragment_row(0), rows),
                        id_of(row_segments, row0 + tile::fragment_row(1), rows)};
    // A bit for each logit: a loop that is unrolled in full would hold all ids in registers.
    static_assert(kCols <= 128, "a thread has 64 logits of a tile at most");
    uint64_t hidden = 0;
#pragma unroll 4
    for (int j = 0; j < kCols / 8; ++j) {
      uint32_t bits = 0;
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int id = id_of(col_segments, col0 + tile::fragment_col(j) + c, cols);
#pragma unroll
        for (int i = 0; i < 2; ++i) bits |= (id != own[i]) << (2 * i + c);
      }
      hidden = hidden >> 4 | uint64_t{bits} << 60;
    }
#pragma unroll
    for (int e = 0; e < kCols / 2; ++e) {
      if (hidden >> (64 - kCols / 2 + e) & 1) logits.data[e] = -INFINITY;
    }
  }
};

}  // namespace jaxkern
