// A thread's part of a tile of 128 x 128, and how it comes from memory.
//
// A thread owns 8 neighbouring rows of 16 bytes (8 columns of 16 bits or 4 of 32).
#pragma once

#include "cuda/quantize/rms_norm.cuh"
#include "cuda/tile/ptx/async.cuh"

namespace jaxkern::quantize {

inline constexpr int kTile = kScaleBlock;  // rows and columns

// How the threads of a block divide a tile. Those of a group have the same rows.
template <class T>
struct Threads {
  static constexpr int kRows = 8;  // of a thread
  static constexpr int kLanes = kGroupLanes<T>;
  static constexpr int kGroups = kTile / kRows;
  static constexpr int kThreads = kLanes * kGroups;
  static constexpr int kWarps = kThreads / tile::kWarpSize;
  static_assert(kLanes <= tile::kWarpSize, "the lanes of a group reduce by shuffles");

  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
};

// Where a tile is, the thread's first element, and how many rows and columns of its patch exist.
template <class T>
struct Place : Threads<T> {
  int64_t tile_row, tile_col;  // in tiles
  int64_t row, col;
  int rows_inside, cols_inside;

  __device__ __forceinline__ Place(const QuantizeParams& p, unsigned tile_row, unsigned tile_col)
      : tile_row(tile_row), tile_col(tile_col) {
    row = this->tile_row * kTile + this->group * Threads<T>::kRows;
    col = this->tile_col * kTile + this->lane * kVec<T>;
    rows_inside = inside(row, p.rows);
    cols_inside = inside(col, p.cols);
  }
};

template <class T>
using Patch = Load<T>[Threads<T>::kRows];

// A patch of every thread in shared memory. No other thread reads it: there is nothing to
// synchronise.
template <class T>
class StagedPatch {
  static constexpr int kRows = Threads<T>::kRows;

 public:
  // Starts to load x, for which no registers wait. What was there may be overwritten.
  template <bool kAligned>
  __device__ __forceinline__ void start(const QuantizeParams& p, const Place<T>& at) {
    const auto* from = static_cast<const Bits<T>*>(p.inputs[0]) + at.row * p.cols + at.col;
    // Loads of single elements take registers: not more than a run of them at a time.
#pragma unroll(kAligned ? kRows : 1)
    for (int i = 0; i < kRows; ++i) {
      const int count = i < at.rows_inside ? at.cols_inside : 0;
      if constexpr (kAligned) {
        tile::ptx::copy_async_16(&runs_[i][threadIdx.x], from + i * p.cols, count > 0);
      } else {
        Load<T> run;
        run.load(from + i * p.cols, count, false);
        runs_[i][threadIdx.x] = run;
      }
    }
  }
  // What was started, once its copies are there, or written.
  __device__ __forceinline__ void read(Patch<T>& x) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] = runs_[i][threadIdx.x];
  }
  __device__ __forceinline__ void write(int row, const Load<T>& run) {
    runs_[row][threadIdx.x] = run;
  }

 private:
  Load<T> runs_[kRows][Threads<T>::kThreads];
};

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
struct NoPatches {};
template <class Source, class T>
using Patches = std::conditional_t<Source::kOutputs == 2, StagedPatch<T>[2], NoPatches>;

// Rows of a patch, normalised by p.rstd_in, of which each lane loads one.
template <class T>
__device__ __forceinline__ void normalise(Patch<T>& x, const QuantizeParams& p, const Place<T>& at,
                                          bool aligned) {
  const float mine =
      at.lane < min(at.rows_inside, Threads<T>::kRows) ? p.rstd_in[at.row + at.lane] : 0.0f;
  const Weights<T> weights = load_weights<T>(p, at.col, at.cols_inside, aligned);
#pragma unroll
  for (int i = 0; i < Threads<T>::kRows; ++i) {
    normalise<T>(x[i], __shfl_sync(0xffffffffu, mine, i, Threads<T>::kLanes), weights);
  }
}

// Calls use(o, x) with the thread's patch x of each matrix o that the source makes.
template <class Source, class T, int kAtOnce = Source::kRowsAtOnce, class Use>
__device__ __forceinline__ void for_each_patch(Patches<Source, T>& patches, const QuantizeParams& p,
                                               const Place<T>& at, bool aligned, const Use& use) {
  Patch<T> x;
  if constexpr (Source::kOutputs == 1) {
    load<Source, T, kAtOnce>(p, at, aligned, [&](int i, const auto& out) { x[i] = out[0]; });
    if constexpr (kNormalises<Source>) normalise<T>(x, p, at, aligned);
    use(0, x);
  } else {
    load<Source, T, kAtOnce>(p, at, aligned, [&](int i, const auto& out) {
      patches[0].write(i, out[0]);
      patches[1].write(i, out[1]);
    });
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      __syncthreads();  // what the first matrix used is free
      patches[o].read(x);
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

// The largest magnitudes in the columns of a tile, by way of shared memory.
template <class T>
class TileColumnMax {
 public:
  // Of a thread's patch. Before anyone reads, the block synchronises.
  __device__ __forceinline__ void write(const Patch<T>& x, const Place<T>& at) {
    ColumnMax<T> most = column_max<T>(x);
    if constexpr (Threads<T>::kLanes < tile::kWarpSize) {  // two groups
#pragma unroll
      for (uint32_t& word : most.data) {
        word = larger<T>(word, __shfl_xor_sync(0xffffffffu, word, Threads<T>::kLanes));
      }
    }
    if (threadIdx.x % tile::kWarpSize < Threads<T>::kLanes) {
      words_[threadIdx.x / tile::kWarpSize][at.lane] = most;
    }
  }
  // amax_bits of a column.
  __device__ __forceinline__ uint32_t read(int column) const {
    const int word = column / kPerWord<T>;
    uint32_t most = 0;
#pragma unroll
    for (int warp = 0; warp < Threads<T>::kWarps; ++warp) {
      most = larger<T>(most, words_[warp][word / 4].data[word % 4]);
    }
    return amax_bits<T>(most, column % kPerWord<T>);
  }

 private:
  ColumnMax<T> words_[Threads<T>::kWarps][Threads<T>::kLanes];
};

// The largest magnitudes in the rows of a group, of which each lane has one, or none.
template <class T>
struct RowMax {
  static constexpr int kLanesPerWord = 4;

  uint32_t amax;  // bits

  // The row of the patch whose maximum a lane of the group has; kRows or more if none.
  static __device__ __forceinline__ int row(int lane) {
    const int e = lane % kLanesPerWord;
    return e < kPerWord<T> ? lane / kLanesPerWord * kPerWord<T> + e : Threads<T>::kRows;
  }
  static __device__ constexpr int lane(int row) {
    return row / kPerWord<T> * kLanesPerWord + row % kPerWord<T>;
  }

  // A word has the maxima of as many rows as it holds elements, so that two 16-bit rows go through
  // one shuffle. While a lane has several words, it gives half of them to another one for half of
  // that one's.
  __device__ __forceinline__ RowMax(const Patch<T>& x, const Place<T>& at) {
    constexpr int kWords = Threads<T>::kRows / kPerWord<T>;
    static_assert(Threads<T>::kLanes == kWords * kLanesPerWord);
    uint32_t words[kWords];
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if constexpr (kPerWord<T> == 1) {
        words[w] = most_of(x[w]);
      } else {
        const uint32_t even = most_of(x[2 * w]), odd = most_of(x[2 * w + 1]);
        words[w] = larger<T>(__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632));
      }
    }
    int offset = Threads<T>::kLanes / 2;
#pragma unroll
    for (int half = kWords / 2; half > 0; half /= 2, offset /= 2) {
      const bool upper = at.lane & offset;
#pragma unroll
      for (int w = 0; w < half; ++w) {
        const uint32_t keep = upper ? words[w + half] : words[w];
        const uint32_t give = upper ? words[w] : words[w + half];
        words[w] = larger<T>(keep, __shfl_xor_sync(0xffffffffu, give, offset));
      }
    }
#pragma unroll
    for (; offset > 0; offset /= 2) {
      words[0] = larger<T>(words[0], __shfl_xor_sync(0xffffffffu, words[0], offset));
    }
    amax = amax_bits<T>(words[0], at.lane % kPerWord<T>);
  }

 private:
  static __device__ __forceinline__ uint32_t most_of(const Load<T>& run) {
    const auto& words = run.words.data;
    const uint32_t low = larger<T>(magnitudes<T>(words[0]), magnitudes<T>(words[1]));
    return larger<T>(low, larger<T>(magnitudes<T>(words[2]), magnitudes<T>(words[3])));
  }
};

}  // namespace jaxkern::quantize
