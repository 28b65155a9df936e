// Global-memory words that blocks hand work over with.
#pragma once

#include <cstdint>

namespace jaxkern::tile::ptx {

__device__ __forceinline__ int load_acquire(const int* word) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void add_release(int* word, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}

// The same without an order of other accesses.
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* word) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ void add_relaxed(uint32_t* word, uint32_t value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ uint64_t load_relaxed(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}
__device__ __forceinline__ void add_relaxed(uint64_t* word, uint64_t value) {
  asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" : : "l"(word), "l"(value) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint32_t* word, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
}
__device__ __forceinline__ void store_relaxed(uint16_t* half, uint16_t value) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" : : "l"(half), "h"(value) : "memory");
}

// 16 bytes at once.
__device__ __forceinline__ void load_relaxed_128(const void* from, uint32_t (&x)[4]) {
  asm volatile(
      "{\n.reg .b128 x;\n.reg .b64 low, high;\n"
      "ld.relaxed.gpu.global.b128 x, [%4];\n"
      "mov.b128 {low, high}, x;\n"
      "mov.b64 {%0, %1}, low;\nmov.b64 {%2, %3}, high;\n}"
      : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
      : "l"(from)
      : "memory");
}
__device__ __forceinline__ void store_relaxed_128(void* to, const uint32_t (&x)[4]) {
  asm volatile(
      "{\n.reg .b128 x;\n.reg .b64 low, high;\n"
      "mov.b64 low, {%1, %2};\nmov.b64 high, {%3, %4};\n"
      "mov.b128 x, {low, high};\n"
      "st.relaxed.gpu.global.b128 [%0], x;\n}"
      :
      : "l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
      : "memory");
}

}  // namespace jaxkern::tile::ptx
