// What the CUDA benchmark programs share: normal-distributed matrices, providers that take turns,
// and samples between two events. The calls of a sample are one CUDA graph, as XLA launches them:
// the host's time for a launch is not in it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace jaxkern::bench {

inline void require(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "%s\n", what.c_str());
  std::exit(1);
}

inline void check(cudaError_t error, const std::string& what) {
  require(error == cudaSuccess, what + ": " + cudaGetErrorString(error));
}

template <class T>
T* allocate(int64_t size) {
  T* data;
  check(cudaMalloc(&data, size * sizeof(T)), "cudaMalloc");
  return data;
}

// Normal numbers with this standard deviation: two uniform numbers of a counter (a finaliser of
// MurmurHash3), one normal one by Box and Muller.
template <class T>
__global__ void normal_kernel(T* x, int64_t size, uint32_t seed, float deviation) {
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size; i += step) {
    float uniform[2];
    for (int k = 0; k < 2; ++k) {
      uint32_t h = static_cast<uint32_t>(2 * i + k) * 0x9e3779b9u + seed;
      h = (h ^ (h >> 16)) * 0x85ebca6bu;
      h = (h ^ (h >> 13)) * 0xc2b2ae35u;
      uniform[k] = ((h ^ (h >> 16)) + 0.5f) * 0x1p-32f;
    }
    x[i] = T(deviation * sqrtf(-2.0f * logf(uniform[0])) * cospif(2.0f * uniform[1]));
  }
}

template <class T>
T* normal_matrix(int64_t size, float deviation = 1.0f) {
  static uint32_t seed = 0;
  T* data = allocate<T>(size);
  normal_kernel<<<1024, 256>>>(data, size, ++seed * 0x3c6ef372u, deviation);
  check(cudaGetLastError(), "normal_kernel");
  return data;
}

// sums[0] += |x - y|^2, sums[1] += |y|^2
template <class T>
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

// Input sets to rotate through, so many that the L2 cache holds a third of them.
inline int64_t rotations(int64_t bytes) {
  int device, cache;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device), "L2 size");
  return std::clamp<int64_t>((3ll * cache + bytes - 1) / bytes, 2, 32);
}

inline float median(std::vector<float> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  return values.size() % 2 ? values[half] : 0.5f * (values[half - 1] + values[half]);
}

template <class Params>
struct Provider {
  std::string name;
  std::function<void(const Params&, cudaStream_t)> enqueue;
  std::vector<float> samples = {};  // us per call
};

template <class Params>
class Comparison {
 public:
  Comparison(std::vector<Params> inputs, float seconds)
      : inputs_(std::move(inputs)), seconds_(seconds) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaEventCreate(&start_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
    check(cudaDeviceSynchronize(), "inputs");
  }

  // The relative Frobenius distance of what two providers write to the `size` elements at `out` of
  // the first set.
  template <class T>
  double distance(const Provider<Params>& x, const Provider<Params>& y, const T* out,
                  int64_t size) {
    T* copy = allocate<T>(size);
    double* sums;
    check(cudaMallocManaged(&sums, 2 * sizeof(double)), "cudaMallocManaged");
    sums[0] = sums[1] = 0.0;
    const auto run = [&](const Provider<Params>& provider) {
      // NaN, for what it does not write
      check(cudaMemsetAsync(const_cast<T*>(out), 0xff, size * sizeof(T), stream_), "memset");
      provider.enqueue(inputs_.front(), stream_);
    };
    run(x);
    check(cudaMemcpyAsync(copy, out, size * sizeof(T), cudaMemcpyDeviceToDevice, stream_), x.name);
    run(y);
    distance_kernel<<<1024, 256, 0, stream_>>>(copy, out, size, sums);
    check(cudaStreamSynchronize(stream_), y.name);
    const double result = std::sqrt(sums[0] / sums[1]);
    cudaFree(copy);
    cudaFree(sums);
    return result;
  }

  // Adds `repeats` samples to each provider, in turns.
  void measure(std::vector<Provider<Params>>& providers, int repeats) {
    std::vector<Graph> graphs;
    for (auto& provider : providers) {
      const float us = time(record(provider, static_cast<int>(inputs_.size())));
      graphs.push_back(
          record(provider, std::clamp(static_cast<int>(seconds_ * 1e6f / us), 2, 1000)));
    }
    for (int i = 0; i < repeats; ++i) {
      for (size_t k = 0; k < providers.size(); ++k) {
        providers[k].samples.push_back(time(graphs[k]));
      }
    }
  }

  // Microseconds per call, of `calls`.
  float sample(const Provider<Params>& provider, int calls) {
    return time(record(provider, calls));
  }

 private:
  struct Graph {
    cudaGraphExec_t run;
    int calls;
  };

  // Has run once already.
  Graph record(const Provider<Params>& provider, int calls) {
    cudaGraph_t graph;
    cudaGraphExec_t run;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), provider.name);
    for (int i = 0; i < calls; ++i) provider.enqueue(inputs_[i % inputs_.size()], stream_);
    check(cudaStreamEndCapture(stream_, &graph), provider.name);
    check(cudaGraphInstantiate(&run, graph, 0), provider.name);
    check(cudaGraphLaunch(run, stream_), provider.name);
    check(cudaStreamSynchronize(stream_), provider.name);
    cudaGraphDestroy(graph);
    return {run, calls};
  }

  float time(const Graph& graph) {
    check(cudaEventRecord(start_, stream_), "cudaEventRecord");
    check(cudaGraphLaunch(graph.run, stream_), "cudaGraphLaunch");
    check(cudaEventRecord(end_, stream_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "cudaEventSynchronize");
    float milliseconds;
    check(cudaEventElapsedTime(&milliseconds, start_, end_), "cudaEventElapsedTime");
    return milliseconds * 1e3f / graph.calls;
  }

  std::vector<Params> inputs_;
  float seconds_;
  cudaStream_t stream_;
  cudaEvent_t start_, end_;
};

// One line per provider: its name, a tab, the median of microseconds per call.
template <class Params>
void print(const std::vector<Provider<Params>>& providers) {
  for (const auto& provider : providers) {
    std::printf("%s\t%.3f\n", provider.name.c_str(), median(provider.samples));
  }
}

}  // namespace jaxkern::bench
