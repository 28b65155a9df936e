// out = x w^T for few rows of x (tokens) and weights of four bits, where it is reading weights that
// takes the time.
//
// mma.m16n8k16 multiplies 16 rows of weights by 8 tokens. A strip is 16 rows of weights with all
// their columns; a tile of out^T is some strips by all tokens. How many strips is a parameter of
// the launch, so that all multiprocessors have equally many. Persistent blocks go from tile to tile
// and keep on reading. Warps have roles:
//   consumers  one for each strip of the tile and each of the panels (128 columns) of a stage;
//   loader     one thread loads panels of weights and tokens into a ring of stages.
// At the end of a tile the sums of its panels are added up in shared memory, always in the same
// order: results repeat bitwise. Weights become operands in registers (four_bit.cuh).
#pragma once

#include "cuda/matmul/four_bit.cuh"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

template <FourBitFormat kFormat, class T_, int kTokens_>
struct QuantizedMatmulFewRows {
  using T = T_;
  using Weights = FourBit<kFormat, T>;
  static constexpr int kTokens = kTokens_, kTokenBlocks = kTokens / 8;
  static constexpr int kConsumers = kTokens < 32 ? 31 : 15;  // warps, at most
  static constexpr int kThreads = tile::kWarpSize * (kConsumers + 1);
  static constexpr int kMaxStages = 32;
  static constexpr int kColumns = kFourBitColumns;  // of a panel
  static constexpr int kSumRow = kFourBitRows + 4;  // no two lanes share a bank
  static constexpr int kSumBytes = kConsumers * kTokens * kSumRow * sizeof(float);
  static constexpr int kStageBytes = (tile::kMaxSharedBytes - kSumBytes - 512) / 1024 * 1024;

  struct Storage {
    alignas(1024) char stages[kStageBytes];  // each has tokens, then weights
    float sums[kConsumers][kTokens][kSumRow];
    tile::Ring<kMaxStages> ring;
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the stages must fit a block");

  struct Params {
    CUtensorMap x;  // (B * M, K); boxes: 64 columns of M tokens, x_box of them
    CUtensorMap w;  // (B * strips, panels, bytes of a tile); boxes: a stage
    FourBitWeight weight;
    void* out;
    DType out_dtype;
    int x_box;
    int strips, panels;       // of a stage
    int stages, stage_bytes;  // of the ring
    int ahead;                // stages on their way at once
    int x_bytes, w_bytes;     // of a stage
    int w_place;              // where weights begin in one
    int tile_bytes;           // of weights
    int B, M, N;
    int tiles, steps;  // of a matrix; stages of a tile
  };

  // A place in a ring whose size is a parameter.
  struct Slot {
    int stage = 0, bytes = 0;  // from the first stage
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(const Params& p) {
      ++stage, bytes += p.stage_bytes;
      if (stage == p.stages) stage = 0, bytes = 0, parity ^= 1;
    }
  };
  struct Work {
    int batch, strip;  // where it begins in a matrix

    __device__ __forceinline__ Work(const Params& p, int index)
        : batch(p.B > 1 ? index / p.tiles : 0), strip((index - batch * p.tiles) * p.strips) {}
  };
  __device__ __forceinline__ static int all_strips(const Params& p) {
    return tile::ceil_div(p.N, kFourBitRows);
  }

  __device__ __forceinline__ static void load_weights(const Params& p, Storage& shared,
                                                      const Work& at, int step, int stage) {
    auto& full = shared.ring.full[stage];
    full.arrive_expect(p.x_bytes + p.w_bytes);
    tile::ptx::bulk_tensor_load_by(
        tile::ptx::evict_first_policy(), shared.stages + stage * p.stage_bytes + p.w_place, &p.w,
        &full.word, 0, step * p.panels, at.batch * all_strips(p) + at.strip);
  }
  __device__ __forceinline__ static void load_tokens(const Params& p, Storage& shared,
                                                     const Work& at, int step, int stage) {
    auto& full = shared.ring.full[stage];
    const uint64_t policy = tile::ptx::evict_last_policy();
    char* to = shared.stages + stage * p.stage_bytes;
    const int first = 2 * step * p.panels;  // of 64 columns
    for (int i = 0; i < 2 * p.panels; i += p.x_box) {
      tile::ptx::bulk_tensor_load_by(policy, to + i * p.M * tile::kPanelBytes, &p.x, &full.word,
                                     p.x_box > 1 ? 0 : 64 * (first + i), at.batch * p.M,
                                     p.x_box > 1 ? first + i : 0);
    }
  }

  // Loads the first weights, when there is what they complete on and nothing else. Returns of how
  // many stages.
  __device__ __forceinline__ static int begin(const Params& p, Storage& shared) {
    tile::ptx::prefetch_tensor_map(&p.x);
    for (int i = 0; i < p.stages; ++i) shared.ring.full[i].init(1);
    tile::ptx::fence_mbarrier_init();
    const Work at(p, blockIdx.x);
    const int stages = min(p.ahead, p.steps);
#pragma unroll 1
    for (int i = 0; i < stages; ++i) load_weights(p, shared, at, i, i);
    for (int i = 0; i < p.stages; ++i) shared.ring.empty[i].init(p.strips * p.panels);
    tile::ptx::fence_mbarrier_init();
    return stages;
  }
  __device__ __forceinline__ static void load(const Params& p, Storage& shared, int begun) {
    Slot slot, oldest;  // on its way
    for (int index = blockIdx.x; index < p.B * p.tiles; index += gridDim.x) {
      const Work at(p, index);
      for (int step = 0; step < p.steps; ++step, slot.advance(p), --begun) {
        if (begun <= 0) {
          shared.ring.full[oldest.stage].wait(oldest.parity);
          oldest.advance(p);
          shared.ring.empty[slot.stage].wait(slot.parity ^ 1);
          load_weights(p, shared, at, step, slot.stage);
        }
        load_tokens(p, shared, at, step, slot.stage);
      }
    }
  }

  // The sums of a strip over one panel of each stage.
  struct Sums {
    float data[kTokenBlocks][4];  // as mma.m16n8k16 has them
  };
  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared, int strip,
                                                  int panel, Slot& slot, Sums& sums) {
    const int lane = threadIdx.x % tile::kWarpSize;
    int x_places[2][kTokenBlocks];  // of a lane's token, in 64 columns and the next 64
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < kTokenBlocks; ++j) {
        // Sums of tokens beyond the last are nobody's: any row will do.
        const int line = (2 * panel + half) * p.M + min(8 * j + lane % 8, p.M - 1);
        x_places[half][j] = line * tile::kPanelBytes + (lane / 8 ^ line % 8) * 16;
      }
    }
    const int w_place = p.w_place + (strip * p.panels + panel) * p.tile_bytes;
#pragma unroll 2
    for (int step = 0; step < p.steps; ++step, slot.advance(p)) {
      const char* x = shared.stages + slot.bytes;
      shared.ring.full[slot.stage].wait(slot.parity);
      FourBitTile<kFormat, T> weights;
      weights.load(p.weight, x + w_place);
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // of 32 columns
        uint32_t a[2][4];
#pragma unroll
        for (int s = 0; s < 2; ++s) weights.expand(2 * i + s, a[s]);
#pragma unroll
        for (int j = 0; j < kTokenBlocks; ++j) {
          uint32_t b[4];
          tile::ptx::ldmatrix_x4(x + (x_places[i / 2][j] ^ i % 2 * 64), b[0], b[1], b[2], b[3]);
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            tile::ptx::mma_m16n8k16<tile::ElementType<T>>(sums.data[j], a[s][0], a[s][1], a[s][2],
                                                          a[s][3], b[2 * s], b[2 * s + 1]);
          }
        }
      }
      shared.ring.empty[slot.stage].arrive_warp();
    }
  }

  __device__ __forceinline__ static int warps(const Params& p) { return p.strips * p.panels; }
  __device__ __forceinline__ static void sync_consumers(const Params& p) {
    tile::ptx::named_barrier_sync(1, warps(p) * tile::kWarpSize);
  }

  __device__ __forceinline__ static void store_sums(Storage& shared, int warp, const Sums& sums) {
    const int lane = threadIdx.x % tile::kWarpSize;
#pragma unroll
    for (int j = 0; j < kTokenBlocks; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared.sums[warp][8 * j + 2 * (lane % 4) + i % 2][lane / 4 + i / 2 * 8] = sums.data[j][i];
      }
    }
  }

  // Adds up the sums of all panels and finishes them.
  __device__ __forceinline__ static void store(const Params& p, Storage& shared, const Work& at) {
    const int rows = kFourBitRows * p.strips, threads = warps(p) * tile::kWarpSize;
    const int first = kFourBitRows * at.strip;
    const float* scales = p.weight.row_scale + int64_t{at.batch} * all_strips(p) * kFourBitRows;
    for (int i = threadIdx.x; i < rows * p.M; i += threads) {
      const int m = i / rows, row = i - m * rows, n = first + row;
      if (n >= p.N) continue;
      const float scale = scales[n] * Weights::kSumScale;
      float sum = 0.0f;
      for (int warp = row / kFourBitRows; warp < warps(p); warp += p.strips) {
        sum += shared.sums[warp][m][row % kFourBitRows];
      }
      const float value = sum * scale;
      const int64_t place = (int64_t{at.batch} * p.M + m) * p.N + n;
      switch (p.out_dtype) {
        case DType::kBFloat16:
          static_cast<tile::bf16*>(p.out)[place] = __float2bfloat16_rn(value);
          break;
        case DType::kFloat16:
          static_cast<tile::f16*>(p.out)[place] = __float2half_rn(value);
          break;
        default:
          static_cast<float*>(p.out)[place] = value;
      }
    }
  }

  __device__ __forceinline__ static void consume(const Params& p, Storage& shared, int warp) {
    if (warp >= warps(p)) return;
    const int strip = warp % p.strips, panel = warp / p.strips;
    Slot slot;
    for (int index = blockIdx.x; index < p.B * p.tiles; index += gridDim.x) {
      Sums sums = {};
      multiply(p, shared, strip, panel, slot, sums);
      store_sums(shared, warp, sums);
      sync_consumers(p);
      store(p, shared, Work(p, index));
      if (index + static_cast<int>(gridDim.x) < p.B * p.tiles) sync_consumers(p);  // sums were read
    }
  }
};

template <class Matmul>
__global__ void __launch_bounds__(Matmul::kThreads, 1)
    quantized_matmul_few_rows_sm90_kernel(const __grid_constant__ typename Matmul::Params p) {
  auto& shared = tile::settled(tile::shared_storage<typename Matmul::Storage>());
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / tile::kWarpSize, 0);
  const bool loader = threadIdx.x == Matmul::kConsumers * tile::kWarpSize;

  int begun = 0;
  if (loader) begun = Matmul::begin(p, shared);
  __syncthreads();
  if (warp < Matmul::kConsumers) {
    Matmul::consume(p, shared, warp);
  } else if (loader) {
    Matmul::load(p, shared, begun);
  }
}

}  // namespace jaxkern
