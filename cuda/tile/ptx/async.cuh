// Asynchronous copies by single threads, from global to shared memory.
#pragma once

#include "cuda/tile/ptx/barrier.cuh"

namespace jaxkern::tile::ptx {

// Starts to copy 16 bytes that are aligned in both, past L1; zeros where they do not exist.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(exists ? 16 : 0)
               : "memory");
}

// The same of what nobody reads again soon: it leaves L2 before other data.
__device__ __forceinline__ void copy_async_16_once(void* shared, const void* global, bool exists,
                                                   uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
               :
               : "r"(shared_address(shared)), "l"(global), "r"(exists ? 16 : 0), "l"(policy)
               : "memory");
}

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Until this thread's copies are there, for this thread.
__device__ __forceinline__ void wait_copies_async() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace jaxkern::tile::ptx
