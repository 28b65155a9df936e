// out = x w^T for weights of four bits and many rows of x (tokens), or x w: the gradient.
//
// wgmma takes its operand A from registers, where weights become bfloat16 or float16
// (four_bit.cuh): so weights are the rows, tokens the columns, and a tile is out^T. Persistent
// clusters of blocks work through tiles. The blocks of a cluster lie below each other: each has
// weights of its own, and they bring each other the tokens they share. Warpgroups have roles:
//   producer   one thread loads squares of weights (128 rows and columns) and panels of tokens (64
//              columns) into a ring of stages each;
//   consumers  each own 64 rows of weights, a warp 16 of them, and all tokens of the tile. While
//              tensor cores multiply by 64 columns, the consumer expands the next 64.
// For the gradient "rows of weights" are columns of w, and the sum is over its rows: a warp takes
// 16 columns of each strip, transposed.
#pragma once

#include "cuda/matmul/four_bit_columns.cuh"
#include "cuda/tile/tile.cuh"

namespace jaxkern {

template <FourBitFormat kFormat, class T_, class Out_, int kTokens_, bool kGradient_ = false>
struct QuantizedMatmul {
  using T = T_;
  using Out = Out_;
  using Weights = FourBit<kFormat, T>;
  using Cluster = tile::Cluster<2>;
  using Corner = tile::tma::Corner;
  static constexpr int kConsumers = 2, kTokens = kTokens_;
  static constexpr bool kGradient = kGradient_;
  static constexpr int kStrips = 4 * kConsumers, kRows = kFourBitRows * kStrips;
  static constexpr int kThreads = tile::kWarpgroupSize * (1 + kConsumers);
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr int kStages = kTokens == 256 ? 5 : 8, kWeightStages = kGradient ? 4 : 3;
  static constexpr int kSquareBytes =
      kStrips * four_bit_tile_bytes(kFormat, kMostBlocks<kFormat>, kFormat == FourBitFormat::kInt4);
  static constexpr int kPiece = 64 / sizeof(Out);  // tokens that go to memory at once
  static_assert(kRows == kFourBitColumns, "so squares are those of w^T too");
  static constexpr bool kRowFactors = kGradient && kFormat == FourBitFormat::kMxfp4;

  using TileX = tile::SharedTile<T, kTokens, 64>;      // (kTokens, 64)
  using TileOut = tile::SharedTile<Out, kPiece, 64>;   // (kPiece, 64)
  using Sum = tile::RegisterTile<float, 64, kTokens>;  // (64, kTokens)
  using Operand = tile::RegisterTile<T, 64, 64>;       // (64, 64)

  struct Storage {
    TileX x[kStages];
    TileOut out[kConsumers][2];
    alignas(128) char weights[kWeightStages][kSquareBytes];
    alignas(128) T factors[kWeightStages][kRowFactors ? kRows : 2];  // of rows of w
    tile::Ring<kStages> ring;
    tile::Ring<kWeightStages> weight_ring;
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");

  struct Params {
    CUtensorMap x;    // (B * M, K), of the gradient (B * M, N); boxes: a block's share of a tile
    CUtensorMap w;    // (B, strips, panels, bytes of a tile); boxes: kStrips of a panel
    CUtensorMap out;  // (B, M, 1, N), of the gradient (B, M, 1, K); boxes: a piece
    CUtensorMap factors;  // (B, N), if kRowFactors; boxes: of kStrips
    FourBitWeight weight;
    const float* sum_scale;   // (B,), of the gradient
    int tile_bytes;           // of weights
    tile::MatrixOrder order;  // of the tiles of clusters
    int first_row;            // of tiles, that they begin with
    int B, M, N, squares;     // whose products are summed
  };

  // Where this block's tile lies.
  struct Work {
    int batch, row, token;

    __device__ __forceinline__ Work(const Params& p, int index) : batch(index / p.order.count()) {
      const auto at = p.order.at(index % p.order.count());
      row = ((p.first_row + at.row) * Cluster::kBlocks + Cluster::rank()) * kRows;
      token = at.col * kTokens;
    }
  };
  template <class Do>
  __device__ __forceinline__ static void for_each_work(const Params& p, const Do& work) {
    for (int index = Cluster::index(); index < p.B * p.order.count(); index += Cluster::count()) {
      work(Work(p, index));
    }
  }
  // Of weights, of which only integers have several.
  __device__ __forceinline__ static int tile_bytes(const Params& p) {
    return kFormat == FourBitFormat::kInt4 ? p.tile_bytes : kSquareBytes / kStrips;
  }
  __device__ __forceinline__ static int all_strips(const Params& p) {
    return tile::ceil_div(p.N, kFourBitRows);
  }

  __device__ __forceinline__ static void load(const Params& p, Storage& shared) {
    tile::Slot<kStages> slot;
    tile::Slot<kWeightStages> weights;
    for_each_work(p, [&](const Work& at) {
      for (int square = 0; square < p.squares; ++square, weights.advance()) {
        weights.wait_empty(shared.weight_ring);
        auto& arrived = shared.weight_ring.full[weights.stage()];
        constexpr int kFactorBytes = kRowFactors ? kRows * sizeof(T) : 0;
        arrived.arrive_expect(kStrips * tile_bytes(p) + kFactorBytes);
        const int own = at.row / kRows, row = kGradient ? square : own;
        tile::ptx::bulk_tensor_load_by(tile::ptx::evict_first_policy(),
                                       shared.weights[weights.stage()], &p.w, &arrived.word, 0,
                                       kGradient ? own : square, row * kStrips, at.batch);
        if constexpr (kRowFactors) {
          tile::ptx::bulk_tensor_load(shared.factors[weights.stage()], &p.factors, &arrived.word,
                                      row * kRows / 2, at.batch);
        }
        for (int half = 0; half < 2; ++half, slot.advance()) {
          slot.wait_empty(shared.ring);
          auto& full = shared.ring.full[slot.stage()];
          full.arrive_expect(TileX::kBytes);
          tile::tma::load_multicast<Cluster>(
              shared.x[slot.stage()], p.x,
              Corner{at.batch * p.M + at.token, kRows * square + 64 * half}, full);
        }
      }
    });
  }

  using WeightSlot = tile::Slot<kWeightStages>;
  // Where a tile of w of a square lies: the warp's own of its strips, or each of them.
  __device__ __forceinline__ static const char* tile_of(const Params& p, const Storage& shared,
                                                        WeightSlot slot, int strip) {
    return shared.weights[slot.stage()] + strip * tile_bytes(p);
  }

  // What a warp has of weights, of which it expands half a square at a time. `own` is its place
  // among the 16 rows of a square. A strip is read as a whole;
  struct Strip {
    using Tile = FourBitTile<kFormat, T>;
    const typename Tile::Place place;
    Tile strip;

    __device__ __forceinline__ Strip(const Params& p, int own)
        : place(p.weight, own * tile_bytes(p)) {}
    __device__ __forceinline__ void begin(const Params&, Storage&, WeightSlot) {}
    __device__ __forceinline__ void begin_square(const Params& p, Storage& shared,
                                                 WeightSlot slot) {
      slot.wait_full(shared.weight_ring);
      strip.load(p.weight, shared.weights[slot.stage()], place);
      shared.weight_ring.empty[slot.stage()].arrive_warp();
    }
    __device__ __forceinline__ void expand(int half, int step, uint32_t* a) const {
      strip.expand(4 * half + step, a);
    }
    __device__ __forceinline__ void advance(const Params&, Storage&, WeightSlot, int, bool) {}
  };
  // columns, a piece of each of four strips, when the half before has been expanded.
  // NOTE: read where they are expanded, they would be waited for between products: a tile of 128
  // tokens took 9% longer.
  struct Columns {
    const FourBitPlace<kFormat> place;
    FourBitTransposed<kFormat, T> pieces[4];

    __device__ __forceinline__ Columns(const Params& p, int own) : place(p.weight, own) {}
    __device__ __forceinline__ void load(const Params& p, const Storage& shared, WeightSlot slot,
                                         int half) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int strip = 4 * half + step;
        pieces[step].load(p.weight, tile_of(p, shared, slot, strip), place,
                          shared.factors[slot.stage()] + kFourBitRows * strip);
      }
    }
    __device__ __forceinline__ void begin(const Params& p, Storage& shared, WeightSlot slot) {
      slot.wait_full(shared.weight_ring);
      load(p, shared, slot, 0);
    }
    __device__ __forceinline__ void begin_square(const Params&, Storage&, WeightSlot) {}
    __device__ __forceinline__ void expand(int, int step, uint32_t* a) const {
      pieces[step].expand(a);
    }
    __device__ __forceinline__ void advance(const Params& p, Storage& shared, WeightSlot slot,
                                            int half, bool last) {
      if (half == 0) {
        load(p, shared, slot, 1);
        shared.weight_ring.empty[slot.stage()].arrive_warp();
      } else {
        if (!last) slot.next().wait_full(shared.weight_ring);
        load(p, shared, slot.next(), 0);  // after the last square what nobody uses
      }
    }
  };

  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared, int consumer) {
    const int warp = threadIdx.x % tile::kWarpgroupSize / tile::kWarpSize;
    const auto x = tile::settled(tile::k_major<kTokens>(shared.x[0]));
    tile::Slot<kStages> slot;
    WeightSlot weight_slot;
    Sum sum;
    Operand operands[2];
    std::conditional_t<kGradient, Columns, Strip> weights(p, 4 * consumer + warp);
    for_each_work(p, [&](const Work& at) {
      weights.begin(p, shared, weight_slot);
      for (int square = 0; square < p.squares; ++square, weight_slot.advance()) {
        weights.begin_square(p, shared, weight_slot);
#pragma unroll
        for (int half = 0; half < 2; ++half, slot.advance()) {
#pragma unroll
          for (int step = 0; step < 4; ++step) {
            weights.expand(half, step, operands[half].data + 4 * step);
          }
          weights.advance(p, shared, weight_slot, half, square + 1 >= p.squares);
          const bool first = square == 0 && half == 0;
          slot.wait_full(shared.ring);
          tile::mma_fence();
          tile::mma(sum, operands[half], x.of_tile(slot.stage()), !first);
          tile::mma_commit();
          tile::mma_wait<1>();  // the products before these
          if (!first) Cluster::arrive_warp(shared.ring.empty[slot.previous().stage()]);
        }
      }
      tile::mma_wait<0>(sum);
      Cluster::arrive_warp(shared.ring.empty[slot.previous().stage()]);
      store(p, shared.out[consumer], at, sum, consumer);
    });
    if (threadIdx.x % tile::kWarpgroupSize == 0) tile::tma::wait_stores_read();
  }

  // Finishes pieces of some tokens, and sends them out through two buffers.
  __device__ __forceinline__ static void store(const Params& p, TileOut (&out)[2], const Work& at,
                                               const Sum& sum, int consumer) {
    const bool leader = threadIdx.x % tile::kWarpgroupSize == 0;
    const auto sync = [&] { tile::ptx::named_barrier_sync(1 + consumer, tile::kWarpgroupSize); };
    const int row = at.row + 64 * consumer;
    tile::RowVector rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kGradient) {
        rows[i] = p.sum_scale[at.batch] * Weights::kSumScale;
        continue;
      }
      const int last = all_strips(p) * kFourBitRows - 1;
      const int n = min(row + tile::fragment_row(i), last);
      rows[i] = p.weight.row_scale[int64_t{at.batch} * (last + 1) + n] * Weights::kSumScale;
    }
#pragma unroll
    for (int piece = 0; piece < kTokens / kPiece; ++piece) {
      if (at.token + kPiece * piece >= p.M) break;
      tile::RegisterTile<float, 64, kPiece> result;
      tile::RegisterTile<Out, 64, kPiece> rounded;
      tile::convert(result, sum, kPiece * piece);
      tile::scale_rows(result, rows);
      tile::convert(rounded, result, 0);
      if (leader) tile::tma::wait_stores_read<1>();
      sync();  // the buffer is free
      tile::store_transposed(out[piece % 2], rounded);
      tile::tma::fence_writes();
      sync();  // and full
      if (leader) {
        tile::tma::store(p.out, {at.batch, at.token + kPiece * piece, 0}, out[piece % 2], 0, row);
      }
    }
  }
};

template <class Matmul>
__global__ void __cluster_dims__(Matmul::Cluster::kBlocks, 1, 1)
    __launch_bounds__(Matmul::kThreads, 1)
        quantized_matmul_sm90_kernel(const __grid_constant__ typename Matmul::Params p) {
  auto& shared = tile::shared_storage<typename Matmul::Storage>();
  const int warpgroup = tile::warpgroup_index();

  if (threadIdx.x == 0) {
    shared.ring.init(1, 4 * Matmul::kConsumers * Matmul::Cluster::kBlocks);  // warps of the cluster
    shared.weight_ring.init(1, 4 * Matmul::kConsumers);
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
