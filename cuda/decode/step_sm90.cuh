// One token of every sequence by the whole model, in one persistent cooperative launch: a block on
// each multiprocessor, which owns rows of every matrix.
//
//   producer    one thread streams the block's rows of all matrices, and keys and values, through a
//               ring. It waits for room only, never for a dependency.
//   consumers   eight warps multiply, and send the results of their rows to all blocks.
//
// A layer is five phases, each of which needs what all blocks sent in the phase before it:
//   qkv        normalised hidden state   -> query, key, value
//   attention  query, key, value         -> heads; blocks without a unit of it go on at once
//   out        heads                     -> hidden state, which its rows' owner keeps in float32
//   gate_up    normalised hidden state   -> hidden units
//   down       hidden units              -> hidden state
// Then the head's rows give logits. docs/decode.md draws the schedule.
#pragma once

#include "cuda/decode/consumer.cuh"

namespace jaxkern::decode {

// Cosine and sine of an angle of up to 2^17, within 2^-20.
__device__ __forceinline__ float2 unit_vector(float angle) {
  constexpr float kTurn = 6.28318548f, kTurnRest = -1.74845553e-7f;  // 2 pi
  const float turns = rintf(angle * (1.0f / kTurn));
  angle = fmaf(-turns, kTurnRest, fmaf(-turns, kTurn, angle));
  return make_float2(__cosf(angle), __sinf(angle));
}

template <int kHeadDim_, int kBatch_, int kStages_>
struct DecodeStep {
  static constexpr int kHeadDim = kHeadDim_, kBatch = kBatch_, kStages = kStages_;
  static constexpr int kThreads = kConsumers + tile::kWarpgroupSize;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <=
                3 * tile::launch_registers(kThreads));
  using Attention = decode::Attention<kHeadDim>;
  using Storage = StepStorage<kHeadDim, kBatch, kStages>;

  // Columns of vectors that are in shared memory at once: whole, or for the hidden units of several
  // sequences in as few parts as there is room for.
  static int columns(const DecodeParams& p) {
    const int room = (tile::kMaxSharedBytes - static_cast<int>(sizeof(Storage))) /
                     (kBatch * static_cast<int>(sizeof(tile::bf16)));
    const int least = p.width > p.heads * p.head_dim ? p.width : p.heads * p.head_dim;
    const int parts = (p.hidden + room - 1) / room;
    const int part = (p.hidden + parts * kSlice - 1) / (parts * kSlice) * kSlice;
    return part > least ? part : least;
  }

  static int shared_bytes(const StepParams& p) {
    const int vectors = kBatch * p.part * static_cast<int>(sizeof(tile::bf16));
    const int attention = static_cast<int>(sizeof(typename Attention::Storage));
    return static_cast<int>(sizeof(Storage)) + (vectors > attention ? vectors : attention);
  }

  __device__ __forceinline__ static void produce(const StepParams& p, Storage& shared) {
    Producer producer(shared.stream);
    const auto load = [&](Phase phase, int layer) {
      const Rows& rows = p.rows[phase];
      const auto* matrix = static_cast<const char*>(p.model.weights[phase]);
      for (int block = blockIdx.x; block < rows.blocks; block += gridDim.x) {
        const int64_t row = (int64_t{layer} * rows.count() + rows.first(block)) * rows.unit_rows;
        const int count = rows.units(block) * rows.unit_rows;
        for (int first = 0; first < rows.K; first += p.part) {
          producer.load(matrix + (row * rows.K + int64_t{count} * first) * 2, count,
                        min(p.part, rows.K - first) / kSlice, rows.chunks_of(block).slices);
        }
      }
    };
    const auto attend = [&](int layer) {
      for (int i = 0; i < shared.unit_count; ++i) {
        Attention::load(p.model, producer, layer, shared.units[i]);
      }
    };
    for (int layer = 0; layer < p.model.layers; ++layer) {
      for (int phase = kQkv; phase <= kDown; ++phase) {
        if (phase == kAttention && HeldOut<kHeadDim>::fit(p.rows[kOut])) {
          load(kOut, layer);  // registers take it before attention
          attend(layer);
        } else if (phase == kAttention) {
          attend(layer);
          load(kOut, layer);
        } else if (phase != kOut) {
          load(static_cast<Phase>(phase), layer);
        }
      }
    }
    load(kHead, 0);
  }

  __device__ __forceinline__ static void consume(const StepParams& p, Storage& shared) {
    const Vectors<kBatch> x = {reinterpret_cast<tile::bf16*>(shared.scratch)};
    Consumer<kHeadDim, kBatch, kStages>{p, shared, x, {}}.run();
  }
};

template <class Step>
__global__ void __launch_bounds__(Step::kThreads, 1)
    decode_step_sm90_kernel(const __grid_constant__ StepParams p) {
  auto& shared = tile::settled(tile::shared_storage<typename Step::Storage>());
  if (threadIdx.x == 0) {
    shared.stream.ring.init(1, kWarps);
    tile::ptx::fence_mbarrier_init();
  }
  if (threadIdx.x < min(Step::kBatch, p.model.batch)) {
    const int token = p.model.tokens[threadIdx.x], length = p.model.lengths[threadIdx.x];
    const bool known = token >= 0 && token < p.model.vocabulary;
    const int before = p.model.status[threadIdx.x];
    shared.status[threadIdx.x] = before != kOk                ? before
                                 : !known                     ? kTokenOutOfRange
                                 : length >= p.model.capacity ? kCacheFull
                                                              : kOk;
    shared.lengths[threadIdx.x] = min(length, p.model.capacity);
    shared.tokens[threadIdx.x] = min(max(token, 0), p.model.vocabulary - 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) shared.splits.init(p.model, shared.lengths);
  const auto& header = *static_cast<const WorkspaceHeader*>(p.model.workspace);
  if (threadIdx.x < kHead) shared.before[threadIdx.x] = header.before[threadIdx.x];
  if (threadIdx.x == kHead) shared.layers = header.layers;
  for (int i = threadIdx.x; i < Step::kBatch * Step::kHeadDim / 2; i += Step::kThreads) {
    const int n = i / (Step::kHeadDim / 2), pair = i % (Step::kHeadDim / 2);
    if (n >= p.model.batch) break;
    shared.rotation[n][pair] = unit_vector(shared.lengths[n] * p.model.frequencies[pair]);
  }
  __syncthreads();
  const int units = p.model.batch * p.model.kv_heads * shared.splits.count;
  const int index = blockIdx.x + threadIdx.x * gridDim.x;
  if (threadIdx.x < kMaxUnits && index < units) {
    shared.units[threadIdx.x].init(p.model, shared.splits, shared.lengths, index);
  }
  if (threadIdx.x == 0) {
    shared.unit_count =
        max(0, tile::ceil_div(units - static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)));
  }
  __syncthreads();
  if (tile::warpgroup_index() < kConsumers / tile::kWarpgroupSize) {
    tile::ptx::setmaxnreg_increase<Step::kConsumerRegisters>();
    Step::consume(p, shared);
  } else {
    tile::ptx::setmaxnreg_decrease<Step::kProducerRegisters>();
    if (threadIdx.x == kConsumers) Step::produce(p, shared);
  }
}

}  // namespace jaxkern::decode
