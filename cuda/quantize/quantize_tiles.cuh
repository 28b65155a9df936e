// Quantisation in tiles of 128 x 128: everything but rows in their natural orientation alone.
//
// A block has one tile; x is read once and the scales of blocks come from what was read. A thread
// owns 8 neighbouring rows of 16 bytes (x: 8 columns of 16 bits or 4 of 32) and issues all eight
// loads at once; 1024 threads of an SM, 4 blocks or 2, have 128 KB of them under way. Sources with
// more to load have half the threads, twice the registers. Two matrices are cast one after the
// other.
//
//   natural       a thread's 16 bytes of a row become 8 or 4; 16 or 32 lanes fill 128 of a row
//   transposed    its 8 rows of a column become 8 bytes, which a tile in shared memory collects;
//                 then 8 lanes store 128 bytes of a transposed row, 16 each
#pragma once

#include "cuda/quantize/rms_norm_ahead.cuh"

namespace jaxkern::quantize {

inline constexpr int kTile = kScaleBlock;  // rows and columns

// How the threads of a block divide a tile. Those of a group have the same rows.
template <class T>
struct Threads {
  static constexpr int kRows = 8;  // of a thread
  static constexpr int kLanes = kGroupLanes<T>;
  static constexpr int kGroups = kTile / kRows;
  static constexpr int kThreads = kLanes * kGroups;
  static_assert(kLanes <= tile::kWarpSize, "the lanes of a group reduce by shuffles");

  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
};

template <class T>
using TilesAhead = Ahead<Threads<T>::kThreads, kTile>;

// Where a tile is, the thread's first element, and how many rows and columns of its patch exist.
template <class T>
struct Place : Threads<T> {
  int64_t tile_row, tile_col;  // in tiles
  int64_t row, col;
  int rows_inside, cols_inside;

  __device__ __forceinline__ Place(const QuantizeParams& p, unsigned tile) {
    const auto tiles_per_row = static_cast<unsigned>(tile::ceil_div(p.cols, kTile));
    tile_row = tile / tiles_per_row;
    tile_col = tile % tiles_per_row;
    row = tile_row * kTile + this->group * Threads<T>::kRows;
    col = tile_col * kTile + this->lane * kVec<T>;
    rows_inside = inside(row, p.rows);
    cols_inside = inside(col, p.cols);
  }
};

template <class Source, class T>
inline constexpr int kBlocksPerSm = Source::kThreadsPerSm / Threads<T>::kThreads;

template <class T>
using Patch = Load<T>[Threads<T>::kRows];  // what a thread owns of a tile

// Calls see(i, out) with the runs that the source makes in row i of the thread's patch.
template <class Source, class T, int kAtOnce, class See>
__device__ __forceinline__ void load(const QuantizeParams& p, const Place<T>& at, bool aligned,
                                     const See& see) {
  constexpr int kRows = Threads<T>::kRows, kInputs = Source::kInputs;
  // NOTE: unrolled, two matrices take more registers than there are, whatever is loaded at once.
#pragma unroll(Source::kOutputs == 2 ? 1 : kRows / kAtOnce)
  for (int first = 0; first < kRows; first += kAtOnce) {
    Load<T> in[kAtOnce][kInputs];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
        const auto* from = static_cast<const Bits<T>*>(p.inputs[k]) + at.row * p.cols + at.col;
        in[i][k].load(from + (first + i) * p.cols, first + i < at.rows_inside ? at.cols_inside : 0,
                      aligned);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      Load<T> out[Source::kOutputs];
      Source::template compute<T>(in[i], out);
      see(first + i, out);
    }
  }
}

// Where the patches of two matrices wait for their turn.
template <class T>
using TwoPatches = Load<T>[2][Threads<T>::kRows][Threads<T>::kThreads];
struct NoPatches {};
template <class Source, class T>
using Patches = std::conditional_t<Source::kOutputs == 2, TwoPatches<T>, NoPatches>;

// Calls use(o, x) with the thread's patch x of each matrix o that the source makes.
template <class Source, class T, int kAtOnce = Source::kRowsAtOnce, class Use>
__device__ __forceinline__ void for_each_patch(Patches<Source, T>& patches, const QuantizeParams& p,
                                               const Place<T>& at, bool aligned, const Use& use) {
  Patch<T> x;
  if constexpr (Source::kOutputs == 1) {
    load<Source, T, kAtOnce>(p, at, aligned, [&](int i, const auto& out) { x[i] = out[0]; });
    if constexpr (kNormalises<Source>) {
      if (p.progress != nullptr) TilesAhead<T>::wait(p, at.tile_row);
      const Weights<T> weights = load_weights<T>(p, at.col, at.cols_inside, aligned);
#pragma unroll
      for (int i = 0; i < Threads<T>::kRows; ++i) {
        normalise<T>(x[i], i < at.rows_inside ? p.rstd_in[at.row + i] : 0.0f, weights);
      }
    }
    use(0, x);
  } else {
    load<Source, T, kAtOnce>(p, at, aligned, [&](int i, const auto& out) {
      patches[0][i][threadIdx.x] = out[0];
      patches[1][i][threadIdx.x] = out[1];
    });
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      __syncthreads();  // what the first matrix used is free
#pragma unroll
      for (int i = 0; i < Threads<T>::kRows; ++i) x[i] = patches[o][i][threadIdx.x];
      use(o, x);
    }
  }
}

// The largest magnitudes in columns, in the words of a row.
template <class T>
using ColumnMax = typename Load<T>::Words;

template <class T>
__device__ __forceinline__ ColumnMax<T> column_max(const Patch<T>& x) {
  ColumnMax<T> most = {};
#pragma unroll
  for (const Load<T>& run : x) {
#pragma unroll
    for (int w = 0; w < kLoadBytes / 4; ++w) {
      most.data[w] = larger<T>(most.data[w], magnitudes<T>(run.words.data[w]));
    }
  }
  return most;
}

// The largest magnitudes in the rows of a group's threads, in each of them. A word has those of as
// many rows as it holds elements, so that two 16-bit rows go through one shuffle.
template <class T>
struct RowMax {
  uint32_t words[Threads<T>::kRows / kPerWord<T>];
};

template <class T>
__device__ __forceinline__ RowMax<T> row_max(const Patch<T>& x) {
  auto most_of = [](const Load<T>& run) {
    const auto& words = run.words.data;
    const uint32_t low = larger<T>(magnitudes<T>(words[0]), magnitudes<T>(words[1]));
    return larger<T>(low, larger<T>(magnitudes<T>(words[2]), magnitudes<T>(words[3])));
  };
  RowMax<T> most;
#pragma unroll
  for (int w = 0; w < Threads<T>::kRows / kPerWord<T>; ++w) {
    if constexpr (kPerWord<T> == 1) {
      most.words[w] = most_of(x[w]);
    } else {
      const uint32_t even = most_of(x[2 * w]), odd = most_of(x[2 * w + 1]);
      most.words[w] = larger<T>(__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632));
    }
#pragma unroll
    for (int offset = Threads<T>::kLanes / 2; offset > 0; offset /= 2) {
      most.words[w] = larger<T>(most.words[w], __shfl_xor_sync(0xffffffffu, most.words[w], offset));
    }
  }
  return most;
}

// What the block is for: the tile with its number, or what its turn says.
template <class Source, class T>
__device__ __forceinline__ typename TilesAhead<T>::Turn turn_of_block(const QuantizeParams& p) {
  if constexpr (kNormalises<Source>) {
    if (p.progress != nullptr) return TilesAhead<T>::take(p);
  }
  return {false, blockIdx.x};
}

// Leaves float32 bits of the largest magnitude of every row, then of every column, in the
// workspace of each matrix, which starts as zeros.
template <class Source, class T>
__global__ void __launch_bounds__(Threads<T>::kThreads, kBlocksPerSm<Source, T>)
    quantize_amax_kernel(const QuantizeParams p) {
  constexpr int kGroups = Threads<T>::kGroups, kOutputs = Source::kOutputs;
  constexpr int kWords = kTile / kPerWord<T>;  // of the maxima of the rows of a tile
  __shared__ ColumnMax<T> columns[kOutputs][kGroups][Threads<T>::kLanes];
  __shared__ RowMax<T> rows[kOutputs][kGroups];
  static_assert(sizeof(rows[0]) == sizeof(uint32_t) * kWords);
  static_assert(2 * kWords <= Threads<T>::kThreads);

  extern __shared__ __align__(16) unsigned char shared[];
  auto& patches = *reinterpret_cast<Patches<Source, T>*>(shared);
  const bool aligned = inputs_aligned<Source, T>(p);
  const auto turn = turn_of_block<Source, T>(p);
  if (turn.is_unit) return TilesAhead<T>::template work<T>(p, turn.index, aligned);
  const Place<T> at(p, turn.index);
  for_each_patch<Source, T>(patches, p, at, aligned, [&](int o, const Patch<T>& x) {
    columns[o][at.group][at.lane] = column_max<T>(x);
    const RowMax<T> most = row_max<T>(x);
    if (at.lane == 0) rows[o][at.group] = most;
  });
  __syncthreads();

  const int word = threadIdx.x % kWords;
  auto raise = [&](int32_t* amax, int64_t first, int64_t size, uint32_t magnitudes) {
#pragma unroll
    for (int e = 0; e < kPerWord<T>; ++e) {
      const int64_t i = first + word * kPerWord<T> + e;
      if (i < size) atomicMax(amax + i, static_cast<int32_t>(amax_bits<T>(magnitudes, e)));
    }
  };
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    int32_t* workspace = p.outputs[o].workspace;
    if (threadIdx.x < kWords) {
      constexpr int kWordsPerGroup = kWords / kGroups;
      raise(workspace, at.tile_row * kTile, p.rows,
            rows[o][word / kWordsPerGroup].words[word % kWordsPerGroup]);
    } else if (threadIdx.x < 2 * kWords) {
      uint32_t most = 0;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        most = larger<T>(most, columns[o][g][word / 4].data[word % 4]);
      }
      raise(workspace + p.rows, at.tile_col * kTile, p.cols, most);
    }
  }
}

// to[first + i] = scales[i], up to to[size].
template <int kCount>
__device__ __forceinline__ void store_scales(float* to, int64_t first, int64_t size,
                                             const uint32_t (&scales)[kCount]) {
  using Four = Run<uint32_t, 4>;
  const bool aligned = Four::aligned(to, size);
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const Four four = {{scales[i], scales[i + 1], scales[i + 2], scales[i + 3]}};
    four.store(reinterpret_cast<uint32_t*>(to) + first + i, inside(first + i, size), aligned);
  }
}

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

template <class T>
struct TileMemory {
  TransposedTile<T> transposed;
  ColumnMax<T> columns[Threads<T>::kGroups][Threads<T>::kLanes];
  uint32_t scratch[tile::kMaxWarps];
};

// Scales and casts a tile. kAligned: every array is aligned for runs, so that the code for others
// need not be there.
template <class T, class F, Scaling kScaling, bool kAligned>
__device__ __forceinline__ void quantize_tile(const Patch<T>& x, const Place<T>& at,
                                              const QuantizeParams& p, const QuantizedMatrix& to,
                                              TileMemory<T>& memory) {
  constexpr int kRows = Threads<T>::kRows, kGroups = Threads<T>::kGroups;
  Scale one;  // of all of the tile
  if constexpr (kScaling == Scaling::kTensor) one = {0, __frcp_rn(*p.scale_in)};
  if constexpr (kScaling == Scaling::kRow) {
    const int64_t row = at.tile_row * kTile + threadIdx.x, col = at.tile_col * kTile + threadIdx.x;
    const bool mine = threadIdx.x < kTile;
    if (mine && to.values != nullptr && at.tile_col == 0 && row < p.rows) {
      to.scale[row] = __uint_as_float(scale_of<F>(to.workspace[row]).bits);
    }
    if (mine && to.values_t != nullptr && at.tile_row == 0 && col < p.cols) {
      to.scale_t[col] = __uint_as_float(scale_of<F>(to.workspace[p.rows + col]).bits);
    }
  }
  if constexpr (kScaling == Scaling::kBlock1x128) {
    if (to.values_t != nullptr) memory.columns[at.group][at.lane] = column_max<T>(x);
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

  if (to.values != nullptr) {
    RowMax<T> most;
    if constexpr (kScaling == Scaling::kBlock1x128) most = row_max<T>(x);
    using Out = Run<uint8_t, kVec<T>>;
    const bool aligned = kAligned || Out::aligned(to.values, p.cols);
    uint8_t* values = static_cast<uint8_t*>(to.values) + at.row * p.cols + at.col;
    uint32_t scales[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const bool exists = i < at.rows_inside;
      Scale scale = one;
      if constexpr (kScaling == Scaling::kRow) {
        scale = scale_of<F>(exists ? to.workspace[at.row + i] : 0);
      }
      if constexpr (kScaling == Scaling::kBlock1x128) {
        scale = scale_of<F>(amax_bits<T>(most.words[i / kPerWord<T>], i % kPerWord<T>));
      }
      scales[i] = scale.bits;
      cast<F, T>(x[i], scale.inverse)
          .store(values + i * p.cols, exists ? at.cols_inside : 0, aligned);
    }
    if (kScaling == Scaling::kBlock1x128 && at.lane == 0) {
      const int64_t pitch = scale_pitch(p.rows);
      store_scales(to.scale + at.tile_col * pitch, at.row, pitch, scales);
    }
  }

  if (to.values_t == nullptr) return;
  ColumnMax<T> most = {};
  if constexpr (kScaling == Scaling::kBlock1x128) {
    __syncthreads();  // columns are written
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const ColumnMax<T> others = memory.columns[g][at.lane];
#pragma unroll
      for (int w = 0; w < kLoadBytes / 4; ++w) {
        most.data[w] = larger<T>(most.data[w], others.data[w]);
      }
    }
  }
  uint32_t scales[kVec<T>];
#pragma unroll
  for (int e = 0; e < kVec<T>; ++e) {
    Scale scale = one;
    if constexpr (kScaling == Scaling::kRow) {
      scale = scale_of<F>(e < at.cols_inside ? to.workspace[p.rows + at.col + e] : 0);
    }
    if constexpr (kScaling == Scaling::kBlock1x128) {
      scale = scale_of<F>(amax_bits<T>(most.data[e / kPerWord<T>], e % kPerWord<T>));
    }
    scales[e] = scale.bits;
    memory.transposed.write(at, e, cast_column<F, T>(x, e, scale.inverse));
  }
  if (kScaling == Scaling::kBlock1x128 && at.group == 0) {
    const int64_t pitch = scale_pitch(p.cols);
    store_scales(to.scale_t + at.tile_row * pitch, at.col, pitch, scales);
  }
  __syncthreads();  // transposed is written

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

template <class Source, class T>
struct Memory {
  TileMemory<T> tile;
  Patches<Source, T> patches;
};

template <class Source, class T, class F, Scaling kScaling, bool kAligned>
__global__ void __launch_bounds__(Threads<T>::kThreads, kBlocksPerSm<Source, T>)
    quantize_tiles_kernel(const QuantizeParams p) {
  extern __shared__ __align__(16) unsigned char shared[];
  auto& memory = *reinterpret_cast<Memory<Source, T>*>(shared);
  const bool aligned = kAligned || inputs_aligned<Source, T>(p);
  const auto turn = turn_of_block<Source, T>(p);
  if (turn.is_unit) return TilesAhead<T>::template work<T>(p, turn.index, aligned);
  // Backwards after quantize_amax_kernel: L2 still has what that read last.
  constexpr bool kBackwards = kScaling == Scaling::kRow;
  const Place<T> at(p, kBackwards ? gridDim.x - 1 - blockIdx.x : turn.index);
  // Loads of single elements take registers: fewer at once.
  constexpr int kAtOnce = Source::kRowsAtOnce / (kAligned ? 1 : Source::kOutputs);
  for_each_patch<Source, T, kAtOnce>(memory.patches, p, at, aligned, [&](int o, const Patch<T>& x) {
    quantize_tile<T, F, kScaling, kAligned>(x, at, p, p.outputs[o], memory.tile);
  });
}

}  // namespace jaxkern::quantize
