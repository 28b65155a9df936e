// Times the GEMM of cuda/matmul beside cuBLAS: see gemm.py, which compiles and runs this.
//
//     gemm <M> <N> <K> <repeats> <seconds per sample> [--variants]
//
// Prints one line per provider: its name, a tab, microseconds per call. A sample enqueues calls for
// about the given time between two events; the providers take turns, on normal-distributed matrices
// rotated through three times the L2 cache; the median sample is reported.
#include <cublas_v2.h>

#include <cstring>

#include "benchmarks/harness.cuh"
#include "cuda/matmul/gemm.h"

namespace jaxkern {
namespace {

using T = tile::bf16;
using Provider = bench::Provider<GemmParams>;

template <class Gemm>
Provider ours(const std::string& name, int group = 8) {
  return {name, [group](const GemmParams& p, cudaStream_t stream) {
            bench::check(launch_gemm<Gemm>(p, stream, group), "gemm");
          }};
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
  cublasHandle_t handle;
  bench::require(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS, "cublasCreate failed");
  char* workspace = bench::allocate<char>(kWorkspace);
  return {"cublas", [handle, workspace](const GemmParams& p, cudaStream_t stream) {
            // The first takes the workspace away that the second gives.
            bench::require(
                cublasSetStream(handle, stream) == CUBLAS_STATUS_SUCCESS &&
                    cublasSetWorkspace(handle, workspace, kWorkspace) == CUBLAS_STATUS_SUCCESS,
                "cublas takes no stream or workspace");
            // Its matrices are column-major: it sees the transposes, so D^T = B^T A^T.
            const float one = 1.0f, zero = 0.0f;
            const int M = static_cast<int>(p.M), N = static_cast<int>(p.N);
            const int K = static_cast<int>(p.K);
            const auto status =
                cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, N, M, K, &one, p.b, CUDA_R_16BF, N,
                             p.a, CUDA_R_16BF, K, &zero, p.d, CUDA_R_16BF, N, CUBLAS_COMPUTE_32F,
                             CUBLAS_GEMM_DEFAULT);
            bench::require(status == CUBLAS_STATUS_SUCCESS, "cublasGemmEx failed");
          }};
}

}  // namespace
}  // namespace jaxkern

int main(int argc, char** argv) {
  using namespace jaxkern;
  bench::require(argc >= 6, "gemm <M> <N> <K> <repeats> <seconds per sample> [--variants]");
  std::vector<Provider> providers = {ours<Gemm<T, 256, 4, 2>>("jaxkern"), cublas()};
  if (argc > 6 && std::strcmp(argv[6], "--variants") == 0) {
    for (Provider& provider : variants()) providers.push_back(provider);
  }
  const int64_t M = std::atoll(argv[1]), N = std::atoll(argv[2]), K = std::atoll(argv[3]);
  std::vector<GemmParams> inputs;
  for (int64_t i = bench::rotations((M * K + K * N) * sizeof(T)); i > 0; --i) {
    inputs.push_back({bench::normal_matrix<T>(M * K), bench::normal_matrix<T>(K * N),
                      bench::allocate<T>(M * N), M, N, K});
  }
  bench::Comparison<GemmParams> comparison(inputs, static_cast<float>(std::atof(argv[5])));
  for (const Provider& provider : providers) {
    const double distance =
        comparison.distance(provider, providers[1], static_cast<const T*>(inputs.front().d), M * N);
    bench::require(distance <= 1e-2,
                   provider.name + " and cublas disagree: " + std::to_string(distance));
  }
  comparison.measure(providers, std::max(1, std::atoi(argv[4])));
  bench::print(providers);
  return 0;
}
