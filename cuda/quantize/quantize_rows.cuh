// Quantisation in the natural orientation alone, with a scale for each row or, where rstd takes all
// of a row anyway, for each 128 columns of it.
//
// Blocks are (threads of a row, rows): the threads that share threadIdx.y own one row of x. Each
// keeps kSlots runs of it in registers from the maximum to the cast; the rest of a wider row is
// read again for each pass. With rstd, which takes one more reduction, blocks go from row to row:
// the next one is on its way to shared memory while they work on this one. The weights of the
// slots, which every row needs, stay there.
#pragma once

#include "cuda/quantize/rms_norm.cuh"
#include "cuda/tile/ptx/async.cuh"

namespace jaxkern::quantize {

template <class Source>
inline constexpr int kSlots = 4 / Source::kOutputs;
template <class Source>
inline constexpr int kMaxThreadsPerRow = kNormalises<Source> ? 512 : 1024;
// 1024 threads an SM, or fewer where that would spill. NOTE: float16 takes more registers.
template <class Source, class T, Scaling kScaling, bool kAligned>
inline constexpr int kRowsRegisters = !kNormalises<Source>                    ? 64
                                      : std::is_same_v<T, tile::f16>          ? 96
                                      : kAligned && kScaling == Scaling::kRow ? 64
                                                                              : 80;

// A thread's part of a row. kAligned: so are all arrays, for runs.
template <class Source, class T, bool kAligned>
struct RowPart {
  using Inputs = Load<T>[Source::kInputs];

  const QuantizeParams& p;
  const int64_t row;
  const int64_t cols = row < p.rows ? p.cols : 0;  // a row past the end is empty
  const int64_t stride = int64_t{blockDim.x} * kVec<T>;
  const bool aligned = kAligned || inputs_aligned<Source, T>(p);

  // The first column in slot s; slot kSlots is the first that is not kept.
  __device__ __forceinline__ int64_t col(int s) const { return s * stride + threadIdx.x * kVec<T>; }
  __device__ __forceinline__ void load(Inputs& in, int64_t col) const {
#pragma unroll
    for (int i = 0; i < Source::kInputs; ++i) {
      in[i].load(from(i) + col, inside(col, cols), aligned);
    }
  }
  __device__ __forceinline__ const Bits<T>* from(int input) const {
    return static_cast<const Bits<T>*>(p.inputs[input]) + row * p.cols;
  }
  __device__ __forceinline__ Weights<T> weights(int64_t col) const {
    return load_weights<T>(p, col, inside(col, p.cols), aligned);
  }
  __device__ __forceinline__ void load_slots(Inputs (&in)[kSlots<Source>]) const {
#pragma unroll
    for (int s = 0; s < kSlots<Source>; ++s) load(in[s], col(s));
  }
  // Calls pass(col) for what the slots do not hold, by all threads of the row as often.
  template <class Pass>
  __device__ __forceinline__ void beyond_slots(const Pass& pass) const {
    int64_t first = kSlots<Source> * stride;
    for (; first < cols; first += stride) pass(first + threadIdx.x * kVec<T>);
  }
};

// rstd of the row, in all of its threads: as given, or computed, and then in p.rstd too.
template <class T, class Part>
__device__ __forceinline__ float row_rstd(const Part& part, const Load<T> (&in)[kSlots<RmsNorm>][1],
                                          float (&scratch)[tile::kMaxWarps]) {
  const QuantizeParams& p = part.p;
  if (p.rstd_in != nullptr) return part.row < p.rows ? p.rstd_in[part.row] : 0.0f;
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < kSlots<RmsNorm>; ++s) sum += sum_of_squares<T>(in[s][0]);
  part.beyond_slots([&](int64_t col) {
    Load<T> x[1];
    part.load(x, col);
    sum += sum_of_squares<T>(x[0]);
  });
  const float rstd = rstd_of(tile::row_sum(sum, scratch), p);
  if (threadIdx.x == 0 && part.row < p.rows) p.rstd[part.row] = rstd;
  return rstd;
}

// What threads of RmsNorm have in shared memory, each its own: the weights of their slots, and what
// is in the slots of the next row.
template <class T>
class RowMemory {
  using Words = typename Load<T>::Words;
  static constexpr int kPlanes = kVec<T> / 4;  // 16 bytes of the weights of each run
  static constexpr int kRuns = (1 + kPlanes) * kSlots<RmsNorm>;

 public:
  static int bytes(dim3 block) {
    return kRuns * static_cast<int>(block.x * block.y * sizeof(Words));
  }

  __device__ __forceinline__ explicit RowMemory(void* shared)
      : mine_(static_cast<Words*>(shared) + threadIdx.y * blockDim.x + threadIdx.x) {}

  template <class Part>
  __device__ __forceinline__ void load_weights(const Part& part) const {
#pragma unroll
    for (int s = 0; s < kSlots<RmsNorm>; ++s) {
      const auto run = part.weights(part.col(s));
#pragma unroll
      for (int k = 0; k < kPlanes; ++k) {
#pragma unroll
        for (int w = 0; w < 4; ++w) at(1 + k, s).data[w] = run.words.data[4 * k + w];
      }
    }
  }
  __device__ __forceinline__ Weights<T> weights(int s) const {
    Weights<T> run;
#pragma unroll
    for (int k = 0; k < kPlanes; ++k) {
      const Words words = at(1 + k, s);
#pragma unroll
      for (int w = 0; w < 4; ++w) run.words.data[4 * k + w] = words.data[w];
    }
    return run;
  }

  // Starts to load the slots of a row.
  template <class Part>
  __device__ __forceinline__ void start(const Part& part) const {
    if (part.aligned) {
#pragma unroll
      for (int s = 0; s < kSlots<RmsNorm>; ++s) {
        const int64_t col = part.col(s);
        tile::ptx::copy_async_16(&at(0, s), part.from(0) + col, col < part.cols);
      }
    } else {
      for (int s = 0; s < kSlots<RmsNorm>; ++s) {
        Load<T> x[1];
        part.load(x, part.col(s));
        at(0, s) = x[0].words;
      }
    }
  }
  // The slots of the row that was started last.
  __device__ __forceinline__ void read(Load<T> (&x)[kSlots<RmsNorm>][1]) const {
    tile::ptx::wait_all_copies_async();
#pragma unroll
    for (int s = 0; s < kSlots<RmsNorm>; ++s) x[s][0].words = at(0, s);
  }

 private:
  __device__ __forceinline__ Words& at(int plane, int s) const {
    return mine_[(plane * kSlots<RmsNorm> + s) * (blockDim.x * blockDim.y)];
  }

  Words* mine_;
};

// kBlock1x128: blockDim.x is at least kGroupLanes.
template <class Source, class T, class F, Scaling kScaling, bool kAligned>
__global__ void __maxnreg__((kRowsRegisters<Source, T, kScaling, kAligned>))
    quantize_rows_kernel(const QuantizeParams p) {
  constexpr int kInputs = Source::kInputs, kOutputs = Source::kOutputs;
  constexpr bool kStays = kNormalises<Source>;
  using Part = RowPart<Source, T, kAligned>;
  using Inputs = typename Part::Inputs;
  using Outputs = Load<T>[kOutputs];
  using Scales = Scale[kOutputs];
  using Out = Run<uint8_t, kVec<T>>;
  __shared__ uint32_t scratch[kOutputs][tile::kMaxWarps];
  // Two rows need different ones, unless a reduction of the other kind is between them.
  constexpr int kRstdScratch = kScaling == Scaling::kRow ? 1 : 2;
  __shared__ float rstd_scratch[kRstdScratch][tile::kMaxWarps];

  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  auto any_inside = [&] { return row - threadIdx.y < p.rows; };  // of the rows of the block
  extern __shared__ __align__(16) unsigned char shared[];
  const RowMemory<T> memory(shared);
  if constexpr (kStays) {
    memory.start(Part{p, row});
    memory.load_weights(Part{p, row});
  }

  for (int turn = 0;; ++turn) {
    const Part part{p, row};
    Load<T> x[kSlots<Source>][kOutputs];
    float rstd = 0.0f;
    if constexpr (kStays) {
      memory.read(x);
      row += int64_t{gridDim.x} * blockDim.y;
      if (any_inside()) memory.start(Part{p, row});
      rstd = row_rstd<T>(part, x, rstd_scratch[turn % kRstdScratch]);
#pragma unroll
      for (int s = 0; s < kSlots<Source>; ++s) normalise<T>(x[s][0], rstd, memory.weights(s));
    } else {
      Load<T> in[kSlots<Source>][kInputs];
      part.load_slots(in);
#pragma unroll
      for (int s = 0; s < kSlots<Source>; ++s) Source::template compute<T>(in[s], x[s]);
    }
    auto compute_beyond = [&](int64_t col, Outputs& to) {
      Inputs from;
      part.load(from, col);
      Source::template compute<T>(from, to);
      if constexpr (kStays) normalise<T>(to[0], rstd, part.weights(col));
    };
    auto raise = [](uint32_t& most, const Load<T>& run) {
      for (const uint32_t word : run.words.data) most = larger<T>(most, magnitudes<T>(word));
    };
    auto write = [&](int64_t col, const Outputs& runs, const Scales& scale) {
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        void* values = p.outputs[o].values;
        uint8_t* to = static_cast<uint8_t*>(values) + part.row * p.cols;
        cast<F, T>(runs[o], scale[o].inverse)
            .store(to + col, inside(col, part.cols), kAligned || Out::aligned(values, p.cols));
      }
    };

    Scales scale;
    if constexpr (kScaling == Scaling::kRow) {
      uint32_t most[kOutputs] = {};
      auto see = [&](const Outputs& runs) {
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) raise(most[o], runs[o]);
      };
#pragma unroll
      for (int s = 0; s < kSlots<Source>; ++s) see(x[s]);
      part.beyond_slots([&](int64_t col) {
        Outputs beyond;
        compute_beyond(col, beyond);
        see(beyond);
      });
#pragma unroll
      for (int o = 0; o < kOutputs; ++o) {
        scale[o] = scale_of<F>(tile::row_max(largest<T>(most[o]), scratch[o]));
        if (threadIdx.x == 0 && part.row < p.rows) {
          p.outputs[o].scale[part.row] = __uint_as_float(scale[o].bits);
        }
      }
#pragma unroll
      for (int s = 0; s < kSlots<Source>; ++s) write(part.col(s), x[s], scale);
      part.beyond_slots([&](int64_t col) {
        Outputs beyond;
        compute_beyond(col, beyond);
        write(col, beyond, scale);
      });
    } else {
      static_assert(kScaling == Scaling::kBlock1x128);
      auto write_groups = [&](int64_t col, const Outputs& runs) {
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) {
          uint32_t most = 0;
          raise(most, runs[o]);
          scale[o] = scale_of<F>(tile::warp_max(largest<T>(most), kGroupLanes<T>));
          if (threadIdx.x % kGroupLanes<T> == 0 && col < part.cols) {
            p.outputs[o].scale[col / kScaleBlock * scale_pitch(p.rows) + part.row] =
                __uint_as_float(scale[o].bits);
          }
        }
        write(col, runs, scale);
      };
#pragma unroll
      for (int s = 0; s < kSlots<Source>; ++s) write_groups(part.col(s), x[s]);
      part.beyond_slots([&](int64_t col) {
        Outputs beyond;
        compute_beyond(col, beyond);
        write_groups(col, beyond);
      });
    }
    if (!kStays || !any_inside()) return;
  }
}

}  // namespace jaxkern::quantize
