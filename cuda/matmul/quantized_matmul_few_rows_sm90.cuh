// out = x w^T for weights of four bits and few rows of x (tokens), where reading and expanding
// weights takes the time.
//
// mma.m16n8k16 multiplies 16 rows of weights by 8 tokens: a tile is out^T. Warps have roles:
//   consumers  one for each strip of the tile and each of the panels of a stage;
//   loader     one thread (four_bit_stream.cuh).
// At the end of a tile the sums of its panels are added up in shared memory, always in the same
// order: results repeat bitwise. Weights become operands in registers (four_bit.cuh).
#pragma once

#include "cuda/matmul/four_bit_stream.cuh"

namespace jaxkern {

template <FourBitFormat kFormat, class T_, class Out_, int kTokens_>
struct QuantizedMatmulFewRows : FourBitStream<false> {
  using T = T_;
  using Out = Out_;
  using Weights = FourBit<kFormat, T>;
  static constexpr int kTokens = kTokens_, kTokenBlocks = kTokens / 8;
  static constexpr int kConsumers = 31;  // warps, at most
  static constexpr int kThreads = tile::kWarpSize * (kConsumers + 1);
  static constexpr int kSumRow = kFourBitRows + 4;  // no two lanes share a bank
  static constexpr int kSumBytes = kConsumers * kTokens * kSumRow * sizeof(float);
  static constexpr int kStageBytes = (tile::kMaxSharedBytes - kSumBytes - 512) / 1024 * 1024;

  struct Storage {
    alignas(1024) char stages[kStageBytes];
    float sums[kConsumers][kTokens][kSumRow];
    tile::Ring<kMaxStages> ring;
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the stages must fit a block");

  struct Params : FourBitStream<false>::Params {
    Out* out;
  };

  // A consumer's place in the tile and in stages, and its weights of the first stage.
  struct Role {
    int strip, panel;
    bool loaded;
    FourBitTile<kFormat, T> weights;

    __device__ __forceinline__ Role(const Params& p, const Place& place, int warp)
        : strip(warp % p.strips), panel(warp / p.strips), loaded(panel < p.panels) {
      if (loaded) load_first(p, place, strip, panel, weights);
    }
  };

  // The sums of a strip over one panel of each stage.
  struct Sums {
    float data[kTokenBlocks][4];  // as mma.m16n8k16 has them
  };
  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared, Role& role,
                                                  Slot& slot, Sums& sums) {
    const int strip = role.strip, panel = role.panel;
    const int lane = threadIdx.x % tile::kWarpSize;
    const int row = lane % 8;
    int x_place[2];  // of a lane's token, of the first 32 columns of 64 and of the others
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x_place[i] =
          2 * panel * p.x_bytes + row * tile::kPanelBytes + ((lane / 8 + 4 * i) ^ row) * 16;
      tile::ptx::work_out_here(x_place[i]);
    }
    FourBitTile<kFormat, T>& weights = role.weights;
    const typename FourBitTile<kFormat, T>::Place w_place(
        p.weight, p.w_place + (strip * p.panels + panel) * p.tile_bytes);
#pragma unroll 2
    for (int step = 0; step < p.steps; ++step, slot.advance(p)) {
      const char* x = shared.stages + slot.bytes;
      shared.ring.full[slot.stage].wait(slot.parity);
      if (!role.loaded) weights.load(p.weight, x, w_place);
      role.loaded = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // of 32 columns
        uint32_t a[2][4];
#pragma unroll
        for (int s = 0; s < 2; ++s) weights.expand(2 * i + s, a[s]);
#pragma unroll
        for (int j = 0; j < kTokenBlocks; ++j) {
          uint32_t b[4];
          tile::ptx::ldmatrix_x4(x + x_place[i % 2] + (i / 2 * kTokens + 8 * j) * tile::kPanelBytes,
                                 b[0], b[1], b[2], b[3]);
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
    const int first = kFourBitRows * at.own;
    const float* scales = p.weight.row_scale + int64_t{at.batch} * all_strips(p) * kFourBitRows;
    for (int i = threadIdx.x; i < rows * p.M; i += threads) {
      const int m = i / rows, row = i - m * rows, n = first + row;
      if (n >= p.N) continue;
      const float scale = scales[n] * Weights::kSumScale;
      float sum = 0.0f;
      for (int warp = row / kFourBitRows; warp < warps(p); warp += p.strips) {
        sum += shared.sums[warp][m][row % kFourBitRows];
      }
      p.out[(int64_t{at.batch} * p.M + m) * p.N + n] = static_cast<Out>(sum * scale);
    }
  }

  __device__ __forceinline__ static void consume(const Params& p, Storage& shared, int warp,
                                                 Role& role) {
    if (warp >= warps(p)) return;
    Slot slot;
    for (int index = blockIdx.x; index < p.B * p.tiles; index += gridDim.x) {
      Sums sums = {};
      multiply(p, shared, role, slot, sums);
      store_sums(shared, warp, sums);
      sync_consumers(p);
      store(p, shared, Work(p, Place(p), index));
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
  const typename Matmul::Place place(p);
  typename Matmul::Role role(p, place, warp);
  int begun = 0;
  if (loader) begun = Matmul::begin(p, shared, place, Matmul::warps(p));
  __syncthreads();
  if (warp < Matmul::kConsumers) {
    Matmul::consume(p, shared, warp, role);
  } else if (loader) {
    Matmul::load(p, shared, place, begun);
  }
}

}  // namespace jaxkern
