// Times the GEMM of cuda/matmul beside cuBLAS: see gemm.py, which compiles and runs this.
//
//     gemm <M> <N> <K> <repeats> <seconds per sample> [--variants]
//
// Prints one line per provider: its name, a tab, microseconds per call. A sample enqueues calls for
// about the given time between two events; the providers take turns, on normal-distributed matrices
// rotated through three times the L2 cache; the median sample is reported.
#include <cublas_v2.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "cuda/matmul/gemm.h"

namespace jaxkern {
namespace {

using T = tile::bf16;

void require(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

void check(cudaError_t error, const char* what) {
  require(error == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(error));
}

// Two uniform numbers of a counter (a finaliser of MurmurHash3), one normal one by Box and Muller.
__global__ void normal_kernel(T* x, int64_t size, uint32_t seed) {
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    float uniform[2];
    for (int k = 0; k < 2; ++k) {
      uint32_t h = static_cast<uint32_t>(2 * i + k) * 0x9e3779b9u + seed;
      h = (h ^ (h >> 16)) * 0x85ebca6bu;
      h = (h ^ (h >> 13)) * 0xc2b2ae35u;
      uniform[k] = ((h ^ (h >> 16)) + 0.5f) * 0x1p-32f;
    }
    x[i] = T(sqrtf(-2.0f * logf(uniform[0])) * cospif(2.0f * uniform[1]));
  }
}

// sums[0] += |x - y|^2, sums[1] += |y|^2
__global__ void distance_kernel(const T* x, const T* y, int64_t size, double* sums) {
  double difference = 0.0, reference = 0.0;
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    const float wanted = float(y[i]), distance = float(x[i]) - wanted;
    difference += distance * distance;
    reference += wanted * wanted;
  }
  atomicAdd(&sums[0], difference);
  atomicAdd(&sums[1], reference);
}

T* normal_matrix(int64_t size) {
  static uint32_t seed = 0;
  T* data;
  check(cudaMalloc(&data, size * sizeof(T)), "cudaMalloc");
  normal_kernel<<<1024, 256>>>(data, size, ++seed * 0x3c6ef372u);
  check(cudaGetLastError(), "normal_kernel");
  return data;
}

struct Provider {
  std::string name;
  std::function<void(const GemmParams&)> enqueue;
  std::vector<float> samples;  // us per call
};

template <class Gemm>
Provider ours(const std::string& name, int group = 8) {
  return {name,
          [group](const GemmParams& p) { check(launch_gemm<Gemm>(p, nullptr, group), "gemm"); },
          {}};
}

std::vector<Provider> variants() {
  return {
      ours<Gemm<T, 256, 4, 2>>("n256 stages4 cluster2 group4", 4),
      ours<Gemm<T, 256, 4, 2>>("n256 stages4 cluster2 group16", 16),
      ours<Gemm<T, 256, 3, 2>>("n256 stages3 cluster2"),
      ours<Gemm<T, 256, 4, 1>>("n256 stages4 cluster1 group16", 16),
      ours<Gemm<T, 128, 6, 2>>("n128 stages6 cluster2"),
  };
}

Provider cublas() {
  constexpr size_t kWorkspace = 64 << 20;
  void* workspace;
  cublasHandle_t handle;
  check(cudaMalloc(&workspace, kWorkspace), "cudaMalloc");
  require(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS, "cublasCreate failed");
  require(cublasSetWorkspace(handle, workspace, kWorkspace) == CUBLAS_STATUS_SUCCESS,
          "cublasSetWorkspace failed");
  return {"cublas",
          [handle](const GemmParams& p) {
            // Its matrices are column-major: it sees the transposes, so D^T = B^T A^T.
            const float one = 1.0f, zero = 0.0f;
            const int M = static_cast<int>(p.M), N = static_cast<int>(p.N);
            const int K = static_cast<int>(p.K);
            const auto status =
                cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, N, M, K, &one, p.b, CUDA_R_16BF, N,
                             p.a, CUDA_R_16BF, K, &zero, p.d, CUDA_R_16BF, N, CUBLAS_COMPUTE_32F,
                             CUBLAS_GEMM_DEFAULT);
            require(status == CUBLAS_STATUS_SUCCESS, "cublasGemmEx failed");
          },
          {}};
}

class Comparison {
 public:
  Comparison(int64_t M, int64_t N, int64_t K, float seconds) : seconds_(seconds) {
    int device, cache;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device), "L2 size");
    const int64_t bytes = (M * K + K * N) * sizeof(T);
    const int64_t sets = std::clamp<int64_t>(tile::ceil_div<int64_t>(3ll * cache, bytes), 2, 32);
    for (int64_t i = 0; i < sets; ++i) {
      inputs_.push_back(
          {normal_matrix(M * K), normal_matrix(K * N), normal_matrix(M * N), M, N, K});
    }
    check(cudaEventCreate(&start_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }

  // The relative Frobenius distance of what two providers compute.
  double distance(const Provider& x, const Provider& y) {
    const GemmParams& p = inputs_.front();
    const int64_t size = p.M * p.N;
    T* copy;
    double* sums;
    check(cudaMalloc(&copy, size * sizeof(T)), "cudaMalloc");
    check(cudaMallocManaged(&sums, 2 * sizeof(double)), "cudaMallocManaged");
    sums[0] = sums[1] = 0.0;
    check(cudaMemset(p.d, 0xff, size * sizeof(T)), "cudaMemset");  // NaN
    x.enqueue(p);
    check(cudaMemcpy(copy, p.d, size * sizeof(T), cudaMemcpyDeviceToDevice), "cudaMemcpy");
    y.enqueue(p);
    distance_kernel<<<1024, 256>>>(copy, static_cast<T*>(p.d), size, sums);
    check(cudaDeviceSynchronize(), "distance");
    const double result = std::sqrt(sums[0] / sums[1]);
    cudaFree(copy);
    cudaFree(sums);
    return result;
  }

  void measure(std::vector<Provider>& providers, int repeats) {
    std::vector<int> calls;
    for (Provider& provider : providers) {
      sample(provider, static_cast<int>(inputs_.size()));  // warms up
      const float us = sample(provider, static_cast<int>(inputs_.size()));
      calls.push_back(std::clamp(static_cast<int>(seconds_ * 1e6f / us), 2, 1000));
    }
    for (int i = 0; i < repeats; ++i) {
      for (size_t k = 0; k < providers.size(); ++k) {
        providers[k].samples.push_back(sample(providers[k], calls[k]));
      }
    }
  }

 private:
  // Microseconds per call.
  float sample(const Provider& provider, int calls) {
    check(cudaEventRecord(start_), "cudaEventRecord");
    for (int i = 0; i < calls; ++i) provider.enqueue(inputs_[i % inputs_.size()]);
    check(cudaEventRecord(end_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), provider.name.c_str());
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, start_, end_), "cudaEventElapsedTime");
    return milliseconds * 1e3f / calls;
  }

  float seconds_;
  std::vector<GemmParams> inputs_;
  cudaEvent_t start_, end_;
};

float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : 0.5f * (values[half - 1] + values[half]);
}

}  // namespace
}  // namespace jaxkern

int main(int argc, char** argv) {
  using namespace jaxkern;
  require(argc >= 6, "gemm <M> <N> <K> <repeats> <seconds per sample> [--variants]");
  std::vector<Provider> providers = {ours<Gemm<T, 256, 4, 2>>("jaxkern"), cublas()};
  if (argc > 6 && std::strcmp(argv[6], "--variants") == 0) {
    for (Provider& provider : variants()) providers.push_back(provider);
  }
  Comparison comparison(std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3]),
                        static_cast<float>(std::atof(argv[5])));
  for (const Provider& provider : providers) {
    const double distance = comparison.distance(provider, providers[1]);
    require(distance <= 1e-2, provider.name + " and cublas disagree: " + std::to_string(distance));
  }
  comparison.measure(providers, std::max(1, std::atoi(argv[4])));
  for (const Provider& provider : providers) {
    std::printf("%s\t%.3f\n", provider.name.c_str(), median(provider.samples));
  }
  return 0;
}
