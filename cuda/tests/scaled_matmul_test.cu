// The kernels of products of scaled matrices against a scalar product, at sizes that no tile
// divides. Elements are small integers and scales powers of two, so that every way to sum is exact.
#include "cuda/matmul/scaled_matmul.h"

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

template <class Lhs, class Rhs, class Out, class Launch>
void test_matmul(const Launch& launch, std::string what, int64_t B, int64_t M, int64_t N, int64_t K,
                 Scaling lhs_scaling, Scaling rhs_scaling, bool with_bias) {
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
  const test::Array<Out> out(wanted.size());
  ScaledMatmulParams params = {};
  params.lhs_scaling = lhs_scaling;
  params.rhs_scaling = rhs_scaling;
  params.B = B, params.M = M, params.N = N, params.K = K;
  params.lhs = in_lhs.data();
  params.rhs = in_rhs.data();
  params.lhs_scale = in_lhs_scale.data();
  params.rhs_scale = in_rhs_scale.data();
  params.bias = with_bias ? in_bias.data() : nullptr;
  params.out = out.data();
  test::check(launch(params), what);
  test::synchronize(what);
  test::compare(what, out.host(), wanted, N);
}

template <class Matmul>
void test_sizes(const std::string& what, Scaling lhs, Scaling rhs) {
  const auto test = [&](int64_t B, int64_t M, int64_t N, int64_t K, bool with_bias) {
    test_matmul<typename Matmul::Lhs, typename Matmul::Rhs, typename Matmul::Out>(
        [](const auto& params) { return launch_scaled_matmul_sm90<Matmul>(params, nullptr); }, what,
        B, M, N, K, lhs, rhs, with_bias);
  };
  test(1, 256, 256, 128, false);  // a tile or two
  test(1, 1, 8, 16, true);        // almost nothing of one
  test(3, 130, 264, 144, true);   // a little more, several matrices
  test(2, 99, 72, 1040, false);   // several rounds of the ring
  test(1, 2100, 2312, 48, true);  // several tiles a block
}

template <class Out, BlockScales kScales, bool kFast, int kTokens>
void test_few_rows(std::string what, Scaling lhs, Scaling rhs) {
  using Matmul = ScaledMatmulFewRows<Out, kScales, kFast, kTokens>;
  what += ", few rows " + std::to_string(kTokens);
  for (const int splits : {0, 1, 2, 4, 8}) {
    const auto test = [&](int64_t B, int64_t M, int64_t N, int64_t K, bool with_bias) {
      test_matmul<e4m3, e4m3, Out>(
          [splits](const auto& params) {
            return launch_scaled_matmul_few_rows_sm90<Matmul>(params, nullptr, splits);
          },
          what + ", splits " + std::to_string(splits), B, M, N, K, lhs, rhs, with_bias);
    };
    test(1, kTokens, 128, 128, false);                      // a tile, and splits with nothing to do
    test(1, 1, 8, 16, true);                                // almost nothing of one
    test(3, kTokens - 3, 264, 144, true);                   // several matrices
    test(1, kTokens, 1000, 2064, false);                    // several rounds of the ring
    if (splits < 2) test(1, kTokens - 1, 35000, 48, true);  // several tiles a block
  }
}

template <class Out, int kTokens>
void test_few_rows_scales(const std::string& what) {
  constexpr auto kNone = BlockScales::kNone;
  test_few_rows<Out, kNone, true, kTokens>(what + ", fast", Scaling::kRow, Scaling::kTensor);
  test_few_rows<Out, kNone, false, kTokens>(what + ", row by row", Scaling::kRow, Scaling::kRow);
  test_few_rows<Out, BlockScales::k1x128By128x128, false, kTokens>(
      what + ", 1x128 by 128x128", Scaling::kBlock1x128, Scaling::kBlock128x128);
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
      using PingPong = ScaledMatmul<Lhs, Rhs, Out, kScales, kFast, kPingPong>;
      test_sizes<PingPong>(what + how + ", ping-pong", lhs, rhs);
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
  test_few_rows_scales<bf16, 16>("to bf16");
  test_few_rows_scales<float, 32>("to float32");
  test_few_rows_scales<f16, 64>("to f16");
  test_few_rows_scales<float, 128>("to float32");
  return test::finish();
}
