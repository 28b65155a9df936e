// matmul/scaled_matmul_sm90.cuh against a scalar product, at sizes that no tile divides. Elements
// are small integers and scales powers of two, so that every way to sum is exact.
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
      : scaling(scaling), rows(rows), blocks(tile::ceil_div<int64_t>(K, kScaleBlock)) {
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
        return tile::ceil_div<int64_t>(rows, kScaleBlock) * blocks;
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

template <class Matmul>
void test_matmul(std::string what, int64_t B, int64_t M, int64_t N, int64_t K, Scaling lhs_scaling,
                 Scaling rhs_scaling, bool with_bias) {
  using Out = typename Matmul::Out;
  what += ", B " + std::to_string(B) + ", M " + std::to_string(M) + ", N " + std::to_string(N) +
          ", K " + std::to_string(K);
  const auto lhs = test::integers<typename Matmul::Lhs>(B * M * K, M, 3);
  const auto rhs = test::integers<typename Matmul::Rhs>(B * N * K, N, 3);
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

  const test::Array<typename Matmul::Lhs> in_lhs(guarded(lhs));
  const test::Array<typename Matmul::Rhs> in_rhs(guarded(rhs));
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
  test::check(launch_scaled_matmul_sm90<Matmul>(params, nullptr), what);
  test::synchronize(what);
  test::compare(what, out.host(), wanted, N);
}

template <class Matmul>
void test_sizes(const std::string& what, Scaling lhs, Scaling rhs) {
  test_matmul<Matmul>(what, 1, 256, 256, 128, lhs, rhs, false);  // a tile or two
  test_matmul<Matmul>(what, 1, 1, 8, 16, lhs, rhs, true);        // almost nothing of one
  test_matmul<Matmul>(what, 3, 130, 264, 144, lhs, rhs, true);   // a little more, several matrices
  test_matmul<Matmul>(what, 2, 99, 72, 1040, lhs, rhs, false);   // several rounds of the ring
  test_matmul<Matmul>(what, 1, 2100, 2312, 48, lhs, rhs, true);  // several tiles a block
}

template <class Lhs, class Rhs, class Out>
void test_types(std::string what) {
  constexpr ScaledMatmulConfig kFast = {1, 256, 4, 2}, kPromoted = {2, 128, 4, 2};
  constexpr auto kNone = BlockScales::kNone;
  what += std::string(", ") + tile::ElementType<Lhs>::kName + " " + tile::ElementType<Rhs>::kName;
  test_sizes<ScaledMatmul<Lhs, Rhs, Out, kNone, true, kFast>>(what + ", fast, row by row",
                                                              Scaling::kRow, Scaling::kRow);
  test_sizes<ScaledMatmul<Lhs, Rhs, Out, kNone, false, kPromoted>>(
      what + ", tensor by tensor", Scaling::kTensor, Scaling::kTensor);
  test_sizes<ScaledMatmul<Lhs, Rhs, Out, kNone, false, kPromoted>>(what + ", row by tensor",
                                                                   Scaling::kRow, Scaling::kTensor);
  test_sizes<ScaledMatmul<Lhs, Rhs, Out, BlockScales::k1x128By128x128, false, kPromoted>>(
      what + ", 1x128 by 128x128", Scaling::kBlock1x128, Scaling::kBlock128x128);
  test_sizes<ScaledMatmul<Lhs, Rhs, Out, BlockScales::k1x128By1x128, false, kPromoted>>(
      what + ", 1x128 by 1x128", Scaling::kBlock1x128, Scaling::kBlock1x128);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_types<e4m3, e4m3, bf16>("to bf16");
  test_types<e5m2, e4m3, float>("to float32");
  test_types<e4m3, e5m2, f16>("to f16");
  return test::finish();
}
