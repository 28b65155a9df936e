// Times the product of scaled 8-bit matrices beside cuBLASLt: see scaled_matmul.py, which compiles
// and runs this.
//
//     scaled_matmul <recipe> <M> <N> <K> <repeats> <seconds per sample> [--variants]
//
// Recipes: tensor, row (sums promoted to float32), tensor-fast, row-fast (not), block (1x128 by
// 128x128), block-wgrad (1x128 by 1x128, float32 out). Prints one line per provider: its name, a
// tab, microseconds per call; harness.cuh says how they are measured.
#include <cstring>

#include "benchmarks/cublaslt.cuh"
#include "cuda/matmul/few_rows.h"
#include "cuda/matmul/scaled_matmul.h"

namespace jaxkern {
namespace {

using bench::Recipe;
using tile::e4m3;
using Provider = bench::Provider<ScaledMatmulParams>;
using Comparison = bench::Comparison<ScaledMatmulParams>;

constexpr Recipe kRecipes[] = {
    {"tensor", Scaling::kTensor, Scaling::kTensor, false, DType::kBFloat16},
    {"tensor-fast", Scaling::kTensor, Scaling::kTensor, true, DType::kBFloat16},
    {"row", Scaling::kRow, Scaling::kRow, false, DType::kBFloat16},
    {"row-fast", Scaling::kRow, Scaling::kRow, true, DType::kBFloat16},
    {"block", Scaling::kBlock1x128, Scaling::kBlock128x128, false, DType::kBFloat16},
    {"block-wgrad", Scaling::kBlock1x128, Scaling::kBlock1x128, false, DType::kFloat32},
};

template <class Out, BlockScales kScales, bool kFast, ScaledMatmulConfig kConfig>
Provider variant(int group) {
  using Matmul = ScaledMatmul<e4m3, e4m3, Out, kScales, kFast, kConfig>;
  return {"consumers" + std::to_string(kConfig.consumers) + " waves" +
              std::to_string(kConfig.waves) + " n" + std::to_string(kConfig.block_n) + " stages" +
              std::to_string(kConfig.stages) + " cluster" + std::to_string(kConfig.blocks) +
              " pieces" + std::to_string(kConfig.pieces) + (kConfig.ping_pong ? " ping-pong" : "") +
              " group" + std::to_string(group),
          [group](const ScaledMatmulParams& p, cudaStream_t stream) {
            bench::check(launch_scaled_matmul_sm90<Matmul>(p, stream, group), "scaled_matmul");
          }};
}

// The first is what the library runs.
template <class Out, BlockScales kScales>
std::vector<Provider> promoted() {
  constexpr ScaledMatmulConfig kTwo = scaled_matmul_config(kScales, false);
  constexpr ScaledMatmulConfig kPair = {2, 2, 128, 3, 2, 4}, kThreeAlone = {3, 1, 128, 4, 1, 2};
  const auto library = [](const ScaledMatmulParams& p, cudaStream_t stream) {
    bench::check(launch_promoted_sm90<e4m3, e4m3, Out, kScales>(p, stream), "scaled_matmul");
  };
  return {{"library", library},
          variant<Out, kScales, false, kTwo>(8),
          variant<Out, kScales, false, kTwo>(16),
          variant<Out, kScales, false, kPair>(8),
          variant<Out, kScales, false, kThreeConsumers>(8),
          variant<Out, kScales, false, kThreeConsumers>(12),
          variant<Out, kScales, false, kThreeAlone>(8)};
}

// The first is what the library runs.
template <class Out>
std::vector<Provider> fast() {
  constexpr auto kNone = BlockScales::kNone;
  constexpr ScaledMatmulConfig kWide = scaled_matmul_config(kNone, true);
  constexpr ScaledMatmulConfig kAlone = {2, 1, 256, 4, 1, 2};
  const auto library = [](const ScaledMatmulParams& p, cudaStream_t stream) {
    bench::check(launch_fast_sm90<e4m3, e4m3, Out>(p, stream), "scaled_matmul");
  };
  return {{"library", library},
          variant<Out, kNone, true, kWide>(8),
          variant<Out, kNone, true, kAlone>(8),
          variant<Out, kNone, true, ping_pong_config(192)>(8),
          variant<Out, kNone, true, ping_pong_config(192)>(16),
          variant<Out, kNone, true, ping_pong_config(176)>(8),
          variant<Out, kNone, true, ping_pong_config(176)>(16),
          variant<Out, kNone, true, ping_pong_config(160)>(8)};
}

// The first is what the library runs; then each instance with about 32, 64 and 128 tiles, of one
// block and of two.
template <BlockScales kScales, bool kFast, int kTokens>
std::vector<Provider> few_rows() {
  using Out = tile::bf16;
  std::vector<Provider> found = {
      {"library", [](const auto& p, cudaStream_t s) {
         bench::check(launch_few_rows_sm90<Out, kScales, kFast, kTokens>(p, s), "few rows");
       }}};
  const auto add = [&]<int kGroups>() {
    using Matmul = ScaledMatmulFewRows<Out, kScales, kFast, few_rows_config(kTokens, kGroups)>;
    for (const int blocks : {32, 64, 128}) {
      for (const int splits : {1, 2}) {
        const auto run = [=](const ScaledMatmulParams& p, cudaStream_t s) {
          const int64_t rows = tile::ceil_div(p.N, blocks);
          const FewRowsPlan plan = {
              std::min(64 * kGroups, static_cast<int>(tile::ceil_div(rows, 8)) * 8), splits, 0.0};
          bench::check(launch_few_rows_plan_sm90<Matmul>(p, s, plan), "few rows");
        };
        found.push_back({"few rows groups" + std::to_string(kGroups) + " tiles" +
                             std::to_string(blocks) + " splits" + std::to_string(splits),
                         run});
      }
    }
  };
  add.template operator()<1>();
  if constexpr (kTokens > 32) add.template operator()<2>();
  add.template operator()<4>();
  return found;
}

template <int kTokens>
std::vector<Provider> few_rows(const Recipe& recipe) {
  if (recipe.rhs == Scaling::kBlock128x128) {
    return few_rows<BlockScales::k1x128By128x128, false, kTokens>();
  }
  return recipe.fast ? few_rows<BlockScales::kNone, true, kTokens>()
                     : few_rows<BlockScales::kNone, false, kTokens>();
}

std::vector<Provider> variants(const Recipe& recipe, int64_t M) {
  if (M <= 128 && recipe.rhs != Scaling::kBlock1x128) {
    return M <= 16   ? few_rows<16>(recipe)
           : M <= 32 ? few_rows<32>(recipe)
           : M <= 64 ? few_rows<64>(recipe)
                     : few_rows<128>(recipe);
  }
  if (recipe.fast) return fast<tile::bf16>();
  switch (recipe.rhs) {
    case Scaling::kBlock1x128:
      return promoted<float, BlockScales::k1x128By1x128>();
    case Scaling::kBlock128x128:
      return promoted<tile::bf16, BlockScales::k1x128By128x128>();
    default:
      return promoted<tile::bf16, BlockScales::kNone>();
  }
}

// --- Inputs --------------------------------------------------------------------------------------

// Positive scales of `rows` rows, as many as the recipe wants.
float* scales(Scaling scaling, int64_t rows, int64_t K) {
  const int64_t blocks = scale_blocks(K);
  const int64_t sizes[] = {1, rows, blocks * padded_scale_row(rows), scale_blocks(rows) * blocks};
  const int64_t size = sizes[static_cast<int>(scaling)];
  std::vector<float> values;
  for (int64_t i = 0; i < size; ++i) values.push_back((1.0f + i % 7 / 8.0f) / 64.0f);
  float* data = bench::allocate<float>(size);
  bench::check(cudaMemcpy(data, values.data(), size * sizeof(float), cudaMemcpyHostToDevice),
               "scales");
  return data;
}

ScaledMatmulParams problem(const Recipe& recipe, int64_t M, int64_t N, int64_t K) {
  constexpr float kDeviation = 64.0f;  // the largest of a tensor's normal numbers become about 350
  ScaledMatmulParams p = {};
  p.lhs_dtype = p.rhs_dtype = DType::kFloat8E4M3;
  p.out_dtype = recipe.out;
  p.lhs_scaling = recipe.lhs;
  p.rhs_scaling = recipe.rhs;
  p.fast_accumulation = recipe.fast;
  p.B = 1, p.M = M, p.N = N, p.K = K;
  p.lhs = bench::normal_matrix<e4m3>(M * K, kDeviation);
  p.rhs = bench::normal_matrix<e4m3>(N * K, kDeviation);
  p.lhs_scale = scales(recipe.lhs, M, K);
  p.rhs_scale = scales(recipe.rhs, N, K);
  p.out = bench::allocate<float>(M * N);
  return p;
}

}  // namespace
}  // namespace jaxkern

int main(int argc, char** argv) {
  using namespace jaxkern;
  bench::require(argc >= 7, "scaled_matmul <recipe> <M> <N> <K> <repeats> <seconds> [--variants]");
  const auto recipe = std::find_if(std::begin(kRecipes), std::end(kRecipes), [&](const Recipe& r) {
    return std::strcmp(r.name, argv[1]) == 0;
  });
  bench::require(recipe != std::end(kRecipes), std::string("no recipe ") + argv[1]);
  const int64_t M = std::atoll(argv[2]), N = std::atoll(argv[3]), K = std::atoll(argv[4]);
  std::vector<ScaledMatmulParams> inputs;
  for (int64_t i = bench::rotations(M * K + N * K); i > 0; --i) {
    inputs.push_back(problem(*recipe, M, N, K));
  }
  Comparison comparison(inputs, static_cast<float>(std::atof(argv[6])));
  const ScaledMatmulParams& first = inputs.front();
  std::vector<Provider> providers = variants(*recipe, M);
  if (argc <= 7 || std::strcmp(argv[7], "--variants") != 0) providers.resize(1);
  providers.insert(providers.begin() + 1, bench::cublaslt(*recipe, first, comparison));
  providers.front().name = "jaxkern";
  for (const Provider& provider : providers) {
    const auto distance = [&](const auto* out) {
      return comparison.distance(provider, providers[1], out, M * N);
    };
    const double found = recipe->out == DType::kFloat32
                             ? distance(static_cast<const float*>(first.out))
                             : distance(static_cast<const tile::bf16*>(first.out));
    bench::require(found <= 1e-2,
                   provider.name + " and cublaslt disagree: " + std::to_string(found));
  }
  comparison.measure(providers, std::max(1, std::atoi(argv[5])));
  bench::print(providers);
  return 0;
}
