// Products of e4m3 with weights of four bits against a scalar loop over what their bits mean,
// rounded as four_bit_fp8.cuh has it.
#include "cuda/matmul/quantized_matmul_fp8.h"

#include "cuda/tests/test.h"

namespace jaxkern {
namespace {

using tile::bf16, tile::e4m3, tile::f16;

constexpr size_t kGuard = 1024;  // bytes or elements, NaN, behind each operand and the result

template <class T>
std::vector<T> guarded(const std::vector<T>& x) {
  std::vector<T> copy = x;
  std::vector<unsigned char> bytes(kGuard * sizeof(T), 0xff);
  const T* end = reinterpret_cast<const T*>(bytes.data());
  copy.insert(copy.end(), end, end + kGuard);
  return copy;
}

enum class Scales { kClose, kWide };  // whether sums are exact, and all codes that there are

// A weight with random bits, and what kernels make of them, by the description in packed_weight.py.
struct Weight {
  FourBitFormat format;
  int blocks;
  bool zero_points;
  int64_t B, N, K, strips, panels;
  int bytes;
  std::vector<uint8_t> data;
  std::vector<float> row_scale, values;  // (B, strips * 16), (B, N, K)

  Weight(FourBitFormat format, int blocks, bool zero_points, int64_t B, int64_t N, int64_t K,
         Scales scales)
      : format(format),
        blocks(blocks),
        zero_points(zero_points),
        B(B),
        N(N),
        K(K),
        strips(tile::ceil_div(N, kFourBitRows)),
        panels(K / kFourBitColumns),
        bytes(four_bit_tile_bytes(format, blocks, zero_points)),
        data(B * strips * panels * bytes) {
    std::mt19937 random(static_cast<unsigned>(N * 31 + K));
    for (auto& byte : data) byte = static_cast<uint8_t>(random());
    for (int64_t tile = 0; tile < B * strips * panels; ++tile) {
      fill_scales(data.data() + tile * bytes + kFourBitValueBytes, scales, random);
    }
    for (int64_t i = 0; i < B * strips * kFourBitRows; ++i) {
      row_scale.push_back(std::ldexp(1.0f, static_cast<int>(random() % 3)));
    }
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t k = 0; k < K; ++k) {
          const int64_t strip = b * strips + n / kFourBitRows;
          const uint8_t* tile = data.data() + (strip * panels + k / kFourBitColumns) * bytes;
          values.push_back(value(tile, n % kFourBitRows, k % kFourBitColumns) *
                           row_scale[b * strips * kFourBitRows + n]);
        }
      }
    }
  }

 private:
  void fill_scales(uint8_t* scales, Scales which, std::mt19937& random) const {
    const int count = kFourBitRows * blocks;
    const bool wide = which == Scales::kWide;
    for (int i = 0; i < count; ++i) {
      if (format == FourBitFormat::kNvfp4) {
        // e5m3 codes of e4m3's numbers: from 2^-9 to 448, and that of zero.
        const int code = wide ? 8 + random() % 143 : 9 * 8 + random() % 16;
        scales[i] = static_cast<uint8_t>(wide && random() % 16 == 0 ? 0 : code);
      } else if (format == FourBitFormat::kMxfp4) {
        const int spread = wide ? 3 + random() % 15 : 4;
        scales[i] = static_cast<uint8_t>((wide ? random() % 100 : 0) + random() % spread);
      } else {
        const float scale = 1.0f + static_cast<float>(random() % 128) / 128;
        put(scales, i,
            wide ? std::ldexp(scale, static_cast<int>(random() % 12) - 6)
                 : 1.0f + static_cast<float>(random() % 8) / 8);
        if (zero_points) put(scales, count + i, 128.0f + static_cast<float>(random() % 16));
      }
    }
  }
  static void put(uint8_t* to, int i, float x) {
    const bf16 rounded = __float2bfloat16_rn(x);
    std::memcpy(to + 2 * i, &rounded, 2);
  }
  static float get(const uint8_t* from, int i) {
    bf16 x;
    std::memcpy(&x, from + 2 * i, 2);
    return test::to_float(x);
  }

  // The scale of a block, relative to the row's.
  float scale(const uint8_t* tile, int row, int block) const {
    const uint8_t* scales = tile + kFourBitValueBytes;
    const int at = (row % 8 * blocks + block) * 2 + row / 8;
    if (format == FourBitFormat::kInt4) return get(scales, at);
    const int code = scales[at];
    if (format == FourBitFormat::kMxfp4) return std::ldexp(1.0f, -code);
    return std::ldexp((8.0f + static_cast<float>(code % 8)) / 8, code / 8 - 10);
  }

  // Without its scale.
  float element(const uint8_t* tile, int row, int col) const {
    const int step = col / 16, odd = col % 2, lane = row % 8 * 4 + col % 8 / 2;
    const int i = col % 16 / 8 * 2 + row / 8;
    uint16_t half;
    std::memcpy(&half, tile + ((step / 4 * 32 + lane) * 4 + step % 4) * 4 + 2 * odd, 2);
    if (format == FourBitFormat::kInt4) {
      const int count = kFourBitRows * blocks;
      const int at = (row % 8 * blocks + col * blocks / kFourBitColumns) * 2 + row / 8;
      const float zero = zero_points ? get(tile + kFourBitValueBytes, count + at) : 136.0f;
      return static_cast<float>(half >> 4 * i & 15) + 128.0f - zero;
    }
    constexpr float kMagnitudes[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    constexpr int kBits[4][4] = {{15, 8, 7, 6}, {12, 5, 4, 3}, {9, 2, 1, 0}, {13, 11, 10, 14}};
    int bits = 0;
    for (const int bit : kBits[i]) bits = 2 * bits + (half >> bit & 1);
    return bits & 8 ? -kMagnitudes[bits & 7] : kMagnitudes[bits];
  }

  // The nearest e4m3 of the share of the row's largest scale in the tile, times that again.
  float value(const uint8_t* tile, int row, int col) const {
    const float own = scale(tile, row, col * blocks / kFourBitColumns);
    const float x = element(tile, row, col);
    if (blocks == 1) return x * own;
    float largest = 0.0f;
    for (int i = 0; i < blocks; ++i) largest = std::max(largest, scale(tile, row, i));
    const int up = format == FourBitFormat::kInt4 ? 3 : 1;
    const int factor = std::ilogb(largest) - up;
    // Scales of integers are rounded to float16 and so are the products, before they are to e4m3.
    const float share = test::round_to<f16>(std::ldexp(own, -factor));
    return std::ldexp(test::round_to<e4m3>(test::round_to<f16>(x * share)), factor);
  }
};

// Of each 16 columns 0, 1, 8, 9, 2, 3, 10, 11, ...
template <class T>
std::vector<T> in_order(const std::vector<T>& x) {
  std::vector<T> y = x;
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t at = i % 16;
    y[i] = x[i - at + at / 4 * 2 + at % 4 / 2 * 8 + at % 2];
  }
  return y;
}

template <class T>
constexpr DType kDType = std::is_same_v<T, float>  ? DType::kFloat32
                         : std::is_same_v<T, bf16> ? DType::kBFloat16
                                                   : DType::kFloat16;

template <class Matmul>
void test_matmul(std::string what, const Weight& w, int64_t M, const std::vector<e4m3>& x) {
  using Out = typename Matmul::Out;
  what += ", B " + std::to_string(w.B) + ", M " + std::to_string(M) + ", N " + std::to_string(w.N) +
          ", K " + std::to_string(w.K);
  std::vector<float> x_scale, wanted;
  for (int64_t i = 0; i < w.B * M; ++i) x_scale.push_back(std::ldexp(1.0f, i % 5 - 2));
  std::vector<float> row(w.K);
  for (int64_t m = 0; m < w.B * M; ++m) {
    for (int64_t k = 0; k < w.K; ++k) row[k] = test::to_float(x[m * w.K + k]);
    for (int64_t n = 0; n < w.N; ++n) {
      const float* col = w.values.data() + (m / M * w.N + n) * w.K;
      float sum = 0.0f;
      for (int64_t k = 0; k < w.K; ++k) sum += row[k] * col[k];
      wanted.push_back(test::round_to<Out>(sum * x_scale[m]));
    }
  }
  wanted.insert(wanted.end(), kGuard, NAN);

  const test::Array<e4m3> in_x(guarded(in_order(x)));
  const test::Array<float> in_scale(guarded(x_scale));
  const test::Array<uint8_t> data(guarded(w.data));
  const test::Array<float> row_scale(guarded(w.row_scale));
  const test::Array<Out> out(wanted.size());
  QuantizedMatmulFp8Params params = {};
  params.out_dtype = kDType<Out>;
  params.B = w.B, params.M = M, params.N = w.N, params.K = w.K;
  params.x = in_x.data();
  params.x_scale = in_scale.data();
  params.w = {w.format, w.blocks, w.zero_points, data.data(), row_scale.data()};
  params.out = out.data();
  test::check(launch_four_bit_fp8_sm90<Matmul>(params, nullptr), what);
  test::synchronize(what);
  test::compare(what, out.host(), wanted, w.N);
}

template <FourBitFormat kFormat, class Out, int kTokens>
void test_kernel(std::string what, int blocks, bool zero_points) {
  using Matmul = QuantizedMatmulFp8<kFormat, Out, kTokens>;
  what += ", tokens " + std::to_string(kTokens);
  const auto weight = [&](int64_t B, int64_t N, int64_t K, Scales scales) {
    return Weight(kFormat, blocks, zero_points, B, N, K, scales);
  };
  // Each row of x picks a column of the weight.
  const int64_t K = 384;
  std::vector<e4m3> picks(K * K);
  for (int64_t i = 0; i < K; ++i) picks[i * K + i] = e4m3(i % 2 == 0 ? 1.0f : -2.0f);
  test_matmul<Matmul>(what + ", each weight", weight(1, 144, K, Scales::kWide), K, picks);

  const auto test = [&](int64_t B, int64_t M, int64_t N, int64_t K) {
    const auto x = test::integers<e4m3>(B * M * K, static_cast<int>(M), 1);
    test_matmul<Matmul>(what, weight(B, N, K, Scales::kClose), M, x);
  };
  test(1, kTokens, 256, 128);               // a tile of a cluster
  test(1, 1, 16, 128);                      // almost nothing of one
  test(1, kTokens + 7, 272, 1152);          // a little more
  test(2, kTokens - 29, 144, 4096);         // several rounds of the ring
  test(3, 2 * kTokens + 1, 80, 256);        // several matrices
  test(1, 5 * kTokens - 5, 16 * 272, 128);  // several tiles a block
}

template <FourBitFormat kFormat>
void test_format(std::string what, int blocks, bool zero_points = false) {
  what += ", blocks " + std::to_string(blocks) + (zero_points ? ", zero points" : "");
  test_kernel<kFormat, bf16, 256>(what + ", to bf16", blocks, zero_points);
  test_kernel<kFormat, float, 128>(what + ", to float32", blocks, zero_points);
}

}  // namespace
}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_format<FourBitFormat::kNvfp4>("nvfp4", 8);
  test_format<FourBitFormat::kMxfp4>("mxfp4", 4);
  test_format<FourBitFormat::kInt4>("int4", 1);
  test_format<FourBitFormat::kInt4>("int4", 1, true);
  test_format<FourBitFormat::kInt4>("int4", 2);
  test_format<FourBitFormat::kInt4>("int4", 4, true);
  return test::finish();
}
