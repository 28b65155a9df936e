// Tokens of every sequence by the whole model, in one persistent cooperative launch: a block on
// each multiprocessor, which owns rows of every matrix.
//
//   producer    one thread streams the block's rows of all matrices, and keys and values, through a
//               ring. It waits for room only, never for a dependency.
//   consumers   eight warps multiply, and send the results of their rows to all blocks.
//   helpers     a warp or three find out what normalises the hidden state, while that is multiplied
//               already, and clear the places of what all have read.
//
// A layer is five phases, each of which needs what all blocks sent in the phase before it:
//   qkv        normalised hidden state   -> query, key, value
//   attention  query, key, value         -> heads; blocks without a unit of it go on at once
//   out        heads                     -> hidden state, which its rows' owner keeps in float32
//   gate_up    normalised hidden state   -> hidden units
//   down       hidden units              -> hidden state
// Then the head's rows give logits, and those the next tokens. docs/decode.md draws the schedule.
#pragma once

#include <algorithm>

#include "cuda/decode/steps.cuh"

namespace jaxkern::decode {

// Weight: bf16, e4m3, e2m1 or s4.
template <class Weight_, int kHeadDim_, int kBatch_, int kStages_>
struct DecodeStep {
  using Weight = Weight_;
  static constexpr int kHeadDim = kHeadDim_, kBatch = kBatch_, kStages = kStages_;
  static constexpr int kThreads = kConsumers + tile::kWarpgroupSize;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <=
                3 * tile::launch_registers(kThreads));
  using Attention = decode::Attention<kHeadDim>;
  static constexpr int kColumns = Weights<Weight>::kColumns;  // of a slice
  static constexpr int kScaleBytes = Weights<Weight>::kScaleBytes;
  using Storage = StepStorage<kHeadDim, kBatch, kStages, kScaleBytes>;
  using Helper = decode::Helper<kHeadDim, kBatch, kStages, kScaleBytes>;

  // Columns of vectors that are in shared memory at once: of one sequence all, but for hidden units
  // in parts where they have to be.
  static int columns(const DecodeParams& p) {
    const int least = std::max(p.width, p.heads * p.head_dim);
    if (kBatch > 1) return std::min(std::max(least, p.hidden), kPartColumns);
    const int room = (tile::kMaxSharedBytes - static_cast<int>(sizeof(Storage))) /
                     static_cast<int>(sizeof(tile::bf16));
    const int parts = (p.hidden + room - 1) / room;
    const int part = (p.hidden + parts * kColumns - 1) / (parts * kColumns) * kColumns;
    return std::max(part, least);
  }

  // What registers have room for, and how shared memory is divided.
  static void plan(StepParams& p) {
    p.part = columns(p.model);
    p.hold_qkv = HeldQkv<Weight>::fit(p.rows[kQkv], p.part);
    p.hold_out = HeldOut<Weight, kHeadDim>::fit(p.rows[kOut], p.part);
  }

  static constexpr int bytes_with(int columns) {
    const int vectors = kBatch * columns * static_cast<int>(sizeof(tile::bf16));
    const int attention = static_cast<int>(sizeof(typename Attention::Storage));
    const int histograms = kBatch * kBins * static_cast<int>(sizeof(uint64_t));
    return static_cast<int>(sizeof(Storage)) + std::max({vectors, attention, histograms});
  }
  static int shared_bytes(const DecodeParams& p) { return bytes_with(columns(p)); }

  __device__ __forceinline__ static void produce(const StepParams& p, Storage& shared) {
    Producer producer(shared.stream);
    const auto load = [&](Phase phase, int layer) {
      const Rows& rows = p.rows[phase];
      const auto* matrix = static_cast<const char*>(p.model.weights[phase]);
      for (int block = blockIdx.x; block < rows.blocks; block += gridDim.x) {
        if (rows.units(block) == 0) continue;
        const Chunks chunks = rows.chunks_of(block);
        const char* from = matrix + rows.place(layer, block);
        for (int first = 0; first < rows.K; first += p.part) {
          producer.load(from + int64_t{first / kColumns} * chunks.slice_bytes,
                        min(p.part, rows.K - first) / kColumns, chunks);
        }
      }
    };
    const auto attend = [&](int layer) {
      for (int i = 0; i < shared.units.count; ++i) {
        Attention::load(p.model, producer, layer, shared.units.data[i]);
      }
    };
    // Whether there is the step: then keys and values of those before it are in the cache.
    const auto begins = [&](int step) {
      shared.turn.wait(step % 2);
      tile::ptx::fence_async();
      if (shared.ended) producer.drain();
      return !shared.ended;
    };
    // What comes before keys and values comes before the turn, if the ring has room for all of it.
    const auto chunks = [&](Phase phase) { return p.rows[phase].chunks_of(blockIdx.x).count; };
    const bool ahead =
        p.rows[kQkv].K <= p.part && chunks(kQkv) + (p.hold_out ? chunks(kOut) : 0) <= kStages;
    const int steps = max(p.model.sampling.steps, 1);
    // Attention's turn comes after that of out, or before it.
    const auto phase_of = [&](int turn) {
      const bool other = p.hold_out && (turn == kAttention || turn == kOut);
      return static_cast<Phase>(other ? kAttention + kOut - turn : turn);
    };
    for (int step = 0; step < steps; ++step) {
      if (!ahead && !begins(step)) return;
#pragma unroll 1
      for (int layer = 0; layer < p.model.layers; ++layer) {
#pragma unroll 1
        for (int turn = kQkv; turn < kHead; ++turn) {
          const Phase phase = phase_of(turn);
          if (phase != kAttention) {
            load(phase, layer);
          } else {
            if (ahead && layer == 0 && !begins(step)) return;
            attend(layer);
          }
        }
      }
      load(kHead, 0);
    }
  }

  __device__ __forceinline__ static void consume(const StepParams& p, Storage& shared) {
    const Vectors<kBatch> x = {reinterpret_cast<Word*>(shared.scratch), p.model.batch};
    Draw<kBatch> draw(p, shared.draw, reinterpret_cast<uint64_t*>(shared.scratch));
    Steps<Weight, kHeadDim, kBatch, kStages>{{{p, shared, x}, draw}}.run();
  }
};

template <class Step>
__global__ void __launch_bounds__(Step::kThreads, 1)
    decode_step_sm90_kernel(const __grid_constant__ StepParams p) {
  auto& shared = tile::settled(tile::shared_storage<typename Step::Storage>());
  if (threadIdx.x == kConsumers) {
    shared.stream.ring.init(1, kWarps);
    shared.turn.init(1);
    shared.hidden_sent.init(1);
    shared.rstd_ready.init(Step::Helper::kWarps);
    tile::ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (tile::warpgroup_index() < kConsumers / tile::kWarpgroupSize) {
    tile::ptx::setmaxnreg_increase<Step::kConsumerRegisters>();
    Step::consume(p, shared);
  } else {
    tile::ptx::setmaxnreg_decrease<Step::kProducerRegisters>();
    const int warp = static_cast<int>(threadIdx.x - kConsumers) / tile::kWarpSize - 1;
    if (warp >= 0) {
      if (warp < Step::Helper::kWarps) Step::Helper::run(p, shared, warp);
    } else if (threadIdx.x == kConsumers) {
      Step::produce(p, shared);
    }
  }
}

}  // namespace jaxkern::decode
