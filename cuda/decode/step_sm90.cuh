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
// Then the head's rows give logits. docs/decode.md draws the schedule and what it costs.
#pragma once

#include "cuda/decode/attention.cuh"
#include "cuda/tile/smem.cuh"

namespace jaxkern::decode {

struct Matrices {
  Rows qkv, out, gate_up, down, head;
};

struct Words {
  Word *qkv, *attention, *out, *gate_up, *down;
};

struct StepParams {
  DecodeParams model;
  Matrices rows;
  Words words;
};

template <int kHeadDim_, int kBatch_, int kStages_>
struct DecodeStep {
  static constexpr int kHeadDim = kHeadDim_, kBatch = kBatch_, kStages = kStages_;
  static constexpr int kThreads = kConsumers + tile::kWarpgroupSize;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static_assert(kProducerRegisters + 2 * kConsumerRegisters <=
                3 * tile::launch_registers(kThreads));
  using Attention = decode::Attention<kHeadDim>;
  using bf16 = tile::bf16;

  struct Storage {
    Stream<kStages> stream;
    Sums<kBatch> sums;
    float residual[kBatch][kMaxRows];  // hidden state of the rows that the block has of out, down
    float squares[kBatch][kWarps];
    float2 rotation[kBatch][kHeadDim / 2];  // cosines and sines of the positions
    int lengths[kBatch], tokens[kBatch];
    // Vectors of the products, and between them what attention needs. As large as is asked for.
    alignas(128) char scratch[];
  };
  static int shared_bytes(const StepParams& p) {
    const int widest = p.model.hidden > p.model.width ? p.model.hidden : p.model.width;
    const int heads = p.model.heads * kHeadDim;
    const int vectors = kBatch * 2 * (heads > widest ? heads : widest);
    const int attention = static_cast<int>(sizeof(typename Attention::Storage));
    return static_cast<int>(sizeof(Storage)) + (vectors > attention ? vectors : attention);
  }

  // What the consumers know of a step.
  struct Consumer {
    const StepParams& p;
    Storage& shared;
    WorkspaceHeader& header;
    const Splits splits;
    const Vectors<kBatch> x;
    const uint32_t steps;  // done before this one
    const float reciprocal_width;
    tile::Slot<kStages> slot;

    __device__ __forceinline__ uint32_t tag(int layer) const {
      return (steps * p.model.layers + layer + 1) & 0xffff;
    }
    // Until all have sent what they have of a layer.
    __device__ __forceinline__ void wait(Kind kind, int arrivals, int layer) {
      if (threadIdx.x == 0) {
        wait_for(header.counters[kind], (steps * p.model.layers + layer + 1) * arrivals);
      }
      sync_consumers();
    }
    __device__ __forceinline__ static int arrivals(const Rows& rows) {
      return kBatch * rows.blocks * rows.sending_warps();
    }

    // Calls use(n, row, count, word, prepared) with the words of a product's results, of sequences
    // from `first_n` on; some at once because each costs the same time. prepare(row, count) is
    // called before the wait, and may set the count of what is not wanted to 0.
    template <int kAtOnce, class Prepare, class Use>
    __device__ __forceinline__ void receive(Kind kind, const Rows& rows, const Word* words,
                                            int layer, int first_n, int end_n,
                                            const Prepare& prepare, const Use& use) {
      const int all = rows.all_words();
      int none = 0;
      for (int first = 0; first < all; first += kAtOnce * kConsumers) {
        int row[kAtOnce], count[kAtOnce];
        decltype(prepare(0, none)) prepared[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int index = first + i * kConsumers + threadIdx.x;
          const int block = rows.block_of(index), at = (index - block * rows.words) * kWordValues;
          row[i] = rows.first(block) + at;
          count[i] = index < all ? min(kWordValues, rows.units(block) - at) : 0;
          prepared[i] = prepare(row[i], count[i]);
        }
        if (first == 0) wait(kind, arrivals(rows), layer);
        for (int n = first_n; n < end_n; ++n) {
          const Word* from = words + int64_t{n} * all + first + threadIdx.x;
          Word got[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (count[i] > 0) got[i] = peek(from + i * kConsumers);
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (count[i] <= 0) continue;
            settle(got[i], from + i * kConsumers, tag(layer));
            use(n, row[i], count[i], got[i], prepared[i]);
          }
        }
      }
    }

    struct Weights {
      float data[kWordValues];
    };

    // The hidden state times the weights of a norm; its squares, for the rest of the norm.
    __device__ __forceinline__ void receive_hidden(Kind kind, const Rows& rows, const Word* words,
                                                   int layer, const float* weights) {
      float squares[kBatch] = {};
      const auto prepare = [&](int row, int& count) {
        Weights w;
#pragma unroll
        for (int i = 0; i < kWordValues; ++i) w.data[i] = i < count ? weights[row + i] : 0.0f;
        return w;
      };
      receive<3>(kind, rows, words, layer, 0, kBatch, prepare,
                 [&](int n, int row, int count, const Word& word, const Weights& w) {
#pragma unroll
                   for (int i = 0; i < kWordValues; ++i) {
                     const float h = value_of(word, i);
                     if (i >= count) continue;
                     squares[n] += h * h;
                     x.at(n, row + i) = __float2bfloat16_rn(h * w.data[i]);
                   }
                 });
      add_squares(squares);
    }

    // Ready when the product is.
    __device__ __forceinline__ void add_squares(const float (&squares)[kBatch]) {
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const float sum = tile::warp_sum(squares[n]);
        if (threadIdx.x % tile::kWarpSize == 0) {
          shared.squares[n][threadIdx.x / tile::kWarpSize] = sum;
        }
      }
    }
    __device__ __forceinline__ float rstd(int n) const {
      float sum = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) sum += shared.squares[n][warp];
      return rsqrtf(sum * reciprocal_width + p.model.norm_epsilon);
    }

    // The first hidden state: rows of the embedding.
    __device__ __forceinline__ void embed(const float* weights) {
      const auto* embedding = static_cast<const bf16*>(p.model.embedding);
      const Rows& rows = p.rows.out;
      float squares[kBatch] = {};
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const bf16* row = embedding + int64_t{shared.tokens[n]} * p.model.width;
        for (int i = threadIdx.x; i < p.model.width; i += kConsumers) {
          const float h = __bfloat162float(row[i]);
          squares[n] += h * h;
          x.at(n, i) = __float2bfloat16_rn(h * weights[i]);
        }
        const int block = blockIdx.x;
        if (threadIdx.x < rows.units(block)) {
          shared.residual[n][threadIdx.x] =
              __bfloat162float(row[rows.first(block) + threadIdx.x]);
        }
      }
      add_squares(squares);
    }

    // Hidden units as they are.
    __device__ __forceinline__ void receive_units(const Rows& rows, const Word* words, int layer) {
      struct Nothing {};
      receive<5>(kGateUp, rows, words, layer, 0, kBatch, [](int, int&) { return Nothing{}; },
                 [&](int n, int row, int count, const Word& word, Nothing) {
#pragma unroll
                   for (int i = 0; i < kWordValues; ++i) {
                     if (i < count) x.at(n, row + i) = __float2bfloat16_rn(value_of(word, i));
                   }
                 });
    }

    // Multiplies the block's rows and sends value(n, unit of the block, block) of each of its units.
    template <class Value>
    __device__ __forceinline__ void multiply_send(Kind kind, const Rows& rows, Word* words,
                                                  int layer, const Value& value) {
      const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
      sync_consumers();  // the vectors are there
      for (int block = blockIdx.x; block < rows.blocks; block += gridDim.x) {
        const int units = rows.units(block);
        if (block != static_cast<int>(blockIdx.x)) sync_consumers();  // sums have been read
        multiply<kBatch>(shared.stream, slot, x, units * rows.unit_rows, rows.K / kSlice,
                         shared.sums);
        sync_consumers();
        const int sending = rows.sending_warps();
        for (int task = warp; task < kBatch * sending; task += kWarps) {
          const int n = task / sending, part = task % sending, unit = part * kWarpRows + lane;
          const float own = lane < kWarpRows && unit < units ? value(n, unit, block) : 0.0f;
          const Word word = gather_word(own, tag(layer));
          const int index = part * kWarpWords + lane;
          if (lane < kWarpWords && index < rows.words) {
            send(words + int64_t{n} * rows.all_words() + block * rows.words + index, word);
          }
          __syncwarp();
          if (lane == 0) arrive(header.counters[kind]);
        }
      }
    }

    __device__ __forceinline__ void qkv(int layer) {
      const float* weights = p.model.attention_norm + int64_t{layer} * p.model.width;
      if (layer == 0) {
        embed(weights);
      } else {
        receive_hidden(kDown, p.rows.down, p.words.down, layer - 1, weights);
      }
      const Rows& rows = p.rows.qkv;
      const float* bias = p.model.qkv_bias;
      if (bias != nullptr) bias += int64_t{layer} * (p.model.heads + 2 * p.model.kv_heads) * kHeadDim;
      multiply_send(kQkv, rows, p.words.qkv, layer, [&](int n, int unit, int block) {
        const float b = bias == nullptr ? 0.0f : bias[rows.first(block) + unit];
        return shared.sums.total(n, unit) * rstd(n) + b;
      });
    }

    __device__ __forceinline__ void attention(int layer) {
      auto& storage = *reinterpret_cast<typename Attention::Storage*>(shared.scratch);
      const float scale = tile::kLog2E * rsqrtf(kHeadDim);
      for_each_unit(p.model, splits, shared.lengths, layer, [&](const Unit& unit) {
        const int position = shared.lengths[unit.sequence];
        // The wait is also one for all to have read the storage.
        receive<4>(
            kQkv, p.rows.qkv, p.words.qkv, layer, unit.sequence, unit.sequence + 1,
            [&](int row, int& count) {
              const int at = Attention::place(p.model, unit, row);
              const bool wanted =
                  at >= 0 || Attention::place(p.model, unit, row + count - 1) >= 0;
              if (!wanted) count = 0;
              return at;
            },
            [&](int, int row, int count, const Word& word, int at) {
#pragma unroll
              for (int i = 0; i < kWordValues; ++i) {
                if (i >= count) break;
                const int to = at >= 0 && i == 0 ? at : Attention::place(p.model, unit, row + i);
                if (to >= 0) storage.raw[0][to] = value_of(word, i);
              }
            });
        sync_consumers();
        Attention::prepare(p.model, layer, shared.rotation[unit.sequence], storage);
        sync_consumers();
        if (unit.last) {
          Attention::score(p.model, scale, storage);
          Attention::append(p.model, layer, unit, position, storage);
        }
        Attention::attend(shared.stream, slot, unit, scale, storage);
        sync_consumers();
        Attention::finish(p.model, p.words.attention, tag(layer), unit, storage);
      });
      sync_consumers();
      if (threadIdx.x == 0) arrive(header.counters[kAttention]);
    }

    __device__ __forceinline__ void add_to_residual(Kind kind, const Rows& rows, Word* words,
                                                    int layer) {
      multiply_send(kind, rows, words, layer, [&](int n, int unit, int) {
        return shared.residual[n][unit] += shared.sums.total(n, unit);
      });
    }

    __device__ __forceinline__ void out(int layer) {
      wait(kAttention, gridDim.x, layer);
      Attention::template collect<kBatch>(p.model, p.words.attention, tag(layer), splits,
                                          shared.lengths, x);
      add_to_residual(kOut, p.rows.out, p.words.out, layer);
    }

    __device__ __forceinline__ void gate_up(int layer) {
      receive_hidden(kOut, p.rows.out, p.words.out, layer,
                     p.model.mlp_norm + int64_t{layer} * p.model.width);
      const Rows& rows = p.rows.gate_up;
      multiply_send(kGateUp, rows, p.words.gate_up, layer, [&](int n, int unit, int block) {
        const float gate = shared.sums.total(n, unit) * rstd(n);
        const float up = shared.sums.total(n, rows.units(block) + unit) * rstd(n);
        return __fdividef(gate, 1.0f + __expf(-gate)) * up;
      });
    }

    __device__ __forceinline__ void down(int layer) {
      receive_units(p.rows.gate_up, p.words.gate_up, layer);
      add_to_residual(kDown, p.rows.down, p.words.down, layer);
    }

    __device__ __forceinline__ void head() {
      const int last = p.model.layers - 1;
      receive_hidden(kDown, p.rows.down, p.words.down, last, p.model.norm);
      sync_consumers();
      const Rows& rows = p.rows.head;
      for (int block = blockIdx.x; block < rows.blocks; block += gridDim.x) {
        const int units = rows.units(block);
        multiply<kBatch>(shared.stream, slot, x, units, rows.K / kSlice, shared.sums);
        sync_consumers();
        for (int i = threadIdx.x; i < kBatch * units; i += kConsumers) {
          const int n = i / units, unit = i % units;
          p.model.logits[int64_t{n} * p.model.vocabulary + rows.first(block) + unit] =
              shared.sums.total(n, unit) * rstd(n);
        }
        sync_consumers();
      }
      // All blocks have sent what needs the head's input, so they have read these.
      if (blockIdx.x == 0 && threadIdx.x < kBatch) {
        p.model.lengths[threadIdx.x] = shared.lengths[threadIdx.x] + 1;
        if (threadIdx.x == 0) header.steps = steps + 1;
      }
    }
  };

  __device__ __forceinline__ static void produce(const StepParams& p, Storage& shared,
                                                 const Splits& splits) {
    Producer<kStages> producer(shared.stream);
    const auto load = [&](const void* matrix, const Rows& rows, int units, int layer) {
      for (int block = blockIdx.x; block < rows.blocks; block += gridDim.x) {
        const int64_t row = (int64_t{layer} * units + rows.first(block)) * rows.unit_rows;
        producer.load(static_cast<const char*>(matrix) + row * rows.K * 2,
                      rows.units(block) * rows.unit_rows, rows.K / kSlice);
      }
    };
    const DecodeParams& model = p.model;
    const int heads = (model.heads + 2 * model.kv_heads) * kHeadDim;
    for (int layer = 0; layer < model.layers; ++layer) {
      load(model.qkv, p.rows.qkv, heads, layer);
      for_each_unit(model, splits, shared.lengths, layer, [&](const Unit& unit) {
        Attention::load(model, producer, layer, unit);
      });
      load(model.out, p.rows.out, model.width, layer);
      load(model.gate_up, p.rows.gate_up, model.hidden, layer);
      load(model.down, p.rows.down, model.width, layer);
    }
    load(model.head, p.rows.head, model.vocabulary, 0);
  }

  __device__ __forceinline__ static void consume(const StepParams& p, Storage& shared,
                                                 const Splits& splits) {
    auto& header = *static_cast<WorkspaceHeader*>(p.model.workspace);
    const Vectors<kBatch> x = {reinterpret_cast<bf16*>(shared.scratch)};
    Consumer consumer = {p, shared, header, splits, x, header.steps,
                         1.0f / p.model.width, {}};
    for (int layer = 0; layer < p.model.layers; ++layer) {
      consumer.qkv(layer);
      consumer.attention(layer);
      consumer.out(layer);
      consumer.gate_up(layer);
      consumer.down(layer);
    }
    consumer.head();
  }
};

template <class Step>
__global__ void __launch_bounds__(Step::kThreads, 1)
    decode_step_sm90_kernel(const __grid_constant__ StepParams p) {
  auto& shared = tile::shared_storage<typename Step::Storage>();
  if (threadIdx.x == 0) {
    shared.stream.ring.init(1, kWarps);
    tile::ptx::fence_mbarrier_init();
  }
  if (threadIdx.x < Step::kBatch) {
    shared.lengths[threadIdx.x] = p.model.lengths[threadIdx.x];
    shared.tokens[threadIdx.x] = min(max(p.model.tokens[threadIdx.x], 0), p.model.vocabulary - 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < Step::kBatch * Step::kHeadDim / 2; i += Step::kThreads) {
    const int n = i / (Step::kHeadDim / 2), pair = i % (Step::kHeadDim / 2);
    float2& rotation = shared.rotation[n][pair];
    sincosf(static_cast<float>(shared.lengths[n]) * p.model.frequencies[pair], &rotation.y,
            &rotation.x);
  }
  __syncthreads();
  const Splits splits(p.model, shared.lengths);
  if (tile::warpgroup_index() < kConsumers / tile::kWarpgroupSize) {
    tile::ptx::setmaxnreg_increase<Step::kConsumerRegisters>();
    Step::consume(p, shared, splits);
  } else {
    tile::ptx::setmaxnreg_decrease<Step::kProducerRegisters>();
    if (threadIdx.x == kConsumers) Step::produce(p, shared, splits);
  }
}

}  // namespace jaxkern::decode
