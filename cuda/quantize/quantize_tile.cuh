// Scales and casts a tile whose patches are in registers.
//
//   natural       a thread's 16 bytes of a row become 8 or 4; 16 or 32 lanes fill 128 of a row
//   transposed    its 8 rows of a column become 8 bytes, which a tile in shared memory collects;
//                 then 8 lanes store 128 bytes of a transposed row, 16 each
#pragma once

#include "cuda/quantize/patch.cuh"

namespace jaxkern::quantize {

// NOTE: with more threads, RmsNorm of float16, or of what is not aligned, spills registers.
template <class Source, class T, bool kAligned = true>
inline constexpr int kBlocksPerSm =
    (kNormalises<Source> && (!kAligned || std::is_same_v<T, tile::f16>) ? 512
                                                                        : Source::kThreadsPerSm) /
    Threads<T>::kThreads;

// Eight rows of a column, cast.
template <class F, class T>
__device__ __forceinline__ Run<uint8_t, 8> cast_column(const Patch<T>& x, int e, float inverse) {
  Run<uint8_t, 8> y;
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    y.words.data[i / 4] =
        tile::pack<F>(element<T>(x[i], e) * inverse, element<T>(x[i + 1], e) * inverse,
                      element<T>(x[i + 2], e) * inverse, element<T>(x[i + 3], e) * inverse);
  }
  return y;
}

// A tile of transposed values: 128 bytes, those of one column of x, in a row.
//
// Threads write 8 bytes, of which a half-warp's 16 must lie in different pairs of banks. Its lanes
// have the same rows of x and columns kVec apart: without more, all would hit one pair. So the
// eight bytes of group g lie at position g ^ (c / kVec % 16) of row c, and c / kVec % 16 is another
// number in each of the 16 lanes. Reading 16 bytes, 8 lanes take all of a row, so every bank once;
// what they read are neighbours, in reverse order where the number is odd. It is the same in a
// whole warp: this costs no divergence.
template <class T>
class TransposedTile {
 public:
  // Column e of the thread's.
  __device__ __forceinline__ void write(const Place<T>& at, int e, const Run<uint8_t, 8>& run) {
    const int c = at.lane * kVec<T> + e;
    const int position = at.group ^ (at.lane % 16);
    reinterpret_cast<Run<uint8_t, 8>::Words*>(rows_[c])[position] = run.words;
  }

  // Bytes 16 * chunk and up of row c.
  __device__ __forceinline__ Run<uint8_t, 16> read(int c, int chunk) const {
    const int turn = c / kVec<T> % 16;
    const Run<uint8_t, 16>::Words found = rows_[c][chunk ^ (turn / 2)];
    if (turn % 2 == 0) return {found};
    return {{found.data[2], found.data[3], found.data[0], found.data[1]}};
  }

 private:
  Run<uint8_t, 16>::Words rows_[kTile][kTile / 16];
};

// Raises the maxima of a tile's columns.
template <class T>
__device__ __forceinline__ void raise_column(int32_t* amax, int column, const QuantizeParams& p,
                                             const Place<T>& at, const TileColumnMax<T>& columns) {
  const int64_t col = at.tile_col * kTile + column;
  if (col < p.cols) atomicMax(amax + col, static_cast<int32_t>(columns.read(column)));
}

// The row whose maximum RowMax gives this lane, and whether there is one.
template <class T>
__device__ __forceinline__ int64_t row_of_lane(const Place<T>& at) {
  return at.row + RowMax<T>::row(at.lane);
}
template <class T>
__device__ __forceinline__ bool has_row(const Place<T>& at) {
  return RowMax<T>::row(at.lane) < min(at.rows_inside, Threads<T>::kRows);
}

// kRow: the maxima of rows, behind those of columns.
__device__ __forceinline__ int32_t* row_maxima(const QuantizeParams& p, const QuantizedMatrix& to) {
  return to.workspace + p.cols;
}

template <class T>
struct TileMemory {
  union {  // the maxima are read before the values are written
    TileColumnMax<T> columns;
    TransposedTile<T> transposed;
  };
  alignas(16) float inverses[kTile];  // of the scales of columns
  uint32_t scratch[tile::kMaxWarps];
};

// Casts a tile's columns by memory.inverses, which are visible, or by `one`. What the block had in
// memory.transposed is free.
template <class T, class F, bool kOfColumns>
__device__ __forceinline__ void cast_transposed(const Patch<T>& x, const Place<T>& at, float one,
                                                TileMemory<T>& memory) {
#pragma unroll
  for (int e = 0; e < kVec<T>; ++e) {
    const float inverse = kOfColumns ? memory.inverses[at.lane * kVec<T> + e] : one;
    memory.transposed.write(at, e, cast_column<F, T>(x, e, inverse));
  }
}

// Stores them, once they are visible.
template <class T, bool kAligned>
__device__ __forceinline__ void store_transposed(const Place<T>& at, const QuantizeParams& p,
                                                 const QuantizedMatrix& to,
                                                 const TileMemory<T>& memory) {
  constexpr int kChunks = kTile / 16;
  const int chunk = threadIdx.x % kChunks;
  const bool aligned = kAligned || Run<uint8_t, 16>::aligned(to.values_t, p.rows);
  const int64_t first = at.tile_row * kTile + 16 * chunk;
#pragma unroll
  for (int c = threadIdx.x / kChunks; c < kTile; c += Threads<T>::kThreads / kChunks) {
    const int64_t col = at.tile_col * kTile + c;
    uint8_t* values = static_cast<uint8_t*>(to.values_t) + col * p.rows + first;
    memory.transposed.read(c, chunk).store(values, col < p.cols ? inside(first, p.rows) : 0,
                                           aligned);
  }
}

// The scale of a column of tile `at`, whose largest magnitude is known, and in the first tile of
// the column scale_t too.
template <class T, class F>
__device__ __forceinline__ Scale scale_of_column(int column, const Place<T>& at,
                                                 const QuantizeParams& p,
                                                 const QuantizedMatrix& to) {
  const int64_t col = at.tile_col * kTile + column;
  const bool exists = col < p.cols;
  const Scale scale = scale_of<F>(exists ? to.workspace[col] : 0);
  if (exists && at.tile_row == 0) to.scale_t[col] = __uint_as_float(scale.bits);
  return scale;
}

// The transposed values of a tile, and the scales of its columns where they are not `one`. What the
// block had in memory before is free, and what it needs is visible.
template <class T, class F, Scaling kScaling, bool kAligned>
__device__ __forceinline__ void quantize_transposed(const Patch<T>& x, const Place<T>& at,
                                                    const Scale& one, const QuantizeParams& p,
                                                    const QuantizedMatrix& to,
                                                    TileMemory<T>& memory) {
  constexpr bool kOfColumns = kScaling == Scaling::kRow || kScaling == Scaling::kBlock1x128;
  if constexpr (kOfColumns) {
    if (threadIdx.x < kTile) {
      Scale scale;
      if constexpr (kScaling == Scaling::kRow) {
        scale = scale_of_column<T, F>(threadIdx.x, at, p, to);
      } else {
        const int64_t col = at.tile_col * kTile + threadIdx.x;
        scale = scale_of<F>(memory.columns.read(threadIdx.x));
        float* scales = to.scale_t + at.tile_row * scale_pitch(p.cols);
        if (col < p.cols) scales[col] = __uint_as_float(scale.bits);
      }
      memory.inverses[threadIdx.x] = scale.inverse;
    }
    __syncthreads();  // inverses are written, columns are read
  }
  cast_transposed<T, F, kOfColumns>(x, at, one.inverse, memory);
  __syncthreads();  // transposed is written
  store_transposed<T, kAligned>(at, p, to, memory);
}

// The values of a tile, and the scales of its rows where they are not `one`.
template <class T, class F, Scaling kScaling, bool kAligned>
__device__ __forceinline__ void quantize_natural(const Patch<T>& x, const Place<T>& at,
                                                 const Scale& one, const QuantizeParams& p,
                                                 const QuantizedMatrix& to) {
  constexpr bool kOfRows = kScaling == Scaling::kRow || kScaling == Scaling::kBlock1x128;
  using Out = Run<uint8_t, kVec<T>>;
  const bool aligned = kAligned || Out::aligned(to.values, p.cols);
  uint8_t* values = static_cast<uint8_t*>(to.values) + at.row * p.cols + at.col;
  Scale mine = one;  // of the row that this lane has
  if constexpr (kOfRows) {
    const int64_t row = row_of_lane(at);
    float* scale = to.scale + row;
    if constexpr (kScaling == Scaling::kRow) {
      mine = scale_of<F>(has_row(at) ? row_maxima(p, to)[row] : 0);
    } else {
      mine = scale_of<F>(RowMax<T>(x, at).amax);
      scale += at.tile_col * scale_pitch(p.rows);
    }
    if (has_row(at) && (kScaling != Scaling::kRow || at.tile_col == 0)) {
      *scale = __uint_as_float(mine.bits);
    }
  }
#pragma unroll
  for (int i = 0; i < Threads<T>::kRows; ++i) {
    float inverse = mine.inverse;
    if constexpr (kOfRows) {
      inverse = __shfl_sync(0xffffffffu, inverse, RowMax<T>::lane(i), Threads<T>::kLanes);
    }
    cast<F, T>(x[i], inverse)
        .store(values + i * p.cols, i < at.rows_inside ? at.cols_inside : 0, aligned);
  }
}

// kAligned: every array is aligned for runs, so that the code for others need not be there. kRow:
// maxima are known.
//
// NOTE: kComputed finds columns' maxima where nobody wants them, too. With a branch there the
// compiler spreads loads among what is computed from the first, and SwiGLU takes a quarter longer
// (H200).
template <class T, class F, Scaling kScaling, bool kAligned, bool kComputed = false>
__device__ __forceinline__ void quantize_tile(const Patch<T>& x, const Place<T>& at,
                                              const QuantizeParams& p, const QuantizedMatrix& to,
                                              TileMemory<T>& memory) {
  Scale one = {};  // of all of the tile
  if constexpr (kScaling == Scaling::kTensor) one = {0, __frcp_rn(*p.scale_in)};
  if constexpr (kScaling == Scaling::kBlock1x128) {
    if (kComputed || to.values_t != nullptr) {
      memory.columns.write(x, at);
      __syncthreads();
    }
  }
  if constexpr (kScaling == Scaling::kBlock128x128) {
    uint32_t amax = 0;
    for (const uint32_t word : column_max<T>(x).data) amax = max(amax, largest<T>(word));
    one = scale_of<F>(tile::row_max(amax, memory.scratch));
    if (threadIdx.x == 0) {
      const int64_t row_tiles = tile::ceil_div(p.rows, kTile);
      const int64_t col_tiles = tile::ceil_div(p.cols, kTile);
      const float scale = __uint_as_float(one.bits);
      if (to.values != nullptr) to.scale[at.tile_row * col_tiles + at.tile_col] = scale;
      if (to.values_t != nullptr) to.scale_t[at.tile_col * row_tiles + at.tile_row] = scale;
    }
  }
  if (to.values != nullptr) quantize_natural<T, F, kScaling, kAligned>(x, at, one, p, to);
  if (to.values_t != nullptr) {
    quantize_transposed<T, F, kScaling, kAligned>(x, at, one, p, to, memory);
  }
}

}  // namespace jaxkern::quantize
