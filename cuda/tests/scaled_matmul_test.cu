// The kernels of products of scaled matrices against a scalar product, at sizes that no tile
// divides. Elements are small integers and scales powers of two, so that every way to sum is exact.
#include "cuda/matmul/scaled_matmul.h"

#include <functional>

#include "cuda/matmul/few_rows.h"
#include "cuda/tests/test.h"

namespace jaxkern {

using tile::bf16, tile::e4m3, tile::e5m2, tile::f16;

constexpr int kGuard = 4096;  // bytes behind each array, NaN: nothing may read or write them

template <class T>
std::vector<T> guarded(std::vector<T> values) {
  std::vector<T> copy(values.size() + kGuard / sizeof(T));
  std::memset(static_cast<void*>(copy.data()), 0xff, copy.size() * sizeof(T));
  std::copy(values.begin(), values.end(), copy.begin());
  return copy;
}

// The scales of B matrices of `rows` rows, as the kernel takes them; at() reads the same array.
struct Scales {
  Scaling scaling;
  int64_t rows, blocks;
  std::vector<float> values;

  Scales(Scaling scaling, int64_t B, int64_t rows, int64_t K, int seed)
      : scaling(scaling), rows(rows), blocks(scale_blocks(K)) {
    std::mt19937 random(seed);
    for (int64_t i = 0; i < B * per_matrix(); ++i) values.push_back(std::exp2(random() % 4 - 2.0f));
  }
  int64_t per_matrix() const {
    switch (scaling) {
      case Scaling::kTensor:
        return 1;
      case Scaling::kRow:
        return rows;
      case Scaling::kBlock1x128:
        return blocks * padded_scale_row(rows);
      case Scaling::kBlock128x128:
        return scale_blocks(rows) * blocks;
    }
    return 0;
  }
  float at(int64_t b, int64_t row, int64_t k) const {
    const float* own = values.data() + b * per_matrix();
    switch (scaling) {
      case Scaling::kTensor:
        return own[0];
      case Scaling::kRow:
        return own[row];
      case Scaling::kBlock1x128:
        return own[k / kScaleBlock * padded_scale_row(rows) + row];
      case Scaling::kBlock128x128:
        return own[row / kScaleBlock * blocks + k / kScaleBlock];
    }
    return NAN;
  }
};

template <class T>
std::vector<float> scaled(const std::vector<T>& x, const Scales& scales, int64_t K) {
  std::vector<float> y;
  for (size_t i = 0; i < x.size(); ++i) {
    const int64_t row = i / K;
    y.push_back(test::to_float(x[i]) * scales.at(row / scales.rows, row % scales.rows, i % K));
  }
  return y;
}

struct Launch {
  std::string how;
  std::function<cudaError_t(const ScaledMatmulParams&)> launch;
};

template <class Lhs, class Rhs, class Out>
void test_matmul(const std::vector<Launch>& launches, std::string what, int64_t B, int64_t M,
                 int64_t N, int64_t K, Scaling lhs_scaling, Scaling rhs_scaling, bool with_bias) {
  what += ", B " + std::to_string(B) + ", M " + std::to_string(M) + ", N " + std::to_string(N) +
          ", K " + std::to_string(K);
  const auto lhs = test::integers<Lhs>(B * M * K, M, 3);
  const auto rhs = test::integers<Rhs>(B * N * K, N, 3);
  const auto bias = test::integers<float>(N, K, 100);
  const Scales lhs_scales(lhs_scaling, B, M, K, 1), rhs_scales(rhs_scaling, B, N, K, 2);
  const auto x = scaled(lhs, lhs_scales, K), y = scaled(rhs, rhs_scales, K);
  std::vector<float> wanted;
  for (int64_t m = 0; m < B * M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      const float *row = x.data() + m * K, *col = y.data() + (m / M * N + n) * K;
      float sum = with_bias ? bias[n] : 0.0f;
      for (int64_t k = 0; k < K; ++k) sum += row[k] * col[k];
      wanted.push_back(test::round_to<Out>(sum));
    }
  }
  wanted.insert(wanted.end(), kGuard / sizeof(Out), NAN);

  const test::Array<Lhs> in_lhs(guarded(lhs));
  const test::Array<Rhs> in_rhs(guarded(rhs));
  const test::Array<float> in_lhs_scale(guarded(lhs_scales.values));
  const test::Array<float> in_rhs_scale(guarded(rhs_scales.values)), in_bias(guarded(bias));
  ScaledMatmulParams params = {};
  params.lhs_scaling = lhs_scaling;
  params.rhs_scaling = rhs_scaling;
  params.B = B, params.M = M, params.N = N, params.K = K;
  params.lhs = in_lhs.data();
  params.rhs = in_rhs.data();
  params.lhs_scale = in_lhs_scale.data();
  params.rhs_scale = in_rhs_scale.data();
  params.bias = with_bias ? in_bias.data() : nullptr;
  for (const Launch& run : launches) {
    const test::Array<Out> out(wanted.size());
    params.out = out.data();
    test::check(run.launch(params), what + run.how);
    test::synchronize(what + run.how);
    test::compare(what + run.how, out.host(), wanted, N);
  }
}

template <class Matmul>
void test_sizes(const std::string& what, Scaling lhs, Scaling rhs) {
  const auto test = [&](int64_t B, int64_t M, int64_t N, int64_t K, bool with_bias) {
    test_matmul<typename Matmul::Lhs, typename Matmul::Rhs, typename Matmul::Out>(
        {{"",
          [](const auto& params) { return launch_scaled_matmul_sm90<Matmul>(params, nullptr); }}},
        what, B, M, N, K, lhs, rhs, with_bias);
  };
  test(1, 256, 256, 128, false);  // a tile or two
  test(1, 1, 8, 16, true);        // almost nothing of one
  test(3, 130, 264, 144, true);   // a little more, several matrices
  test(2, 99, 72, 1040, false);   // several rounds of the ring
  test(1, 2100, 2312, 48, true);  // several tiles a block
}

// By the plan that the launcher finds and, for each of its instances, by tiles that are as high as
// can be, that leave some consumers with few rows or none, and of 8 rows.
template <class Out, BlockScales kScales, bool kFast, int kTokens>
void test_few_rows(std::string what, Scaling lhs, Scaling rhs) {
  what += ", few rows " + std::to_string(kTokens);
  std::vector<Launch> launches = {{"", [](const auto& params) {
                                     return launch_few_rows_sm90<Out, kScales, kFast, kTokens>(
                                         params, nullptr);
                                   }}};
  std::vector<Launch> persistent = launches;
  const auto add = [&]<int kGroups>() {
    using Matmul = ScaledMatmulFewRows<Out, kScales, kFast, few_rows_config(kTokens, kGroups)>;
    for (const int rows : {64 * kGroups, 64 * kGroups - 24, 32 * kGroups - 8, 8}) {
      for (const int splits : {1, 2}) {
        const std::string how = ", groups " + std::to_string(kGroups) + ", rows " +
                                std::to_string(rows) + ", splits " + std::to_string(splits);
        launches.push_back({how, [=](const auto& params) {
                              const FewRowsPlan plan = {rows, splits, 0.0};
                              return launch_few_rows_plan_sm90<Matmul>(params, nullptr, plan);
                            }});
        if (splits == 1) persistent.push_back(launches.back());
      }
    }
  };
  add.template operator()<1>();
  if constexpr (kTokens > 32) add.template operator()<2>();
  add.template operator()<4>();
  const auto test = [&](const auto& by, int64_t B, int64_t M, int64_t N, int64_t K, bool bias) {
    test_matmul<e4m3, e4m3, Out>(by, what, B, M, N, K, lhs, rhs, bias);
  };
  test(launches, 1, kTokens, 128, 128, false);         // a split with nothing to do
  test(launches, 1, 1, 8, 16, true);                   // almost nothing of a tile
  test(launches, 3, kTokens - 3, 264, 144, true);      // several matrices, panels one by one
  test(launches, 2, kTokens - 5, 136, 1152, true);     // a stage has panels beyond K
  test(launches, 1, kTokens, 520, 8192, false);        // several rounds of the ring
  test(persistent, 1, kTokens - 1, 35000, 48, true);   // several tiles a block
  test(persistent, 150, kTokens - 1, 72, 144, false);  // of several matrices
}

template <class Out, int kTokens>
void test_few_rows_scales(const std::string& what) {
  constexpr auto kNone = BlockScales::kNone;
  test_few_rows<Out, kNone, true, kTokens>(what + ", fast", Scaling::kRow, Scaling::kTensor);
  test_few_rows<Out, kNone, false, kTokens>(what + ", row by row", Scaling::kRow, Scaling::kRow);
  test_few_rows<Out, BlockScales::k1x128By128x128, false, kTokens>(
      what + ", 1x128 by 128x128", Scaling::kBlock1x128, Scaling::kBlock128x128);
}

// The launcher's plans: tiles that their instance can hold, split only where SMs would be idle.
void test_few_rows_plans() {
  int multiprocessors;
  test::check(multiprocessor_count(&multiprocessors), "multiprocessors");
  for (const int64_t B : {1, 3, 200}) {
    for (const int64_t N : {8, 1000, 4096, 7168, 14336, 28672, 128256}) {
      for (const int groups : {1, 2, 4}) {
        ScaledMatmulParams p = {};
        p.B = B, p.N = N, p.K = 4096;
        const FewRowsPlan plan = few_rows_plan(p, 64, groups, multiprocessors);
        const std::string what = "plan of B " + std::to_string(B) + ", N " + std::to_string(N) +
                                 ", groups " + std::to_string(groups);
        if (std::isinf(plan.us)) {
          test::expect(groups > 1, what + ": the lowest tiles always have one");
          continue;
        }
        const int64_t tiles = B * tile::ceil_div(N, plan.rows);
        test::expect(plan.rows % 8 == 0 && plan.rows > 0 && plan.rows <= 64 * groups, what);
        test::expect(plan.splits == 1 || plan.splits == 2, what + ": splits");
        test::expect(plan.splits == 1 || plan.splits * tiles <= multiprocessors,
                     what + ": more blocks than SMs");
      }
    }
  }
}

template <class Lhs, class Rhs, class Out>
void test_types(std::string what) {
  constexpr auto kNone = BlockScales::kNone;
  what += std::string(", ") + tile::ElementType<Lhs>::kName + " " + tile::ElementType<Rhs>::kName;
  const auto test = [&]<BlockScales kScales, bool kFast>(const char* how, Scaling lhs,
                                                         Scaling rhs) {
    constexpr ScaledMatmulConfig kConfig = scaled_matmul_config(kScales, kFast);
    test_sizes<ScaledMatmul<Lhs, Rhs, Out, kScales, kFast, kConfig>>(what + how, lhs, rhs);
    if constexpr (kFast) {
      using Turns192 = ScaledMatmul<Lhs, Rhs, Out, kScales, kFast, ping_pong_config(192)>;
      using Turns176 = ScaledMatmul<Lhs, Rhs, Out, kScales, kFast, ping_pong_config(176)>;
      test_sizes<Turns192>(what + how + ", ping-pong 192", lhs, rhs);
      test_sizes<Turns176>(what + how + ", ping-pong 176", lhs, rhs);
    } else {
      using Three = ScaledMatmul<Lhs, Rhs, Out, kScales, kFast, kThreeConsumers>;
      test_sizes<Three>(what + how + ", three consumers", lhs, rhs);
    }
  };
  test.template operator()<kNone, true>(", fast, row by row", Scaling::kRow, Scaling::kRow);
  test.template operator()<kNone, false>(", tensor by tensor", Scaling::kTensor, Scaling::kTensor);
  test.template operator()<kNone, false>(", row by tensor", Scaling::kRow, Scaling::kTensor);
  test.template operator()<kNone, false>(", tensor by row", Scaling::kTensor, Scaling::kRow);
  test.template operator()<BlockScales::k1x128By128x128, false>(
      ", 1x128 by 128x128", Scaling::kBlock1x128, Scaling::kBlock128x128);
  test.template operator()<BlockScales::k1x128By1x128, false>(
      ", 1x128 by 1x128", Scaling::kBlock1x128, Scaling::kBlock1x128);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_types<e4m3, e4m3, bf16>("to bf16");
  test_types<e5m2, e4m3, float>("to float32");
  test_types<e4m3, e5m2, f16>("to f16");
  test_few_rows_plans();
  test_few_rows_scales<bf16, 16>("to bf16");
  test_few_rows_scales<float, 32>("to float32");
  test_few_rows_scales<f16, 64>("to f16");
  test_few_rows_scales<float, 128>("to float32");
  return test::finish();
}
