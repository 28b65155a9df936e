// Producer/consumer hand-off through shared memory: mbarriers and rings of stages.
#pragma once

#include "cuda/tile/ptx/barrier.cuh"
#include "cuda/tile/types.cuh"

namespace jaxkern::tile {

// An mbarrier. A phase completes when the expected arrivals and bytes have all come.
struct Barrier {
  uint64_t word;

  __device__ __forceinline__ void init(int arrivals) { ptx::mbarrier_init(&word, arrivals); }
  __device__ __forceinline__ void arrive() { ptx::mbarrier_arrive(&word); }
  __device__ __forceinline__ void arrive(int count) { ptx::mbarrier_arrive(&word, count); }
  __device__ __forceinline__ void arrive_expect(int bytes) {
    ptx::mbarrier_arrive_expect(&word, bytes);
  }
  // Returns once the phase of this parity has completed.
  __device__ __forceinline__ void wait(uint32_t parity) {
    while (!ptx::mbarrier_try_wait(&word, parity)) {
    }
  }
  // Whether it has.
  __device__ __forceinline__ bool test(uint32_t parity) {
    return ptx::mbarrier_test_wait(&word, parity);
  }
  // One arrival for the calling warp, after all its lanes have come here.
  __device__ __forceinline__ void arrive_warp() {
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) arrive();
  }
};

// kStages buffers that go round: the producer waits for `empty`, fills, completes `full`.
template <int kStages_>
struct Ring {
  static constexpr int kStages = kStages_;
  Barrier full[kStages];
  Barrier empty[kStages];

  __device__ __forceinline__ void init(int full_arrivals, int empty_arrivals) {
    for (int s = 0; s < kStages; ++s) {
      full[s].init(full_arrivals);
      empty[s].init(empty_arrivals);
    }
  }
};

// A place in a ring: how many stages have gone by. One register; kStages is best a power of two.
template <int kStages>
struct Slot {
  uint32_t count = 0;

  __device__ __forceinline__ int stage() const { return count % kStages; }
  __device__ __forceinline__ uint32_t parity() const { return count / kStages % 2; }
  __device__ __forceinline__ void advance() { ++count; }
  __device__ __forceinline__ Slot previous() const { return {count - 1}; }
  __device__ __forceinline__ Slot next() const { return {count + 1}; }
  __device__ __forceinline__ void wait_full(Ring<kStages>& ring) const {
    ring.full[stage()].wait(parity());
  }
  __device__ __forceinline__ bool is_full(Ring<kStages>& ring) const {
    return ring.full[stage()].test(parity());
  }
  __device__ __forceinline__ void wait_empty(Ring<kStages>& ring) const {
    ring.empty[stage()].wait(parity() ^ 1);  // the first round finds every stage empty
  }
};

}  // namespace jaxkern::tile
