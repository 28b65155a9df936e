// out = x w^T for weights of four bits and some rows of x (tokens), where tokens count beside
// weights but do not fill tensor cores.
//
// wgmma takes its operand A from registers, where weights become bfloat16 or float16
// (four_bit.cuh): so weights are the rows, tokens the columns, and a tile is out^T. Warps have
// roles:
//   consumers  warpgroups, each for four strips of the tile and one of the panels of a stage; while
//              tensor cores multiply by 64 columns, it expands the next 64;
//   loader     one thread (four_bit_stream.cuh).
// At the end of a tile the sums of its panels, and those of the other block of a cluster, are added
// up, always in the same order: results repeat bitwise. The blocks of a cluster can each have three
// groups of four strips, say, and share a fourth.
#pragma once

#include "cuda/matmul/four_bit_stream.cuh"

namespace jaxkern {

template <FourBitFormat kFormat, class T_, class Out_, int kTokens_>
struct QuantizedMatmulSomeRows : FourBitStream<true> {
  using T = T_;
  using Out = Out_;
  using Weights = FourBit<kFormat, T>;
  static constexpr int kTokens = kTokens_;
  static constexpr int kConsumers = 4;  // at most
  static constexpr int kThreads = tile::kWarpgroupSize * kConsumers + tile::kWarpSize;
  static constexpr int kMaxGroups = 4;
  static constexpr int kMaxStrips = 4 * kMaxGroups;
  static constexpr int kPieceTokens = 16;  // that go to memory at once

  using TileX = tile::SharedTile<T, kTokens, 64>;  // (kTokens, 64), half of a panel
  using TileOut = tile::SharedTile<Out, kPieceTokens, 64>;
  using Sum = tile::RegisterTile<float, 64, kTokens>;  // (64, kTokens)
  using Operand = tile::RegisterTile<T, 64, 64>;       // (64, 64)

  // Of each consumer. It leaves its sums here for that of the first panel, which in turn finds here
  // those of the other block, and then puts results in order for memory.
  union Handover {
    float sums[64 * kTokens];
    TileOut out;
  };
  static constexpr int kOtherBytes = kConsumers * int{sizeof(Handover)} + 1024;
  static constexpr int kStageBytes = (tile::kMaxSharedBytes - kOtherBytes) / 1024 * 1024;
  struct Storage {
    alignas(1024) char stages[kStageBytes];
    Handover handovers[kConsumers];
    tile::Ring<kMaxStages> ring;
    tile::Barrier received[kMaxGroups];
  };
  static constexpr int kSharedBytes = sizeof(Storage);
  static_assert(kSharedBytes <= tile::kMaxSharedBytes, "the stages must fit a block");

  struct Params : FourBitStream<true>::Params {
    Out* out;
    int groups;  // of four strips, of a tile
  };

  __device__ __forceinline__ static int begin(const Params& p, Storage& shared,
                                              const Place& place) {
    for (tile::Barrier& received : shared.received) received.init(1);
    return FourBitStream<true>::begin(p, shared, place, 4 * p.groups * p.panels);
  }

  // A consumer's place in the stages, those it has work in, and its weights of the first stage.
  struct Role {
    int group, panel, strip;
    bool shared;  // strips
    Range steps;
    bool loaded;
    FourBitTile<kFormat, T> weights;

    __device__ __forceinline__ Role(const Params& p, const Place& place, int consumer)
        : group(consumer % p.groups),
          panel(consumer / p.groups),
          shared(4 * group >= p.own),
          steps(shared ? place.shared : place.all),
          loaded(panel < p.panels && steps.begin == place.all.begin) {
      const int warp = threadIdx.x % tile::kWarpgroupSize / tile::kWarpSize;
      strip = min(4 * group + warp, p.strips - 1);  // sums of those beyond are nobody's
      if (loaded) load_first(p, place, strip, panel, weights);
    }
  };

  // Passes by stages in which a consumer has no work.
  __device__ __forceinline__ static void skip(const Params& p, Storage& shared, Range steps,
                                              Slot& slot) {
    for (int step = steps.begin; step < steps.end; ++step, slot.advance(p)) {
      shared.ring.full[slot.stage].wait(slot.parity);
      shared.ring.empty[slot.stage].arrive_warp();
    }
  }

  // The sums of a group over one panel of each stage.
  __device__ __forceinline__ static void multiply(const Params& p, Storage& shared, Role& role,
                                                  Slot& slot, Sum& sum) {
    const int panel = role.panel;
    const Range steps = role.steps;
    FourBitTile<kFormat, T>& weights = role.weights;
    const typename FourBitTile<kFormat, T>::Place w_place(
        p.weight, p.w_place + (role.strip * p.panels + panel) * p.tile_bytes);
    const auto x = tile::settled(
        tile::k_major<kTokens>(*reinterpret_cast<TileX*>(shared.stages)).of_tile(2 * panel));
    tile::zero(sum);
    Operand operands[2];
    int previous = 0;
#pragma unroll 1
    for (int step = steps.begin; step < steps.end; ++step, slot.advance(p)) {
      shared.ring.full[slot.stage].wait(slot.parity);
      if (!role.loaded) weights.load(p.weight, shared.stages + slot.bytes, w_place);
      role.loaded = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          weights.expand(4 * half + s, operands[half].data + 4 * s);
        }
        tile::mma_fence();
        tile::mma(sum, operands[half], x.of_bytes(slot.bytes).of_tile(half), true);
        tile::mma_commit();
        tile::mma_wait<1>();  // the products before these
        if (half == 0 && step > steps.begin) shared.ring.empty[previous].arrive_warp();
      }
      previous = slot.stage;
    }
    tile::mma_wait<0>(sum);
    if (steps.begin < steps.end) shared.ring.empty[previous].arrive_warp();
  }

  // Adds the sums of a group's other panels to those of its first.
  __device__ __forceinline__ static void add_panels(const Params& p, Storage& shared, int group,
                                                    int panel, Sum& sum) {
    const auto sync = [&] {
      tile::ptx::named_barrier_sync(1 + kMaxGroups + group, p.panels * tile::kWarpgroupSize);
    };
    Handover* first = &shared.handovers[group];
    if (panel > 0) tile::store_fragments(first[panel * p.groups].sums, sum);
    sync();  // they are there
    for (int i = 1; panel == 0 && i < p.panels; ++i) {
      tile::add_fragments_at<kTokens>(sum, 0, first[i * p.groups].sums);
    }
    sync();  // and read
  }
  // Adds those of the other block.
  __device__ __forceinline__ static void receive(Storage& shared, int group, Sum& sum) {
    auto& received = shared.received[group];
    if (threadIdx.x % tile::kWarpgroupSize == 0) {
      received.arrive_expect(64 * kTokens * sizeof(float));
    }
    received.wait(0);
    tile::add_fragments_at<kTokens>(sum, 0, shared.handovers[group].sums);
  }

  // Finishes the sums of a group, and writes them through shared memory, so that a warp's
  // instruction writes whole lines.
  __device__ __forceinline__ static void store(const Params& p, Storage& shared, const Work& at,
                                               int group, const Sum& sum) {
    const auto sync = [&] { tile::ptx::named_barrier_sync(1 + group, tile::kWarpgroupSize); };
    auto& out = shared.handovers[group].out;
    const int last = all_strips(p) * kFourBitRows - 1, row = kFourBitRows * at.strip(p, 4 * group);
    tile::RowVector scale;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int n = min(row + tile::fragment_row(i), last);
      scale[i] = p.weight.row_scale[int64_t{at.batch} * (last + 1) + n] * Weights::kSumScale;
    }
    constexpr int kChunk = 16 / sizeof(Out), kChunks = 64 / kChunk;
#pragma unroll
    for (int first = 0; first < kTokens; first += kPieceTokens) {
      if (first >= p.M) break;
      tile::RegisterTile<float, 64, kPieceTokens> result;
      tile::RegisterTile<Out, 64, kPieceTokens> rounded;
      tile::convert(result, sum, first);
      tile::scale_rows(result, scale);
      tile::convert(rounded, result, 0);
      sync();  // out is free
      tile::store_transposed(out, rounded);
      sync();  // and full
#pragma unroll
      for (int i = threadIdx.x % tile::kWarpgroupSize; i < kPieceTokens * kChunks;
           i += tile::kWarpgroupSize) {
        const int m = first + i / kChunks, col = i % kChunks * kChunk;
        if (m < p.M && 64 * group + col < kFourBitRows * p.strips && row + col < p.N) {
          *reinterpret_cast<uint4*>(p.out + (int64_t{at.batch} * p.M + m) * p.N + row + col) =
              *reinterpret_cast<const uint4*>(out.chunk(i / kChunks, col));
        }
      }
    }
  }

  // Sums that two blocks share are finished by the second, which ends with their last columns.
  __device__ __forceinline__ static void finish(const Params& p, Storage& shared,
                                                const Place& place, const Work& at, int group,
                                                bool shares, Sum& sum) {
    if (shares && place.split == 0) {
      tile::send_fragments<kTokens>(shared.handovers[group].sums, sum, 0, shared.received[group],
                                    1);
      return;
    }
    if (shares) receive(shared, group, sum);
    store(p, shared, at, group, sum);
  }

  __device__ __forceinline__ static void consume(const Params& p, Storage& shared,
                                                 const Place& place, Role& role) {
    if (role.panel >= p.panels) return;
    Slot slot;
    for (int index = place.first; index < p.B * p.tiles; index += place.step) {
      skip(p, shared, {place.all.begin, role.steps.begin}, slot);
      Sum sum;
      multiply(p, shared, role, slot, sum);
      role.weights = {};  // which take no registers then
      // What follows from it is for after the products, which have no registers to spare.
      int group = role.group;
      tile::ptx::work_out_here(group);
      if (p.panels > 1) add_panels(p, shared, group, role.panel, sum);
      if (role.panel == 0) finish(p, shared, place, Work(p, place, index), group, role.shared, sum);
      skip(p, shared, {role.steps.end, place.all.end}, slot);
    }
  }
};

template <class Matmul>
__global__ void __launch_bounds__(Matmul::kThreads, 1)
    quantized_matmul_some_rows_sm90_kernel(const __grid_constant__ typename Matmul::Params p) {
  auto& shared = tile::settled(tile::shared_storage<typename Matmul::Storage>());
  const int consumer = tile::warpgroup_index();
  const bool loader = threadIdx.x == tile::kWarpgroupSize * Matmul::kConsumers;
  const typename Matmul::Place place(p);

  typename Matmul::Role role(p, place, consumer);
  int begun = 0;
  if (loader) begun = Matmul::begin(p, shared, place);
  __syncwarp();
  if (p.shared > 0) {
    tile::start_cluster();
  } else {
    __syncthreads();
  }
  if (consumer < Matmul::kConsumers) {
    Matmul::consume(p, shared, place, role);
  } else if (loader) {
    Matmul::load(p, shared, place, begun);
  }
}

}  // namespace jaxkern
