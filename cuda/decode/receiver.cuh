// What a block needs before a phase: how long consumers wait for it, and how it becomes vectors.
#pragma once

#include "cuda/decode/helper.cuh"

namespace jaxkern::decode {

template <class Weight, int kHeadDim, int kBatch, int kStages>
struct Receiver {
  using bf16 = tile::bf16;
  using Weights = decode::Weights<Weight>;
  using Storage = StepStorage<kHeadDim, kBatch, kStages, Weights::kScaleBytes>;
  using Team = decode::Team<kBatch>;

  const StepParams& p;
  Storage& shared;
  const Vectors<kBatch> x;

  __device__ __forceinline__ WorkspaceHeader& header() const {
    return *static_cast<WorkspaceHeader*>(p.model.workspace);
  }
  __device__ __forceinline__ int batch() const { return kBatch == 1 ? 1 : p.model.batch; }
  __device__ __forceinline__ static int warp() { return threadIdx.x / tile::kWarpSize; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % tile::kWarpSize; }

  // NOTE: a branch that depends on data takes 20 to 40 cycles here, a constant by a computed index
  // 45, and all of it is time in which nobody multiplies. So phases are compile-time constants.
  __device__ static constexpr bool gives_hidden(Phase phase) {
    return phase == kOut || phase == kDown;
  }

  __device__ __forceinline__ Sent<kHeadDim, kBatch> sent(int layer) const {
    return {p, shared.layers + layer};
  }

  // How many arrivals there are of a phase of so many layers.
  __device__ __forceinline__ uint32_t arrivals(Phase phase, int layers) const {
    const Rows& rows = p.rows[phase];
    const int senders =
        gives_hidden(phase) ? 1 : min(Team::kSize, tile::ceil_div(rows.most, tile::kWarpSize));
    return layers * batch() * (phase == kAttention ? p.model.kv_heads : rows.blocks * senders);
  }
  // Until it is worth to look for what all have sent of a phase: the last quarter comes while the
  // look is on its way.
  __device__ __forceinline__ void wait(Phase phase, int layer) {
    if (threadIdx.x == 0) {
      const uint32_t all = shared.before[phase] + arrivals(phase, layer + 1);
      wait_for(header().counters[phase], all - arrivals(phase, 1) / 4);
      if (gives_hidden(phase)) shared.hidden_sent.arrive();
    }
    sync_consumers();
  }

  // Columns that are looked for at once: those of common models, of several sequences those of a
  // part, or what registers have room for beside a product.
  __device__ static constexpr int columns_at_once(Phase phase) {
    if (kBatch > 1) return kBatch > 8 ? kPartColumns / 2 : kPartColumns;
    if (phase == kDown) return kHeadDim == 64 ? 8192 : 10240;
    return kHeadDim == 64 ? 2048 : 4096;
  }
  // The phase that sends what a phase multiplies, and the layer in which it does.
  __device__ static constexpr Phase source(Phase phase) {
    return phase == kOut ? kAttention : phase == kGateUp ? kOut : phase == kDown ? kGateUp : kDown;
  }
  __device__ __forceinline__ static int source_layer(Phase phase, int layer) {
    return phase == kQkv || phase == kHead ? layer - 1 : layer;
  }

  // Words of what a phase has sent, as many as vectors have in kColumns columns: a thread has every
  // kConsumers-th from one on.
  template <int kColumns>
  struct Words {
    static constexpr int kCount = kBatch * kColumns / (kConsumers * Word::kValues);
    Word data[kCount] = {};

    // use(word, index) of those below `end`, if the first is word `start`.
    template <class Use>
    __device__ __forceinline__ void each(int start, int end, const Use& use) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int index = start + static_cast<int>(threadIdx.x) + i * kConsumers;
        if (index < end) use(data[i], index);
      }
    }
    __device__ __forceinline__ bool are_there() const {
      return __all_sync(0xffffffffu, have_values(data));
    }
  };
  template <Phase kPhase, int kColumns>
  __device__ __forceinline__ void look(Words<kColumns>& words, int layer, int start,
                                       int end) const {
    const Sent<kHeadDim, kBatch> sent = this->sent(source_layer(kPhase, layer));
    const auto* from = reinterpret_cast<const Word*>(sent.results(source(kPhase)));
    words.each(start, end, [&](Word& word, int index) { word = peek(from + index); });
  }
  // Columns `first` to `first + columns` of the vectors that a phase multiplies, of which `words`
  // may have seen the first ones. Helpers find out what normalises the hidden state.
  template <Phase kPhase, int kColumns>
  __device__ __forceinline__ void receive(int layer, int first, int columns, Words<kColumns>& words,
                                          bool seen) {
    if (kPhase == kQkv && layer == 0) {
      embed(first, columns);
      return;
    }
    const int begin = words_of(first), end = words_of(first + columns);
#pragma unroll 1
    for (int start = begin; start < end; start += words.kCount * kConsumers) {
      if (!seen) look<kPhase>(words, layer, start, end);
      seen = false;
      while (!words.are_there()) look<kPhase>(words, layer, start, end);
      words.each(start, end, [&](const Word& word, int index) { x.words[index - begin] = word; });
    }
  }
  __device__ __forceinline__ int words_of(int columns) const {
    return batch() * columns / Word::kValues;
  }
  // Until shared.rstd is that of the hidden state that a phase has received.
  template <Phase kPhase>
  __device__ __forceinline__ void wait_for_rstd(int layer) const {
    using Helper = decode::Helper<kHeadDim, kBatch, kStages, Weights::kScaleBytes>;
    if (kPhase == kGateUp) shared.rstd_ready.wait(Helper::kAfterOut);
    if (kPhase == kHead || (kPhase == kQkv && layer > 0)) {
      shared.rstd_ready.wait(Helper::kAfterDown);
    }
  }

  // Columns of the first hidden state: rows of the embedding.
  __device__ __forceinline__ void embed(int first, int columns) {
#pragma unroll 1
    for (int round = 0; round < Team::kRounds; ++round) {
      const int n = Team::sequence(round);
      if (n < batch()) embed_one(n, first, columns, shared.squares[n * Team::kSize]);
    }
    sync_consumers();
    const int n = threadIdx.x;
    if (n < batch()) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < Team::kSize; ++i) sum += shared.squares[n * Team::kSize + i];
      shared.rstd[n] = rstd_of(p.model, sum);
    }
  }
  // Of one sequence. `squares`: their sums, of the team's warps.
  __device__ __forceinline__ void embed_one(int n, int first, int columns, float& squares) {
    const int token = min(max(shared.draw.tokens[n], 0), p.model.vocabulary - 1);
    const auto* row = static_cast<const bf16*>(p.model.embedding) + int64_t{token} * p.model.width;
    const auto* norm = static_cast<const bf16*>(p.model.norms);
    constexpr int kWords = kBatch == 1 ? 2 : 4;  // at once
    float sum = 0.0f;
#pragma unroll 1
    for (int start = Team::lane(); start < p.model.width / Word::kValues;
         start += kWords * Team::kLanes) {
      Word values[kWords], weights[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int index = min(start + i * Team::kLanes, p.model.width / Word::kValues - 1);
        values[i] = reinterpret_cast<const Word*>(row)[index];
        weights[i] = reinterpret_cast<const Word*>(norm)[index];
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const int index = start + i * Team::kLanes;
        if (index >= p.model.width / Word::kValues) continue;
#pragma unroll
        for (uint32_t& pair : values[i].data) {
          const float2 value = tile::unpack<bf16>(pair);
          const float2 weight = tile::unpack<bf16>(weights[i].data[&pair - values[i].data]);
          sum += value.x * value.x + value.y * value.y;
          pair = tile::pack<bf16>(value.x * weight.x * Weights::kVectorScale,
                                  value.y * weight.y * Weights::kVectorScale);
        }
        const int place = index - first / Word::kValues;
        if (place >= 0 && place < columns / Word::kValues) x.word(n, place) = values[i];
      }
    }
    const Rows& rows = p.rows[kOut];
    const int block = blockIdx.x;
    for (int unit = Team::lane(); unit < rows.units(block); unit += Team::kLanes) {
      shared.residual[n][unit] = __bfloat162float(row[rows.first(block) + unit]);
    }
    sum = tile::warp_sum(sum);
    if (lane() == 0) (&squares)[Team::lane() / tile::kWarpSize] = sum;
  }

  // Until it is worth to look for what a phase multiplies.
  template <Phase kPhase>
  __device__ __forceinline__ void wait_for_source(int layer) {
    if (kPhase != kQkv || layer > 0) wait(source(kPhase), source_layer(kPhase, layer));
    shared.probe.take(kPhase, kWait);
  }
  // The vectors that a phase multiplies.
  template <Phase kPhase>
  __device__ __forceinline__ void gather(int layer) {
    Words<columns_at_once(kPhase)> words;
    wait_for_source<kPhase>(layer);
    receive<kPhase>(layer, 0, p.rows[kPhase].K, words, false);
    sync_consumers();
    shared.probe.take(kPhase, kReceive);
  }
};

}  // namespace jaxkern::decode
