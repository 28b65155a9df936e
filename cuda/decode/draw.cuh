// The token that follows each sequence: the one with the largest logit, or with the largest logit
// plus noise, of all or of those that top_k and top_p leave.
//
// A rank orders tokens by logit, equal ones by the smaller token. Blocks exchange the largest of
// their rows like other values. What top_k and top_p leave are the tokens from some rank on; a
// search digit by digit finds it, in rounds: all blocks add what they have to a histogram.
#pragma once

#include <cfloat>

#include "cuda/decode/product.cuh"
#include "cuda/tile/reduce.cuh"

namespace jaxkern::decode {

using Rank = uint64_t;

__device__ __forceinline__ Rank rank_of(float logit, uint32_t token) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 is 0
  const uint32_t ordered = bits ^ (static_cast<int>(bits) < 0 ? 0xffffffff : 0x80000000);
  return Rank{isnan(logit) ? 0 : ordered} << 32 | ~token;
}
__device__ __forceinline__ uint32_t token_of(Rank rank) { return ~static_cast<uint32_t>(rank); }
__device__ __forceinline__ float logit_of(Rank rank) {
  const auto ordered = static_cast<uint32_t>(rank >> 32);
  return __uint_as_float(ordered ^ (static_cast<int>(ordered) < 0 ? 0x80000000 : 0xffffffff));
}

// Threefry-2x32 (Salmon et al. 2011), the words of which are exclusive-ored: bits `index` of
// jax.random.bits for this key.
__device__ __forceinline__ uint32_t random_bits(uint2 key, uint32_t index) {
  const uint32_t keys[3] = {key.x, key.y, key.x ^ key.y ^ 0x1bd11bda};
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  uint32_t x = keys[0], y = index + keys[1];
#pragma unroll
  for (int group = 0; group < 5; ++group) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x += y;
      y = __funnelshift_l(y, y, kRotations[group % 2][i]) ^ x;
    }
    x += keys[(group + 1) % 3];
    y += keys[(group + 2) % 3] + group + 1;
  }
  return x ^ y;
}

// Noise with which the largest of logits is a draw from their softmax (Gumbel's distribution).
__device__ __forceinline__ float gumbel(uint2 key, uint32_t token) {
  const float uniform = __uint_as_float(random_bits(key, token) >> 9 | 0x3f800000) - 1.0f;
  return -__logf(-logf(fmaxf(uniform, FLT_MIN)));
}

// What histograms add up: how many tokens, and exp(logit - largest) in units of 2^-24.
struct Tally {
  static constexpr int kMassBits = 44, kOne = 1 << 24;
  __device__ __forceinline__ static uint64_t of(float mass) {
    return uint64_t{1} << kMassBits | __float2uint_rn(mass * kOne);
  }
  template <bool kMass>
  __device__ __forceinline__ static uint64_t part(uint64_t tally) {
    return kMass ? tally & ((uint64_t{1} << kMassBits) - 1) : tally >> kMassBits;
  }
};
static_assert(kMaxVocabulary <= 1 << (64 - Tally::kMassBits));

// In shared memory.
template <int kBatch>
struct DrawStorage {
  Rank of_warps[kBatch * Team<kBatch>::kSize], largest[kBatch];
  uint64_t limit[kBatch];                // 0 before it is known
  Rank lowest[kBatch];                   // of the tokens that stay, as far as it is known
  uint64_t above[kBatch], kept[kBatch];  // tallies of ranks above it, and from it on
  bool settled[kBatch];
  int tokens[kBatch], done[kBatch];
  uint32_t exchanges, rounds;                  // so far, of this launch and those before it
  uint32_t exchange_arrivals, round_arrivals;  // that there were
};

template <int kBatch>
class Draw {
  using Storage = DrawStorage<kBatch>;
  using Team = decode::Team<kBatch>;

 public:
  __device__ __forceinline__ Draw(const StepParams& p, Storage& shared, uint64_t* scratch)
      : p_(p), how_(p.model.sampling), shared_(shared), histograms_(scratch) {}

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (Rank& best : best_) best = 0;
  }
  // One more logit, of the lane's sequence in a round.
  __device__ __forceinline__ void add(int round, uint32_t token, float logit) {
    const Rank rank = rank_of(logit, token);
#pragma unroll
    for (int i = 0; i < Team::kRounds; ++i) {  // registers have no index
      if (i == round) best_[i] = max(best_[i], rank);
    }
  }

  // When all have been added.
  __device__ __forceinline__ void start() { send_largest(); }

  // The tokens, and whether there is another step.
  __device__ __forceinline__ bool finish(int step) {
    receive_largest();
    if (how_.seeds != nullptr) {
      filter();
      add_noise(step);
      send_largest();
      receive_largest();
    }
    return take(step);
  }

 private:
  __device__ __forceinline__ static int warp() { return threadIdx.x / tile::kWarpSize; }
  __device__ __forceinline__ static int lane() { return threadIdx.x % tile::kWarpSize; }
  __device__ __forceinline__ int batch() const { return kBatch == 1 ? 1 : p_.model.batch; }
  __device__ __forceinline__ WorkspaceHeader& header() const {
    return *static_cast<WorkspaceHeader*>(p_.model.workspace);
  }

  // --- The largest rank --------------------------------------------------------------------------

  __device__ __forceinline__ static Rank warp_max(Rank rank) {
    const uint32_t high = __reduce_max_sync(0xffffffffu, static_cast<uint32_t>(rank >> 32));
    const uint32_t low = high == rank >> 32 ? static_cast<uint32_t>(rank) : 0;
    return Rank{high} << 32 | __reduce_max_sync(0xffffffffu, low);
  }

  __device__ __forceinline__ Rank* place(uint32_t exchange, int n) const {
    return p_.ranks.of(exchange) + n * p_.squares_stride;
  }

  // Of the lanes' logits.
  __device__ __forceinline__ void send_largest() {
#pragma unroll
    for (int round = 0; round < Team::kRounds; ++round) {
      const Rank largest = warp_max(best_[round]);
      if (lane() == 0) shared_.of_warps[warp() + round * kWarps] = largest;
    }
    sync_consumers();
    if (threadIdx.x < batch()) {
      Rank rank = 0;
#pragma unroll
      for (int i = 0; i < Team::kSize; ++i) {
        rank = max(rank, shared_.of_warps[threadIdx.x * Team::kSize + i]);
      }
      send(place(shared_.exchanges, threadIdx.x) + blockIdx.x, rank);
    }
    if (threadIdx.x == 0) arrive(header().counters[kHead]);
  }

  // Of all blocks.
  __device__ __forceinline__ void receive_largest() {
    const int blocks = p_.model.multiprocessors;
    if (threadIdx.x == 0) {
      wait_for<true>(header().counters[kHead], shared_.exchange_arrivals + blocks);
    }
    sync_consumers();
    const uint32_t exchange = shared_.exchanges;
    for (int n = warp(); n < batch(); n += kWarps) {
      constexpr int kEach = kMaxMultiprocessors / tile::kWarpSize;
      Rank got[kEach] = {};
      bool ready;
      do {
        ready = true;
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
          const int block = lane() + i * tile::kWarpSize;
          if (block < blocks) got[i] = tile::ptx::load_relaxed(place(exchange, n) + block);
        }
#pragma unroll
        for (int i = 0; i < kEach; ++i) ready &= got[i] != kNoRank;
      } while (!__all_sync(0xffffffffu, ready));
      Rank largest = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) largest = max(largest, got[i]);
      largest = warp_max(largest);
      if (lane() == 0) shared_.largest[n] = largest;
    }
    // All have read the ranks of the exchange before.
    if (threadIdx.x < batch()) clear(place(exchange + 1, threadIdx.x) + blockIdx.x);
    sync_consumers();
    if (threadIdx.x == 0) {
      ++shared_.exchanges;
      shared_.exchange_arrivals += blocks;
    }
  }

  // --- Draws -------------------------------------------------------------------------------------

  // Calls body(round, n) for the lane's sequences.
  template <class Body>
  __device__ __forceinline__ void for_sequences(const Body& body) const {
#pragma unroll 1
    for (int round = 0; round < Team::kRounds; ++round) {
      if (const int n = Team::sequence(round); n < batch()) body(round, n);
    }
  }
  // Calls body(token, logit) for those of a sequence that add() was given.
  template <class Body>
  __device__ __forceinline__ void for_own(int n, const Body& body) const {
    const Rows& rows = p_.rows[kHead];
#pragma unroll 1
    for (int block = blockIdx.x; block < rows.blocks; block += p_.model.multiprocessors) {
      for (int unit = Team::lane(); unit < rows.units(block); unit += Team::kLanes) {
        const int token = rows.first(block) + unit;
        body(token, p_.model.logits[int64_t{n} * p_.model.vocabulary + token]);
      }
    }
  }

  // What softmax is of, less the largest.
  __device__ __forceinline__ float scaled(float logit, float largest) const {
    return __fdiv_rn(logit - largest, how_.parameters[0]);
  }

  __device__ __forceinline__ void add_noise(int step) {
    begin();
    for_sequences([&](int round, int n) {
      const auto key = reinterpret_cast<const uint2*>(how_.seeds)[step * batch() + n];
      const float largest = logit_of(shared_.largest[n]);
      const Rank lowest = shared_.lowest[n];
      for_own(n, [&](int token, float logit) {
        if (rank_of(logit, token) < lowest) return;
        add(round, token, scaled(logit, largest) + gumbel(key, token));
      });
    });
  }

  // The lowest ranks of the tokens that stay.
  __device__ __forceinline__ void filter() {
    const int n = threadIdx.x;
    if (n < batch()) {
      shared_.lowest[n] = 0;
      shared_.limit[n] = how_.top_k;
    }
    if (how_.top_k > 0) search<false>();
    sync_consumers();  // all know that the search has ended
    if (how_.top_p) {
      if (n < batch()) shared_.limit[n] = how_.top_k > 0 ? mass_limit(shared_.kept[n]) : 0;
      search<true>();
    }
    sync_consumers();
  }
  // Of what comes before a token that stays.
  __device__ __forceinline__ uint64_t mass_limit(uint64_t tally) const {
    const double limit = double{how_.parameters[1]} * Tally::part<true>(tally);
    return max(uint64_t{1}, static_cast<uint64_t>(ceil(limit)));
  }

  // The lowest rank of which those above add up to less than the limit, of masses or of numbers of
  // tokens.
  template <bool kMass>
  __device__ __forceinline__ void search() {
    if (threadIdx.x < batch()) {
      const int n = threadIdx.x;
      shared_.lowest[n] = 0;
      shared_.above[n] = 0;
      shared_.settled[n] = false;
    }
#pragma unroll 1
    for (int shift = 56; shift >= 0; shift -= 8) {
      add_up(shift);
      for (int n = warp(); n < batch(); n += kWarps) {
        if (!shared_.settled[n]) choose_digit<kMass>(n, shift);
      }
      sync_consumers();
      if (threadIdx.x == 0) {
        ++shared_.rounds;
        shared_.round_arrivals += p_.model.multiprocessors;
      }
      bool settled = true;
      for (int n = 0; n < batch(); ++n) settled &= shared_.settled[n];
      if (settled) break;
    }
  }

  __device__ __forceinline__ uint64_t* histogram(uint32_t round) const {
    return p_.histograms + round % 4 * batch() * kBins;
  }

  // A histogram of the digit of all ranks that have those above it.
  __device__ __forceinline__ void add_up(int shift) {
    const int all = batch() * kBins, blocks = p_.model.multiprocessors;
    for (int i = threadIdx.x; i < all; i += kConsumers) histograms_[i] = 0;
    sync_consumers();
    for_sequences([&](int, int n) {
      const float largest = logit_of(shared_.largest[n]);
      const Rank lowest = shared_.lowest[n];
      auto* bins = reinterpret_cast<unsigned long long*>(histograms_ + n * kBins);
      for_own(n, [&](int token, float logit) {
        const Rank rank = rank_of(logit, token);
        if (shift < 56 && (rank ^ lowest) >> (shift + 8) != 0) return;
        const float mass = fmaxf(__expf(scaled(logit, largest)), 0.0f);  // none of NaN
        atomicAdd(&bins[(rank >> shift) % kBins], static_cast<unsigned long long>(Tally::of(mass)));
      });
    });
    sync_consumers();
    uint64_t* to = histogram(shared_.rounds);
    for (int i = threadIdx.x; i < all; i += kConsumers) {
      if (histograms_[i] != 0) tile::ptx::add_relaxed(to + i, histograms_[i]);
    }
    sync_consumers();
    if (threadIdx.x == 0) {
      __threadfence();
      arrive(header().round_counter);
      wait_for<true>(header().round_counter, shared_.round_arrivals + blocks);
    }
    sync_consumers();
    // All have read the histogram of the round before.
    uint64_t* before = histogram(shared_.rounds - 1);
    for (int i = blockIdx.x * kConsumers + threadIdx.x; i < all; i += blocks * kConsumers) {
      tile::ptx::store_relaxed(before + i, kEmpty);
    }
  }

  // A lane has eight bins, from the highest on.
  template <bool kMass>
  __device__ __forceinline__ void choose_digit(int n, int shift) {
    constexpr int kEach = kBins / tile::kWarpSize;
    const uint64_t* from = histogram(shared_.rounds) + n * kBins;
    const int highest = kBins - 1 - kEach * lane();
    uint64_t bins[kEach], own = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      bins[i] = tile::ptx::load_relaxed(from + highest - i) - kEmpty;
      own += bins[i];
    }
    uint64_t before = own;  // and then of the lanes before this
#pragma unroll
    for (int offset = 1; offset < tile::kWarpSize; offset *= 2) {
      const uint64_t other = __shfl_up_sync(0xffffffffu, before, offset);
      if (lane() >= offset) before += other;
    }
    const uint64_t total = __shfl_sync(0xffffffffu, before, tile::kWarpSize - 1);
    before += shared_.above[n] - own;
    uint64_t limit = shared_.limit[n];
    if (kMass && limit == 0) limit = mass_limit(total);
    int digit = -1;
    uint64_t after = before;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (digit >= 0) continue;
      before = after;
      after += bins[i];
      if (Tally::part<kMass>(before) < limit && limit <= Tally::part<kMass>(after)) {
        digit = highest - i;
      }
    }
    __syncwarp();
    const bool none = !__any_sync(0xffffffffu, digit >= 0);
    if (none && lane() == 0) {  // all stay
      shared_.kept[n] = shared_.above[n] + total;
      shared_.settled[n] = true;
    }
    if (digit >= 0) {
      shared_.lowest[n] |= Rank(digit) << shift;
      shared_.limit[n] = limit;
      shared_.above[n] = before;
      shared_.kept[n] = after;
      shared_.settled[n] = Tally::part<false>(after - before) == 1 ||  //
                           Tally::part<kMass>(after) == limit;
    }
  }

  // The tokens of a step, and whether there is another one.
  __device__ __forceinline__ bool take(int step) {
    for (int n = warp(); n < batch(); n += kWarps) {
      const bool before = shared_.done[n] != 0;
      const int token = before ? shared_.tokens[n] : token_of(shared_.largest[n]);
      bool stops = before;
      for (int i = lane(); i < how_.stop_count; i += tile::kWarpSize) {
        stops |= how_.stop_tokens[i] == token;
      }
      stops = __any_sync(0xffffffffu, stops);
      if (lane() == 0) {
        shared_.tokens[n] = token;
        shared_.done[n] = stops;
        if (blockIdx.x == 0) how_.drawn[n * how_.steps + step] = token;
      }
    }
    sync_consumers();
    bool done = true;
    for (int n = 0; n < batch(); ++n) done &= shared_.done[n] != 0;
    if (done && blockIdx.x == 0) {
      for (int i = step + 1 + threadIdx.x; i < how_.steps; i += kConsumers) {
        for (int n = 0; n < batch(); ++n) how_.drawn[n * how_.steps + i] = shared_.tokens[n];
      }
    }
    return !done && step + 1 < how_.steps;
  }

  static constexpr uint64_t kEmpty = ~uint64_t{0};  // a bin, as all of the workspace begins

  const StepParams& p_;
  const Sampling& how_;
  Storage& shared_;
  uint64_t* histograms_;
  Rank best_[Team::kRounds];
};

}  // namespace jaxkern::decode
