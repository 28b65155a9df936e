// Products of scaled 8-bit matrices on Hopper: out = (lhs * lhs_scale) (rhs * rhs_scale)^T + bias.
//
// Persistent clusters of blocks work through tiles of out. The tiles of a cluster lie side by side
// and its blocks bring each other the rows of lhs that they share; or, where tiles are wider than
// high, below each other, and the blocks share rows of rhs.
// Warpgroups have roles:
//   producer    one thread loads blocks of 128 along K, and scales, into a ring of stages;
//   consumers   each own 64 * kWaves rows of the tile and all of its columns.
// A tensor core adds 8-bit products with about 14 bits. So a consumer takes the product of one
// block of K, a wave of 64 rows at a time, and adds it to a sum in float32 registers, times its
// scales where there are some for blocks; meanwhile another consumer multiplies. With
// kFastAccumulation tensor cores do all of the sum; then consumers can take turns (ping-pong): each
// has tiles of its own, and ends one while another multiplies. Before its turn a consumer does not
// look at the ring, where a stage may have gone around twice since: parity would not tell.
// Such a consumer has as much to do between two products as they take. What is in its loop counts:
// addresses are settled before it, and the next block's barrier is tested among this one's sums.
// Blocks of K with scales of their own are DeepSeek-V3's recipe, the promotion is DeepGEMM's.
// docs/matmul.md draws the schedule.
#pragma once

#include "cuda/matmul/params.h"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

// kNone: scales are those of a row, or of all, and wait until the end.
enum class BlockScales { kNone, k1x128By128x128, k1x128By1x128 };

// A tile has 64 * consumers * waves rows, unless they take turns, and block_n columns.
struct ScaledMatmulConfig {
  int consumers, waves, block_n, stages;
  int blocks;  // of a cluster
  int pieces;  // of a consumer's result that shared memory has room for, 64 rows and 128 bytes each
  bool ping_pong = false;  // consumers take turns, each with tiles of its own of 64 * waves rows
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
  static constexpr int kConsumers = kConfig.consumers, kWaves = kConfig.waves;
  static constexpr int kStages = kConfig.stages;
  static constexpr int kTurns = kConfig.ping_pong ? kConsumers : 1;
  static constexpr int kSharers = kConsumers / kTurns;  // consumers of a tile
  static_assert(kTurns == 1 || kFastAccumulation, "while one adds, another has to multiply");
  static constexpr int kBlockM = 64 * kSharers * kWaves, kBlockN = kConfig.block_n;
  static constexpr int kBlockK = kScaleBlock;
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);
  static constexpr int kProducerRegisters = kTurns > 1 ? 24 : kConsumers == 2 ? 40 : 32;
  static constexpr int kConsumerRegisters = kTurns > 1 ? 240 : kConsumers == 2 ? 232 : 160;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (1 + kConsumers) * tile::launch_registers(kThreads));
  static constexpr bool kLhsBlocks = kScales != BlockScales::kNone;
  static constexpr bool kRhsBlocks = kScales == BlockScales::k1x128By1x128;
  static_assert(!kLhsBlocks || !kFastAccumulation, "scales of blocks need float32 sums");
  static_assert(kScales != BlockScales::k1x128By128x128 || kBlockN == kScaleBlock);

  static constexpr bool kSharesLhs = kBlockM > kBlockN;
  static constexpr int kUnroll = kRhsBlocks || kFastAccumulation ? 1 : 4;  // more would spill
  static constexpr int kPieceCols = tile::kPanelBytes / sizeof(Out);
  static constexpr int kPieces = tile::ceil_div(kBlockN, kPieceCols);
  static constexpr int kColumns = tile::ceil_div(kBlockN, 32) * 32;  // 128-byte aligned for TMA
  static constexpr int kBuffers = kConfig.pieces;
  using TileLhs = tile::SharedTile<Lhs, kBlockM, kBlockK>;  // (kBlockM, kBlockK)
  using TileRhs = tile::SharedTile<Rhs, kBlockN, kBlockK>;  // (kBlockN, kBlockK)
  using TileOut = tile::SharedTile<Out, 64, kPieceCols>;    // a piece on its way out
  using Sum = tile::RegisterTile<float, 64, kBlockN>;       // (64, kBlockN)

  struct Storage {
    TileLhs lhs[kStages];
    TileRhs rhs[kStages];
    TileOut out[kConsumers][kBuffers];
    alignas(128) float lhs_scale[kLhsBlocks ? kStages : 1][kBlockM];
    alignas(128) float rhs_scale[kRhsBlocks ? kStages : kTurns][kColumns];
    alignas(128) float bias[kTurns][kColumns];
    tile::Ring<kStages> ring;
    tile::Ring<kTurns> columns;   // of what the end of a tile reads: bias and scales of columns
    tile::Barrier turns[kTurns];  // to multiply, of consumers that take them
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");
  static constexpr int kStageBytes =
      TileLhs::kBytes + TileRhs::kBytes +
      static_cast<int>(sizeof(float)) * (kLhsBlocks * kBlockM + kRhsBlocks * kBlockN);

  struct Params {
    CUtensorMap lhs, rhs;  // (B * M, K), (B * N, K); boxes: what a block loads of a tile
    CUtensorMap out;       // (B, M, 1, N); boxes: a piece
    CUtensorMap lhs_rows;  // scales of blocks (B * KB, M padded); boxes: those of a tile
    CUtensorMap rhs_rows;  // the same (B * KB, N padded), or without blocks those of rows (B, N)
    CUtensorMap bias_row;  // (1, N); boxes: that of a tile
    const float *lhs_scale, *rhs_scale, *bias;
    int lhs_scale_step,
        rhs_scale_step;       // without blocks: 1 if rows have scales, 0 if all share one
    tile::MatrixOrder order;  // of the tiles of clusters
    int B, M, N, K_blocks;
  };

  static constexpr int kClusterM = kSharesLhs ? kBlockM : kBlockM * Cluster::kBlocks;
  static constexpr int kClusterN = kSharesLhs ? kBlockN * Cluster::kBlocks : kBlockN;

  // Where this block's tile lies in out.
  struct Work {
    int batch, row, col;

    __device__ __forceinline__ Work(const Params& p, int index) : batch(index / p.order.count()) {
      const auto at = p.order.at(index % p.order.count());
      row = at.row * kClusterM + (kSharesLhs ? 0 : Cluster::rank() * kBlockM);
      col = at.col * kClusterN + (kSharesLhs ? Cluster::rank() * kBlockN : 0);
    }
  };
  // Calls work(at, n) for the n-th tile of this block's, n = turn, turn + turns, ...
  template <class Do>
  __device__ __forceinline__ static void for_each_work(const Params& p, const Do& work,
                                                       int turn = 0, int turns = 1) {
    const int count = p.B * p.order.count();
    for (int n = turn;; n += turns) {
      const int index = Cluster::index() + n * Cluster::count();
      if (index >= count) break;
      work(Work(p, index), n);
    }
  }

  // Whether each column of out has something of its own, which shared memory brings.
  __device__ __forceinline__ static bool has_column_scales(const Params& p) {
    return !kLhsBlocks && p.rhs_scale_step;
  }
  __device__ __forceinline__ static bool has_columns(const Params& p) {
    return has_column_scales(p) || p.bias != nullptr;
  }

  __device__ __forceinline__ static void load(const Params& p, Storage& shared) {
    using Alone = tile::Cluster<1>;
    tile::Slot<kStages> slot;
    tile::Slot<kTurns> columns;
    for_each_work(p, [&](const Work& at, int) {
      for (int k = 0; k < p.K_blocks; ++k, slot.advance()) {
        slot.wait_empty(shared.ring);
        const int stage = slot.stage();
        auto& full = shared.ring.full[stage];
        full.arrive_expect(kStageBytes);
        // Rows past the end of a matrix are those of the next one; out has no room for them.
        tile::tma::load_multicast<std::conditional_t<kSharesLhs, Cluster, Alone>>(
            shared.lhs[stage], p.lhs, Corner{at.batch * p.M + at.row, k * kBlockK}, full);
        tile::tma::load_multicast<std::conditional_t<kSharesLhs, Alone, Cluster>>(
            shared.rhs[stage], p.rhs, Corner{at.batch * p.N + at.col, k * kBlockK}, full);
        const int block = at.batch * p.K_blocks + k;
        if constexpr (kLhsBlocks) {
          tile::tma::load(shared.lhs_scale[stage], p.lhs_rows, block, at.row, full);
        }
        if constexpr (kRhsBlocks) {
          tile::tma::load(shared.rhs_scale[stage], p.rhs_rows, block, at.col, full);
        }
      }
      if (has_columns(p)) {
        // Late, because the consumers have to be done with those of the tile before this one.
        columns.wait_empty(shared.columns);
        load_columns(p, shared, at, columns.stage());
        columns.advance();
      }
    });
  }

  __device__ __forceinline__ static void load_columns(const Params& p, Storage& shared,
                                                      const Work& at, int turn) {
    auto& full = shared.columns.full[turn];
    const bool has_scales = has_column_scales(p), has_bias = p.bias != nullptr;
    full.arrive_expect(static_cast<int>(sizeof(float)) * kBlockN * (has_scales + has_bias));
    if (has_scales) tile::tma::load(shared.rhs_scale[turn], p.rhs_rows, at.batch, at.col, full);
    if (has_bias) tile::tma::load(shared.bias[turn], p.bias_row, 0, at.col, full);
  }

  // Which of the tiles, and what part of them, is a consumer's.
  __device__ __forceinline__ static int turn_of(int consumer) { return kTurns > 1 ? consumer : 0; }
  __device__ __forceinline__ static int part_of(int consumer) { return kTurns > 1 ? 0 : consumer; }

  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared, int consumer) {
    const int turn = turn_of(consumer), part = part_of(consumer);
    Sum sums[kWaves];  // rows 64 * kWaves * part and on of the tile
    fill_columns(p, shared);
    const auto work = [&](const Work& at, uint32_t n) {
      tile::Slot<kStages> slot = {n * p.K_blocks};
      const uint32_t parity = n / kTurns % 2;  // of this consumer's tiles
      // Fetched ahead, unless there are no registers for them; then another consumer multiplies
      // while this one waits.
      tile::RowVector rows[kWaves];
      if constexpr (kTurns == 1) {
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) rows[wave] = row_scales(p, at, part, wave);
      } else {
        shared.turns[turn].wait(turn == 0 ? parity ^ 1 : parity);  // the first waits for nobody
      }
      const auto rows_of = [&](int wave) {
        if constexpr (kTurns == 1) return rows[wave];
        return row_scales(p, at, part, wave);
      };
      if constexpr (kFastAccumulation) {
        sum_fast(p, shared, slot, consumer, sums);
      } else {
        sum_promoted(p, shared, slot, consumer, at, sums);
      }
      if (has_columns(p)) {
        shared.columns.full[turn].wait(parity);
        store<true>(p, shared, at, sums, rows_of, consumer);
        shared.columns.empty[turn].arrive_warp();
      } else {
        store<false>(p, shared, at, sums, rows_of, consumer);
      }
    };
    for_each_work(p, work, turn, kTurns);
    if (threadIdx.x % tile::kWarpgroupSize == 0) tile::tma::wait_stores_read();
  }

  __device__ __forceinline__ static auto lhs_rows(Storage& shared, int consumer, int wave) {
    return tile::k_major<64>(shared.lhs[0], 64 * (kWaves * consumer + wave));
  }

  __device__ __forceinline__ static void release(Storage& shared, tile::Slot<kStages> slot) {
    Cluster::arrive_warp(shared.ring.empty[slot.stage()]);
  }

  __device__ __forceinline__ static void sum_fast(const Params& p, Storage& shared,
                                                  tile::Slot<kStages>& slot, int consumer,
                                                  Sum (&sums)[kWaves]) {
    const auto lhs = tile::settled(lhs_rows(shared, part_of(consumer), 0));
    const auto rhs = tile::settled(tile::k_major<kBlockN>(shared.rhs[0]));
    bool ready = slot.is_full(shared.ring);
    for (int k = 0; k < p.K_blocks; ++k, slot.advance()) {
      if (!ready) slot.wait_full(shared.ring);
      const int stage = slot.stage();
      tile::mma_fence();
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
        tile::mma(sums[wave], lhs.of_tile(stage).of_rows(64 * wave), rhs.of_tile(stage), k > 0);
      }
      tile::mma_commit();
      ready = slot.next().is_full(shared.ring);
      tile::mma_wait<1>();  // the products before these
      if (k > 0) release(shared, slot.previous());
    }
    if constexpr (kTurns > 1) shared.turns[(consumer + 1) % kTurns].arrive_warp();
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
    const auto lhs = tile::settled(lhs_rows(shared, consumer, 0));
    const auto rhs = tile::settled(tile::k_major<kBlockN>(shared.rhs[0]));
    const int row = 64 * kWaves * consumer + tile::fragment_row(0);
    // Of 128 columns, the same for all of the tile. A lane has that of one in 32 blocks.
    const float* rhs_scale = nullptr;
    float lane_scale = 1.0f;
    if constexpr (kScales == BlockScales::k1x128By128x128) {
      const int blocks = tile::ceil_div(p.N, kScaleBlock);
      const int block = at.batch * blocks + at.col / kScaleBlock;
      rhs_scale = p.rhs_scale + int64_t{block} * p.K_blocks;
    }
    const auto rhs_scale_of = [&](int k) {
      if constexpr (kScales != BlockScales::k1x128By128x128) return 1.0f;
      constexpr int kLanes = tile::kWarpSize;
      if (k % kLanes == 0) {
        lane_scale = rhs_scale[min(k + static_cast<int>(threadIdx.x) % kLanes, p.K_blocks - 1)];
      }
      return __shfl_sync(0xffffffffu, lane_scale, k % kLanes);
    };
    float next_scale = rhs_scale_of(0);
    bool ready = slot.is_full(shared.ring);
#pragma unroll kUnroll
    for (int k = 0; k < p.K_blocks; ++k, slot.advance()) {
      const float col_scale = next_scale;
      const int stage = slot.stage();
      if (!ready) slot.wait_full(shared.ring);
      const float* row_scales = shared.lhs_scale[kLhsBlocks ? stage : 0] + row;
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
        tile::RowVector row_scale;
        if constexpr (kLhsBlocks) {
#pragma unroll
          for (int i = 0; i < 2; ++i) row_scale[i] = row_scales[64 * wave + 8 * i] * col_scale;
        }
        Sum part;
        tile::mma_fence(part);
        tile::mma(part, lhs.of_tile(stage).of_rows(64 * wave), rhs.of_tile(stage), false);
        tile::mma_commit();
        tile::mma_wait<0>(part);
        if (!kRhsBlocks && wave == kWaves - 1) release(shared, slot);
        if (wave == kWaves - 1) {
          ready = slot.next().is_full(shared.ring);
          next_scale = rhs_scale_of(k + 1);
        }
        if constexpr (kRhsBlocks) {
          // NOTE: not before the wait. While tensor cores read shared memory others are served
          // late: with half of these loads ahead it took 5% more cycles, with all 20% (H200).
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

  // What rows of the result are multiplied by where blocks have no scales: those of a thread in a
  // wave, times that of rhs if it has but one.
  __device__ __forceinline__ static tile::RowVector row_scales(const Params& p, const Work& at,
                                                               int consumer, int wave) {
    tile::RowVector scales = {1.0f, 1.0f};
    if constexpr (!kLhsBlocks) {
      const float rhs = p.rhs_scale_step ? 1.0f : p.rhs_scale[at.batch];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = at.row + 64 * (kWaves * consumer + wave) + tile::fragment_row(i);
        const int m = min(row, p.M - 1);
        scales[i] = rhs * p.lhs_scale[p.lhs_scale_step ? int64_t{at.batch} * p.M + m : at.batch];
      }
    }
    return scales;
  }

  // What columns do not have, for those who have the other. It stays as it is here.
  __device__ __forceinline__ static void fill_columns(const Params& p, Storage& shared) {
    const int t = threadIdx.x - tile::kWarpgroupSize;
    if (t < kBlockN) {
      for (int turn = 0; turn < kTurns; ++turn) {
        if (!kLhsBlocks && !has_column_scales(p)) shared.rhs_scale[turn][t] = 1.0f;
        if (p.bias == nullptr) shared.bias[turn][t] = 0.0f;
      }
    }
    tile::ptx::named_barrier_sync(1 + kConsumers, kConsumers * tile::kWarpgroupSize);
  }

  // A piece of the result, from column `col` of the tile on: the sums times the scales of their
  // rows and columns, plus the bias.
  template <bool kColumns, int kCols>
  __device__ __forceinline__ static void finish(const Storage& shared, int turn, int col,
                                                const tile::RowVector& rows,
                                                tile::RegisterTile<float, 64, kCols>& sum) {
    if constexpr (!kLhsBlocks) tile::scale_rows(sum, rows);
    if constexpr (kColumns && !kLhsBlocks) {
      tile::scale_add_row(sum, shared.rhs_scale[turn] + col, shared.bias[turn] + col);
    } else if constexpr (kColumns) {
      tile::add_row(sum, shared.bias[turn] + col);
    }
  }

  // The first column of a piece. Where whole pieces do not fit, the last two share some columns,
  // and write the same to them.
  __device__ static constexpr int piece_col(int piece) {
    return piece < kPieces - 1 ? kPieceCols * piece : kBlockN - kPieceCols;
  }

  // Finishes pieces of 64 rows and 128 bytes and sends them out through the buffers; the last ones
  // are still on their way when the next tile's products begin.
  template <bool kColumns, class RowsOf>
  __device__ __forceinline__ static void store(const Params& p, Storage& shared, const Work& at,
                                               const Sum (&sums)[kWaves], const RowsOf& rows_of,
                                               int consumer) {
    const bool leader = threadIdx.x % tile::kWarpgroupSize == 0;
    const auto sync = [&] { tile::ptx::named_barrier_sync(1 + consumer, tile::kWarpgroupSize); };
    // Pieces at once, and groups of so many buffers, which take turns.
    constexpr int kGroup = kTurns > 1 ? 1 : kPieces < kBuffers ? kPieces : kBuffers;
    constexpr int kGroups = kBuffers / kGroup;
    static_assert(kWaves * kPieces / kGroup % kGroups == 0, "tiles begin with the first group");
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
      const int row = at.row + 64 * (kWaves * part_of(consumer) + wave);
      const tile::RowVector rows = rows_of(wave);
#pragma unroll
      for (int first = 0; first < kPieces; first += kGroup) {
        const int buffer = (wave * kPieces / kGroup + first / kGroup) % kGroups * kGroup;
        // With turns, again for each piece: addresses of all would take too many registers.
        auto& out = (kTurns > 1 ? tile::settled(shared) : shared).out[consumer];
        if (leader) tile::tma::wait_stores_read<kGroups - 1>();
        sync();  // the buffers are free
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const int col = piece_col(first + i);
          tile::RegisterTile<float, 64, kPieceCols> result;
          tile::RegisterTile<Out, 64, kPieceCols> rounded;
          tile::convert(result, sums[wave], col);
          finish<kColumns>(shared, turn_of(consumer), col, rows, result);
          tile::convert(rounded, result, 0);
          tile::store(out[buffer + i], 0, rounded);
        }
        tile::tma::fence_writes();
        sync();  // and full
        if (leader) {
#pragma unroll
          for (int i = 0; i < kGroup; ++i) {
            const int col = piece_col(first + i);
            tile::tma::store(p.out, {at.batch, row, 0}, out[buffer + i], 0, at.col + col);
          }
        }
      }
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
    shared.ring.init(1, 4 * Matmul::kSharers * Matmul::Cluster::kBlocks);  // warps of the cluster
    shared.columns.init(1, 4 * Matmul::kSharers);
    for (auto& turn : shared.turns) turn.init(4);  // warps of a consumer
    tile::ptx::fence_mbarrier_init();
  }
  Matmul::Cluster::sync();

  if (warpgroup == 0) {
    tile::ptx::setmaxnreg_decrease<Matmul::kProducerRegisters>();
    if (threadIdx.x == 0) Matmul::load(p, shared);
  } else {
    tile::ptx::setmaxnreg_increase<Matmul::kConsumerRegisters>();
    Matmul::multiply(p, tile::settled(shared), warpgroup - 1);
  }
  Matmul::Cluster::sync();
}

}  // namespace jaxkern
