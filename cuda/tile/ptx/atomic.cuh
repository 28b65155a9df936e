// Global-memory words that blocks hand work over with.
#pragma once

namespace jaxkern::tile::ptx {

__device__ __forceinline__ int load_acquire(const int* word) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void add_release(int* word, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}

}  // namespace jaxkern::tile::ptx
