// The warps that multiply: what they gather before a phase, and what they hand on after it.
#pragma once

#include "cuda/decode/attention.cuh"
#include "cuda/tile/smem.cuh"

namespace jaxkern::decode {

// The shared memory of a block.
template <int kHeadDim, int kBatch, int kStages>
struct StepStorage {
  Stream<kStages> stream;
  Sums<kBatch> sums;
  float residual[kBatch][kMaxRows];  // hidden state of the rows that the block has of out, down
  float bias[kMaxRows];
  float squares[kBatch][kWarps];
  float2 rotation[kBatch][kHeadDim / 2];  // cosines and sines of the positions
  int lengths[kBatch], tokens[kBatch], status[kBatch];
  Splits splits;
  uint32_t before[kHead], layers;  // of the steps before this one, see WorkspaceHeader
  // Vectors of the products, and between them what attention needs. As large as is asked for.
  alignas(128) char scratch[];
};

template <int kHeadDim, int kBatch, int kStages>
struct Consumer {
  using Attention = decode::Attention<kHeadDim>;
  using Storage = StepStorage<kHeadDim, kBatch, kStages>;
  using bf16 = tile::bf16;

  const StepParams& p;
  Storage& shared;
  const Vectors<kBatch> x;
  tile::Slot<kStages> slot;

  __device__ __forceinline__ WorkspaceHeader& header() const {
    return *static_cast<WorkspaceHeader*>(p.model.workspace);
  }
  __device__ __forceinline__ int batch() const { return kBatch == 1 ? 1 : p.model.batch; }
  __device__ __forceinline__ uint32_t tag(int layer) const {
    return (shared.layers + layer + 1) & 0xffff;
  }
  // Of all blocks, when all have sent what they have of so many layers.
  __device__ __forceinline__ uint32_t arrivals(Phase phase, int layers) const {
    const Rows& rows = p.rows[phase];
    return layers *
           (phase == kAttention ? gridDim.x : batch() * rows.blocks * rows.sending_warps());
  }
  // Until all have sent what they have of a phase.
  __device__ __forceinline__ void wait(Phase phase, int layer) {
    if (threadIdx.x == 0) {
      wait_for(header().counters[phase], shared.before[phase] + arrivals(phase, layer + 1));
    }
    sync_consumers();
  }

  // Calls use(n, row, count, word, prepared) with words `begin` to `end` of a product's results,
  // of sequences from `first_n` on; some at once because each costs the same time. prepare(row,
  // count) is called before the wait, and may set the count of what is not wanted to 0.
  template <int kAtOnce, class Prepare, class Use>
  __device__ __forceinline__ void receive(Phase from, int layer, int begin, int end, int first_n,
                                          int end_n, const Prepare& prepare, const Use& use) {
    const Rows& rows = p.rows[from];
    int none = 0;
#pragma unroll 1
    for (int first = begin; first < end; first += kAtOnce * kConsumers) {
      int row[kAtOnce], count[kAtOnce];
      decltype(prepare(0, none)) prepared[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int index = first + i * kConsumers + threadIdx.x;
        const int block = rows.block_of(index), at = (index - block * rows.words) * kWordValues;
        row[i] = rows.first(block) + at;
        count[i] = index < end ? min(kWordValues, rows.units(block) - at) : 0;
        prepared[i] = prepare(row[i], count[i]);
      }
      if (first == begin) wait(from, layer);
#pragma unroll 1
      for (int n = first_n; n < end_n; ++n) {
        const Word* words = p.words[from] + int64_t{n} * rows.all_words() + first + threadIdx.x;
        Word got[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (count[i] > 0) got[i] = peek(words + i * kConsumers);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (count[i] <= 0) continue;
          settle(got[i], words + i * kConsumers, tag(layer));
          use(n, row[i], count[i], got[i], prepared[i]);
        }
      }
    }
  }

  struct Weights {
    float data[kWordValues];
  };

  // Hidden units from `first` on, `count` of them, as vectors.
  __device__ __forceinline__ void receive_units(int layer, int first, int count) {
    struct Nothing {};
    const Rows& rows = p.rows[kGateUp];
    const int begin = rows.block_of_unit(first) * rows.words;
    const int end = (rows.block_of_unit(first + count - 1) + 1) * rows.words;
    receive<4>(
        kGateUp, layer, begin, end, 0, batch(), [](int, int) { return Nothing{}; },
        [&](int n, int row, int words, const Word& word, Nothing) {
#pragma unroll
          for (int i = 0; i < kWordValues; ++i) {
            const int at = row - first + i;
            if (i < words && (kBatch == 1 || (at >= 0 && at < count))) {
              x.at(n, at) = __float2bfloat16_rn(value_of(word, i));
            }
          }
        });
  }

  // The hidden state times the weights of a norm, whose other factor its squares are for.
  __device__ __forceinline__ void receive_hidden(Phase from, int layer, const bf16* norm) {
    float squares[kBatch] = {};
    receive<3>(
        from, layer, 0, p.rows[from].all_words(), 0, batch(),
        [&](int row, int count) {
          Weights weights;
#pragma unroll
          for (int i = 0; i < kWordValues; ++i) {
            weights.data[i] = i < count ? __bfloat162float(norm[row + i]) : 0.0f;
          }
          return weights;
        },
        [&](int n, int row, int count, const Word& word, const Weights& weights) {
#pragma unroll
          for (int i = 0; i < kWordValues; ++i) {
            if (i >= count) break;
            const float value = value_of(word, i);
            add_square(squares, n, value);
            x.at(n, row + i) = __float2bfloat16_rn(value * weights.data[i]);
          }
        });
    add_squares(squares);
  }

  // The first hidden state: rows of the embedding.
  __device__ __forceinline__ void embed(const bf16* norm) {
    const auto* embedding = static_cast<const bf16*>(p.model.embedding);
    const Rows& rows = p.rows[kOut];
    const int block = blockIdx.x;
    float squares[kBatch] = {};
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (n >= batch()) break;
      const bf16* row = embedding + int64_t{shared.tokens[n]} * p.model.width;
      for (int i = threadIdx.x; i < p.model.width; i += kConsumers) {
        const float value = __bfloat162float(row[i]);
        squares[n] += value * value;
        x.at(n, i) = __float2bfloat16_rn(value * __bfloat162float(norm[i]));
      }
      if (threadIdx.x < rows.units(block)) {
        shared.residual[n][threadIdx.x] = __bfloat162float(row[rows.first(block) + threadIdx.x]);
      }
    }
    add_squares(squares);
  }

  __device__ __forceinline__ static void add_square(float (&squares)[kBatch], int n, float value) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {  // so that registers have them
      if (i == n) squares[i] += value * value;
    }
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
    return rsqrtf(__fdividef(sum, p.model.width) + p.model.norm_epsilon);
  }

  // The vectors that a phase multiplies, `count` columns from `first` on.
  __device__ __forceinline__ void gather(Phase phase, int layer, int first, int count) {
    const bf16* norm = static_cast<const bf16*>(p.model.norms) +
                       int64_t{2 * layer + (phase == kGateUp)} * p.model.width;
    if (phase == kOut) {
      wait(kAttention, layer);
      Attention::template collect<kBatch>(p.model, batch(), p.words[kAttention], tag(layer),
                                          shared.splits, shared.lengths, x);
    } else if (phase == kDown) {
      receive_units(layer, first, count);
    } else if (phase == kQkv && layer == 0) {
      embed(norm);
    } else {  // the head's layer is one after the last
      receive_hidden(phase == kGateUp ? kOut : kDown, phase == kGateUp ? layer : layer - 1, norm);
    }
    sync_consumers();
  }

  // The result of a unit of the block's.
  __device__ __forceinline__ float result(Phase phase, int n, int unit, int units) {
    const float sum = shared.sums.total(n, unit);
    if (phase == kOut || phase == kDown) return shared.residual[n][unit] += sum;
    const float factor = rstd(n);
    if (phase == kQkv) return sum * factor + shared.bias[unit];
    if (phase == kHead) return sum * factor;
    const float gate = sum * factor, up = shared.sums.total(n, units + unit) * factor;
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
  }

  // The product of attention's results, whose wait is the longest: meanwhile registers take the
  // weights, and the ring has room for more.
  __device__ __forceinline__ void out_held(int layer) {
    const Rows& rows = p.rows[kOut];
    const int block = blockIdx.x, units = rows.units(block);
    const int slices = units > 0 ? rows.K / kSlice : 0;
    HeldWeights held;
    held.take(tile::settled(shared.stream), slot, units, slices);
    gather(kOut, layer, 0, rows.K);
    held.multiply(x, slices, shared.sums);
    sync_consumers();
    send_results(kOut, rows, block, units, layer);
  }

  // Gathers vectors, multiplies the block's rows and hands on what they give.
  __device__ __forceinline__ void multiply_rows(Phase phase, int layer) {
    const Rows& rows = p.rows[phase];
    const bool whole = rows.K <= p.part;
#pragma unroll 1
    for (int block = blockIdx.x; block < rows.blocks; block += gridDim.x) {
      const int units = rows.units(block);
      if (phase == kQkv) load_bias(rows.first(block), units, layer);
#pragma unroll 1
      for (int first = 0; first < rows.K; first += p.part) {
        const int count = min(p.part, rows.K - first);
        if (first > 0) sync_consumers();  // vectors have been read
        if (block == static_cast<int>(blockIdx.x) || !whole) gather(phase, layer, first, count);
        multiply(tile::settled(shared.stream), slot, x, units * rows.unit_rows, count / kSlice,
                 shared.sums, first > 0);
      }
      sync_consumers();
      if (phase == kHead) {
        store_logits(rows.first(block), units);
      } else {
        send_results(phase, rows, block, units, layer);
      }
      if (block + gridDim.x < rows.blocks) sync_consumers();  // sums have been read
    }
  }

  __device__ __forceinline__ void load_bias(int first, int units, int layer) {
    const auto* bias = static_cast<const bf16*>(p.model.qkv_bias);
    if (threadIdx.x < units) {
      const int all = (p.model.heads + 2 * p.model.kv_heads) * kHeadDim;
      shared.bias[threadIdx.x] =
          bias == nullptr ? 0.0f
                          : __bfloat162float(bias[int64_t{layer} * all + first + threadIdx.x]);
    }
  }

  __device__ __forceinline__ void send_results(Phase phase, const Rows& rows, int block, int units,
                                               int layer) {
    const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
    const int sending = rows.sending_warps();
#pragma unroll 1
    for (int task = warp; task < batch() * sending; task += kWarps) {
      const int n = kBatch == 1 ? 0 : task / sending, part = task - n * sending;
      const int unit = part * kWarpRows + lane, index = part * kWarpWords + lane;
      const float own = lane < kWarpRows && unit < units ? result(phase, n, unit, units) : 0.0f;
      const Word word = gather_word(own, tag(layer));
      if (lane < kWarpWords && index < rows.words) {
        send(p.words[phase] + int64_t{n} * rows.all_words() + block * rows.words + index, word);
      }
      __syncwarp();
      if (lane == 0) arrive(header().counters[phase]);
    }
  }

  __device__ __forceinline__ void store_logits(int first, int units) {
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      if (threadIdx.x < units && n < batch()) {
        const float logit = result(kHead, n, threadIdx.x, units);
        p.model.logits[int64_t{n} * p.model.vocabulary + first + threadIdx.x] =
            shared.status[n] == kOk ? logit : NAN;
      }
    }
  }

  struct Ends {
    int first, last, cut;
  };

  __device__ __forceinline__ void attention(int layer) {
    auto& storage = *reinterpret_cast<typename Attention::Storage*>(shared.scratch);
    const float scale = tile::kLog2E * rsqrtf(kHeadDim);
    for_each_unit(p.model, shared.splits, shared.lengths, [&](const Unit& unit) {
      // The wait is also one for all to have read the storage.
      receive<3>(
          kQkv, layer, 0, p.rows[kQkv].all_words(), unit.sequence, unit.sequence + 1,
          [&](int row, int& count) {
            // Values up to `cut` belong to the head of the first one, others to the last one's.
            const Ends ends = {Attention::place(p.model, unit, row),
                               Attention::place(p.model, unit, row + count - 1) - count + 1,
                               kHeadDim - row % kHeadDim};
            if (ends.first < 0 && ends.last + count <= 0) count = 0;
            return ends;
          },
          [&](int, int, int count, const Word& word, const Ends& ends) {
#pragma unroll
            for (int i = 0; i < kWordValues; ++i) {
              const int to = (i < ends.cut ? ends.first : ends.last) + i;
              const bool wanted = i < ends.cut ? ends.first >= 0 : ends.last + count > 0;
              if (i < count && wanted) storage.raw[0][to] = value_of(word, i);
            }
          });
      sync_consumers();
      Attention::prepare(p.model, layer, shared.rotation[unit.sequence], storage);
      sync_consumers();
      if (unit.last) Attention::score(p.model, scale, storage);
      Attention::attend(shared.stream, slot, unit, scale, storage);
      sync_consumers();
      Attention::finish(p.model, p.words[kAttention], tag(layer), unit, storage);
      if (unit.last && shared.lengths[unit.sequence] < p.model.capacity) {
        Attention::append(p.model, layer, unit, shared.lengths[unit.sequence], storage);
      }
    });
    sync_consumers();
    if (threadIdx.x == 0) arrive(header().counters[kAttention]);
  }

  // One loop over phases, so that what they share is in the instruction caches once.
  __device__ __forceinline__ void run() {
    const int layers = p.model.layers;
    const Rows& rows = p.rows[kOut];
    const bool hold = HeldWeights::fit(rows.each + (rows.extra > 0), rows.K / kSlice);
#pragma unroll 1
    for (int layer = 0; layer <= layers; ++layer) {
#pragma unroll 1
      for (int i = layer < layers ? kQkv : kHead; i <= (layer < layers ? kDown : kHead); ++i) {
        const auto phase = static_cast<Phase>(i);
        if (phase == kAttention) {
          attention(layer);
        } else if (phase == kOut && hold) {
          out_held(layer);
        } else {
          multiply_rows(phase, layer);
        }
      }
    }
    // All blocks have sent what the head needs, so they have read these.
    if (blockIdx.x == 0 && threadIdx.x < batch()) {
      const int length = shared.lengths[threadIdx.x];
      p.model.lengths[threadIdx.x] = length + (length < p.model.capacity);
      p.model.status[threadIdx.x] = shared.status[threadIdx.x];
    }
    if (blockIdx.x == 0 && threadIdx.x < kHead) {
      const auto phase = static_cast<Phase>(threadIdx.x);
      header().before[phase] = shared.before[phase] + arrivals(phase, p.model.layers);
      if (threadIdx.x == 0) header().layers = shared.layers + p.model.layers;
    }
  }
};

}  // namespace jaxkern::decode
