// What need not be on the way from one phase to the next: what normalises the hidden state, and
// clearing places.
#pragma once

#include "cuda/decode/storage.cuh"

namespace jaxkern::decode {

// 1 / sqrt(mean square) of a hidden state, from the sum of its squares.
__device__ __forceinline__ float rstd_of(const DecodeParams& p, float squares) {
  return rsqrtf(__fdividef(squares, p.width) + p.norm_epsilon);
}

// A warp that has every kWarps-th sequence.
//
// All blocks send squares of the hidden state. So when those are there all have read what was sent
// before the phase that gave it, and the one before.
template <int kHeadDim, int kBatch, int kStages, int kScaleBytes>
class Helper {
  using Storage = StepStorage<kHeadDim, kBatch, kStages, kScaleBytes>;
  using Sent = decode::Sent<kHeadDim, kBatch>;

 public:
  static constexpr int kWarps = kBatch == 1 ? 1 : 3;        // of those that the producer leaves
  static constexpr uint32_t kAfterOut = 0, kAfterDown = 1;  // parities of the barriers

  __device__ __forceinline__ static void run(const StepParams& p, Storage& shared, int warp) {
    const Helper helper(p, shared, warp);
    const int steps = max(p.model.sampling.steps, 1);
    uint32_t layer = 0;
    for (int step = 0; step < steps; ++step) {
      shared.turn.wait(step % 2);
      if (shared.ended) return;
      if (step == 0) layer = shared.layers;
      // NOTE: loops, because code that is not needed leaves the caches to the consumers'.
      for (const uint32_t end = layer + p.model.layers; layer != end; ++layer) {
#pragma unroll 1
        for (uint32_t half = kAfterOut; half <= kAfterDown; ++half) {
          const bool after_out = half == kAfterOut;
          shared.hidden_sent.wait(half);
          helper.normalize({p, layer}, after_out ? kOut : kDown);
#pragma unroll 1
          for (int i = 0; i < 2; ++i) {
            const Phase phase = after_out ? (i == 0 ? kDown : kQkv) : (i == 0 ? kOut : kGateUp);
            helper.clear_results({p, phase == kDown ? layer - 1 : layer}, phase);
          }
          if (after_out) helper.clear_attention({p, layer});
        }
      }
    }
  }

 private:
  __device__ __forceinline__ Helper(const StepParams& p, Storage& shared, int warp)
      : p_(p), shared_(shared), warp_(warp) {}

  __device__ __forceinline__ static int lane() { return threadIdx.x % tile::kWarpSize; }
  __device__ __forceinline__ int batch() const { return kBatch == 1 ? 1 : p_.model.batch; }

  __device__ __forceinline__ void normalize(const Sent& sent, Phase phase) const {
    for (int n = warp_; n < batch(); n += kWarps) {
      const float sum = receive(sent.squares(phase) + n * p_.squares_stride);
      if (lane() == 0) shared_.rstd[n] = rstd_of(p_.model, sum);
    }
    shared_.rstd_ready.arrive_warp();
  }
  // The sum of what all blocks have sent.
  __device__ __forceinline__ float receive(const float* from) const {
    static_assert(kMaxMultiprocessors <= 2 * 4 * tile::kWarpSize);
    const auto get = [&](int index) {
      Word word = {};
      do {
        if (index < p_.squares_stride) word = peek(from + index);
      } while (!__all_sync(0xffffffffu, has_sums(word)));
      return (__uint_as_float(word.data[0]) + __uint_as_float(word.data[1])) +
             (__uint_as_float(word.data[2]) + __uint_as_float(word.data[3]));
    };
    float sum = get(4 * lane());
    if (p_.squares_stride > 4 * tile::kWarpSize) sum += get(4 * (lane() + tile::kWarpSize));
    return tile::warp_sum(sum);
  }

  // They stay where all layers have their own.
  __device__ __forceinline__ void clear_result(tile::bf16* place) const {
    if (p_.model.debug == nullptr) clear(place);
  }
  // The places of this block's results of a phase.
  __device__ __forceinline__ void clear_results(const Sent& sent, Phase phase) const {
    const Rows& rows = p_.rows[phase];
    for (int n = warp_; n < batch(); n += kWarps) {
      for (int block = blockIdx.x; block < rows.blocks; block += p_.model.multiprocessors) {
#pragma unroll 1
        for (int unit = lane(); unit < rows.units(block); unit += tile::kWarpSize) {
          clear_result(sent.results(phase) +
                       result_place(rows, phase, batch(), n, rows.first(block) + unit));
        }
        if ((phase == kOut || phase == kDown) && lane() == 0) {
          clear(sent.squares(phase) + n * p_.squares_stride + block);
        }
      }
    }
  }
  __device__ __forceinline__ void clear_attention(const Sent& sent) const {
    for (int i = 0; i < shared_.units.count; ++i) {
      const Unit& unit = shared_.units.data[i];
      if (unit.tokens == 0 || unit.sequence % kWarps != warp_) continue;
#pragma unroll 1
      for (int d = lane(); d < unit.group * kHeadDim; d += tile::kWarpSize) {
        if (unit.split == 0) clear_result(sent.head(unit) + sent.head_place(d));
        if (unit.splits > 1) clear(sent.partial(unit, unit.split) + d);
      }
      if (unit.splits > 1 && lane() < unit.group) clear(sent.log(unit, unit.split) + lane());
    }
  }

  const StepParams& p_;
  Storage& shared_;
  const int warp_;
};

}  // namespace jaxkern::decode
