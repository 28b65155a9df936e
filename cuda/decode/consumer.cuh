// The warps that multiply: what they gather before a phase, and what they hand on after it.
#pragma once

#include <type_traits>

#include "cuda/decode/helper.cuh"
#include "cuda/tile/smem.cuh"

namespace jaxkern::decode {

template <class Weight, int kHeadDim, int kBatch, int kStages>
struct Consumer {
  using Attention = decode::Attention<kHeadDim>;
  using Storage = StepStorage<kHeadDim, kBatch, kStages>;
  using bf16 = tile::bf16;
  using Weights = decode::Weights<Weight>;
  using Team = decode::Team<kBatch>;

  const StepParams& p;
  Storage& shared;
  const Vectors<kBatch> x;
  Draw<kBatch> draw;
  tile::Slot<kStages> slot = {};

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

  // --- What others have sent ---------------------------------------------------------------------

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
    using Helper = decode::Helper<kHeadDim, kBatch, kStages>;
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

  // --- What this block sends ---------------------------------------------------------------------

  // Where a lane begins among the results of a block and goes on: those of a sequence are of a team
  // of warps, or of its first, which then has the sum of their squares.
  struct Place {
    int unit, step;
  };
  __device__ __forceinline__ Place place(Phase phase) const {
    if (gives_hidden(phase)) {
      return {Team::leads() ? lane() : kMaxRows, tile::kWarpSize};
    }
    return {Team::lane(), Team::kLanes};
  }

  // What a result needs besides the sum: a bias, or the weight of the norm that follows; and what
  // sums of its rows are multiplied by.
  struct Constant {
    bf16 own;
    float scale[2];
  };
  template <Phase kPhase>
  __device__ __forceinline__ Constant constant(int layer, int block, int unit) const {
    const Rows& rows = p.rows[kPhase];
    const int row = max(rows.first(block) + min(unit, rows.units(block) - 1), 0);
    Constant constant = {__float2bfloat16_rn(0.0f), {1.0f, 1.0f}};
    if constexpr (kPhase == kQkv) {
      const auto* bias = static_cast<const bf16*>(p.model.qkv_bias);
      if (bias != nullptr) constant.own = bias[int64_t{layer} * rows.count() + row];
    }
    if constexpr (gives_hidden(kPhase)) {
      const auto* norms = static_cast<const bf16*>(p.model.norms);
      constant.own = norms[int64_t{2 * layer + (kPhase == kOut ? 1 : 2)} * p.model.width + row];
    }
    if constexpr (std::is_same_v<Weight, tile::e4m3>) {
      constexpr int kParts = kPhase == kGateUp ? 2 : 1;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int64_t index = (int64_t{kPhase == kHead ? 0 : layer} * kParts + part) * rows.count();
        constant.scale[part] = p.model.scales[kPhase][index + row] * Weights::kSumScale;
      }
    }
    return constant;
  }

  // silu(gate) * up
  __device__ __forceinline__ static float gated(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
  }

  // `first`: of the lane's first result, fetched before the sums were there.
  template <Phase kPhase>
  __device__ __forceinline__ void send_results(int layer, int block, const Constant& first) {
    if (gives_hidden(kPhase) && !Team::leads()) return;
#pragma unroll 1
    for (int round = 0; round < Team::kRounds; ++round) {
      const int n = Team::sequence(round);
      if (n < batch()) send_results<kPhase>(layer, block, n, first);
    }
  }
  template <Phase kPhase>
  __device__ __forceinline__ void send_results(int layer, int block, int n, const Constant& first) {
    const Rows& rows = p.rows[kPhase];
    const Place place = this->place(kPhase);
    const int units = rows.units(block);
    const bool large = is_large(rows, block);
    wait_for_rstd<kPhase>(layer);
    bf16* to = sent(layer).results(kPhase);
    float sum_of_squares = 0.0f;
#pragma unroll 1
    for (int unit = place.unit; unit < units; unit += place.step) {
      const auto [bits, scale] =
          unit == place.unit ? first : this->constant<kPhase>(layer, block, unit);
      [[maybe_unused]] const float own = __bfloat162float(bits);
      float value = shared.sums.total(n, unit, large) * scale[0];
      if constexpr (gives_hidden(kPhase)) {
        value += shared.residual[n][unit];
        shared.residual[n][unit] = value;
        value = __bfloat162float(__float2bfloat16_rn(value));
        sum_of_squares += value * value;
        value *= own * Weights::kVectorScale;
      } else if constexpr (kPhase == kQkv) {
        value = value * shared.rstd[n] + own;
      } else {
        const float factor = shared.rstd[n];
        const float up = shared.sums.total(n, units + unit, large) * scale[1];
        value = gated(value * factor, up * factor) * Weights::kVectorScale;
      }
      send(to + result_place(rows, kPhase, batch(), n, rows.first(block) + unit),
           __float2bfloat16_rn(value));
    }
    if constexpr (gives_hidden(kPhase)) {
      __syncwarp();
      sum_of_squares = tile::warp_sum(sum_of_squares);
      if (lane() == 0) {
        send(sent(layer).squares(kPhase) + n * p.squares_stride + block, sum_of_squares);
      }
    }
    if (lane() == 0 && place.unit < rows.most) arrive(header().counters[kPhase]);
  }
  // Whether the sums of a block are in the places of those of many rows.
  __device__ __forceinline__ bool is_large(const Rows& rows, int block) const {
    return rows.units(block) * rows.unit_rows > decltype(shared.sums)::kHalfRows;
  }

  __device__ __forceinline__ void store_logits(int block, const Constant& first) {
    const Rows& rows = p.rows[kHead];
    const bool large = is_large(rows, block);
    wait_for_rstd<kHead>(0);
#pragma unroll 1
    for (int round = 0; round < Team::kRounds; ++round) {
      const int n = Team::sequence(round);
      if (n >= batch()) return;
#pragma unroll 1
      for (int unit = Team::lane(); unit < rows.units(block); unit += Team::kLanes) {
        const int token = rows.first(block) + unit;
        const float scale =
            (unit == Team::lane() ? first : constant<kHead>(0, block, unit)).scale[0];
        const float sum = shared.sums.total(n, unit, large);
        const float logit = shared.status[n] == kOk ? sum * scale * shared.rstd[n] : NAN;
        p.model.logits[int64_t{n} * p.model.vocabulary + token] = logit;
        draw.add(round, token, logit);
      }
    }
  }

  // --- The phases --------------------------------------------------------------------------------

  // With weights that registers hold.
  template <Phase kPhase, class Held>
  __device__ __forceinline__ void multiply_held(int layer, const Held& held) {
    const Rows& rows = p.rows[kPhase];
    const int block = blockIdx.x;
    const Constant constant = this->constant<kPhase>(layer, block, place(kPhase).unit);
    gather<kPhase>(layer);
    held.multiply(x, rows, block, shared.sums);
    sync_consumers();
    shared.probe.take(kPhase, kMultiply);
    send_results<kPhase>(layer, block, constant);
    shared.probe.take(kPhase, kSend);
  }

  // Gathers vectors, multiplies the block's rows and hands on what they give.
  template <Phase kPhase>
  __device__ __forceinline__ void multiply_rows(int layer) {
    const Rows& rows = p.rows[kPhase];
#pragma unroll 1
    for (int block = blockIdx.x; block < rows.blocks; block += gridDim.x) {
      const Constant constant = this->constant<kPhase>(layer, block, place(kPhase).unit);
      const bool first = block == static_cast<int>(blockIdx.x);
      if constexpr (kBatch > 1 || kPhase == kDown) {
        multiply_parts<kPhase>(layer, block, first);
      } else {
        if (first) gather<kPhase>(layer);
        multiply<kPhase>(block, rows.K, false);
      }
      sync_consumers();
      shared.probe.take(kPhase, kMultiply);
      if constexpr (kPhase == kHead) {
        store_logits(block, constant);
        // The new keys and values are there for whoever knows of this block's next arrival. It
        // costs nothing here.
        if (threadIdx.x == 0 && first) __threadfence();
      } else {
        send_results<kPhase>(layer, block, constant);
      }
      shared.probe.take(kPhase, kSend);
      if (block + gridDim.x < rows.blocks) sync_consumers();  // sums have been read
    }
  }
  // `more`: adds to the sums of columns before these.
  template <Phase kPhase>
  __device__ __forceinline__ void multiply(int block, int columns, bool more) {
    decode::multiply<Weight>(tile::settled(shared.stream), slot, x, p.rows[kPhase], block,
                             columns / Weights::kColumns, shared.sums, more);
  }
  // In as many parts as vectors have room for. All are there when the first ones are, so those of
  // the next part are on their way while a part is multiplied.
  template <Phase kPhase>
  __device__ __forceinline__ void multiply_parts(int layer, int block, bool first_block) {
    const int columns = p.rows[kPhase].K;
    Words<columns_at_once(kPhase)> words;
    bool seen = false;
    if (first_block) wait_for_source<kPhase>(layer);
#pragma unroll 1
    for (int first = 0; first < columns; first += p.part) {
      const int count = min(p.part, columns - first), next = first + p.part;
      if (first_block || count < columns) {
        if (first > 0) sync_consumers();  // vectors have been read
        receive<kPhase>(layer, first, count, words, seen);
        sync_consumers();
        shared.probe.take(kPhase, kReceive);
      }
      seen = kBatch > 1 && kPhase == kDown && next < columns;
      if (seen) {
        look<kPhase>(words, layer, words_of(next), words_of(min(next + p.part, columns)));
      }
      multiply<kPhase>(block, count, first > 0);
      shared.probe.take(kPhase, kMultiply);
    }
  }

  __device__ __forceinline__ void attention(int layer) {
    auto& storage = tile::settled(*reinterpret_cast<typename Attention::Storage*>(shared.scratch));
    const float scale = tile::kLog2E * rsqrtf(kHeadDim);
#pragma unroll 1
    for (int i = 0; i < shared.units.count; ++i) {
      const Unit& unit = shared.units.data[i];
      if (unit.tokens == 0) continue;
      if (i > 0) sync_consumers();  // the storage has been read
      receive_heads(layer, unit, storage);
      sync_consumers();
      shared.probe.take(kAttention, kWait);
      Attention::prepare(p.model, layer, unit, shared.rotation[unit.sequence], storage);
      sync_consumers();
      shared.probe.take(kAttention, kReceive);
      Attention::attend(p.model, shared.stream, slot, unit, scale, storage);
      sync_consumers();
      shared.probe.take(kAttention, kMultiply);
      const bool split = unit.splits > 1;
      const Sent<kHeadDim, kBatch> sent = this->sent(layer);
      bf16* partial = sent.partial(unit, unit.split);
      Attention::merge_warps(
          p.model, storage, Weights::kVectorScale,
          [&](int g, int d, bf16 value) {
            const int index = g * kHeadDim + d;
            send(split ? partial + index : sent.head(unit, index), value);
          },
          [&](int g, float value) {
            if (split) send(sent.log(unit, unit.split) + g, value);
          });
      if (split && unit.split == 0) {
        const int64_t heads = int64_t{p.model.batch} * p.model.heads;
        Attention::merge_splits(p.model, sent.partial(unit, 0), heads * kHeadDim, sent.log(unit, 0),
                                heads, unit.splits, [&](int index, const Word& word) {
                                  send(sent.head(unit, index * Word::kValues), word);
                                });
      }
      if (unit.split == 0 && threadIdx.x == 0) arrive(header().counters[kAttention]);
      shared.probe.take(kAttention, kSend);
    }
  }

  // Query, key and value of a unit. These few blocks look for the values themselves.
  __device__ __forceinline__ void receive_heads(int layer, const Unit& unit,
                                                typename Attention::Storage& storage) {
    const int count = Unit::values(p.model), index = threadIdx.x;
    const bf16* from = sent(layer).results(kQkv) +
                       (int64_t{unit.sequence} * p.model.kv_heads + unit.kv_head) * count;
    static_assert((kMaxGroup + 2) * kHeadDim <= kConsumers * Word::kValues);
    Word got = {};
    do {
      if (index * Word::kValues < count) got = peek(from + index * Word::kValues);
    } while (!__all_sync(0xffffffffu, has_values(got)));
    if (index * Word::kValues < count) reinterpret_cast<Word*>(storage.raw)[index] = got;
  }
};

}  // namespace jaxkern::decode
