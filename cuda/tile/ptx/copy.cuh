// Bulk asynchronous copies (TMA): tensor tiles and flat spans between global and shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/tile/ptx/barrier.cuh"

namespace jaxkern::tile::ptx {

// One box of a rank-4 tensor into shared memory; completes on `barrier` by byte count.
__device__ __forceinline__ void bulk_tensor_load(void* shared, const CUtensorMap* map,
                                                 uint64_t* barrier, int c0, int c1, int c2,
                                                 int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
        "r"(c2), "r"(c3)
      : "memory");
}

// One box from shared memory into a rank-4 tensor; elements outside the tensor are dropped.
__device__ __forceinline__ void bulk_tensor_store(const CUtensorMap* map, const void* shared,
                                                  int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               :
               : "l"(map), "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// The same of a rank-2 tensor.
// NOTE: for data that threads read with ordinary loads this replaces cp.async.bulk, whose writes
// compute-sanitizer's racecheck takes for the issuing thread's and reports, although an mbarrier
// orders them.
__device__ __forceinline__ void bulk_tensor_load(void* shared, const CUtensorMap* map,
                                                 uint64_t* barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
      : "memory");
}

// The same into the same place of every block of the cluster whose bit is set in `blocks`; it
// completes on the barrier that lies at the same place in each of them.
__device__ __forceinline__ void bulk_tensor_load_multicast(void* shared, const CUtensorMap* map,
                                                           uint64_t* barrier, int c0, int c1,
                                                           uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
        "h"(blocks)
      : "memory");
}

// The same of a rank-4 tensor.
__device__ __forceinline__ void bulk_tensor_load_multicast(void* shared, const CUtensorMap* map,
                                                           uint64_t* barrier, int c0, int c1,
                                                           int c2, int c3, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
        "r"(c2), "r"(c3), "h"(blocks)
      : "memory");
}

// One box of a rank-3 tensor into shared memory, by a policy of the L2 cache.
__device__ __forceinline__ void bulk_tensor_load_by(uint64_t policy, void* shared,
                                                    const CUtensorMap* map, uint64_t* barrier,
                                                    int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
        "r"(c2), "l"(policy)
      : "memory");
}

// The same of a rank-4 tensor.
__device__ __forceinline__ void bulk_tensor_load_by(uint64_t policy, void* shared,
                                                    const CUtensorMap* map, uint64_t* barrier,
                                                    int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
        "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}

// Policies: what is read by them leaves the L2 cache before all else, or after it.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t evict_last_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// A flat span from global memory into this block's shared memory, by a policy of the L2 cache; both
// and `bytes` are multiples of 16.
__device__ __forceinline__ void bulk_load_by(uint64_t policy, void* shared, const void* global,
                                             uint32_t bytes, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;"
      :
      : "r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier)),
        "l"(policy)
      : "memory");
}

// 16 bytes of global memory that nobody writes, and nobody reads again.
__device__ __forceinline__ uint4 load_once(const uint4* global) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(global));
  return x;
}

// Has the tensor map fetched, so that the first copy need not wait for it.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

// A flat span of this block's shared memory to another block's; `to` and `barrier`, on which it
// completes, are cluster addresses.
__device__ __forceinline__ void bulk_copy_cluster(uint32_t to, const void* from, uint32_t bytes,
                                                  uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(to), "r"(shared_address(from)), "r"(bytes), "r"(barrier)
      : "memory");
}

// One box from shared memory into a rank-2 tensor.
__device__ __forceinline__ void bulk_tensor_store(const CUtensorMap* map, const void* shared,
                                                  int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];"
               :
               : "l"(map), "r"(shared_address(shared)), "r"(c0), "r"(c1)
               : "memory");
}

// global[i] += shared[i] over a flat span of float32, done by the L2 cache.
__device__ __forceinline__ void bulk_reduce_add(float* global, const float* shared,
                                                uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               :
               : "l"(global), "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most kPending of this thread's groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(kPending) : "memory");
}

// Until at most kPending of this thread's groups are incomplete.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" : : "n"(kPending) : "memory");
}

// Orders this thread's ordinary accesses and asynchronous ones, to any memory.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Orders this thread's ordinary shared-memory writes before later asynchronous reads (TMA, wgmma).
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace jaxkern::tile::ptx
