// Times products of e4m3 with weights of four bits beside cuBLASLt's with the same weight in e4m3:
// see quantized_matmul_fp8.py, which compiles and runs this.
//
//     quantized_matmul_fp8 <recipe> <M> <N> <K> <repeats> <seconds per sample> [--variants]
//
// Recipes: nvfp4, mxfp4, int4 (in groups of 32), and with -fast behind it sums that are not
// promoted to float32. N is a multiple of 16, K of 128. Prints one line per provider: its name, a
// tab, microseconds per call; harness.cuh says how they are measured.
#include <cstring>

#include "benchmarks/cublaslt.cuh"
#include "cuda/matmul/scaled_matmul.h"
#include "cuda/matmul/weight_to_fp8.h"

namespace jaxkern {
namespace {

using tile::bf16, tile::e4m3;

struct Problem {
  WeightToFp8Params weight;
  ScaledMatmulParams matmul;  // of what becomes of the weight
  void* copied;               // as many bytes as are read and written for that, half of each
};
using Provider = bench::Provider<Problem>;

// --- Inputs --------------------------------------------------------------------------------------

// Random values; of blocks, the scales of one binade or two.
__global__ void weight_kernel(FourBitWeight w, int tile_bytes, uint8_t* data, int64_t tiles,
                              uint32_t seed) {
  const int64_t tile = blockIdx.x;
  for (int i = threadIdx.x; i < tile_bytes / 2; i += blockDim.x) {
    uint32_t h = static_cast<uint32_t>(tile * tile_bytes + i) * 0x9e3779b9u + seed;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    h ^= h >> 16;
    uint32_t two = h & 0xffff;
    if (i >= kFourBitValueBytes / 2) {
      const uint32_t low = h & 0xff, high = h >> 8 & 0xff;
      if (w.format == FourBitFormat::kNvfp4) two = (72 + low % 16) | (72 + high % 16) << 8;
      if (w.format == FourBitFormat::kMxfp4) two = low % 3 | high % 3 << 8;
      if (w.format == FourBitFormat::kInt4) two = 0x3e80 + low;
    }
    reinterpret_cast<uint16_t*>(data + tile * tile_bytes)[i] = static_cast<uint16_t>(two);
  }
}

float* scales(int64_t size) {
  std::vector<float> values;
  for (int64_t i = 0; i < size; ++i) values.push_back((1.0f + i % 7 / 8.0f) / 64.0f);
  float* data = bench::allocate<float>(size);
  bench::check(cudaMemcpy(data, values.data(), size * sizeof(float), cudaMemcpyHostToDevice),
               "scales");
  return data;
}

Problem problem(FourBitFormat format, bool fast, int64_t M, int64_t N, int64_t K) {
  static uint32_t seed = 0;
  const int blocks = format == FourBitFormat::kNvfp4 ? 8 : 4;
  const int64_t tiles = N / kFourBitRows * (K / kFourBitColumns);
  FourBitWeight w = {format, blocks, false, nullptr, scales(N)};
  auto* data = bench::allocate<uint8_t>(tiles * w.tile_bytes());
  w.data = data;
  weight_kernel<<<static_cast<unsigned>(tiles), 256>>>(w, w.tile_bytes(), data, tiles,
                                                       ++seed * 0x3c6ef372u);
  bench::check(cudaGetLastError(), "weight");
  Problem problem = {};
  problem.weight = {w, N / kFourBitRows, static_cast<int32_t>(K / kFourBitColumns),
                    bench::allocate<e4m3>(N * K), bench::allocate<float>(N)};
  ScaledMatmulParams& p = problem.matmul;
  p.lhs_dtype = p.rhs_dtype = DType::kFloat8E4M3;
  p.out_dtype = DType::kBFloat16;
  p.lhs_scaling = p.rhs_scaling = Scaling::kRow;
  p.fast_accumulation = fast;
  p.B = 1, p.M = M, p.N = N, p.K = K;
  p.lhs = bench::normal_matrix<e4m3>(M * K, 64.0f);
  p.lhs_scale = scales(M);
  p.rhs = problem.weight.values;
  p.rhs_scale = problem.weight.scale;
  p.out = bench::allocate<bf16>(M * N);
  problem.copied = bench::allocate<char>((tiles * w.tile_bytes() + N * K) / 2);
  return problem;
}

// --- Providers -----------------------------------------------------------------------------------

template <FourBitFormat kFormat>
void expand(const Problem& p, cudaStream_t stream) {
  bench::check(launch_weight_to_fp8_of<kFormat>(p.weight, stream), "weight_to_fp8");
}

void multiply(const Problem& p, cudaStream_t stream) {
  bench::check(p.matmul.fast_accumulation
                   ? launch_fast_sm90<e4m3, e4m3, bf16>(p.matmul, stream)
                   : launch_promoted_sm90<e4m3, e4m3, bf16, BlockScales::kNone>(p.matmul, stream),
               "scaled_matmul");
}

template <FourBitFormat kFormat>
std::vector<Provider> providers() {
  const auto both = [](const Problem& p, cudaStream_t stream) {
    expand<kFormat>(p, stream);
    multiply(p, stream);
  };
  // From and to what nothing else needs any more.
  const auto copy = [](const Problem& p, cudaStream_t stream) {
    const size_t size = p.weight.w.tile_bytes() * p.weight.strips * p.weight.panels;
    const size_t bytes = (size + p.matmul.N * p.matmul.K) / 2;
    bench::check(cudaMemcpyAsync(p.copied, p.matmul.rhs, bytes, cudaMemcpyDeviceToDevice, stream),
                 "copy");
  };
  return {{"jaxkern", both},
          {"scaled_matmul", multiply},
          {"weight_to_fp8", expand<kFormat>},
          {"copy", copy}};
}

template <FourBitFormat kFormat>
int run(bool fast, int argc, char** argv) {
  const int64_t M = std::atoll(argv[2]), N = std::atoll(argv[3]), K = std::atoll(argv[4]);
  bench::require(M > 128, "M is at most 128, wanted more");
  std::vector<Problem> inputs;
  for (int64_t i = bench::rotations(N * K / 2); i > 0; --i) {
    inputs.push_back(problem(kFormat, fast, M, N, K));
    expand<kFormat>(inputs.back(), nullptr);
  }
  bench::Comparison<Problem> comparison(inputs, static_cast<float>(std::atof(argv[6])));
  const Problem& first = inputs.front();
  const bench::Recipe recipe = {"row", Scaling::kRow, Scaling::kRow, fast, DType::kBFloat16};
  std::vector<Provider> all = providers<kFormat>();
  if (argc <= 7 || std::strcmp(argv[7], "--variants") != 0) all.resize(1);
  all.insert(all.begin() + 1, bench::cublaslt(recipe, first.matmul, comparison,
                                              [](const Problem& p) { return p.matmul; }));
  const auto* out = static_cast<const bf16*>(first.matmul.out);
  const double distance = comparison.distance(all[0], all[1], out, M * N);
  bench::require(distance <= 1e-2, "jaxkern and cublaslt disagree: " + std::to_string(distance));
  comparison.measure(all, std::max(1, std::atoi(argv[5])));
  bench::print(all);
  return 0;
}

}  // namespace
}  // namespace jaxkern

int main(int argc, char** argv) {
  using namespace jaxkern;
  bench::require(argc >= 7,
                 "quantized_matmul_fp8 <recipe> <M> <N> <K> <repeats> <seconds> [--variants]");
  std::string format = argv[1];
  const bool fast = format.ends_with("-fast");
  if (fast) format.resize(format.size() - 5);
  if (format == "nvfp4") return run<FourBitFormat::kNvfp4>(fast, argc, argv);
  if (format == "mxfp4") return run<FourBitFormat::kMxfp4>(fast, argc, argv);
  bench::require(format == "int4", "no format " + format);
  return run<FourBitFormat::kInt4>(fast, argc, argv);
}
