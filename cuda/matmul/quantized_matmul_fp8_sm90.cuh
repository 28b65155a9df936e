// out = (x * x_scale) w^T for x of e4m3 and weights of four bits.
//
// Weights are the rows, tokens the columns, and a tile is out^T. Persistent clusters of blocks work
// through tiles. The blocks of a cluster lie below each other: each has weights of its own, and
// they bring each other the tokens they share. Warpgroups have roles:
//   expander   expands panels of weights, of 128 columns, to e4m3 in shared memory, each once for
//   all
//              tokens of a tile (four_bit_fp8.cuh); one of its threads loads panels of packed
//              weights and of tokens;
//   consumers  each own 64 rows of weights and all tokens of the tile.
// A tensor core adds products of 8 bits with about 14. So a consumer takes the product of one
// panel, of some tokens at a time, and adds it to a sum in float32 registers, times the factors
// that rows have in the panel; meanwhile the other consumer multiplies.
#pragma once

#include "cuda/matmul/four_bit_fp8.cuh"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

template <FourBitFormat kFormat, class Out_, int kTokens_>
struct QuantizedMatmulFp8 {
  using Out = Out_;
  using Cluster = tile::Cluster<2>;
  using Corner = tile::tma::Corner;
  static constexpr int kConsumers = 2, kTokens = kTokens_;
  static constexpr int kStrips = 4 * kConsumers, kRows = kFourBitRows * kStrips;
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);
  static constexpr int kExpanderRegisters = 72, kConsumerRegisters = 216;
  static_assert(kExpanderRegisters + kConsumers * kConsumerRegisters <=
                (1 + kConsumers) * tile::launch_registers(kThreads));
  static constexpr int kStages = 4, kPackedStages = 3, kWeightStages = 3;
  static constexpr int kPart = kTokens < 128 ? kTokens : 128;  // tokens of a product
  static constexpr int kParts = kTokens / kPart;
  static constexpr int kPiece = 64 / sizeof(Out);  // tokens that go to memory at once
  static constexpr int kPackedBytes =
      kStrips * four_bit_tile_bytes(kFormat, kMostBlocks<kFormat>, kFormat == FourBitFormat::kInt4);

  using TileX = tile::SharedTile<tile::e4m3, kTokens, kFourBitColumns>;  // (kTokens, 128)
  using TileW = tile::SharedTile<tile::e4m3, kRows, kFourBitColumns>;    // (kRows, 128)
  using TileOut = tile::SharedTile<Out, kPiece, 64>;                     // (kPiece, 64)
  using Sum = tile::RegisterTile<float, 64, kPart>;                      // (64, kPart)

  struct Storage {
    TileX x[kStages];
    TileW w[kWeightStages];
    TileOut out[kConsumers];
    alignas(128) char packed[kPackedStages][kPackedBytes];
    float factors[kWeightStages][kRows];
    alignas(16) float token_scale[kConsumers][kTokens];
    tile::Ring<kStages> ring;
    tile::Ring<kPackedStages> packed_ring;
    tile::Ring<kWeightStages> weight_ring;
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");

  struct Params {
    CUtensorMap x;    // (B * M, K); boxes: a block's share of a tile
    CUtensorMap w;    // (B * strips, panels, bytes of a tile); boxes: kStrips of a panel
    CUtensorMap out;  // (B, M, 1, N); boxes: a piece
    const float* x_scale;
    FourBitWeight weight;
    int tile_bytes;           // of weights
    tile::MatrixOrder order;  // of the tiles of clusters
    int B, M, N, panels;      // of 128 columns
  };

  // Where this block's tile lies.
  struct Work {
    int batch, strip, token;

    __device__ __forceinline__ Work(const Params& p, int index) : batch(index / p.order.count()) {
      const auto at = p.order.at(index % p.order.count());
      strip = (at.row * Cluster::kBlocks + Cluster::rank()) * kStrips;
      token = at.col * kTokens;
    }
  };
  __device__ __forceinline__ static int all_work(const Params& p) { return p.B * p.order.count(); }
  template <class Do>
  __device__ __forceinline__ static void for_each_work(const Params& p, const Do& work) {
    for (int index = Cluster::index(); index < all_work(p); index += Cluster::count()) {
      work(Work(p, index));
    }
  }
  __device__ __forceinline__ static int all_strips(const Params& p) {
    return tile::ceil_div(p.N, kFourBitRows);
  }

  // Loads panels of one tile after another, by one thread.
  struct Loader {
    const Params& p;
    Storage& shared;
    int index = Cluster::index(), panel = 0;
    tile::Slot<kStages> slot = {};
    tile::Slot<kPackedStages> packed = {};

    // All that there is room for. The expander is at panel number `count`, and needs that one.
    __device__ __forceinline__ void load(uint32_t count) {
      while (index < all_work(p)) {
        if (slot.count <= count) {
          slot.wait_empty(shared.ring);
          packed.wait_empty(shared.packed_ring);
        } else if (!slot.is_empty(shared.ring) || !packed.is_empty(shared.packed_ring)) {
          return;
        }
        load_panel(Work(p, index));
        slot.advance();
        packed.advance();
        if (++panel == p.panels) {
          panel = 0;
          index += Cluster::count();
        }
      }
    }
    __device__ __forceinline__ void load_panel(const Work& at) {
      auto& arrived = shared.packed_ring.full[packed.stage()];
      arrived.arrive_expect(kStrips * p.tile_bytes);
      tile::ptx::bulk_tensor_load_by(tile::ptx::evict_first_policy(), shared.packed[packed.stage()],
                                     &p.w, &arrived.word, 0, panel,
                                     at.batch * all_strips(p) + at.strip);
      auto& full = shared.ring.full[slot.stage()];
      full.arrive_expect(TileX::kBytes);
      tile::tma::load_multicast<Cluster>(shared.x[slot.stage()], p.x,
                                         Corner{at.batch * p.M + at.token, kFourBitColumns * panel},
                                         full);
    }
  };

  __device__ __forceinline__ static void expand(const Params& p, Storage& shared) {
    const int warp = threadIdx.x / tile::kWarpSize;
    Loader loader{p, shared};
    tile::Slot<kPackedStages> packed;
    tile::Slot<kWeightStages> weights;
    for_each_work(p, [&](const Work&) {
      for (int panel = 0; panel < p.panels; ++panel, packed.advance(), weights.advance()) {
        if (threadIdx.x == 0) loader.load(packed.count);
        __syncwarp();
        packed.wait_full(shared.packed_ring);
        weights.wait_empty(shared.weight_ring);
        const int stage = weights.stage();
#pragma unroll 1
        for (int strip = warp; strip < kStrips; strip += 4) {
          const char* tile = shared.packed[packed.stage()] + strip * p.tile_bytes;
          expand_fp8<kFormat>(p.weight, tile, shared.w[stage], kFourBitRows * strip,
                              shared.factors[stage]);
        }
        shared.packed_ring.empty[packed.stage()].arrive_warp();
        tile::tma::fence_writes();
        shared.weight_ring.full[stage].arrive_warp();
      }
    });
  }

  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared, int consumer) {
    const auto w = tile::settled(tile::k_major<64>(shared.w[0], 64 * consumer));
    const auto x = tile::settled(tile::k_major<kPart>(shared.x[0]));
    const int row = 64 * consumer + tile::fragment_row(0);
    float* token_scale = shared.token_scale[consumer];
    tile::Slot<kStages> slot;
    tile::Slot<kWeightStages> weights;
    for_each_work(p, [&](const Work& at) {
      Sum sums[kParts];
#pragma unroll
      for (int i = 0; i < kParts; ++i) tile::zero(sums[i]);
      load_token_scale(p, token_scale, at);
      for (int panel = 0; panel < p.panels; ++panel, slot.advance(), weights.advance()) {
        const int stage = slot.stage(), weight_stage = weights.stage();
        slot.wait_full(shared.ring);
        weights.wait_full(shared.weight_ring);
        tile::RowVector factors;
#pragma unroll
        for (int i = 0; i < 2; ++i) factors[i] = shared.factors[weight_stage][row + 8 * i];
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          Sum part;
          tile::mma_fence(part);
          tile::mma(part, w.of_tile(weight_stage), x.of_tile(stage).of_rows(kPart * i), false);
          tile::mma_commit();
          tile::mma_wait<0>(part);
          if (i == kParts - 1) {
            Cluster::arrive_warp(shared.ring.empty[stage]);
            shared.weight_ring.empty[weight_stage].arrive_warp();
          }
          tile::add_scaled(sums[i], part, factors);
        }
      }
      store(p, shared.out[consumer], token_scale, at, sums, consumer);
    });
    if (threadIdx.x % tile::kWarpgroupSize == 0) tile::tma::wait_stores_read();
  }

  // By a consumer for itself; it has not read those of the tile before for a barrier.
  __device__ __forceinline__ static void load_token_scale(const Params& p, float* to,
                                                          const Work& at) {
    for (int i = threadIdx.x % tile::kWarpgroupSize; i < kTokens; i += tile::kWarpgroupSize) {
      to[i] = p.x_scale[int64_t{at.batch} * p.M + min(at.token + i, p.M - 1)];
    }
  }

  // Finishes pieces of some tokens, and sends them out.
  __device__ __forceinline__ static void store(const Params& p, TileOut& out,
                                               const float* token_scale, const Work& at,
                                               const Sum (&sums)[kParts], int consumer) {
    const bool leader = threadIdx.x % tile::kWarpgroupSize == 0;
    const auto sync = [&] { tile::ptx::named_barrier_sync(1 + consumer, tile::kWarpgroupSize); };
    const int row = kFourBitRows * at.strip + 64 * consumer;
    tile::RowVector rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int last = all_strips(p) * kFourBitRows - 1;
      const int n = min(row + tile::fragment_row(i), last);
      rows[i] = p.weight.row_scale[int64_t{at.batch} * (last + 1) + n];
    }
#pragma unroll
    for (int piece = 0; piece < kTokens / kPiece; ++piece) {
      const int token = kPiece * piece;
      if (at.token + token >= p.M) break;
      if (leader) tile::tma::wait_stores_read();
      sync();  // the buffer is free, and token_scale there
      tile::RegisterTile<float, 64, kPiece> result;
      tile::RegisterTile<Out, 64, kPiece> rounded;
      tile::convert(result, sums[token / kPart], token % kPart);
      tile::scale_rows(result, rows);
      tile::scale_cols(result, token_scale + token);
      tile::convert(rounded, result, 0);
      tile::store_transposed(out, rounded);
      tile::tma::fence_writes();
      sync();  // and full
      if (leader) tile::tma::store(p.out, {at.batch, at.token + token, 0}, out, 0, row);
    }
  }
};

template <class Matmul>
__global__ void __cluster_dims__(Matmul::Cluster::kBlocks, 1, 1)
    __launch_bounds__(Matmul::kThreads, 1)
        quantized_matmul_fp8_sm90_kernel(const __grid_constant__ typename Matmul::Params p) {
  auto& shared = tile::shared_storage<typename Matmul::Storage>();
  const int warpgroup = tile::warpgroup_index();

  if (threadIdx.x == 0) {
    shared.ring.init(1, 4 * Matmul::kConsumers * Matmul::Cluster::kBlocks);  // warps of the cluster
    shared.packed_ring.init(1, 4);
    shared.weight_ring.init(4, 4 * Matmul::kConsumers);
    tile::ptx::fence_mbarrier_init();
  }
  Matmul::Cluster::sync();

  if (warpgroup == 0) {
    tile::ptx::setmaxnreg_decrease<Matmul::kExpanderRegisters>();
    Matmul::expand(p, tile::settled(shared));
  } else {
    tile::ptx::setmaxnreg_increase<Matmul::kConsumerRegisters>();
    Matmul::multiply(p, tile::settled(shared), warpgroup - 1);
  }
  Matmul::Cluster::sync();
}

}  // namespace jaxkern
