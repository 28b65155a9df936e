// Products of scaled 8-bit matrices on Hopper: out = (lhs * lhs_scale) (rhs * rhs_scale)^T + bias.
//
// Persistent clusters of blocks work through tiles of out. The blocks of a cluster lie below each
// other: each has rows of lhs of its own, and they bring each other the rows of rhs they share.
// Warpgroups have roles:
//   producer    one thread loads blocks of 128 along K, and scales, into a ring of stages;
//   consumers   each own 64 * kWaves rows of the tile and all of its columns.
// A tensor core adds 8-bit products with about 14 bits. So a consumer takes the product of one
// block of K, a wave of 64 rows at a time, and adds it to a sum in float32 registers, times its
// scales where there are some for blocks; meanwhile the other consumer multiplies. With
// kFastAccumulation tensor cores do all of the sum.
// Blocks of K with scales of their own are DeepSeek-V3's recipe, the promotion is DeepGEMM's.
// docs/matmul.md draws the schedule.
#pragma once

#include "cuda/matmul/params.h"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

// kNone: scales are those of a row, or of all, and wait until the end.
enum class BlockScales { kNone, k1x128By128x128, k1x128By1x128 };

// A tile has 64 * kConsumers * kWaves rows and kBlockN columns.
struct ScaledMatmulConfig {
  int waves, block_n, stages, blocks;  // blocks: of a cluster
};

template <class Lhs_, class Rhs_, class Out_, BlockScales kScales_, bool kFastAccumulation_,
          ScaledMatmulConfig kConfig>
struct ScaledMatmul {
  using Lhs = Lhs_;
  using Rhs = Rhs_;
  using Out = Out_;
  using Cluster = tile::Cluster<kConfig.blocks>;
  using Corner = tile::tma::Corner;
  static constexpr BlockScales kScales = kScales_;
  static constexpr bool kFastAccumulation = kFastAccumulation_;
  static constexpr int kConsumers = 2, kWaves = kConfig.waves, kStages = kConfig.stages;
  static constexpr int kBlockM = 64 * kConsumers * kWaves, kBlockN = kConfig.block_n;
  static constexpr int kBlockK = kScaleBlock;
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr bool kLhsBlocks = kScales != BlockScales::kNone;
  static constexpr bool kRhsBlocks = kScales == BlockScales::k1x128By1x128;
  static_assert(!kLhsBlocks || !kFastAccumulation, "scales of blocks need float32 sums");
  static_assert(kScales != BlockScales::k1x128By128x128 || kBlockN == kScaleBlock);

  static constexpr int kOutBuffers = kLhsBlocks ? 1 : 2;  // scales take the second's place
  static constexpr int kPieceCols = tile::kPanelBytes / sizeof(Out);
  using TileLhs = tile::SharedTile<Lhs, kBlockM, kBlockK>;  // (kBlockM, kBlockK)
  using TileRhs = tile::SharedTile<Rhs, kBlockN, kBlockK>;  // (kBlockN, kBlockK)
  using TileOut = tile::SharedTile<Out, 64, kPieceCols>;    // a piece on its way out
  using Sum = tile::RegisterTile<float, 64, kBlockN>;       // (64, kBlockN)

  struct Storage {
    TileLhs lhs[kStages];
    TileRhs rhs[kStages];
    TileOut out[kConsumers][kOutBuffers];
    alignas(128) float lhs_scale[kLhsBlocks ? kStages : 1][kBlockM];
    alignas(128) float rhs_scale[kRhsBlocks ? kStages : 1][kBlockN];
    tile::Ring<kStages> ring;
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");
  static constexpr int kStageBytes =
      TileLhs::kBytes + TileRhs::kBytes +
      static_cast<int>(sizeof(float)) * (kLhsBlocks * kBlockM + kRhsBlocks * kBlockN);

  struct Params {
    CUtensorMap lhs, rhs;            // (B * M, K), (B * N, K); boxes: a tile, a block's share
    CUtensorMap out;                 // (B, M, 1, N); boxes: a piece
    CUtensorMap lhs_rows, rhs_rows;  // scales (B * KB, M or N padded); boxes: those of a tile
    const float *lhs_scale, *rhs_scale, *bias;
    int lhs_scale_step,
        rhs_scale_step;       // without blocks: 1 if rows have scales, 0 if all share one
    tile::MatrixOrder order;  // of a cluster's tiles: kBlockM * kBlocks rows, kBlockN columns
    int B, M, N, K_blocks;
  };

  // Where this block's part of a cluster's tile lies in out.
  struct Work {
    int batch, row, col;

    __device__ __forceinline__ Work(const Params& p, int index) : batch(index / p.order.count()) {
      const auto at = p.order.at(index % p.order.count());
      row = (at.row * Cluster::kBlocks + Cluster::rank()) * kBlockM;
      col = at.col * kBlockN;
    }
  };
  template <class Do>
  __device__ __forceinline__ static void for_each_work(const Params& p, const Do& work) {
    const int count = p.B * p.order.count();
    for (int index = Cluster::index(); index < count; index += Cluster::count()) {
      work(Work(p, index));
    }
  }

  __device__ __forceinline__ static void load(const Params& p, Storage& shared) {
    tile::Slot<kStages> slot;
    for_each_work(p, [&](const Work& at) {
      for (int k = 0; k < p.K_blocks; ++k, slot.advance()) {
        slot.wait_empty(shared.ring);
        const int stage = slot.stage();
        auto& full = shared.ring.full[stage];
        full.arrive_expect(kStageBytes);
        // Rows past the end of a matrix are those of the next one; out has no room for them.
        tile::tma::load(shared.lhs[stage], p.lhs, Corner{at.batch * p.M + at.row, k * kBlockK},
                        full);
        tile::tma::load_multicast<Cluster>(shared.rhs[stage], p.rhs,
                                           Corner{at.batch * p.N + at.col, k * kBlockK}, full);
        const int block = at.batch * p.K_blocks + k;
        if constexpr (kLhsBlocks) {
          tile::tma::load(shared.lhs_scale[stage], p.lhs_rows, block, at.row, full);
        }
        if constexpr (kRhsBlocks) {
          tile::tma::load(shared.rhs_scale[stage], p.rhs_rows, block, at.col, full);
        }
      }
    });
  }

  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared, int consumer) {
    tile::Slot<kStages> slot;
    Sum sums[kWaves];  // rows 64 * kWaves * consumer and on of the tile
    for_each_work(p, [&](const Work& at) {
      if constexpr (kFastAccumulation) {
        sum_fast(p, shared, slot, consumer, sums);
      } else {
        sum_promoted(p, shared, slot, consumer, at, sums);
      }
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
        const int row = at.row + 64 * (kWaves * consumer + wave);
        store(p, shared.out[consumer], at, row, sums[wave], consumer);
      }
    });
    if (threadIdx.x % tile::kWarpgroupSize == 0) tile::tma::wait_stores_read();
  }

  __device__ __forceinline__ static auto lhs_rows(Storage& shared, int stage, int consumer,
                                                  int wave) {
    return tile::k_major<64>(shared.lhs[stage], 64 * (kWaves * consumer + wave));
  }

  __device__ __forceinline__ static void release(Storage& shared, tile::Slot<kStages> slot) {
    Cluster::arrive_warp(shared.ring.empty[slot.stage()]);
  }

  __device__ __forceinline__ static void sum_fast(const Params& p, Storage& shared,
                                                  tile::Slot<kStages>& slot, int consumer,
                                                  Sum (&sums)[kWaves]) {
    for (int k = 0; k < p.K_blocks; ++k, slot.advance()) {
      slot.wait_full(shared.ring);
      const int stage = slot.stage();
      tile::mma_fence();
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
        tile::mma(sums[wave], lhs_rows(shared, stage, consumer, wave),
                  tile::k_major<kBlockN>(shared.rhs[stage]), k > 0);
      }
      tile::mma_commit();
      tile::mma_wait<1>();  // the products before these
      if (k > 0) release(shared, slot.previous());
    }
    tile::mma_wait<0>();
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) tile::pin(sums[wave]);
    release(shared, slot.previous());
  }

  __device__ __forceinline__ static void sum_promoted(const Params& p, Storage& shared,
                                                      tile::Slot<kStages>& slot, int consumer,
                                                      const Work& at, Sum (&sums)[kWaves]) {
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) tile::zero(sums[wave]);
    // Of 128 columns, the same for all of the tile. The next one is read a block ahead.
    const float* rhs_scale = nullptr;
    float next_scale = 1.0f;
    if constexpr (kScales == BlockScales::k1x128By128x128) {
      const int blocks = tile::ceil_div(p.N, kScaleBlock);
      const int block = at.batch * blocks + at.col / kScaleBlock;
      rhs_scale = p.rhs_scale + int64_t{block} * p.K_blocks;
      next_scale = rhs_scale[0];
    }
    for (int k = 0; k < p.K_blocks; ++k, slot.advance()) {
      const float col_scale = next_scale;
      if constexpr (kScales == BlockScales::k1x128By128x128) {
        next_scale = rhs_scale[min(k + 1, p.K_blocks - 1)];
      }
      slot.wait_full(shared.ring);
      const int stage = slot.stage();
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
        Sum part;
        tile::mma_fence(part);
        tile::mma(part, lhs_rows(shared, stage, consumer, wave),
                  tile::k_major<kBlockN>(shared.rhs[stage]), false);
        tile::mma_commit();
        tile::RowVector row_scale;
        if constexpr (kLhsBlocks) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int row = 64 * (kWaves * consumer + wave) + tile::fragment_row(i);
            row_scale[i] = shared.lhs_scale[stage][row] * col_scale;
          }
        }
        tile::mma_wait<0>(part);
        if (!kRhsBlocks && wave == kWaves - 1) release(shared, slot);
        if constexpr (kRhsBlocks) {
          tile::add_scaled(sums[wave], part, row_scale, shared.rhs_scale[stage]);
        } else if constexpr (kLhsBlocks) {
          tile::add_scaled(sums[wave], part, row_scale);
        } else {
          tile::add(sums[wave], part);
        }
        if (kRhsBlocks && wave == kWaves - 1) release(shared, slot);
      }
    }
  }

  // The scales of a thread's two rows, where blocks have none.
  __device__ __forceinline__ static tile::RowVector row_scales(const Params& p, const Work& at,
                                                               int row) {
    tile::RowVector scales = {1.0f, 1.0f};
    if constexpr (!kLhsBlocks) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int m = min(row + tile::fragment_row(i), p.M - 1);
        scales[i] = p.lhs_scale[p.lhs_scale_step ? int64_t{at.batch} * p.M + m : at.batch];
      }
    }
    return scales;
  }

  // A piece of the result from column `col` on: its sums times those and the columns' scales, plus
  // the bias.
  template <int kCols>
  __device__ __forceinline__ static void finish(const Params& p, const Work& at, int col,
                                                const tile::RowVector& rows,
                                                tile::RegisterTile<float, 64, kCols>& sum) {
#pragma unroll
    for (int j = 0; j < kCols / 8; ++j) {
      const int n = min(col + tile::fragment_col(j), p.N - 2);  // even, as N is
      float2 scale = {1.0f, 1.0f}, bias = {0.0f, 0.0f};
      if constexpr (!kLhsBlocks) {
        if (p.rhs_scale_step) {
          scale = *reinterpret_cast<const float2*>(p.rhs_scale + int64_t{at.batch} * p.N + n);
        } else {
          scale.x = scale.y = p.rhs_scale[at.batch];
        }
      }
      if (p.bias != nullptr) bias = *reinterpret_cast<const float2*>(p.bias + n);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sum.at(j, i, 0) = sum.at(j, i, 0) * (rows[i] * scale.x) + bias.x;
        sum.at(j, i, 1) = sum.at(j, i, 1) * (rows[i] * scale.y) + bias.y;
      }
    }
  }

  // Finishes pieces of 64 rows and 128 bytes and sends them out through the buffers; the last ones
  // are still on their way when the next tile's products begin.
  __device__ __forceinline__ static void store(const Params& p, TileOut (&out)[kOutBuffers],
                                               const Work& at, int row, const Sum& sum,
                                               int consumer) {
    const bool leader = threadIdx.x % tile::kWarpgroupSize == 0;
    const auto sync = [&] { tile::ptx::named_barrier_sync(1 + consumer, tile::kWarpgroupSize); };
    const tile::RowVector rows = row_scales(p, at, row);
#pragma unroll
    for (int piece = 0; piece < kBlockN / kPieceCols; ++piece) {
      const int col = at.col + kPieceCols * piece;
      auto& buffer = out[piece % kOutBuffers];
      tile::RegisterTile<float, 64, kPieceCols> result;
      tile::RegisterTile<Out, 64, kPieceCols> rounded;
      tile::convert(result, sum, kPieceCols * piece);
      finish(p, at, col, rows, result);
      tile::convert(rounded, result, 0);
      if (leader) tile::tma::wait_stores_read<kOutBuffers - 1>();
      sync();  // the buffer is free
      tile::store(buffer, 0, rounded);
      tile::tma::fence_writes();
      sync();  // and full
      if (leader) tile::tma::store(p.out, {at.batch, row, 0}, buffer, 0, col);
    }
  }
};

template <class Matmul>
__global__ void __cluster_dims__(Matmul::Cluster::kBlocks, 1, 1)
    __launch_bounds__(Matmul::kThreads, 1)
        scaled_matmul_sm90_kernel(const __grid_constant__ typename Matmul::Params p) {
  auto& shared = tile::shared_storage<typename Matmul::Storage>();
  const int warpgroup = tile::warpgroup_index();

  if (threadIdx.x == 0) {
    shared.ring.init(1, 4 * Matmul::kConsumers * Matmul::Cluster::kBlocks);  // warps of the cluster
    tile::ptx::fence_mbarrier_init();
  }
  Matmul::Cluster::sync();

  if (warpgroup == 0) {
    tile::ptx::setmaxnreg_decrease<Matmul::kProducerRegisters>();
    if (threadIdx.x == 0) Matmul::load(p, shared);
  } else {
    tile::ptx::setmaxnreg_increase<Matmul::kConsumerRegisters>();
    Matmul::multiply(p, shared, warpgroup - 1);
  }
  Matmul::Cluster::sync();
}

}  // namespace jaxkern
