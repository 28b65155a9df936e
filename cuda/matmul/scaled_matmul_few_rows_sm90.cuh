// scaled_matmul_sm90.cuh's product for few rows of lhs (tokens, up to kTokens), where it is reading
// rhs (weights) that takes the time.
//
// Tensor cores multiply 64 rows at a time, so weights are those rows: a tile is out^T, some rows of
// rhs by all tokens. How many rows is a parameter of the launch, any multiple of 8: all
// multiprocessors then get equal tiles. Persistent blocks go from tile to tile and keep on reading.
// Where tiles would be low, and tokens read too often, two blocks in a cluster share out the K of
// higher ones. Warps have roles:
//   consumers  warpgroups, each for 64 rows of rhs, or kWaves times as many, all tokens or half of
//              them, and one of the blocks of 128 along K (panels) that a stage has;
//   loader     one thread loads panels of weights and tokens, and scales, into a ring of stages.
// Where little is read, what is not reading shows. So the first weights are on their way before the
// barriers of all else are there; what the end of a tile reads comes before its products; and two
// blocks add up sums without waiting for each other's end: each owns some parts of the tile, sums
// of other parts go straight into stages that the other block no longer uses and complete on a
// barrier there. Sums have one order: results repeat bitwise. docs/matmul.md says more of why.
#pragma once

#include <algorithm>

#include "cuda/matmul/scaled_matmul_sm90.cuh"

namespace jaxkern {

struct FewRowsConfig {
  int tokens, groups;  // a tile has up to 64 * groups rows of rhs
  int halves;          // 2: a group has two consumers, each for half of the tokens
  int panels;          // of a stage
  int waves = 1;       // groups of a consumer
};

template <class Out_, BlockScales kScales_, bool kFastAccumulation_, FewRowsConfig kConfig>
struct ScaledMatmulFewRows {
  using Out = Out_;
  static constexpr BlockScales kScales = kScales_;
  static constexpr bool kFastAccumulation = kFastAccumulation_;
  static constexpr bool kBlocks = kScales != BlockScales::kNone;
  static_assert(kScales != BlockScales::k1x128By1x128, "weights have scales for 128 rows");
  static_assert(!kBlocks || !kFastAccumulation, "scales of blocks need float32 sums");

  static constexpr int kTokens = kConfig.tokens, kGroups = kConfig.groups;
  static constexpr int kHalves = kConfig.halves, kPanels = kConfig.panels, kWaves = kConfig.waves;
  static constexpr int kRows = 64 * kGroups;              // of a tile, at most
  static constexpr int kOwnTokens = kTokens / kHalves;    // of a consumer
  static constexpr int kUnits = kGroups * kHalves;        // of a tile: 64 rows by kOwnTokens
  static constexpr int kUnitConsumers = kUnits / kWaves;  // for one panel
  static constexpr int kConsumers = kUnitConsumers * kPanels;
  static_assert(kHalves == 1 || kTokens > 32, "a unit with one part has no other half");
  static_assert(kWaves == 1 || kPanels == 1, "waves are for sums that take many registers");
  static constexpr int kThreads =
      tile::kWarpgroupSize * kConsumers + (kWaves > 1 ? tile::kWarpgroupSize : tile::kWarpSize);
  static constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;  // with waves

  // Parts of a unit's tokens, of which each block owns one, and what goes to memory at once.
  static constexpr int kParts = kOwnTokens > 16 ? 2 : 1, kPartTokens = kOwnTokens / kParts;
  static constexpr int kPieceTokens = 16;

  using TileRhs = tile::SharedTile<tile::e4m3, kRows * kPanels, 128>;  // kPanels of p.rows rows
  using TileLhs = tile::SharedTile<tile::e4m3, kTokens * kPanels, 128>;
  using TileOut = tile::SharedTile<Out, kPieceTokens, 64>;
  using Sum = tile::RegisterTile<float, 64, kOwnTokens>;  // a unit's, transposed
  static constexpr int kFloat = sizeof(float);
  static constexpr int kPartBytes = 64 * kPartTokens * kFloat, kUnitBytes = kParts * kPartBytes;
  static constexpr int kPartsPerStage = TileRhs::kBytes / kPartBytes;

  // All the shared memory there is: most of it is weights on their way.
  static constexpr int kLhsBytes = TileLhs::kBytes + kBlocks * kPanels * kTokens * kFloat;
  static constexpr int kScaleRow = kTokens < 32 ? 32 : kTokens;  // copies begin at 128 bytes
  static constexpr int kStageBytes =
      TileRhs::kBytes + TileLhs::kBytes + kBlocks * kPanels * kScaleRow * kFloat;
  static constexpr int kOtherBytes =
      kUnits * (TileOut::kBytes + (kPanels - 1) * kUnitBytes + kOwnTokens * kFloat) + (2 << 10);
  static constexpr int kStages = std::min(12, (tile::kMaxSharedBytes - kOtherBytes) / kStageBytes);
  struct Storage {
    TileRhs rhs[kStages];
    TileLhs lhs[kStages];
    TileOut out[kUnits];
    alignas(128) float lhs_scale[kBlocks ? kStages : 1][kPanels][kScaleRow];
    alignas(128) float sums[std::max(kPanels - 1, 1)][kUnits][kPanels > 1 ? 64 * kOwnTokens : 4];
    alignas(8) float token_scale[kUnits][kOwnTokens];
    tile::Ring<kStages> ring;
    tile::Barrier room, received[kUnits];  // for sums in the other block; of its, here
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the tiles must fit a block");
  static_assert(kUnits * kUnitBytes / 2 <= kStages * TileRhs::kBytes, "stages receive sums");

  struct Params {
    CUtensorMap lhs, rhs;  // (B * M, K), (B * N, K); boxes: lhs_box and rhs_box panels of a tile
    CUtensorMap lhs_rows;  // scales (B * KB, M padded); boxes: those of a tile
    int lhs_box, rhs_box;
    const float *lhs_scale, *rhs_scale, *bias;
    Out* out;
    bool lhs_row_scales, rhs_row_scales;  // without blocks: rows have scales, or all share one
    int rows, tiles;                      // of a tile, of a matrix
    int splits;                           // blocks that share out K, 1 or 2; two have but one tile
    int owners;                           // of two, those that own parts; else 0
    int stages;                           // of a tile, all of K
    int first_stages;                     // whose weights come before all else
    int sum_stages;                       // that take what the other block sends
    int releases;                         // of a stage
    int rhs_bytes;                        // of its weights
    int B, M, N, K_blocks;
  };

  struct Place {
    int split, first, step;  // its tiles are the first and those that follow in steps
    int begin, end;          // its stages of each

    __device__ __forceinline__ explicit Place(const Params& p)
        : split(blockIdx.x & (p.splits - 1)),
          first(blockIdx.x >> (p.splits - 1)),
          step(gridDim.x >> (p.splits - 1)),
          begin(first_stage(p, split)),
          end(first_stage(p, split + 1)) {}
    __device__ __forceinline__ static int first_stage(const Params& p, int split) {
      return split < p.splits ? p.stages / 2 * split : p.stages;
    }
    __device__ __forceinline__ bool owns(const Params& p, int part) const {
      return p.splits == 1 || part % 2 == split;
    }
  };
  struct Work {
    int batch, col;

    __device__ __forceinline__ Work(const Params& p, int index)
        : batch(p.B > 1 ? index / p.tiles : 0), col((index - batch * p.tiles) * p.rows) {}
  };

  // NOTE: the policies are worth 3 to 6% at 128 tokens: without them the L2 cache loses tokens,
  // which all blocks read, to weights, which nobody reads again (H200).
  __device__ __forceinline__ static void load_rhs(const Params& p, Storage& shared, const Work& at,
                                                  int s, int stage) {
    auto& full = shared.ring.full[stage];
    full.arrive_expect(p.rhs_bytes + kLhsBytes);
    tile::tma::load_panels<kPanels>(shared.rhs[stage].data, p.rhs, p.rhs_box, p.rows,
                                    {at.batch * p.N + at.col, s * kPanels}, full,
                                    tile::ptx::evict_first_policy());
  }
  __device__ __forceinline__ static void load_lhs(const Params& p, Storage& shared, const Work& at,
                                                  int s, int stage) {
    auto& full = shared.ring.full[stage];
    tile::tma::load_panels<kPanels>(shared.lhs[stage].data, p.lhs, p.lhs_box, kTokens,
                                    {at.batch * p.M, s * kPanels}, full,
                                    tile::ptx::evict_last_policy());
    if constexpr (kBlocks) {
      const int block = at.batch * p.K_blocks + s * kPanels;
#pragma unroll
      for (int i = 0; i < kPanels; ++i) {
        tile::tma::load(shared.lhs_scale[stage][i], p.lhs_rows, block + i, 0, full);
      }
    }
  }

  // Loads the first weights, when there is what they complete on and nothing else. Returns of how
  // many stages.
  __device__ __forceinline__ static int begin(const Params& p, Storage& shared,
                                              const Place& place) {
    tile::ptx::prefetch_tensor_map(&p.lhs);
    for (auto& full : shared.ring.full) full.init(1);
    tile::ptx::fence_mbarrier_init();
    const Work at(p, place.first);
    const int stages = min(p.first_stages, place.end - place.begin);
#pragma unroll 1  // the GPU would have to fetch more code first
    for (int i = 0; i < stages; ++i) load_rhs(p, shared, at, place.begin + i, i);
    for (auto& empty : shared.ring.empty) empty.init(p.releases);
    for (auto& received : shared.received) received.init(1);
    shared.room.init(1);
    tile::ptx::fence_mbarrier_init();
    return stages;
  }

  __device__ __forceinline__ static void load(const Params& p, Storage& shared, const Place& place,
                                              int begun) {
    tile::Slot<kStages> slot;
    for (int index = place.first; index < p.B * p.tiles; index += place.step) {
      const Work at(p, index);
      for (int s = place.begin; s < place.end; ++s, slot.advance()) {
        if (static_cast<int>(slot.count) >= begun) {
          slot.wait_empty(shared.ring);
          load_rhs(p, shared, at, s, slot.stage());
        }
        load_lhs(p, shared, at, s, slot.stage());
      }
    }
    if (place.split < p.owners) {
      for (int i = 0; i < p.sum_stages; ++i, slot.advance()) slot.wait_empty(shared.ring);
      tile::arrive_at(shared.room, place.split ^ 1);
    }
  }

  // What a consumer has of a tile. Its waves are groups, and units, one after another.
  struct Role {
    int group, half, panel, unit;

    __device__ __forceinline__ explicit Role(int consumer)
        : group(consumer % (kGroups / kWaves) * kWaves),
          half(consumer / (kGroups / kWaves) % kHalves),
          panel(consumer / kUnitConsumers),
          unit(group + kGroups * half) {}
    __device__ __forceinline__ bool has(const Params& p, int wave) const {
      return 64 * (group + wave) < p.rows;  // a tile is that high
    }
    // A thread's rows of rhs; those beyond the matrix are the last.
    __device__ __forceinline__ int row(const Params& p, const Work& at, int wave, int i) const {
      return min(at.col + 64 * (group + wave) + tile::fragment_row(i), p.N - 1);
    }
  };

  // The sums over one panel of each stage.
  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared,
                                                  const Place& place, const Role& role,
                                                  const Work& at, tile::Slot<kStages>& slot,
                                                  Sum (&sums)[kWaves]) {
    const auto rhs = tile::settled(
        tile::k_major<64>(shared.rhs[0]).of_rows(p.rows * role.panel + 64 * role.group));
    const auto lhs = tile::settled(
        tile::k_major<kOwnTokens>(shared.lhs[0], kTokens * role.panel + kOwnTokens * role.half));
    const float* rhs_scale[kWaves][2];  // of a thread's rows, for the blocks of K
#pragma unroll
    for (int wave = 0; wave < kWaves; ++wave) {
      tile::zero(sums[wave]);
#pragma unroll
      for (int i = 0; kBlocks && i < 2; ++i) {
        const int block =
            at.batch * tile::ceil_div(p.N, kScaleBlock) + role.row(p, at, wave, i) / kScaleBlock;
        rhs_scale[wave][i] = p.rhs_scale + int64_t{block} * p.K_blocks;
      }
    }
    bool ready = slot.is_full(shared.ring);
    for (int s = place.begin; s < place.end; ++s, slot.advance()) {
      const int k = s * kPanels + role.panel, stage = slot.stage();
      if (!ready) slot.wait_full(shared.ring);
      if constexpr (kFastAccumulation) {
        tile::mma_fence();
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
          tile::mma(sums[wave], rhs.of_tile(stage).of_rows(64 * wave), lhs.of_tile(stage),
                    s > place.begin);
        }
        tile::mma_commit();
        ready = slot.next().is_full(shared.ring);
        tile::mma_wait<1>();  // the products before these
        if (s > place.begin) shared.ring.empty[slot.previous().stage()].arrive_warp();
      } else {
#pragma unroll
        for (int wave = 0; wave < kWaves; ++wave) {
          const bool last = wave == kWaves - 1;
          tile::RowVector row_scale;
#pragma unroll
          for (int i = 0; kBlocks && i < 2; ++i) {
            row_scale[i] = rhs_scale[wave][i][min(k, p.K_blocks - 1)];
          }
          Sum part;
          tile::mma_fence(part);
          tile::mma(part, rhs.of_tile(stage).of_rows(64 * wave), lhs.of_tile(stage), false);
          tile::mma_commit();
          tile::mma_wait<0>(part);
          if (!kBlocks && last) shared.ring.empty[stage].arrive_warp();
          if (last) ready = slot.next().is_full(shared.ring);
          if constexpr (!kBlocks) {
            tile::add(sums[wave], part);
          } else if (kPanels == 1 || k < p.K_blocks) {  // scales end with K
            tile::add_scaled(sums[wave], part, row_scale,
                             shared.lhs_scale[stage][role.panel] + kOwnTokens * role.half);
          }
        }
        if constexpr (kBlocks) shared.ring.empty[stage].arrive_warp();
      }
    }
    if constexpr (kFastAccumulation) {
      tile::mma_wait<0>();
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) tile::pin(sums[wave]);
      if (place.begin < place.end) shared.ring.empty[slot.previous().stage()].arrive_warp();
    }
  }

  // Adds the sums of a unit's other panels to those of its first.
  __device__ __forceinline__ static void add_panels(Storage& shared, const Role& role, Sum& sum) {
    const auto sync = [&] {
      tile::ptx::named_barrier_sync(1 + kUnits + role.unit, kPanels * tile::kWarpgroupSize);
    };
    if (role.panel > 0) tile::store_fragments(shared.sums[role.panel - 1][role.unit], sum);
    sync();  // they are there
#pragma unroll
    for (int i = 0; role.panel == 0 && i < kPanels - 1; ++i) {
      tile::add_fragments_at<kOwnTokens>(sum, 0, shared.sums[i][role.unit]);
    }
    sync();  // and read
  }

  // Where a part's owner gets the other block's sums: in the stages that come after its last.
  __device__ __forceinline__ static float* sums_of_part(const Params& p, Storage& shared,
                                                        int part) {
    const int used = Place::first_stage(p, part % 2 + 1) - Place::first_stage(p, part % 2);
    const unsigned stage = (used + part / 2 / kPartsPerStage) % unsigned{kStages};
    return reinterpret_cast<float*>(shared.rhs[stage].data +
                                    part / 2 % kPartsPerStage * kPartBytes);
  }
  __device__ __forceinline__ static void send(const Params& p, Storage& shared, const Place& place,
                                              int unit, const Sum& sum) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int part = unit * kParts + i;
      if (place.owns(p, part)) continue;
      shared.room.wait(0);
      tile::send_fragments<kPartTokens>(sums_of_part(p, shared, part), sum, kPartTokens * i,
                                        shared.received[unit], place.split ^ 1);
    }
  }
  __device__ __forceinline__ static void receive(const Params& p, Storage& shared,
                                                 const Place& place, int unit, Sum& sum) {
    if (kParts == 1 && !place.owns(p, unit)) return;
    if (threadIdx.x % tile::kWarpgroupSize == 0) {
      shared.received[unit].arrive_expect(kPartBytes);
    }
    shared.received[unit].wait(0);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const int part = unit * kParts + i;
      if (!place.owns(p, part)) continue;
      tile::add_fragments_at<kPartTokens>(sum, kPartTokens * i, sums_of_part(p, shared, part));
    }
  }

  // What finishes a thread's rows of rhs; token_scale in shared memory is what tokens have.
  struct Finish {
    tile::RowVector scale, bias;
  };
  __device__ __forceinline__ static Finish load_finish(const Params& p, Storage& shared,
                                                       const Role& role, const Work& at, int wave) {
    Finish finish;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = role.row(p, at, wave, i);
      const int64_t at_scale = p.rhs_row_scales ? int64_t{at.batch} * p.N + n : at.batch;
      finish.scale[i] = kBlocks ? 1.0f : p.rhs_scale[at_scale];
      finish.bias[i] = p.bias != nullptr ? p.bias[n] : 0.0f;
    }
    const int token = threadIdx.x % tile::kWarpgroupSize;
    if (!kBlocks && role.panel == 0 && token < kOwnTokens) {
      const int m = min(kOwnTokens * role.half + token, p.M - 1);
      shared.token_scale[role.unit + wave][token] =
          p.lhs_scale[p.lhs_row_scales ? int64_t{at.batch} * p.M + m : at.batch];
    }
    return finish;
  }

  // Finishes the parts of a wave that are this block's, and writes them through shared memory, so
  // that a warp's instruction writes whole lines. It is over when they are on their way.
  __device__ __forceinline__ static void store(const Params& p, Storage& shared, const Place& place,
                                               const Role& role, const Work& at, int wave,
                                               const Finish& finish, const Sum& sum) {
    const int unit = role.unit + wave;
    const auto sync = [&] { tile::ptx::named_barrier_sync(1 + unit, tile::kWarpgroupSize); };
    auto& out = shared.out[unit];
    constexpr int kChunk = 16 / sizeof(Out), kChunks = 64 / kChunk;
#pragma unroll
    for (int first = 0; first < kOwnTokens; first += kPieceTokens) {
      if (kOwnTokens * role.half + first >= p.M) break;
      if (!place.owns(p, unit * kParts + first / kPartTokens)) continue;
      tile::RegisterTile<float, 64, kPieceTokens> result;
      tile::RegisterTile<Out, 64, kPieceTokens> rounded;
      tile::convert(result, sum, first);
      sync();  // out is free, and token_scale there
#pragma unroll
      for (int j = 0; j < kPieceTokens / 8; ++j) {
        const float* tokens = shared.token_scale[unit] + first + tile::fragment_col(j);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = result.at(j, i, c);
            x = x * (kBlocks ? 1.0f : finish.scale[i] * tokens[c]) + finish.bias[i];
          }
        }
      }
      tile::convert(rounded, result, 0);
      tile::store_transposed(out, rounded);
      sync();  // and full
#pragma unroll
      for (int i = threadIdx.x % tile::kWarpgroupSize; i < kPieceTokens * kChunks;
           i += tile::kWarpgroupSize) {
        const int m = kOwnTokens * role.half + first + i / kChunks, col = i % kChunks * kChunk;
        const int row = 64 * (role.group + wave) + col, n = at.col + row;
        if (m < p.M && row < p.rows && n < p.N) {
          *reinterpret_cast<uint4*>(p.out + (int64_t{at.batch} * p.M + m) * p.N + n) =
              *reinterpret_cast<const uint4*>(out.chunk(i / kChunks, col));
        }
      }
    }
  }

  __device__ __forceinline__ static void consume(const Params& p, Storage& shared,
                                                 const Place& place, const Role& role) {
    if (!role.has(p, 0)) return;
    tile::Slot<kStages> slot;
    Sum sums[kWaves];
    for (int index = place.first; index < p.B * p.tiles; index += place.step) {
      const Work at(p, index);
      Finish finish[kWaves];
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
        finish[wave] = load_finish(p, shared, role, at, wave);
      }
      multiply(p, shared, place, role, at, slot, sums);
      if constexpr (kPanels > 1) add_panels(shared, role, sums[0]);
      if (role.panel > 0) continue;
#pragma unroll
      for (int wave = 0; p.splits == 2 && wave < kWaves; ++wave) {
        if (role.has(p, wave)) send(p, shared, place, role.unit + wave, sums[wave]);
      }
#pragma unroll
      for (int wave = 0; wave < kWaves; ++wave) {
        if (!role.has(p, wave)) break;
        if (p.splits == 2) receive(p, shared, place, role.unit + wave, sums[wave]);
        store(p, shared, place, role, at, wave, finish[wave], sums[wave]);
      }
    }
  }
};

template <class Matmul>
__global__ void __launch_bounds__(Matmul::kThreads, 1)
    scaled_matmul_few_rows_sm90_kernel(const __grid_constant__ typename Matmul::Params p) {
  auto& shared = tile::settled(tile::shared_storage<typename Matmul::Storage>());
  const int consumer = tile::warpgroup_index();
  const bool loader = threadIdx.x == tile::kWarpgroupSize * Matmul::kConsumers;
  const typename Matmul::Place place(p);

  int begun = 0;
  if (loader) begun = Matmul::begin(p, shared, place);
  __syncwarp();
  if (p.splits == 2) {
    tile::start_cluster();
  } else {
    __syncthreads();
  }
  constexpr bool kUneven = Matmul::kWaves > 1;
  if (consumer == Matmul::kConsumers) {
    if constexpr (kUneven) tile::ptx::setmaxnreg_decrease<Matmul::kLoaderRegisters>();
    if (loader) Matmul::load(p, shared, place, begun);
  } else {
    if constexpr (kUneven) tile::ptx::setmaxnreg_increase<Matmul::kConsumerRegisters>();
    Matmul::consume(p, shared, place, typename Matmul::Role(consumer));
  }
}

}  // namespace jaxkern
