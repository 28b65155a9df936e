// Products with weights of four bits, and their gradients, against a scalar loop over what bits
// mean.
#include "cuda/matmul/quantized_matmul.h"

#include <functional>
#include <thread>

#include "cuda/tests/four_bit_weight.h"

namespace jaxkern {
namespace {

using test::guarded, test::kGuard;
using tile::bf16, tile::f16;

// A weight with random bits, and what they mean, by the description in packed_weight.py. Scales
// have few bits and are all close to 1, so that sums are exact.
struct Weight : test::FourBitTiles {
  int64_t B, N, K;
  std::vector<uint8_t> data;
  std::vector<float> row_scale, values;

  // bad: some blocks have NaN for a scale.
  Weight(FourBitFormat format, int blocks, bool zero_points, int64_t B, int64_t N, int64_t K,
         bool bad = false)
      : FourBitTiles{format, blocks, zero_points}, B(B), N(N), K(K) {
    const int64_t strips = tile::ceil_div(N, kFourBitRows);
    const int64_t panels = tile::ceil_div(K, kFourBitColumns);
    const int bytes = this->bytes();
    std::mt19937 random(static_cast<unsigned>(N * 31 + K));
    data.resize(B * strips * panels * bytes);
    for (auto& byte : data) byte = static_cast<uint8_t>(random());
    for (int64_t tile = 0; tile < B * strips * panels; ++tile) {
      uint8_t* scales = data.data() + tile * bytes + kFourBitValueBytes;
      fill_scales(scales, random);
      const int at = static_cast<int>(random() % this->scales());
      if (!bad || random() % 8 > 0) continue;
      format == FourBitFormat::kInt4 ? test::put_bf16(scales, at, NAN) : void(scales[at] = 255);
    }
    for (int64_t i = 0; i < B * strips * kFourBitRows; ++i) {
      row_scale.push_back(std::ldexp(1.0f, static_cast<int>(random() % 3)));
    }
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < K; ++k) {
          const int64_t strip = b * strips + n / kFourBitRows;
          const uint8_t* tile = data.data() + (strip * panels + k / kFourBitColumns) * bytes;
          const int row = n % kFourBitRows, col = k % kFourBitColumns;
          values.push_back(value(tile, row, col) * scale(tile, row, block_of(col)));
        }
      }
    }
  }

  int64_t padded_rows() const { return tile::ceil_div(N, kFourBitRows) * kFourBitRows; }

 private:
  void fill_scales(uint8_t* scales, std::mt19937& random) const {
    for (int i = 0; i < this->scales(); ++i) {
      if (format == FourBitFormat::kNvfp4) {
        scales[i] = static_cast<uint8_t>(9 * 8 + random() % 16);
      } else if (format == FourBitFormat::kMxfp4) {
        scales[i] = static_cast<uint8_t>(random() % 4);
      } else {
        test::put_bf16(scales, i, 1.0f + static_cast<float>(random() % 8) / 8);
        if (zero_points) {
          const float zero = 128.0f + static_cast<float>(random() % 16);
          test::put_bf16(scales, this->scales() + i, zero);
        }
      }
    }
  }
};

struct Launch {
  std::string how;
  std::function<cudaError_t(const QuantizedMatmulParams&)> launch;
};

template <class T>
constexpr DType kDType = std::is_same_v<T, float>  ? DType::kFloat32
                         : std::is_same_v<T, bf16> ? DType::kBFloat16
                                                   : DType::kFloat16;

template <class T, class Out>
void test_matmul(const std::vector<Launch>& launches, std::string what, const Weight& w, int64_t M,
                 float larger = 1.0f) {
  what += ", B " + std::to_string(w.B) + ", M " + std::to_string(M) + ", N " + std::to_string(w.N) +
          ", K " + std::to_string(w.K);
  auto x = test::integers<T>(w.B * M * w.K, static_cast<int>(M), 3);
  for (T& value : x) value = static_cast<T>(test::to_float(value) * larger);
  std::vector<float> wanted(w.B * M * w.N);
  const auto some_rows = [&](int64_t first, int64_t step) {
    for (int64_t i = first; i < w.B * M * w.N; i += step) {
      const int64_t m = i / w.N, n = i % w.N;
      const T* row = x.data() + m * w.K;
      const float* col = w.values.data() + (m / M * w.N + n) * w.K;
      float sum = 0.0f;
      for (int64_t k = 0; k < w.K; ++k) sum += test::to_float(row[k]) * col[k];
      wanted[i] = test::round_to<Out>(sum * w.row_scale[m / M * w.padded_rows() + n]);
    }
  };
  std::vector<std::thread> threads;
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (int i = 0; i < cores; ++i) threads.emplace_back(some_rows, i, cores);
  for (std::thread& thread : threads) thread.join();
  wanted.insert(wanted.end(), kGuard, NAN);

  const test::Array<T> in_x(guarded(x));
  const test::Array<uint8_t> data(guarded(w.data));
  const test::Array<float> row_scale(guarded(w.row_scale));
  QuantizedMatmulParams params = {};
  params.x_dtype = kDType<T>;
  params.out_dtype = kDType<Out>;
  params.B = w.B, params.M = M, params.N = w.N, params.K = w.K;
  params.x = in_x.data();
  params.w = {w.format, w.blocks, w.zero_points, data.data(), row_scale.data()};
  for (const Launch& run : launches) {
    const test::Array<Out> out(wanted.size());
    params.out = out.data();
    test::check(run.launch(params), what + run.how);
    test::synchronize(what + run.how);
    test::compare(what + run.how, out.host(), wanted, w.N);
  }
}

// The gradient: x is dy, out is dx.
template <class T, class Out>
void test_gradient(const Launch& run, std::string what, const Weight& w, int64_t M) {
  what += run.how + ", gradient, B " + std::to_string(w.B) + ", M " + std::to_string(M) + ", N " +
          std::to_string(w.N) + ", K " + std::to_string(w.K);
  const bool has_factors = w.format == FourBitFormat::kMxfp4;
  std::vector<float> sum_scale, wanted;
  std::vector<T> factors;
  for (const float scale : w.row_scale) factors.push_back(static_cast<T>(scale / 4));
  for (int64_t b = 0; b < w.B; ++b) sum_scale.push_back(0.5f + static_cast<float>(b));
  const auto dy = test::integers<T>(w.B * M * w.N, static_cast<int>(M), 3);
  for (int64_t m = 0; m < w.B * M; ++m) {
    std::vector<float> sums(w.K, 0.0f);
    for (int64_t n = 0; n < w.N; ++n) {
      const int64_t b = m / M;
      const float factor = has_factors ? test::to_float(factors[b * w.N + n]) : 1.0f;
      const float y = test::to_float(dy[m * w.N + n]) * factor;
      const float* row = w.values.data() + (b * w.N + n) * w.K;
      for (int64_t k = 0; k < w.K; ++k) sums[k] += y * row[k];
    }
    for (const float sum : sums) wanted.push_back(test::round_to<Out>(sum * sum_scale[m / M]));
  }
  wanted.insert(wanted.end(), kGuard, NAN);

  const test::Array<T> in_dy(guarded(dy));
  const test::Array<uint8_t> data(guarded(w.data));
  const test::Array<T> in_factors(guarded(factors));
  const test::Array<float> in_scale(guarded(sum_scale));
  const test::Array<Out> out(wanted.size());
  QuantizedMatmulParams params = {};
  params.x_dtype = kDType<T>;
  params.out_dtype = kDType<Out>;
  params.B = w.B, params.M = M, params.N = w.N, params.K = w.K;
  params.x = in_dy.data();
  params.w = {w.format, w.blocks, w.zero_points, data.data(), nullptr};
  params.sum_scale = in_scale.data();
  if (has_factors) params.row_factor = in_factors.data();
  params.out = out.data();
  test::check(run.launch(params), what);
  test::synchronize(what);
  test::compare(what, out.host(), wanted, w.K);
}

// By the launcher's plan and by others, of which those of clusters have one tile each.
template <class T, class Out, class PlanLaunch>
void test_plans(const std::string& what, FourBitFormat format, int blocks, bool zero_points,
                int tokens, const std::vector<FourBitPlan>& plans, const PlanLaunch& run) {
  std::vector<Launch> launches, persistent;
  for (const FourBitPlan& plan : plans) {
    launches.push_back({", strips " + std::to_string(plan.strips) + ", panels " +
                            std::to_string(plan.panels) + ", shared " + std::to_string(plan.shared),
                        [=](const auto& p) { return run(p, plan); }});
    if (plan.shared == 0) persistent.push_back(launches.back());
  }
  const auto test = [&](const auto& by, int64_t B, int64_t M, int64_t N, int64_t K) {
    test_matmul<T, Out>(by, what, Weight(format, blocks, zero_points, B, N, K), M);
  };
  test(launches, 1, 1, 16, 128);                // almost nothing of a tile
  test(launches, 1, tokens, 272, 1152);         // a stage has panels beyond K
  test(launches, 2, tokens - 5, 80, 128 + 32);  // several matrices, columns that fill no tile
  test(launches, 1, tokens - 3, 528, 8192);     // several rounds of the ring
  test(persistent, 1, tokens - 6, 35008, 128);  // several tiles a block
  test(persistent, 150, tokens - 1, 32, 256);   // of several matrices
}

constexpr FourBitPlan kLaunchers = {};  // stands for the launcher's own plan

int multiprocessors() {
  int count;
  test::check(multiprocessor_count(&count), "multiprocessors");
  return count;
}

template <FourBitFormat kFormat, class T, class Out>
void test_one_row(std::string what, int blocks, bool zero_points) {
  using Matmul = QuantizedMatmulOneRow<kFormat, T, Out>;
  what += ", one row";
  std::vector<Launch> launches;
  for (const int warps : {0, 1, 3, 16}) {  // 0 stands for the launcher's
    launches.push_back({", warps " + std::to_string(warps), [=](const auto& p) {
                          const int own = one_row_warps<Matmul>(p, multiprocessors());
                          return launch_one_row<Matmul>(p, nullptr, warps == 0 ? own : warps);
                        }});
  }
  const auto test = [&](int64_t B, int64_t N, int64_t K, float larger = 1.0f) {
    test_matmul<T, Out>(launches, what, Weight(kFormat, blocks, zero_points, B, N, K), 1, larger);
  };
  test(1, 16, 128);
  test(1, 272, 1152);        // a panel for some warps only
  test(2, 80, 128 + 32);     // several matrices, columns that fill no tile
  test(3, 528, 8192);        // several tiles a warp
  test(1, 128 * 1024, 256);  // more blocks than there is room for
  if constexpr (std::is_same_v<T, bf16>) test(1, 48, 1152, 0x1p70f);
}

template <FourBitFormat kFormat, class T, class Out, int kTokens>
void test_few_rows(const std::string& what, int blocks, bool zero_points) {
  using Matmul = QuantizedMatmulFewRows<kFormat, T, Out, kTokens>;
  test_plans<T, Out>(what + ", few rows " + std::to_string(kTokens), kFormat, blocks, zero_points,
                     kTokens,
                     {kLaunchers, {1, 1, 0, 0.0}, {3, 5, 0, 0.0}, {2, 7, 0, 0.0}, {16, 1, 0, 0.0}},
                     [](const auto& p, const FourBitPlan& plan) {
                       const bool own = plan.strips == 0;
                       return launch_few_rows_plan_sm90<Matmul>(
                           p, nullptr, own ? few_rows_plan<Matmul>(p, multiprocessors()) : plan);
                     });
}

template <FourBitFormat kFormat, class T, class Out, int kTokens>
void test_some_rows(const std::string& what, int blocks, bool zero_points) {
  using Matmul = QuantizedMatmulSomeRows<kFormat, T, Out, kTokens>;
  test_plans<T, Out>(what + ", some rows " + std::to_string(kTokens), kFormat, blocks, zero_points,
                     kTokens,
                     {kLaunchers,
                      {1, 1, 0, 0.0},
                      {3, 2, 0, 0.0},
                      {7, 1, 0, 0.0},
                      {16, 1, 0, 0.0},
                      {2, 4, 2, 0.0},
                      {4, 1, 4, 0.0},
                      {7, 2, 7, 0.0},
                      {16, 1, 16, 0.0},
                      {16, 1, 4, 0.0},
                      {6, 2, 2, 0.0},
                      {15, 1, 11, 0.0}},
                     [](const auto& p, const FourBitPlan& plan) {
                       const bool own = plan.strips == 0;
                       return launch_some_rows_plan_sm90<Matmul>(
                           p, nullptr, own ? some_rows_plan<Matmul>(p, multiprocessors()) : plan);
                     });
}

template <FourBitFormat kFormat, class T, class Out, int kTokens>
void test_many_rows(std::string what, int blocks, bool zero_points) {
  using Matmul = QuantizedMatmul<kFormat, T, Out, kTokens>;
  what += ", many rows " + std::to_string(kTokens);
  const std::vector<Launch> launches = {
      {"", [](const auto& p) { return launch_four_bit_sm90<Matmul>(p, nullptr); }}};
  const auto test = [&](int64_t B, int64_t M, int64_t N, int64_t K) {
    test_matmul<T, Out>(launches, what, Weight(kFormat, blocks, zero_points, B, N, K), M);
  };
  test(1, kTokens, 256, 128);               // a tile of a cluster
  test(1, 1, 16, 128);                      // almost nothing of one
  test(1, kTokens + 7, 272, 1152);          // a little more
  test(2, kTokens - 29, 144, 4096);         // several rounds of the rings
  test(3, 2 * kTokens + 1, 80, 128 + 32);   // several matrices, columns that fill no tile
  test(1, 9 * kTokens - 5, 16 * 272, 128);  // several tiles a block
}

template <int kTokens>
void test_plan_of_some_rows(std::string what, const QuantizedMatmulParams& p, int count) {
  using Some = QuantizedMatmulSomeRows<FourBitFormat::kNvfp4, bf16, bf16, kTokens>;
  what += ", some rows " + std::to_string(kTokens);
  const FourBitPlan plan = some_rows_plan<Some>(p, count);
  const int groups = tile::ceil_div(plan.strips, 4);
  const int64_t tiles = p.B * tile::ceil_div(p.N / kFourBitRows, plan.tile_strips());
  test::expect(plan.strips > 0 && plan.panels > 0 && groups <= Some::kMaxGroups &&
                   groups * plan.panels <= Some::kConsumers,
               what);
  test::expect(
      3 * stage_bytes(kTokens, plan.strips, plan.panels, p.w.tile_bytes()) <= Some::kStageBytes,
      what + ": stages");
  test::expect(plan.shared == 0 || (plan.own() % 4 == 0 && 2 * tiles <= count),
               what + ": clusters");
}

template <FourBitFormat kFormat, class T, class Out>
void test_gradients(const std::string& what, int blocks, bool zero_points, const Launch& run,
                    int tokens) {
  const auto test = [&](int64_t B, int64_t M, int64_t N, int64_t K, bool bad = false) {
    test_gradient<T, Out>(run, what, Weight(kFormat, blocks, zero_points, B, N, K, bad), M);
  };
  test(1, tokens, 128, 256);               // a tile of a cluster
  test(1, 1, 16, 128);                     // almost nothing of one
  test(1, tokens + 7, 144, 384);           // a little more
  test(2, tokens - 29, 4096, 128);         // several rounds of the rings
  test(3, 33, 80, 384, true);              // several matrices, rows that fill no square
  test(1, 200, 272, 1152, true);           // some columns are NaN
  test(1, 3 * tokens - 5, 144, 45 * 256);  // several tiles a block
}

template <FourBitFormat kFormat>
void test_all_gradients(const std::string& what, int blocks, bool zero_points) {
  const auto test = [&]<class T, class Out, int kTokens>(const std::string& types) {
    using Matmul = QuantizedMatmul<kFormat, T, Out, kTokens, true>;
    const Launch run = {", tokens " + std::to_string(kTokens),
                        [](const auto& p) { return launch_four_bit_sm90<Matmul>(p, nullptr); }};
    test_gradients<kFormat, T, Out>(what + types, blocks, zero_points, run, kTokens);
  };
  test.template operator()<bf16, bf16, 256>(", bf16 to bf16");
  test.template operator()<f16, f16, 128>(", f16 to f16");
  test.template operator()<f16, float, 256>(", f16 to float32");
  test.template operator()<bf16, float, 128>(", bf16 to float32");
  const Launch launcher = {", launcher", [](const auto& p) {
                             return launch_four_bit_grad_of_sm90<kFormat, bf16, bf16>(p, nullptr);
                           }};
  for (const int M : {1, 7, 65, 300}) {
    const Weight w(kFormat, blocks, zero_points, 2, 208, 640);
    test_gradient<bf16, bf16>(launcher, what, w, M);
  }
}

// Tiles of both sizes: which rows an H200's clusters, 66, leave to the large ones, which have 256
// rows; and the result where this GPU has one too many for a round.
void test_tiles_of_both_sizes() {
  constexpr FourBitFormat kFormat = FourBitFormat::kNvfp4;
  constexpr int kH200Multiprocessors = 132;
  const auto wide = [](int64_t M, int64_t N) {
    QuantizedMatmulParams p = {};
    p.B = 1, p.M = M, p.N = N, p.K = 8192;
    return rows_of_wide_tiles<QuantizedMatmul<kFormat, bf16, bf16, 256>,
                              QuantizedMatmul<kFormat, bf16, bf16, 128>>(p, kH200Multiprocessors);
  };
  test::expect(wide(512, 28672) == 99, "198 of 224 large tiles are three rounds");
  test::expect(wide(512, 4096) == 0, "32 large tiles are half a round, 64 small ones a round");
  test::expect(wide(2048, 4096) == 16, "128 large tiles are nearly two rounds");

  const int64_t rows = 256 * (multiprocessors() / 4 + 1);  // of 500 tokens, two tiles each
  const Launch product = {", both sizes", [](const auto& p) {
                            return launch_four_bit_of_sm90<kFormat, bf16, bf16>(p, nullptr);
                          }};
  test_matmul<bf16, bf16>({product}, "nvfp4", Weight(kFormat, 8, false, 1, rows, 128), 500);
  const Launch gradient = {", both sizes", [](const auto& p) {
                             return launch_four_bit_grad_of_sm90<kFormat, bf16, bf16>(p, nullptr);
                           }};
  test_gradient<bf16, bf16>(gradient, "nvfp4", Weight(kFormat, 8, false, 1, 128, rows), 500);
}

// The launchers' plans: what their kernels can hold, and clusters only where each has one tile.
void test_launchers_plans() {
  using Few = QuantizedMatmulFewRows<FourBitFormat::kNvfp4, bf16, bf16, 16>;
  const int count = multiprocessors();
  for (const int64_t B : {1, 3, 200}) {
    for (const int64_t N : {16, 1040, 4096, 7168, 14336, 28672, 128256}) {
      for (const int64_t K : {128, 4096, 14336}) {
        QuantizedMatmulParams p = {};
        p.B = B, p.M = 10, p.N = N, p.K = K;
        p.w.format = FourBitFormat::kNvfp4, p.w.blocks = 8;
        const std::string what = "plan of B " + std::to_string(B) + ", N " + std::to_string(N) +
                                 ", K " + std::to_string(K);
        const FourBitPlan few = few_rows_plan<Few>(p, count);
        test::expect(few.strips > 0 && few.panels > 0 && few.shared == 0 &&
                         few.strips * few.panels <= Few::kConsumers,
                     what + ", few rows");
        test_plan_of_some_rows<32>(what, p, count);
        test_plan_of_some_rows<64>(what, p, count);
      }
    }
  }
}

template <FourBitFormat kFormat>
void test_format(std::string what, int blocks, bool zero_points = false) {
  what += ", blocks " + std::to_string(blocks) + (zero_points ? ", zero points" : "");
  test_one_row<kFormat, bf16, bf16>(what + ", bf16 to bf16", blocks, zero_points);
  test_one_row<kFormat, f16, float>(what + ", f16 to float32", blocks, zero_points);
  test_few_rows<kFormat, bf16, bf16, 8>(what + ", bf16 to bf16", blocks, zero_points);
  test_few_rows<kFormat, f16, float, 16>(what + ", f16 to float32", blocks, zero_points);
  test_some_rows<kFormat, bf16, float, 32>(what + ", bf16 to float32", blocks, zero_points);
  test_some_rows<kFormat, f16, f16, 64>(what + ", f16 to f16", blocks, zero_points);
  test_many_rows<kFormat, bf16, bf16, 256>(what + ", bf16 to bf16", blocks, zero_points);
  test_many_rows<kFormat, f16, f16, 128>(what + ", f16 to f16", blocks, zero_points);
  test_many_rows<kFormat, bf16, float, 128>(what + ", bf16 to float32", blocks, zero_points);
  test_all_gradients<kFormat>(what, blocks, zero_points);
}

}  // namespace
}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_launchers_plans();
  test_tiles_of_both_sizes();
  test_format<FourBitFormat::kNvfp4>("nvfp4", 8);
  test_format<FourBitFormat::kMxfp4>("mxfp4", 4);
  test_format<FourBitFormat::kInt4>("int4", 1);
  test_format<FourBitFormat::kInt4>("int4", 2);
  test_format<FourBitFormat::kInt4>("int4", 4, true);
  return test::finish();
}
