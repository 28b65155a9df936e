// What the tests of the tile library share. A test is a program: it compares what kernels compute
// with a scalar loop on the host, prints what differs, and exits with 1 if anything did.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/tile/types.cuh"

namespace jaxkern::test {

// Ends the program: after an error of the CUDA runtime nothing that follows means anything.
inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  std::printf("FAILED: %s: %s\n", what.c_str(), cudaGetErrorString(error));
  std::exit(1);
}

// Waits for the kernels launched so far and reports what went wrong in them, a hang too: that is
// how a barrier that misses an arrival shows.
inline void synchronize(const std::string& what) {
  constexpr std::chrono::seconds kPatience(20);
  const auto end = std::chrono::steady_clock::now() + kPatience;
  cudaError_t status;
  while ((status = cudaStreamQuery(nullptr)) == cudaErrorNotReady) {
    if (std::chrono::steady_clock::now() < end) continue;
    std::printf("FAILED: %s: still running after %lld s\n", what.c_str(),
                static_cast<long long>(kPatience.count()));
    std::fflush(stdout);
    std::_Exit(1);
  }
  check(status, what);
}

inline float to_float(float x) { return x; }
inline float to_float(int x) { return static_cast<float>(x); }
inline float to_float(tile::bf16 x) { return __bfloat162float(x); }
inline float to_float(tile::f16 x) { return __half2float(x); }
inline float to_float(tile::e4m3 x) { return static_cast<float>(x); }
inline float to_float(tile::e5m2 x) { return static_cast<float>(x); }

// x rounded to T and back.
template <class T>
float round_to(float x) {
  if constexpr (std::is_same_v<T, tile::bf16>) return to_float(__float2bfloat16_rn(x));
  if constexpr (std::is_same_v<T, tile::f16>) return to_float(__float2half_rn(x));
  if constexpr (std::is_same_v<T, tile::e4m3>) return to_float(tile::e4m3(x));
  return x;
}

// An array on the device. Fresh ones hold NaN (integers: -1), so that what no kernel writes, or
// what one reads too far, shows.
template <class T>
class Array {
 public:
  explicit Array(size_t size) : size_(size) {
    check(cudaMalloc(&data_, size * sizeof(T)), "cudaMalloc");
    check(cudaMemset(data_, 0xff, size * sizeof(T)), "cudaMemset");
  }
  explicit Array(const std::vector<T>& host) : Array(host.size()) {
    check(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { cudaFree(data_); }

  T* data() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> copy(size_);
    check(cudaMemcpy(copy.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return copy;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// Small integers: their products and sums are exact, so that results compare with ==.
template <class T>
std::vector<T> integers(size_t size, int seed, int largest = 4) {
  std::mt19937 random(seed);
  std::vector<T> values(size);
  for (T& value : values) {
    value = static_cast<T>(
        static_cast<float>(static_cast<int>(random() % (2 * largest + 1)) - largest));
  }
  return values;
}

inline int comparisons = 0, failures = 0;

// Compares element by element; `cols` gives mismatches a row and a column. tolerance: absolute.
template <class T, class U>
void compare(const std::string& what, const std::vector<T>& got, const std::vector<U>& wanted,
             size_t cols, float tolerance = 0.0f) {
  ++comparisons;
  if (got.size() != wanted.size()) {
    ++failures;
    std::printf("FAILED: %s: got %zu elements, wanted %zu\n", what.c_str(), got.size(),
                wanted.size());
    return;
  }
  size_t wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const float g = to_float(got[i]), w = to_float(wanted[i]);
    if (g == w || std::fabs(g - w) <= tolerance || (std::isnan(g) && std::isnan(w))) continue;
    if (wrong == 0) std::printf("FAILED: %s\n", what.c_str());
    if (wrong++ < 8) std::printf("  (%zu, %zu): got %g, wanted %g\n", i / cols, i % cols, g, w);
  }
  if (wrong > 8) std::printf("  %zu of %zu elements differ\n", wrong, got.size());
  failures += wrong > 0;
}

inline void expect(bool holds, const std::string& what) {
  ++comparisons;
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// The exit status of main().
inline int finish() {
  std::printf("%d comparisons, %d failed\n", comparisons, failures);
  return comparisons == 0 || failures > 0;
}

}  // namespace jaxkern::test
