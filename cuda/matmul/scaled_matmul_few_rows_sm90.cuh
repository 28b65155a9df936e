// scaled_matmul_sm90.cuh's product for few rows of lhs (tokens, up to kTokens), where it is reading
// rhs (weights) that takes the time.
//
// Tensor cores multiply 64 rows at a time, so weights are those rows: a tile is out^T, kBlockN rows
// of rhs by all tokens. Persistent blocks go from tile to tile and keep on reading. Where there are
// too few tiles for all SMs, a cluster shares out the blocks of K of one; then each block adds up
// the sums of all for some of the tokens, through their shared memory and in a fixed order.
// Warpgroups have roles:
//   producer    one thread loads blocks of 128 along K, and scales, into a ring of stages;
//   consumers   each own 64 rows of rhs.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/matmul/scaled_matmul_sm90.cuh"

namespace jaxkern {

template <class Out_, BlockScales kScales_, bool kFastAccumulation_, int kTokens_>
struct ScaledMatmulFewRows {
  using T = tile::e4m3;
  using Out = Out_;
  using Corner = tile::tma::Corner;
  static constexpr BlockScales kScales = kScales_;
  static constexpr bool kFastAccumulation = kFastAccumulation_;
  static constexpr bool kBlocks = kScales != BlockScales::kNone;
  static constexpr int kTokens = kTokens_, kConsumers = 2;
  static constexpr int kBlockN = 64 * kConsumers, kBlockK = kScaleBlock, kScaleRows = kTokens;
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);
  static_assert(kScales != BlockScales::k1x128By1x128, "weights have scales for 128 rows");
  static_assert(!kBlocks || !kFastAccumulation, "scales of blocks need float32 sums");
  static_assert(kBlockN == kScaleBlock, "a tile has one scale for a block of K");

  // Tokens of a tile that one of the blocks which share out K adds up and stores.
  static constexpr int kPartTokens = kTokens < 32 ? kTokens : kTokens / 4;

  using TileRhs = tile::SharedTile<T, kBlockN, kBlockK>;  // (kBlockN, kBlockK)
  using TileLhs = tile::SharedTile<T, kTokens, kBlockK>;  // (kTokens, kBlockK)
  using TileOut = tile::SharedTile<Out, kTokens, 64>;     // (kTokens, 64), a consumer's part
  using Sum = tile::RegisterTile<float, 64, kTokens>;     // (64, kTokens), transposed

  static constexpr int kStageBytes =
      TileRhs::kBytes + TileLhs::kBytes + kBlocks * kTokens * static_cast<int>(sizeof(float));
  // All the shared memory there is: most of it is weights on their way.
  static constexpr int kOtherBytes = kConsumers * TileOut::kBytes + (4 << 10);
  static constexpr int kStages = std::min(8, (tile::kMaxSharedBytes - kOtherBytes) / kStageBytes);
  struct Storage {
    TileRhs rhs[kStages];
    TileLhs lhs[kStages];
    TileOut out[kConsumers];
    alignas(128) float lhs_scale[kBlocks ? kStages : 1][kTokens < 32 ? 32 : kTokens];
    tile::Ring<kStages> ring;

    // When all products are done.
    __device__ __forceinline__ float* sums(int consumer) {
      static_assert(sizeof(rhs) >= kConsumers * 64 * kTokens * sizeof(float));
      return reinterpret_cast<float*>(rhs) + consumer * 64 * kTokens;
    }
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");

  struct Params {
    CUtensorMap lhs, rhs;  // (B * M, K), (B * N, K); boxes: a tile
    CUtensorMap out;       // (B, M, 1, N); boxes: one panel of kPartTokens of a consumer's rows
    CUtensorMap lhs_rows;  // scales (B * KB, M padded); boxes: those of a tile
    const float *lhs_scale, *rhs_scale, *bias;
    int lhs_scale_step,
        rhs_scale_step;  // without blocks: 1 if rows have scales, 0 if all share one
    int splits;          // blocks of a cluster; if there are several, each cluster has but one tile
    int tiles;           // of a matrix
    int B, M, N, K_blocks;
  };

  struct Work {
    int batch, col, rank;
    int begin, end;  // blocks of K

    __device__ __forceinline__ Work(const Params& p, int index)
        : batch(index / p.tiles), col(index % p.tiles * kBlockN), rank(blockIdx.x % p.splits) {
      begin = static_cast<int>(int64_t{p.K_blocks} * rank / p.splits);
      end = static_cast<int>(int64_t{p.K_blocks} * (rank + 1) / p.splits);
    }
  };
  // Calls part(first) with the first token of each part of the tile that is this block's.
  template <class Do>
  __device__ __forceinline__ static void for_each_part(const Params& p, const Work& at,
                                                       const Do& part) {
    for (int first = at.rank * kPartTokens; first < kTokens; first += p.splits * kPartTokens) {
      part(first);
    }
  }
  template <class Do>
  __device__ __forceinline__ static void for_each_work(const Params& p, const Do& work) {
    const int clusters = gridDim.x / p.splits;
    for (int index = blockIdx.x / p.splits; index < p.B * p.tiles; index += clusters) {
      work(Work(p, index));
    }
  }

  __device__ __forceinline__ static void load(const Params& p, Storage& shared) {
    tile::Slot<kStages> slot;
    for_each_work(p, [&](const Work& at) {
      for (int k = at.begin; k < at.end; ++k, slot.advance()) {
        slot.wait_empty(shared.ring);
        const int stage = slot.stage();
        auto& full = shared.ring.full[stage];
        full.arrive_expect(kStageBytes);
        tile::tma::load(shared.rhs[stage], p.rhs, Corner{at.batch * p.N + at.col, k * kBlockK},
                        full);
        tile::tma::load(shared.lhs[stage], p.lhs, Corner{at.batch * p.M, k * kBlockK}, full);
        if constexpr (kBlocks) {
          tile::tma::load(shared.lhs_scale[stage], p.lhs_rows, at.batch * p.K_blocks + k, 0, full);
        }
      }
    });
  }

  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared,
                                                  tile::Slot<kStages>& slot, const Work& at,
                                                  int consumer, Sum& sum) {
    const auto rhs = tile::settled(tile::k_major<64>(shared.rhs[0], 64 * consumer));
    const auto lhs = tile::settled(tile::k_major<kTokens>(shared.lhs[0]));
    tile::zero(sum);
    const float* rhs_scale = p.rhs_scale;  // of the tile's rows, for a block of K
    if constexpr (kBlocks) {
      const int block = at.batch * tile::ceil_div(p.N, kScaleBlock) + at.col / kScaleBlock;
      rhs_scale += int64_t{block} * p.K_blocks;
    }
    for (int k = at.begin; k < at.end; ++k, slot.advance()) {
      tile::RowVector row_scale = {1.0f, 1.0f};
      if constexpr (kBlocks) row_scale[0] = row_scale[1] = rhs_scale[k];
      slot.wait_full(shared.ring);
      const int stage = slot.stage();
      if constexpr (kFastAccumulation) {
        tile::mma_fence(sum);
        tile::mma(sum, rhs.of_tile(stage), lhs.of_tile(stage), true);
        tile::mma_commit();
        tile::mma_wait<0>(sum);
      } else {
        Sum part;
        tile::mma_fence(part);
        tile::mma(part, rhs.of_tile(stage), lhs.of_tile(stage), false);
        tile::mma_commit();
        tile::mma_wait<0>(part);
        if constexpr (kBlocks) {
          tile::add_scaled(sum, part, row_scale, shared.lhs_scale[stage]);
        } else {
          tile::add(sum, part);
        }
      }
      shared.ring.empty[stage].arrive_warp();
    }
  }

  // Scales that are not of blocks, and the bias. Rows are columns of out.
  __device__ __forceinline__ static void finish(const Params& p, const Work& at, int consumer,
                                                Sum& sum) {
    tile::RowVector scale = {1.0f, 1.0f}, bias = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = min(at.col + 64 * consumer + tile::fragment_row(i), p.N - 1);
      if constexpr (!kBlocks) {
        scale[i] = p.rhs_scale[p.rhs_scale_step ? int64_t{at.batch} * p.N + n : at.batch];
      }
      if (p.bias != nullptr) bias[i] = p.bias[n];
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float token_scale = 1.0f;
        if constexpr (!kBlocks) {
          const int m = min(tile::fragment_col(j) + c, p.M - 1);
          token_scale = p.lhs_scale[p.lhs_scale_step ? int64_t{at.batch} * p.M + m : at.batch];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum.at(j, i, c) = sum.at(j, i, c) * (scale[i] * token_scale) + bias[i];
        }
      }
    }
  }

  // The last tile may still be on its way when the next one's products begin.
  __device__ __forceinline__ static void store(const Params& p, Storage& shared, const Work& at,
                                               int consumer, Sum& sum) {
    const bool leader = threadIdx.x % tile::kWarpgroupSize == 0;
    const auto sync = [&] { tile::ptx::named_barrier_sync(1 + consumer, tile::kWarpgroupSize); };
    auto& out = shared.out[consumer];
    finish(p, at, consumer, sum);
    if (leader) tile::tma::wait_stores_read();
    sync();  // out is free
    if constexpr (std::is_same_v<Out, float>) {
      tile::store_transposed(out, sum);
    } else {
      tile::RegisterTile<Out, 64, kTokens> rounded;
      tile::convert(rounded, sum);
      tile::store_transposed(out, rounded);
    }
    tile::tma::fence_writes();
    sync();  // and full
    if (leader) {
      for_each_part(p, at, [&](int first) {
        tile::tma::store(p.out, {at.batch, first, 0}, out, first, at.col + 64 * consumer);
      });
    }
  }

  // Adds the sums of the other blocks of the cluster, in this block's parts of the tile.
  __device__ __forceinline__ static void add_others(const Params& p, Storage& shared,
                                                    const Work& at, int consumer, Sum& sum) {
    for (int i = 1; i < p.splits; ++i) {
      const int other = (at.rank + i) % p.splits;
      for_each_part(p, at, [&](int first) {
        tile::add_fragments_of(sum, shared.sums(consumer), other, first, first + kPartTokens);
      });
    }
  }
};

template <class Matmul>
__global__ void __launch_bounds__(Matmul::kThreads, 1)
    scaled_matmul_few_rows_sm90_kernel(const __grid_constant__ typename Matmul::Params p) {
  using Work = typename Matmul::Work;
  auto& shared = tile::settled(tile::shared_storage<typename Matmul::Storage>());
  const int consumer = tile::warpgroup_index() - 1;

  if (threadIdx.x == 0) {
    shared.ring.init(1, 4 * Matmul::kConsumers);
    tile::ptx::fence_mbarrier_init();
  }
  __syncthreads();

  typename Matmul::Sum sum;
  if (consumer < 0) {
    if (threadIdx.x == 0) Matmul::load(p, shared);
  } else {
    tile::Slot<Matmul::kStages> slot;
    Matmul::for_each_work(p, [&](const Work& at) {
      Matmul::multiply(p, shared, slot, at, consumer, sum);
      if (p.splits == 1) Matmul::store(p, shared, at, consumer, sum);
    });
  }
  if (p.splits > 1) {
    const Work at(p, blockIdx.x / p.splits);
    __syncthreads();  // nobody reads weights any more
    if (consumer >= 0) tile::store_fragments(shared.sums(consumer), sum);
    tile::ptx::cluster_arrive();
    tile::ptx::cluster_wait();  // all sums are there
    if (consumer >= 0) Matmul::add_others(p, shared, at, consumer, sum);
    tile::ptx::cluster_arrive();
    tile::ptx::cluster_wait();  // and read
    if (consumer >= 0) Matmul::store(p, shared, at, consumer, sum);
  }
  if (consumer >= 0 && threadIdx.x % tile::kWarpgroupSize == 0) tile::tma::wait_stores_read();
}

}  // namespace jaxkern
