// tile/pipeline.cuh: rings of one to several stages between a producing and several consuming
// warps, and named barriers.
#include "cuda/tile/pipeline.cuh"

#include "cuda/host/launch.h"
#include "cuda/tests/test.h"

namespace jaxkern {

constexpr int kConsumers = 3;
constexpr int kWarp = tile::kWarpSize;

template <int kStages>
struct RingStorage {
  int values[kStages][kWarp];
  tile::Ring<kStages> ring;
};

// Warp 0 puts item after item into the ring, the others read each. Some are made slow, so that the
// ring runs full and empty.
template <int kStages>
__global__ void ring_kernel(int* out, int items, bool slow_producer) {
  __shared__ RingStorage<kStages> shared;
  if (threadIdx.x == 0) {
    shared.ring.init(1, kConsumers);
    tile::ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  tile::Slot<kStages> slot;
  bool ready = false;  // one consumer asks beforehand
  for (int item = 0; item < items; ++item, slot.advance()) {
    if (warp == 0) {
      if (slow_producer && item % 5 == 0) __nanosleep(2000);
      slot.wait_empty(shared.ring);
      shared.values[slot.stage()][lane] = 1000 * item + lane;
      shared.ring.full[slot.stage()].arrive_warp();
    } else {
      if (!ready) slot.wait_full(shared.ring);
      if (!slow_producer && item % 3 == warp - 1) __nanosleep(2000);
      out[(item * kConsumers + warp - 1) * kWarp + lane] = shared.values[slot.stage()][lane];
      shared.ring.empty[slot.stage()].arrive_warp();
      ready = warp == 1 && slot.next().is_full(shared.ring);
    }
  }
}

template <int kStages>
void test_ring(int items, bool slow_producer) {
  std::vector<int> wanted;
  for (int i = 0; i < items * kConsumers * kWarp; ++i) {
    wanted.push_back(1000 * (i / kWarp / kConsumers) + i % kWarp);
  }
  const std::string what = "ring of " + std::to_string(kStages) + ", " + std::to_string(items) +
                           " items, slow " + (slow_producer ? "producer" : "consumers");
  const test::Array<int> out(wanted.size());
  test::check(launch(ring_kernel<kStages>, 1, (1 + kConsumers) * kWarp, 0, nullptr, out.data(),
                     items, slow_producer),
              what);
  test::synchronize(what);
  test::compare(what, out.host(), wanted, kWarp);
}

// (stage, parity, stage of the previous slot, of the next) after `n` advances.
template <int kStages>
__global__ void slot_kernel(int* out, int n) {
  tile::Slot<kStages> slot;
  for (int i = 0; i < n; ++i, slot.advance()) {
    out[4 * i] = slot.stage();
    out[4 * i + 1] = slot.parity();
    out[4 * i + 2] = i == 0 ? -1 : slot.previous().stage();
    out[4 * i + 3] = slot.next().stage();
  }
}

template <int kStages>
void test_slot() {
  constexpr int kCount = 4 * kStages + 1;
  std::vector<int> wanted;
  int stage = 0, parity = 0, previous = -1;
  for (int i = 0; i < kCount; ++i) {
    const int next = (stage + 1) % kStages;
    wanted.insert(wanted.end(), {stage, parity, previous, next});
    previous = stage;
    stage = next;
    if (stage == 0) parity = 1 - parity;
  }
  const test::Array<int> out(wanted.size());
  test::check(launch(slot_kernel<kStages>, 1, 1, 0, nullptr, out.data(), kCount), "slot");
  test::synchronize("slot");
  test::compare("slots of " + std::to_string(kStages), out.host(), wanted, 4);
}

// Two warps take turns in appending to a list.
__global__ void turns_kernel(int* list, int turns) {
  __shared__ int length;
  constexpr int kTurn = 1;
  const int warp = threadIdx.x / kWarp;
  if (threadIdx.x == 0) length = 0;
  __syncthreads();
  if (warp == 1) tile::ptx::named_barrier_arrive(kTurn, 2 * kWarp);  // warp 0 begins
  for (int i = 0; i < turns; ++i) {
    tile::ptx::named_barrier_sync(kTurn + warp, 2 * kWarp);
    if (threadIdx.x % kWarp == 0) list[length++] = warp;
    __syncwarp();
    if (warp == 0 || i + 1 < turns) tile::ptx::named_barrier_arrive(kTurn + 1 - warp, 2 * kWarp);
  }
}

void test_turns(int turns) {
  std::vector<int> wanted;
  for (int i = 0; i < 2 * turns; ++i) wanted.push_back(i % 2);
  const test::Array<int> list(wanted.size());
  test::check(launch(turns_kernel, 1, 2 * kWarp, 0, nullptr, list.data(), turns), "turns");
  test::synchronize("turns");
  test::compare("turns by named barriers", list.host(), wanted, 2);
}

template <int kStages>
void test_all() {
  test_slot<kStages>();
  for (const int items : {1, kStages, 37}) {
    test_ring<kStages>(items, false);
    test_ring<kStages>(items, true);
  }
}

}  // namespace jaxkern

int main() {
  jaxkern::test_all<1>();
  jaxkern::test_all<2>();
  jaxkern::test_all<3>();
  jaxkern::test_all<4>();
  jaxkern::test_all<7>();
  jaxkern::test_turns(20);
  return jaxkern::test::finish();
}
