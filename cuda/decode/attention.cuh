// Attention of one new token: over the keys and values that the cache has, which come through the
// stream, and over its own, which come with the query in words.
//
// A unit of work is one kv head of one sequence and one split of its tokens. Each warp takes 32
// tokens at a time: scores of all heads that share the kv head, then their sums of values, both by
// mma.m16n8k16 with heads as rows. Warps are merged in shared memory, splits by whoever reads them.
#pragma once

#include "cuda/decode/exchange.cuh"
#include "cuda/decode/product.cuh"
#include "cuda/tile/ptx/special.cuh"
#include "cuda/tile/reduce.cuh"

namespace jaxkern::decode {

inline constexpr int kWarpTokens = 32;

// A head's result of one split goes by 64 values in ten words, of which the last has one value and
// room for the logarithm of the sum of weights.
inline constexpr int kPartDims = 64, kPartWords = kPartDims / kWordValues + 1;
__host__ __device__ constexpr int head_words(int head_dim) {
  return head_dim / kPartDims * kPartWords;
}

// How the tokens of all sequences are divided: the same number of splits for each.
struct Splits {
  int tokens, count;

  __device__ __forceinline__ void init(const DecodeParams& p, const int* lengths) {
    int longest = 0;
    for (int n = 0; n < p.batch; ++n) longest = max(longest, lengths[n]);
    const int heads = p.batch * p.kv_heads;
    const int most = max(1, min(kMaxSplits, static_cast<int>(gridDim.x) / heads));
    tokens = max(1, tile::ceil_div(longest, kSplitTokens * most)) * kSplitTokens;
    count = max(1, tile::ceil_div(longest, tokens));
  }
  // Those of a sequence of `length` tokens; the last split has the new one, too.
  __device__ __forceinline__ int of(int length) const {
    return max(1, tile::ceil_div(length, tokens));
  }
};

struct Unit {
  int sequence, kv_head, split;
  int first, tokens;  // of the cache
  bool last;
};

// Calls work(unit) for each of the multiprocessor's units.
template <class Do>
__device__ __forceinline__ void for_each_unit(const DecodeParams& p, const Splits& splits,
                                              const int* lengths, const Do& work) {
  // NOTE: the same multiprocessors in every layer. In turns all find the code for it out of their
  // caches, which costs more than their share of keys and values does (H200).
  const int all = p.batch * p.kv_heads * splits.count;
  for (int index = blockIdx.x; index < all; index += gridDim.x) {
    Unit unit;
    unit.split = index % splits.count;
    unit.kv_head = index / splits.count % p.kv_heads;
    unit.sequence = index / splits.count / p.kv_heads;
    const int length = lengths[unit.sequence], count = splits.of(length);
    if (unit.split >= count) continue;
    unit.first = unit.split * splits.tokens;
    unit.last = unit.split == count - 1;
    unit.tokens = min(splits.tokens, length - unit.first);
    work(unit);
  }
}

template <int kHeadDim>
struct Attention {
  using bf16 = tile::bf16;
  static constexpr int kSlices = kHeadDim / kSlice;
  static constexpr int kHalfChunk = kChunkBytes / 2;  // keys; then values
  static constexpr int kChunkTokens = kHalfChunk / (2 * kHeadDim);
  static constexpr int kWords = head_words(kHeadDim);

  struct Storage {
    alignas(16) bf16 query[kSlices][kMaxGroup][kSlice];
    bf16 key[kHeadDim];                  // the new one
    float raw[kMaxGroup + 2][kHeadDim];  // query, key and value as they came
    float score[kMaxGroup];              // of the new token
    float most[kWarps][kMaxGroup], sum[kWarps][kMaxGroup];
    float out[kWarps][kMaxGroup][kHeadDim];
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

  // Where a row of the product of query, key and value belongs in raw, or -1.
  __device__ __forceinline__ static int place(const DecodeParams& p, const Unit& unit, int row) {
    const int group = p.heads / p.kv_heads;
    const int query = unit.kv_head * group * kHeadDim;
    const int key = (p.heads + unit.kv_head) * kHeadDim, value = key + p.kv_heads * kHeadDim;
    if (row >= query && row < query + group * kHeadDim) return row - query;
    if (row >= key && row < key + kHeadDim) return row - key + group * kHeadDim;
    if (row >= value && row < value + kHeadDim) return row - value + (group + 1) * kHeadDim;
    return -1;
  }

  // Norms, rotation and rounding of the heads of query and of the key, a warp each.
  __device__ __forceinline__ static void prepare(const DecodeParams& p, int layer,
                                                 const float2* rotation, Storage& shared) {
    const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
    const int group = p.heads / p.kv_heads;
    constexpr int kHalf = kHeadDim / 2, kPairs = kHalf / tile::kWarpSize;
    for (int head = warp; head <= group; head += kWarps) {
      const float* raw = shared.raw[head];
      float low[kPairs], high[kPairs], squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        low[i] = raw[lane + 32 * i];
        high[i] = raw[lane + 32 * i + kHalf];
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

  // The new token's key and value into the cache.
  __device__ __forceinline__ static void append(const DecodeParams& p, int layer, const Unit& unit,
                                                int position, const Storage& shared) {
    const int64_t offset = cache_offset(p, layer, unit);
    bf16* keys = static_cast<bf16*>(p.keys) + offset;
    bf16* values = static_cast<bf16*>(p.values) + offset;
    const float* value = shared.raw[p.heads / p.kv_heads + 1];
    for (int d = threadIdx.x; d < kHeadDim; d += kConsumers) {
      keys[(int64_t{position / 8} * kSlices + d / kSlice) * 8 * kSlice + position % 8 * kSlice +
           d % kSlice] = shared.key[d];
      values[(int64_t{position / kSlice} * kHeadDim + d) * kSlice + position % kSlice] =
          __float2bfloat16_rn(value[d]);
    }
  }

  // The new token's scores, a warp for each head; first those that have the fewest other tokens. In
  // units of log2.
  __device__ __forceinline__ static void score(const DecodeParams& p, float scale,
                                               Storage& shared) {
    const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
    for (int head = kWarps - 1 - warp; head < p.heads / p.kv_heads; head += kWarps) {
      float sum = 0.0f;
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        sum += __bfloat162float(shared.query[s][head][lane]) *
               __bfloat162float(shared.key[s * kSlice + lane]);
      }
      sum = tile::warp_sum(sum);
      if (lane == 0) shared.score[head] = sum * scale;
    }
  }

  template <int kStages>
  __device__ __forceinline__ static void attend(Stream<kStages>& stream, tile::Slot<kStages>& slot,
                                                const Unit& unit, float scale, Storage& shared) {
    const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
    uint4 query[kSlices];
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      query[s] = *reinterpret_cast<const uint4*>(&shared.query[s][lane / 4][lane % 4 * 8]);
    }
    float most = -INFINITY, sum = 0.0f;  // of head lane / 4; a lane's part of the sum
    float out[kHeadDim / 8][4] = {};
    constexpr int kParts = kChunkTokens / kWarpTokens;
    for (int first = 0; first < unit.tokens; first += kChunkTokens, slot.advance()) {
      slot.wait_full(stream.ring);
      const char* chunk = stream.chunks[slot.stage()];
      const int part = (warp - first / kWarpTokens) & (kWarps - 1);
      const int tokens = min(kWarpTokens, unit.tokens - first - part * kWarpTokens);
      if (part < kParts && tokens > 0) {
        add(chunk + part * kWarpTokens * kHeadDim * 2, query, tokens, scale, most, sum, out);
      }
      stream.ring.empty[slot.stage()].arrive_warp();
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) {
      shared.most[warp][lane / 4] = most;
      shared.sum[warp][lane / 4] = sum;
    }
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
      *reinterpret_cast<float2*>(&shared.out[warp][lane / 4][8 * d + lane % 4 * 2]) =
          make_float2(out[d][0], out[d][1]);
    }
  }

  // 32 tokens, of which `tokens` exist. `keys`: theirs; values lie half a chunk further on.
  __device__ __forceinline__ static void add(const char* keys, const uint4 (&query)[kSlices],
                                             int tokens, float scale, float& most, float& sum,
                                             float (&out)[kHeadDim / 8][4]) {
    const int lane = threadIdx.x % tile::kWarpSize;
    // Columns 2 c, 2 c + 1 of tile t are tokens 8 c + 2 t, + 1: then a lane's scores are weights of
    // the tokens whose values it reads.
    const char* mine = keys + (lane / 8 * kSlices * 8 + lane / 4 % 2) * kSliceBytes + lane % 4 * 16;
    float score[kWarpTokens / 8][4] = {};
#pragma unroll
    for (int t = 0; t < kWarpTokens / 8; ++t) {
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
        const uint4 b = *reinterpret_cast<const uint4*>(mine + (s * 8 + 2 * t) * kSliceBytes);
        tile::ptx::mma_m16n8k16(score[t], query[s].x, 0, query[s].y, 0, b.x, b.y);
        tile::ptx::mma_m16n8k16(score[t], query[s].z, 0, query[s].w, 0, b.z, b.w);
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
    const char* values = keys + kHalfChunk;
#pragma unroll
    for (int d = 0; d < kHeadDim / 8; ++d) {
      out[d][0] *= rescale;
      out[d][1] *= rescale;
      uint4 b = *reinterpret_cast<const uint4*>(values + d * 512 + 16 * lane);
      if (tokens < kWarpTokens) {  // what does not exist may be NaN
        b.x = existing(b.x, 0, tokens);
        b.y = existing(b.y, 2, tokens);
        b.z = existing(b.z, 4, tokens);
        b.w = existing(b.w, 6, tokens);
      }
      tile::ptx::mma_m16n8k16(out[d], weights[0], 0, weights[1], 0, b.x, b.y);
      tile::ptx::mma_m16n8k16(out[d], weights[2], 0, weights[3], 0, b.z, b.w);
    }
  }

  // Of the values of two of the lane's tokens, from its `first` on, those that exist.
  __device__ __forceinline__ static uint32_t existing(uint32_t pair, int first, int tokens) {
    const int left = tokens - first - static_cast<int>(threadIdx.x % 4 * 8);
    return left >= 2 ? pair : left == 1 ? pair & 0xffff : 0;
  }

  // The result of the unit from those of the warps and the new token, sent to whoever reads it. A
  // warp for 64 values of a head.
  __device__ __forceinline__ static void finish(const DecodeParams& p, Word* words, uint32_t tag,
                                                const Unit& unit, const Storage& shared) {
    const int warp = threadIdx.x / tile::kWarpSize, lane = threadIdx.x % tile::kWarpSize;
    const int group = p.heads / p.kv_heads;
    constexpr int kParts = kHeadDim / kPartDims, kResults = 2 * kWarps;  // at most
    for (int task = warp; task < group * kParts; task += kWarps) {
      const int g = task / kParts, part = task % kParts, d = part * kPartDims + 2 * lane;
      float log = -INFINITY, sum = 0.0f;  // of the warps, and then of the new token
      if (lane < kWarps) {
        log = shared.most[lane][g];
        sum = shared.sum[lane][g];
      } else if (lane == kWarps && unit.last) {
        log = shared.score[g];
        sum = 1.0f;
      }
      float most = log;
#pragma unroll
      for (int i = kResults / 2; i > 0; i /= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, i, kResults));
      }
      most = __shfl_sync(0xffffffffu, most, 0);
      const float weight = tile::ptx::exp2_approx(log - most);
      const float total = __shfl_sync(0xffffffffu, tile::warp_sum(weight * sum, kResults), 0);
      const float own = __shfl_sync(0xffffffffu, weight, kWarps);
      float x = 0.0f, y = 0.0f;
      if (unit.last) {
        x = own * shared.raw[group + 1][d];
        y = own * shared.raw[group + 1][d + 1];
      }
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float of_warp = __shfl_sync(0xffffffffu, weight, w);
        const float2 out = *reinterpret_cast<const float2*>(&shared.out[w][g][d]);
        x += of_warp * out.x;
        y += of_warp * out.y;
      }
      const float factor = tile::ptx::reciprocal_approx(total);
      float values[kWordValues];
#pragma unroll
      for (int i = 0; i < kWordValues; ++i) {
        const int from = min(kWordValues * lane + i, kPartDims - 1);
        const float even = __shfl_sync(0xffffffffu, x, from / 2);
        const float odd = __shfl_sync(0xffffffffu, y, from / 2);
        values[i] = (from % 2 ? odd : even) * factor;
      }
      Word word = make_word(values, tag);
      if (lane == kPartWords - 1) word.data[2] = __float_as_uint(most + log2f(total));
      const int head = unit.kv_head * group + g;
      Word* to =
          words + ((int64_t{unit.sequence} * p.heads + head) * kMaxSplits + unit.split) * kWords;
      if (lane < kPartWords) send(to + part * kPartWords + lane, word);
    }
  }

  // The results of all heads of all sequences, once they are there, merged over splits.
  template <int kBatch>
  __device__ __forceinline__ static void collect(const DecodeParams& p, int batch,
                                                 const Word* words, uint32_t tag,
                                                 const Splits& splits, const int* lengths,
                                                 const Vectors<kBatch>& x) {
    constexpr int kAtOnce = 2;
    const int all = p.heads * kWords;
    for (int n = 0; n < batch; ++n) {
      const int count = splits.of(lengths[n]);
      const Word* start = words + int64_t{n} * p.heads * kMaxSplits * kWords;
      const auto from = [&](int index, int split) {
        return start + (index / kWords * kMaxSplits + split) * kWords + index % kWords;
      };
      const auto set = [&](int index, const float (&values)[kWordValues]) {
        const int word = index % kPartWords,
                  d = index / kPartWords * kPartDims + word * kWordValues;
#pragma unroll
        for (int v = 0; v < kWordValues; ++v) {
          if (v == 0 || word < kPartWords - 1) x.at(n, d + v) = __float2bfloat16_rn(values[v]);
        }
      };
      for (int first = threadIdx.x; first < all; first += kAtOnce * kConsumers) {
        if (count == 1) {
          Word got[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            if (first + i * kConsumers < all) got[i] = peek(from(first + i * kConsumers, 0));
          }
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int index = first + i * kConsumers;
            if (index >= all) continue;
            settle(got[i], from(index, 0), tag);
            float values[kWordValues];
#pragma unroll
            for (int v = 0; v < kWordValues; ++v) values[v] = value_of(got[i], v);
            set(index, values);
          }
        } else {
          for (int index = first; index < min(all, first + kAtOnce * kConsumers);
               index += kConsumers) {
            float values[kWordValues];
            merge(
                values, [&](int split) { return from(index, split); },
                kPartWords - 1 - index % kPartWords, count, tag);
            set(index, values);
          }
        }
      }
    }
  }

  // A word's values, merged over splits by the logarithms that lie `log_ahead` words further on.
  template <class From>
  __device__ __forceinline__ static void merge(float (&values)[kWordValues], const From& from,
                                               int log_ahead, int count, uint32_t tag) {
    constexpr int kAtOnce = 2;
    float most = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int v = 0; v < kWordValues; ++v) values[v] = 0.0f;
    for (int first = 0; first < count; first += kAtOnce) {
      Word got[kAtOnce], logs[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= count) break;
        got[i] = peek(from(first + i));
        logs[i] = peek(from(first + i) + log_ahead);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (first + i >= count) break;
        settle(got[i], from(first + i), tag);
        settle(logs[i], from(first + i) + log_ahead, tag);
        const float log = __uint_as_float(logs[i].data[2]), now = fmaxf(most, log);
        const float rescale = tile::ptx::exp2_approx(most - now);
        const float weight = tile::ptx::exp2_approx(log - now);
        most = now;
        sum = sum * rescale + weight;
#pragma unroll
        for (int v = 0; v < kWordValues; ++v) {
          values[v] = values[v] * rescale + weight * value_of(got[i], v);
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kWordValues; ++v) values[v] *= tile::ptx::reciprocal_approx(sum);
  }
};

}  // namespace jaxkern::decode
