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

// Until all of this thread's copies are there, for this thread.
__device__ __forceinline__ void wait_all_copies_async() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace jaxkern::tile::ptx
