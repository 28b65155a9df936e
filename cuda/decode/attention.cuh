// Attention of one new token: over the keys and values that the cache has, which come through the
// stream, and its own, which come with the query and take their place among them.
//
// A unit of work is one kv head of one sequence and one split of its tokens. Each warp takes 32
// tokens at a time: scores of all heads that share the kv head, heads as rows of mma.m16n8k16, then
// their sums of values, heads as its columns. Warps are merged in shared memory, splits by the
// block that has the first one.
#pragma once

#include "cuda/decode/exchange.cuh"
#include "cuda/decode/product.cuh"
#include "cuda/tile/ptx/special.cuh"
#include "cuda/tile/reduce.cuh"

namespace jaxkern::decode {

inline constexpr int kWarpTokens = 32;

// How the tokens of all sequences, with the new ones, are divided: into splits of so many.
struct Splits {
  int tokens, count;  // of a split, and splits of the longest sequence

  __device__ __forceinline__ void init(const DecodeParams& p, int longest) {
    constexpr int kStep = 64;  // of their lengths
    const int heads = p.batch * p.kv_heads;
    const int most = max(1, min(kMaxSplits, p.multiprocessors / heads));
    tokens = max(kSplitTokens, tile::ceil_div(longest, kStep * most) * kStep);
    count = of(longest);
  }
  // Splits of so many.
  __device__ __forceinline__ int of(int total) const { return tile::ceil_div(total, tokens); }
};

// What a multiprocessor does of attention: the same in every layer of a step.
// NOTE: taking turns, all would find the code for it out of their caches, which costs more than
// their share of keys and values does (H200).
struct Unit {
  int sequence, kv_head, split, splits;
  int group;          // heads that share the kv head
  int first, tokens;  // none where a shorter sequence has not got the split
  int own;            // the new token, from the first on; negative if this has not got it

  // `length_of`(sequence): of what the cache has.
  template <class LengthOf>
  __device__ __forceinline__ void init(const DecodeParams& p, const Splits& all,
                                       const LengthOf& length_of, int index) {
    split = index % all.count;
    kv_head = index / all.count % p.kv_heads;
    sequence = index / all.count / p.kv_heads;
    group = p.heads / p.kv_heads;
    const int length = length_of(sequence), total = total_of(p, length);
    splits = all.of(total);
    first = split * all.tokens;
    tokens = max(0, min(all.tokens, total - first));
    own = split == splits - 1 && length < total ? length - first : -1;
  }
  // Tokens of a sequence, with the new one if the cache has room for it.
  __device__ __forceinline__ static int total_of(const DecodeParams& p, int length) {
    return min(length + 1, p.capacity);
  }
  // The first of its heads, among those of all sequences.
  __device__ __forceinline__ int first_head(const DecodeParams& p) const {
    return sequence * p.heads + kv_head * group;
  }
};

// The units of this multiprocessor.
struct Units {
  Unit data[kMaxUnits];
  int count;

  // By kMaxUnits threads or more.
  template <class LengthOf>
  __device__ __forceinline__ void init(const DecodeParams& p, const LengthOf& length_of) {
    if (threadIdx.x >= kMaxUnits) return;
    int longest = 0;
    for (int n = 0; n < p.batch; ++n) longest = max(longest, Unit::total_of(p, length_of(n)));
    Splits splits;
    splits.init(p, longest);
    const int all = p.batch * p.kv_heads * splits.count;
    const int index = blockIdx.x + threadIdx.x * p.multiprocessors;
    if (index < all) data[threadIdx.x].init(p, splits, length_of, index);
    const int left = all - static_cast<int>(blockIdx.x);
    if (threadIdx.x == 0) count = max(0, tile::ceil_div(left, p.multiprocessors));
  }
};

template <int kHeadDim>
struct Attention {
  using bf16 = tile::bf16;
  static constexpr int kSlices = kHeadDim / kSlice;
  static constexpr int kHalfChunk = 8 << 10;  // keys; then values
  static constexpr int kChunkTokens = kHalfChunk / (2 * kHeadDim);

  struct Storage {
    alignas(16) bf16 query[kSlices][kMaxGroup][kSlice];
    bf16 key[kHeadDim];                             // the new one
    alignas(16) bf16 raw[kMaxGroup + 2][kHeadDim];  // query, key and value as they came
    // Of the warps: the logarithm of what weights are relative to, their sum and that of the
    // weighted values.
    alignas(16) float log[kMaxGroup][kWarps], sum[kMaxGroup][kWarps];
    alignas(4) bf16 out[kWarps][kHeadDim][kMaxGroup];
  };

  // Where keys or values of a kv head begin in the cache.
  __device__ __forceinline__ static int64_t cache_offset(const DecodeParams& p, int layer,
                                                         const Unit& unit) {
    return ((int64_t{layer} * p.batch + unit.sequence) * p.kv_heads + unit.kv_head) * p.capacity *
           kHeadDim;
  }

  template <class Producer>
  __device__ __forceinline__ static void load(const DecodeParams& p, Producer& producer, int layer,
                                              const Unit& unit) {
    const int64_t offset = cache_offset(p, layer, unit);
    const bf16* keys = static_cast<const bf16*>(p.keys) + offset;
    const bf16* values = static_cast<const bf16*>(p.values) + offset;
    for (int t = 0; t < unit.tokens; t += kChunkTokens) {
      const int first = unit.first + t;
      const int bytes = min(kChunkTokens, p.capacity - first) * kHeadDim * 2;
      producer.begin(2 * bytes);
      producer.copy(0, keys + int64_t{first} * kHeadDim, bytes);
      producer.copy(kHalfChunk, values + int64_t{first} * kHeadDim, bytes);
      producer.end();
    }
  }

  // Norms, rotation and rounding of the heads of query and of the key, a warp each.
  __device__ __forceinline__ static void prepare(const DecodeParams& p, int layer, const Unit& unit,
                                                 const float2* rotation, Storage& shared) {
    const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
    const int group = unit.group;
    constexpr int kHalf = kHeadDim / 2, kPairs = kHalf / tile::kWarpSize;
    for (int head = warp; head <= group; head += kWarps) {
      const bf16* raw = shared.raw[head];
      float low[kPairs], high[kPairs], squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        low[i] = __bfloat162float(raw[lane + 32 * i]);
        high[i] = __bfloat162float(raw[lane + 32 * i + kHalf]);
        squares += low[i] * low[i] + high[i] * high[i];
      }
      if (p.qk_norms != nullptr) {
        const auto* weight =
            static_cast<const bf16*>(p.qk_norms) + (2 * layer + (head == group)) * kHeadDim;
        const float rstd = rsqrtf(tile::warp_sum(squares) / kHeadDim + p.norm_epsilon);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          low[i] *= rstd * __bfloat162float(weight[lane + 32 * i]);
          high[i] *= rstd * __bfloat162float(weight[lane + 32 * i + kHalf]);
        }
      }
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const auto [cos, sin] = rotation[lane + 32 * i];
        const float x = low[i] * cos - high[i] * sin, y = high[i] * cos + low[i] * sin;
        const auto set = [&](int d, float value) {
          (head < group ? shared.query[d / kSlice][head][d % kSlice] : shared.key[d]) =
              __float2bfloat16_rn(value);
        };
        set(lane + 32 * i, x);
        set(lane + 32 * i + kHalf, y);
      }
    }
  }

  // The cache gets the new token's key and value, by a warp.
  __device__ __forceinline__ static void keep(const DecodeParams& p, int layer, const Unit& unit,
                                              const Storage& shared) {
    if (unit.own < 0 || threadIdx.x < kConsumers - tile::kWarpSize) return;
    const int64_t offset = cache_offset(p, layer, unit);
    put(shared, unit, unit.first + unit.own, static_cast<bf16*>(p.keys) + offset,
        static_cast<bf16*>(p.values) + offset);
  }

  // Where values of a key and of a value are, in the cache and so in a chunk: of a token from the
  // first on, which is one of a slice.
  __device__ __forceinline__ static int64_t key_place(int token, int d) {
    return (int64_t{token / 8} * kSlices + d / kSlice) * 8 * kSlice + token % 8 * kSlice +
           d % kSlice;
  }
  __device__ __forceinline__ static int64_t value_place(int token, int d) {
    return (int64_t{token / kSlice} * kHeadDim + d) * kSlice + token % kSlice;
  }

  // The new token's key and value, by a warp.
  __device__ __forceinline__ static void put(const Storage& shared, const Unit& unit, int token,
                                             bf16* keys, bf16* values) {
    const bf16* value = shared.raw[unit.group + 1];
#pragma unroll
    for (int i = 0; i < kHeadDim / tile::kWarpSize; ++i) {
      const int d = i * tile::kWarpSize + threadIdx.x % tile::kWarpSize;
      keys[key_place(token, d)] = shared.key[d];
      values[value_place(token, d)] = value[d];
    }
  }

  template <class Stream, class Slot>
  __device__ __forceinline__ static void attend(const DecodeParams& p, Stream& stream, Slot& slot,
                                                const Unit& unit, float scale, Storage& shared) {
    const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
    float most = -INFINITY, sum = 0.0f;  // of head lane / 4; a lane's part of the sum
    float out[kHeadDim / 16][4] = {};
    constexpr int kChunkParts = kChunkTokens / kWarpTokens;
    const Slot start = slot;
    // A warp waits for chunks with tokens of its own only, and leaves those before with them. Where
    // its own is further on than the ring is long, it has to leave some before, or that never
    // comes.
    const auto leave_to = [&](Slot end) {
      __syncwarp();
      const Slot left = {slot.count + lane};
      if (left.count < end.count) stream.ring.empty[left.stage()].arrive();
      slot = end;
    };
    const auto wait_for = [&](Slot chunk) {
      while (chunk.count - slot.count >= Stream::kStages) {
        slot.wait_full(stream.ring);
        leave_to(slot.next());
      }
      chunk.wait_full(stream.ring);
    };
    static_assert(kWarps / kChunkParts <= tile::kWarpSize);
#pragma unroll 1
    for (int part = warp; part * kWarpTokens < unit.tokens; part += kWarps) {
      const int begin = part * kWarpTokens, tokens = min(kWarpTokens, unit.tokens - begin);
      const Slot own = {start.count + part / kChunkParts};
      wait_for(own);
      char* keys = stream.chunks[own.stage()] + part % kChunkParts * kWarpTokens * kHeadDim * 2;
      if (unit.own >= begin && unit.own < begin + kWarpTokens) {
        put(shared, unit, unit.own - begin, reinterpret_cast<bf16*>(keys),
            reinterpret_cast<bf16*>(keys + kHalfChunk));
        tile::ptx::fence_async_shared();  // before the next copy to this place
        __syncwarp();
      }
      add(keys, shared, tokens, scale, most, sum, out);
      leave_to(own.next());
    }
    const Slot end = {start.count + tile::ceil_div(unit.tokens, kChunkTokens)};
    if (slot.count < end.count) {
      wait_for(end.previous());
      leave_to(end);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) {
      shared.log[lane / 4][warp] = most;
      shared.sum[lane / 4][warp] = sum;
    }
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int d = 16 * m + 8 * i + lane / 4, head = lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(&shared.out[warp][d][head]) =
            tile::pack<bf16>(out[m][2 * i], out[m][2 * i + 1]);
      }
    }
  }

  // 32 tokens, of which `tokens` exist. `keys`: theirs; values lie half a chunk further on.
  __device__ __forceinline__ static void add(const char* keys, const Storage& shared, int tokens,
                                             float scale, float& most, float& sum,
                                             float (&out)[kHeadDim / 16][4]) {
    const int lane = threadIdx.x % tile::kWarpSize;
    // Columns 2 c, 2 c + 1 of tile t are tokens 8 c + 2 t, + 1: then a lane's scores are weights of
    // the tokens whose values it reads.
    const char* mine = keys + (lane / 8 * kSlices * 8 + lane / 4 % 2) * kSliceBytes + lane % 4 * 16;
    float score[kWarpTokens / 8][4] = {};
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      const auto* row = &shared.query[s][lane / 4][lane % 4 * 8];
      const uint4 query = *reinterpret_cast<const uint4*>(row);
#pragma unroll
      for (int t = 0; t < kWarpTokens / 8; ++t) {
        const uint4 b = *reinterpret_cast<const uint4*>(mine + (s * 8 + 2 * t) * kSliceBytes);
        tile::ptx::mma_m16n8k16<tile::ElementType<tile::bf16>>(score[t], query.x, 0, query.y, 0,
                                                               b.x, b.y);
        tile::ptx::mma_m16n8k16<tile::ElementType<tile::bf16>>(score[t], query.z, 0, query.w, 0,
                                                               b.z, b.w);
      }
    }
    float now = most;
#pragma unroll
    for (int t = 0; t < kWarpTokens / 8; ++t) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool exists = lane % 4 * 8 + 2 * t + e < tokens;
        score[t][e] = exists ? score[t][e] * scale : -INFINITY;
        now = fmaxf(now, score[t][e]);
      }
    }
    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
    now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
    const float rescale = tile::ptx::exp2_approx(most - now);
    most = now;
    sum *= rescale;
    uint32_t weights[kWarpTokens / 8];
#pragma unroll
    for (int t = 0; t < kWarpTokens / 8; ++t) {
      const float x = tile::ptx::exp2_approx(score[t][0] - now);
      const float y = tile::ptx::exp2_approx(score[t][1] - now);
      sum += x + y;
      weights[t] = tile::pack<bf16>(x, y);
    }
    // Here a lane has columns, of two heads.
    const float left = __shfl_sync(0xffffffffu, rescale, lane % 4 * 8);
    const float right = __shfl_sync(0xffffffffu, rescale, lane % 4 * 8 + 4);
    uint32_t exists[4];  // what does not may be NaN
#pragma unroll
    for (int i = 0; i < 4; ++i) exists[i] = existing(2 * i, tokens);
    const char* values = keys + kHalfChunk + 16 * lane;
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
      const uint4 a = *reinterpret_cast<const uint4*>(values + m * 16 * kSliceBytes);
      const uint4 b = *reinterpret_cast<const uint4*>(values + (m * 16 + 8) * kSliceBytes);
      out[m][0] *= left;
      out[m][1] *= right;
      out[m][2] *= left;
      out[m][3] *= right;
      tile::ptx::mma_m16n8k16<tile::ElementType<tile::bf16>>(
          out[m], a.x & exists[0], b.x & exists[0], a.y & exists[1], b.y & exists[1], weights[0],
          weights[1]);
      tile::ptx::mma_m16n8k16<tile::ElementType<tile::bf16>>(
          out[m], a.z & exists[2], b.z & exists[2], a.w & exists[3], b.w & exists[3], weights[2],
          weights[3]);
    }
  }

  // The bits of two of the lane's tokens, from its `first` on, that exist.
  __device__ __forceinline__ static uint32_t existing(int first, int tokens) {
    const int left = tokens - first - static_cast<int>(threadIdx.x % 4 * 8);
    return left >= 2 ? 0xffffffff : left == 1 ? 0xffff : 0;
  }

  // The results of the unit from those of the warps: calls send(g, d, result), and send_log(g,
  // log). A thread has a head, and some of its values. Results are `scale` times as large as the
  // values.
  template <class Send, class SendLog>
  __device__ __forceinline__ static void merge_warps(int group, const Storage& shared, float scale,
                                                     const Send& send, const SendLog& send_log) {
    const int g = threadIdx.x % kMaxGroup;
    if (g >= group) return;
    float weight[kWarps], most = -INFINITY, total = 0.0f;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) {
      weight[k] = shared.log[g][k];
      most = fmaxf(most, weight[k]);
    }
#pragma unroll
    for (int k = 0; k < kWarps; ++k) {
      weight[k] = tile::ptx::exp2_approx(weight[k] - most);
      total += weight[k] * shared.sum[g][k];
    }
    const float factor = tile::ptx::reciprocal_approx(total) * scale;
#pragma unroll 2
    for (int d = threadIdx.x / kMaxGroup; d < kHeadDim; d += kConsumers / kMaxGroup) {
      float x = 0.0f;
#pragma unroll
      for (int k = 0; k < kWarps; ++k) x += weight[k] * __bfloat162float(shared.out[k][d][g]);
      send(g, d, __float2bfloat16_rn(x * factor));
    }
    if (threadIdx.x < kMaxGroup) send_log(g, most + __log2f(total));
  }

  // The same from those of all splits, once they are there: `partials` of the group, the next
  // split's so much further on, and the logs. A thread has eight values of a head: send(index,
  // word), the first of which is value 8 index of the group.
  template <class Send>
  __device__ __forceinline__ static void merge_splits(int group, const bf16* partials,
                                                      int64_t stride, const float* logs,
                                                      int64_t log_stride, int count,
                                                      const Send& send) {
    constexpr int kHeadWords = kHeadDim / Word::kValues;
    static_assert(kMaxGroup * kHeadWords <= kConsumers);
    const int index = threadIdx.x, g = index / kHeadWords;
    const bool mine = g < group;
    const auto* log = reinterpret_cast<const uint32_t*>(logs + g);
    Word got[kMaxSplits];
    float weight[kMaxSplits], most = -INFINITY, total = 0.0f;
    bool ready;
    do {
      ready = true;
#pragma unroll
      for (int k = 0; k < kMaxSplits; ++k) {
        got[k] = {};
        uint32_t bits = __float_as_uint(-INFINITY);
        if (mine && k < count) {
          got[k] = peek(partials + k * stride + index * Word::kValues);
          bits = tile::ptx::load_relaxed(log + k * log_stride);
        }
        weight[k] = __uint_as_float(bits);
        ready &= has_values(got[k]) && bits != kNoSum;
      }
    } while (!__all_sync(0xffffffffu, ready));
    if (!mine) return;
#pragma unroll
    for (int k = 0; k < kMaxSplits; ++k) most = fmaxf(most, weight[k]);
#pragma unroll
    for (int k = 0; k < kMaxSplits; ++k) {
      weight[k] = tile::ptx::exp2_approx(weight[k] - most);
      total += weight[k];
    }
    const float factor = tile::ptx::reciprocal_approx(total);
    Word result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float2 sum = {};
#pragma unroll
      for (int k = 0; k < kMaxSplits; ++k) {
        const float2 value = tile::unpack<bf16>(got[k].data[i]);
        sum.x += weight[k] * value.x;
        sum.y += weight[k] * value.y;
      }
      result.data[i] = tile::pack<bf16>(sum.x * factor, sum.y * factor);
    }
    send(index, result);
  }
};

}  // namespace jaxkern::decode
