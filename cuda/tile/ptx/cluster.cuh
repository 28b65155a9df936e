// Thread block clusters: their barrier, and access to the shared memory of the other blocks. An
// address in the cluster's window is 32 bits, made by map_shared() from one's own.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/tile/ptx/barrier.cuh"

namespace jaxkern::tile::ptx {

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Where block `rank` of the cluster has what this block has at `pointer`.
__device__ __forceinline__ uint32_t map_shared(const void* pointer, uint32_t rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

// NOTE: with an explicit .release.cluster this waits for all of the block's memory operations, with
// a MEMBAR.ALL.GPU. So it orders nothing but what has completed: reads whose values have arrived.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" : : "r"(barrier) : "memory");
}

// A flat span of this block's shared memory to another block's; completes there, on `barrier`.
__device__ __forceinline__ void bulk_copy_cluster(uint32_t to, const void* from, uint32_t bytes,
                                                  uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(to), "r"(shared_address(from)), "r"(bytes), "r"(barrier)
      : "memory");
}

// One box of a rank-4 tensor into the shared memory of every block whose bit is set in `blocks`, at
// the same place, and completes on the barrier at the same place.
__device__ __forceinline__ void bulk_tensor_load_multicast(void* shared, const CUtensorMap* map,
                                                           uint64_t* barrier, uint16_t blocks,
                                                           int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
      :
      : "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
        "r"(c2), "r"(c3), "h"(blocks)
      : "memory");
}

}  // namespace jaxkern::tile::ptx
