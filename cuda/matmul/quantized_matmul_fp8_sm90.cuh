// out = (x * x_scale) w^T for x of e4m3 and weights of four bits.
//
// wgmma takes its operand A from registers, where weights become e4m3 (four_bit_fp8.cuh): so
// weights are the rows, tokens the columns, and a tile is out^T. Persistent clusters of blocks work
// through tiles. The blocks of a cluster lie below each other: each has weights of its own, and
// they bring each other the tokens they share. Warpgroups have roles:
//   producer   one thread loads panels of 128 columns, of weights and of tokens, into a ring;
//   consumers  each own 64 rows of weights, a warp 16 of them, and all tokens of the tile.
// A tensor core adds products of 8 bits with about 14. So a consumer takes the product of one
// panel, of some tokens at a time, and adds it to a sum in float32 registers, times the factors
// that rows have in the panel. While it does so, and expands weights, the other consumer
// multiplies.
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
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                (1 + kConsumers) * tile::launch_registers(kThreads));
  static constexpr int kStages = 4;
  static constexpr int kPart = 128;  // tokens of a product
  static constexpr int kParts = kTokens / kPart;
  static constexpr int kPiece = 64 / sizeof(Out);  // tokens that go to memory at once
  static constexpr int kWeightBytes =
      kStrips * four_bit_tile_bytes(kFormat, kMostBlocks<kFormat>, kFormat == FourBitFormat::kInt4);

  using TileX = tile::SharedTile<tile::e4m3, kTokens, kFourBitColumns>;  // (kTokens, 128)
  using TileOut = tile::SharedTile<Out, kPiece, 64>;                     // (kPiece, 64)
  using Sum = tile::RegisterTile<float, 64, kPart>;                      // (64, kPart)
  using Operand = tile::RegisterTile<tile::e4m3, 64, kFourBitColumns>;   // (64, 128)

  struct Storage {
    TileX x[kStages];
    TileOut out[kConsumers][2];
    alignas(128) char weights[kStages][kWeightBytes];
    alignas(16) float token_scale[kConsumers][kTokens];
    tile::Ring<kStages> ring;
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
  template <class Do>
  __device__ __forceinline__ static void for_each_work(const Params& p, const Do& work) {
    for (int index = Cluster::index(); index < p.B * p.order.count(); index += Cluster::count()) {
      work(Work(p, index));
    }
  }
  __device__ __forceinline__ static int all_strips(const Params& p) {
    return tile::ceil_div(p.N, kFourBitRows);
  }

  __device__ __forceinline__ static void load(const Params& p, Storage& shared) {
    tile::Slot<kStages> slot;
    for_each_work(p, [&](const Work& at) {
      for (int panel = 0; panel < p.panels; ++panel, slot.advance()) {
        slot.wait_empty(shared.ring);
        const int stage = slot.stage();
        auto& full = shared.ring.full[stage];
        full.arrive_expect(kStrips * p.tile_bytes + TileX::kBytes);
        tile::ptx::bulk_tensor_load_by(tile::ptx::evict_first_policy(), shared.weights[stage], &p.w,
                                       &full.word, 0, panel, at.batch * all_strips(p) + at.strip);
        tile::tma::load_multicast<Cluster>(
            shared.x[stage], p.x, Corner{at.batch * p.M + at.token, kFourBitColumns * panel}, full);
      }
    });
  }

  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared, int consumer) {
    const int warp = threadIdx.x % tile::kWarpgroupSize / tile::kWarpSize;
    const int place = (4 * consumer + warp) * p.tile_bytes;  // of a warp's weights in a panel
    const auto x = tile::settled(tile::k_major<kPart>(shared.x[0]));
    float* token_scale = shared.token_scale[consumer];
    tile::Slot<kStages> slot;
    for_each_work(p, [&](const Work& at) {
      Sum sums[kParts];
#pragma unroll
      for (int i = 0; i < kParts; ++i) tile::zero(sums[i]);
      load_token_scale(p, token_scale, at);
      for (int panel = 0; panel < p.panels; ++panel, slot.advance()) {
        const int stage = slot.stage();
        slot.wait_full(shared.ring);
        Operand weights;
        const tile::RowVector factors =
            expand_fp8<kFormat>(p.weight, shared.weights[stage] + place, weights);
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
          Sum part;
          tile::mma_fence(part);
          tile::mma(part, weights, x.of_tile(stage).of_rows(kPart * i), false);
          tile::mma_commit();
          tile::mma_wait<0>(part);
          if (i == kParts - 1) Cluster::arrive_warp(shared.ring.empty[stage]);
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

  // Finishes pieces of some tokens, and sends them out through two buffers.
  __device__ __forceinline__ static void store(const Params& p, TileOut (&out)[2],
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
      if (leader) tile::tma::wait_stores_read<1>();
      sync();  // the buffer is free, and token_scale there
      tile::RegisterTile<float, 64, kPiece> result;
      tile::RegisterTile<Out, 64, kPiece> rounded;
      tile::convert(result, sums[token / kPart], token % kPart);
      tile::scale_rows(result, rows);
      tile::scale_cols(result, token_scale + token);
      tile::convert(rounded, result, 0);
      tile::store_transposed(out[piece % 2], rounded);
      tile::tma::fence_writes();
      sync();  // and full
      if (leader) tile::tma::store(p.out, {at.batch, at.token + token, 0}, out[piece % 2], 0, row);
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
