// matmul/gemm_sm90.cuh against a scalar product, at sizes that no tile divides.
#include "cuda/matmul/gemm.h"

#include "cuda/tests/test.h"

namespace jaxkern {

constexpr int kGuard = 4096;  // elements behind each matrix, NaN: nothing may read or write them

template <class T>
std::vector<T> guarded(std::vector<T> values) {
  values.insert(values.end(), kGuard, T(NAN));
  return values;
}

template <class Gemm>
void test_gemm(const std::string& name, int M, int N, int K) {
  using T = typename Gemm::T;
  const auto a = test::integers<T>(size_t(M) * K, M), b = test::integers<T>(size_t(K) * N, N);
  std::vector<float> b_float(b.size()), row(N);
  for (size_t i = 0; i < b.size(); ++i) b_float[i] = test::to_float(b[i]);
  std::vector<float> wanted;
  for (int m = 0; m < M; ++m) {
    row.assign(N, 0.0f);
    for (int k = 0; k < K; ++k) {
      const float x = test::to_float(a[size_t(m) * K + k]);
      for (int n = 0; n < N; ++n) row[n] += x * b_float[size_t(k) * N + n];
    }
    for (const float sum : row) wanted.push_back(test::round_to<T>(sum));
  }
  wanted.insert(wanted.end(), kGuard, NAN);

  const std::string what =
      name + ", M " + std::to_string(M) + ", N " + std::to_string(N) + ", K " + std::to_string(K);
  const test::Array<T> in_a(guarded(a)), in_b(guarded(b)), d(wanted.size());
  test::check(launch_gemm<Gemm>({in_a.data(), in_b.data(), d.data(), M, N, K}, nullptr), what);
  test::synchronize(what);
  test::compare(what, d.host(), wanted, N);
}

template <class Gemm>
void test_sizes(const std::string& name) {
  test_gemm<Gemm>(name, 256, 256, 64);    // one tile
  test_gemm<Gemm>(name, 1, 8, 8);         // almost nothing of one
  test_gemm<Gemm>(name, 130, 264, 72);    // a little more than one
  test_gemm<Gemm>(name, 100, 520, 1000);  // several rounds of the ring, a cut block of K at the end
  test_gemm<Gemm>(name, 2100, 2312, 40);  // more tiles than blocks, one block of K
  test_gemm<Gemm>(name, 3000, 4104, 136);  // several tiles a block
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  using tile::bf16, tile::f16;
  test_sizes<Gemm<bf16, 256, 4, 2>>("bf16, N 256, 4 stages, clusters of 2");
  test_sizes<Gemm<bf16, 256, 4, 1>>("bf16, N 256, 4 stages, clusters of 1");
  test_sizes<Gemm<bf16, 256, 3, 2>>("bf16, N 256, 3 stages, clusters of 2");
  test_sizes<Gemm<bf16, 128, 6, 2>>("bf16, N 128, 6 stages, clusters of 2");
  test_sizes<Gemm<f16, 256, 4, 2>>("f16, N 256, 4 stages, clusters of 2");
  return test::finish();
}
