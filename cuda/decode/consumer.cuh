// The warps that multiply: the phases, and what they hand on.
#pragma once

#include "cuda/decode/receiver.cuh"
#include "cuda/tile/smem.cuh"

namespace jaxkern::decode {

template <class Weight, int kHeadDim, int kBatch, int kStages>
struct Consumer : Receiver<Weight, kHeadDim, kBatch, kStages> {
  using Receiver = decode::Receiver<Weight, kHeadDim, kBatch, kStages>;
  using Receiver::batch, Receiver::columns_at_once, Receiver::gives_hidden, Receiver::header;
  using Receiver::lane, Receiver::p, Receiver::sent, Receiver::shared, Receiver::words_of;
  using Receiver::x;
  using typename Receiver::bf16, typename Receiver::Team, typename Receiver::Weights;
  using Attention = decode::Attention<kHeadDim>;

  Draw<kBatch> draw;
  tile::Slot<kStages> slot = {};

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
    if constexpr (Weights::kRowScales) {
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
    this->template wait_for_rstd<kPhase>(layer);
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
    this->template wait_for_rstd<kHead>(0);
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
    const auto weights = held.operands(p.scale_code);
    this->template gather<kPhase>(layer);
    weights.multiply(x, rows, block, shared.sums);
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
        if (first) this->template gather<kPhase>(layer);
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
    decode::multiply<Weight>(tile::settled(shared.stream), slot, x, p.scale_code, p.rows[kPhase],
                             block, columns / Weights::kColumns, shared.sums, more);
  }
  // In as many parts as vectors have room for. All are there when the first ones are, so those of
  // the next part are on their way while a part is multiplied.
  template <Phase kPhase>
  __device__ __forceinline__ void multiply_parts(int layer, int block, bool first_block) {
    const int columns = p.rows[kPhase].K;
    typename Receiver::template Words<columns_at_once(kPhase)> words;
    bool seen = false;
    if (first_block) this->template wait_for_source<kPhase>(layer);
#pragma unroll 1
    for (int first = 0; first < columns; first += p.part) {
      const int count = min(p.part, columns - first), next = first + p.part;
      if (first_block || count < columns) {
        if (first > 0) sync_consumers();  // vectors have been read
        this->template receive<kPhase>(layer, first, count, words, seen);
        sync_consumers();
        shared.probe.take(kPhase, kReceive);
      }
      seen = kBatch > 1 && kPhase == kDown && next < columns;
      if (seen) {
        this->template look<kPhase>(words, layer, words_of(next),
                                    words_of(min(next + p.part, columns)));
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
      bf16* to = split ? sent.partial(unit, unit.split) : sent.head(unit);
      Attention::merge_warps(
          unit.group, storage, Weights::kVectorScale,
          [&](int g, int d, bf16 value) {
            const int index = g * kHeadDim + d;
            send(to + (split ? index : sent.head_place(index)), value);
          },
          [&](int g, float value) {
            if (split) send(sent.log(unit, unit.split) + g, value);
          });
      if (split && unit.split == 0) {
        const int64_t heads = int64_t{p.model.batch} * p.model.heads;
        to = sent.head(unit);
        Attention::merge_splits(unit.group, sent.partial(unit, 0), heads * kHeadDim,
                                sent.log(unit, 0), heads, unit.splits,
                                [&](int index, const Word& word) {
                                  send(to + sent.head_place(index * Word::kValues), word);
                                });
      }
      if (unit.split == 0 && threadIdx.x == 0) arrive(header().counters[kAttention]);
      Attention::keep(p.model, layer, unit, storage);  // nobody waits for it
      shared.probe.take(kAttention, kSend);
    }
  }

  // Query, key and value of a unit. These few blocks look for the values themselves.
  __device__ __forceinline__ void receive_heads(int layer, const Unit& unit,
                                                typename Attention::Storage& storage) {
    const int count = (unit.group + 2) * kHeadDim, index = threadIdx.x;
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
