// A thread's part of a tile of 128 x 128, and how it comes from memory.
//
// A thread owns 8 neighbouring rows of 16 bytes (8 columns of 16 bits or 4 of 32). Its next patch
// is on the way to shared memory while it works on this one: no registers wait for it, and no other
// thread reads it, so that there is nothing to synchronise.
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

// The inputs of the next patch of every thread.
template <class Source, class T>
class StagedPatches {
  static constexpr int kRows = Threads<T>::kRows, kInputs = Source::kInputs;

 public:
  // Starts to load. What the thread read before it may be overwritten. kAligned: runs are.
  template <bool kAligned>
  __device__ __forceinline__ void start(const QuantizeParams& p, const Place<T>& at) {
    const int64_t first = at.row * p.cols + at.col;
    // Loads of single elements take registers: not more than a run of them at a time.
#pragma unroll(kAligned ? kRows : 1)
    for (int i = 0; i < kRows; ++i) {
      const int count = i < at.rows_inside ? at.cols_inside : 0;
#pragma unroll
      for (int k = 0; k < kInputs; ++k) {
        const auto* from = static_cast<const Bits<T>*>(p.inputs[k]) + first + i * p.cols;
        if constexpr (kAligned) {
          tile::ptx::copy_async_16(&runs_[k][i][threadIdx.x], from, count > 0);
        } else {
          Load<T> run;
          run.load(from, count, false);
          runs_[k][i][threadIdx.x] = run;
        }
      }
    }
  }

  // What the source makes of the patch that was started last.
  __device__ __forceinline__ void read(Patch<T> (&x)[Source::kOutputs]) const {
    tile::ptx::wait_copies_async();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      Load<T> in[kInputs], out[Source::kOutputs];
#pragma unroll
      for (int k = 0; k < kInputs; ++k) in[k] = runs_[k][i][threadIdx.x];
      Source::template compute<T>(in, out);
#pragma unroll
      for (int o = 0; o < Source::kOutputs; ++o) x[o][i] = out[o];
    }
  }

 private:
  Load<T> runs_[kInputs][kRows][Threads<T>::kThreads];
};

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

  // The row of the patch whose maximum a lane of the group has; kRows if none.
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
