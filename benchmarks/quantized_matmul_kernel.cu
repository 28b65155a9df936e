// Times the products with weights of four bits beside cuBLAS with bfloat16 ones: see
// quantized_matmul_kernel.py, which compiles and runs this.
//
//     quantized_matmul_kernel <format> <M> <N> <K> <repeats> <seconds per sample> [--variants]
//
// Formats: nvfp4, mxfp4, int4 (in groups of 128). N is a multiple of 16, K of 128. Prints one line
// per provider: its name, a tab, microseconds per call; harness.cuh says how they are measured.
#include <cublas_v2.h>

#include <cstring>

#include "benchmarks/harness.cuh"
#include "cuda/matmul/quantized_matmul.h"

namespace jaxkern {
namespace {

using tile::bf16;

struct Problem {
  QuantizedMatmulParams params;
  const bf16* plain;  // (N, K), the weight that cuBLAS takes
};
using Provider = bench::Provider<Problem>;

// --- Inputs --------------------------------------------------------------------------------------

__device__ uint32_t hashed(uint32_t x, uint32_t seed) {
  uint32_t h = x * 0x9e3779b9u + seed;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

__device__ float normal(uint32_t x, uint32_t seed) {
  const float u = (hashed(2 * x, seed) + 0.5f) * 0x1p-32f;
  const float v = (hashed(2 * x + 1, seed) + 0.5f) * 0x1p-32f;
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

// The code of one of normal numbers, times `factor`, and what it stands for.
__device__ uint32_t quantized(bool integers, float x, float* value) {
  if (integers) {
    const int nearest = max(-8, min(7, __float2int_rn(x * 2.7f)));
    *value = nearest;
    return nearest + 8;
  }
  constexpr float kMagnitudes[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  const float magnitude = fabsf(x * 3.2f);
  int code = 0;
  while (code < 7 && magnitude > (kMagnitudes[code] + kMagnitudes[code + 1]) / 2) ++code;
  *value = x < 0.0f ? -kMagnitudes[code] : kMagnitudes[code];
  return code + (x < 0.0f ? 8 : 0);
}

// Writes the scale of a block at `to`, and returns its value.
__device__ float write_scale(FourBitFormat format, uint8_t* to, uint32_t random) {
  if (format == FourBitFormat::kNvfp4) {
    *to = 9 * 8 + random % 16;
    return ldexpf(8 + *to % 8, *to / 8 - 13);
  }
  if (format == FourBitFormat::kMxfp4) {
    *to = random % 3;
    return ldexpf(1.0f, -*to);
  }
  const bf16 scale = __float2bfloat16_rn(0.25f + random % 16 / 64.0f);
  *reinterpret_cast<bf16*>(to) = scale;
  return scale;
}

// A thread makes the word of a lane and a step, in the order of packed_weight.py.
__global__ void weight_kernel(FourBitWeight w, int tile_bytes, uint8_t* data, bf16* plain,
                              int64_t words, int panels, uint32_t seed) {
  constexpr int kBits[4][4] = {{15, 8, 7, 6}, {12, 5, 4, 3}, {9, 2, 1, 0}, {13, 11, 10, 14}};
  const bool integers = w.format == FourBitFormat::kInt4;
  const int64_t index = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= words) return;
  const int64_t tile = index / 256;
  const int lane = index % 256 / 8, step = index % 8, g = lane / 4, c = lane % 4;
  uint8_t* bytes = data + tile * tile_bytes;
  const int64_t K = int64_t{panels} * kFourBitColumns;
  float scales[2];
  for (int half = 0; half < 2; ++half) {
    const int block = step * w.blocks / 8, at = (g * w.blocks + block) * 2 + half;
    scales[half] = write_scale(w.format, bytes + kFourBitValueBytes + at * (integers ? 2 : 1),
                               hashed(static_cast<uint32_t>(tile * 128 + at), seed));
  }
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    for (int odd = 0; odd < 2; ++odd) {
      const int64_t row = tile / panels * kFourBitRows + g + 8 * (i % 2);
      const int64_t col = tile % panels * kFourBitColumns + 16 * step + 8 * (i / 2) + 2 * c + odd;
      float value;
      const uint32_t code =
          quantized(integers, normal(static_cast<uint32_t>(row * K + col), seed), &value);
      plain[row * K + col] = __float2bfloat16_rn(value * scales[i % 2]);
      for (int bit = 0; bit < 4; ++bit) {
        const int place = integers ? 4 * i + 3 - bit : kBits[i][bit];
        word |= (code >> (3 - bit) & 1) << (place + 16 * odd);
      }
    }
  }
  reinterpret_cast<uint32_t*>(bytes)[(step / 4 * 32 + lane) * 4 + step % 4] = word;
}

__global__ void ones_kernel(float* x, int64_t size) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < size) x[i] = 1.0f;
}

Problem problem(FourBitFormat format, int64_t M, int64_t N, int64_t K) {
  static uint32_t seed = 0;
  const int blocks = format == FourBitFormat::kNvfp4 ? 8 : format == FourBitFormat::kMxfp4 ? 4 : 1;
  const int64_t tiles = N / kFourBitRows * (K / kFourBitColumns), words = 256 * tiles;
  FourBitWeight w = {format, blocks, false, nullptr, nullptr};
  auto* data = bench::allocate<uint8_t>(tiles * w.tile_bytes());
  auto* plain = bench::allocate<bf16>(N * K);
  auto* row_scale = bench::allocate<float>(N);
  w.data = data;
  w.row_scale = row_scale;
  constexpr int kThreads = 256;
  weight_kernel<<<static_cast<unsigned>(tile::ceil_div(words, kThreads)), kThreads>>>(
      w, w.tile_bytes(), data, plain, words, static_cast<int>(K / kFourBitColumns),
      ++seed * 0x3c6ef372u);
  ones_kernel<<<static_cast<unsigned>(tile::ceil_div(N, kThreads)), kThreads>>>(row_scale, N);
  bench::check(cudaGetLastError(), "weight");
  return {{DType::kBFloat16, DType::kBFloat16, 1, M, N, K, bench::normal_matrix<bf16>(M * K), w,
           bench::allocate<bf16>(M * N)},
          plain};
}

// --- Providers -----------------------------------------------------------------------------------

template <FourBitFormat kFormat, class Launch>
Provider ours(const std::string& name, const Launch& launch) {
  return {name, [launch](const Problem& problem, cudaStream_t stream) {
            bench::check(launch(problem.params, stream), "quantized_matmul");
          }};
}

// The first is what the library runs.
template <FourBitFormat kFormat>
std::vector<Provider> providers(int64_t M) {
  std::vector<Provider> found = {ours<kFormat>("jaxkern", [](const auto& p, cudaStream_t stream) {
    return launch_four_bit_of_sm90<kFormat, bf16, bf16>(p, stream);
  })};
  if (M <= 16) {
    using Matmul = QuantizedMatmulFewRows<kFormat, bf16, bf16, 16>;
    for (const int strips : {2, 4, 7, 14}) {
      for (const int panels : {1, 2, 4, 7, 14}) {
        if (strips * panels < 14 || strips * panels > 28) continue;
        const auto run = [=](const auto& p, cudaStream_t stream) {
          return launch_few_rows_plan_sm90<Matmul>(p, stream, {strips, panels, 0, 0.0});
        };
        found.push_back(ours<kFormat>(
            "strips" + std::to_string(strips) + " panels" + std::to_string(panels), run));
      }
    }
  }
  const auto many = [&]<int kTokens>() {
    using Matmul = QuantizedMatmul<kFormat, bf16, bf16, kTokens>;
    for (const int group : {1, 2, 4, 8}) {
      const auto run = [=](const auto& p, cudaStream_t stream) {
        return launch_four_bit_sm90<Matmul>(p, stream, group);
      };
      found.push_back(ours<kFormat>(
          "tokens" + std::to_string(kTokens) + " group" + std::to_string(group), run));
    }
  };
  if (M > 64) {
    many.template operator()<128>();
    many.template operator()<256>();
  }
  return found;
}

Provider cublas() {
  constexpr size_t kWorkspace = 64 << 20;
  cublasHandle_t handle;
  bench::require(cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS, "cublasCreate failed");
  char* workspace = bench::allocate<char>(kWorkspace);
  return {"cublas", [handle, workspace](const Problem& problem, cudaStream_t stream) {
            // The first takes the workspace away that the second gives.
            bench::require(
                cublasSetStream(handle, stream) == CUBLAS_STATUS_SUCCESS &&
                    cublasSetWorkspace(handle, workspace, kWorkspace) == CUBLAS_STATUS_SUCCESS,
                "cublas takes no stream or workspace");
            // Its matrices are column-major: it sees the transposes, so out^T = w x^T.
            const float one = 1.0f, zero = 0.0f;
            const auto& p = problem.params;
            const int M = static_cast<int>(p.M), N = static_cast<int>(p.N);
            const int K = static_cast<int>(p.K);
            const auto status =
                cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, N, M, K, &one, problem.plain,
                             CUDA_R_16BF, K, p.x, CUDA_R_16BF, K, &zero, p.out, CUDA_R_16BF, N,
                             CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
            bench::require(status == CUBLAS_STATUS_SUCCESS, "cublasGemmEx failed");
          }};
}

template <FourBitFormat kFormat>
int run(int argc, char** argv) {
  const int64_t M = std::atoll(argv[2]), N = std::atoll(argv[3]), K = std::atoll(argv[4]);
  std::vector<Problem> inputs;
  for (int64_t i = bench::rotations(N * K / 2); i > 0; --i) {
    inputs.push_back(problem(kFormat, M, N, K));
  }
  std::vector<Provider> all = providers<kFormat>(M);
  if (argc <= 7 || std::strcmp(argv[7], "--variants") != 0) all.resize(1);
  all.insert(all.begin() + 1, cublas());
  bench::Comparison<Problem> comparison(inputs, static_cast<float>(std::atof(argv[6])));
  const auto* out = static_cast<const bf16*>(inputs.front().params.out);
  for (const Provider& provider : all) {
    const double distance = comparison.distance(provider, all[1], out, M * N);
    bench::require(distance <= 1e-2,
                   provider.name + " and cublas disagree: " + std::to_string(distance));
  }
  comparison.measure(all, std::max(1, std::atoi(argv[5])));
  bench::print(all);
  return 0;
}

}  // namespace
}  // namespace jaxkern

int main(int argc, char** argv) {
  using namespace jaxkern;
  bench::require(argc >= 7,
                 "quantized_matmul_kernel <format> <M> <N> <K> <repeats> <seconds> [--variants]");
  const std::string format = argv[1];
  if (format == "nvfp4") return run<FourBitFormat::kNvfp4>(argc, argv);
  if (format == "mxfp4") return run<FourBitFormat::kMxfp4>(argc, argv);
  bench::require(format == "int4", "no format " + format);
  return run<FourBitFormat::kInt4>(argc, argv);
}
