// Quantisation to four bits against a scalar loop, bit by bit: all formats and types, at numbers of
// blocks that threads do not divide, of elements at and beside what rounding turns on.
#include "cuda/quantize/quantize_four_bit.h"

#include "cuda/tests/quantize_cases.h"

namespace jaxkern {

constexpr double kMiddles[] = {0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0};

// --- The scalar loop -----------------------------------------------------------------------------

struct FourBits {
  std::vector<uint8_t> values;  // two in a byte
  std::vector<int> scale, zero_point;
};

float e4m3_of(int code) {
  const int exponent = code >> 3, mantissa = code & 7;
  return exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
}

// How many middles, times the unit in float32, are below x, or the same if the code above is even.
template <class Middle>
int code_of(float x, float unit, int codes, const Middle& middle) {
  int code = 0;
  while (code + 1 < codes) {
    const float product = static_cast<float>(middle(code)) * unit;
    if (code % 2 ? x < product : x <= product) break;
    ++code;
  }
  return code;
}

int bfloat16_bits(float x) { return std::bit_cast<uint16_t>(__float2bfloat16_rn(x)); }

// One block, behind those in q.
void quantize_block(const float* x, int size, FourBitFormat format, float tensor_scale,
                    bool has_zero_point, std::vector<int>& codes, FourBits& q) {
  bool finite = true;
  float amax = 0, low = 0, high = 0;
  for (int i = 0; i < size; ++i) finite &= std::isfinite(x[i]);
  for (int i = 0; i < size && finite; ++i) {
    amax = std::max(amax, std::fabs(x[i]));
    low = std::min(low, x[i]);
    high = std::max(high, x[i]);
  }
  if (format == FourBitFormat::kInt4) {
    float scale = has_zero_point ? (high - low) * (1.0f / 15) : amax * (1.0f / 7);
    scale = test::round_to<tile::bf16>(scale);
    if (scale < 0x1p-126f) scale = 1;
    auto nearest = [&](float y) { return static_cast<int>(std::nearbyint(double(y) / scale)); };
    const int zero = has_zero_point ? std::clamp(nearest(-low) - 8, -8, 7) : 0;
    for (int i = 0; i < size; ++i) {
      codes.push_back(std::clamp(nearest(finite ? x[i] : 0) + zero, -8, 7) & 15);
    }
    q.scale.push_back(finite ? bfloat16_bits(scale) : 0x7fc0);
    if (has_zero_point) q.zero_point.push_back(zero & 15);
    return;
  }
  int code;
  float scale;
  if (format == FourBitFormat::kNvfp4) {
    auto middle = [](int c) { return (double(e4m3_of(c)) + e4m3_of(c + 1)) / 2; };
    code = code_of(amax, 6 * tensor_scale, 127, middle);
    scale = e4m3_of(code) * tensor_scale;
  } else {
    code = std::max((amax == 0 ? -127 : std::ilogb(amax)) + 127 - 2, 1);
    scale = std::ldexp(1.0f, code - 127);
  }
  for (int i = 0; i < size; ++i) {
    int value = 0;
    if (finite && scale > 0) {
      value = code_of(std::fabs(x[i]), scale, 8, [](int c) { return kMiddles[c]; });
    }
    codes.push_back(value + 8 * std::signbit(x[i]));
  }
  q.scale.push_back(finite ? code : format == FourBitFormat::kNvfp4 ? 0x7f : 0xff);
}

// --- Cases ---------------------------------------------------------------------------------------

struct Case {
  FourBitFormat format;
  int block;
  bool has_zero_point;
  const char* name;
};
constexpr Case kCases[] = {
    {FourBitFormat::kNvfp4, 16, false, "nvfp4"},    {FourBitFormat::kMxfp4, 32, false, "mxfp4"},
    {FourBitFormat::kInt4, 32, false, "int4 32"},   {FourBitFormat::kInt4, 64, false, "int4 64"},
    {FourBitFormat::kInt4, 128, false, "int4 128"}, {FourBitFormat::kInt4, 32, true, "int4 z 32"},
    {FourBitFormat::kInt4, 64, true, "int4 z 64"},  {FourBitFormat::kInt4, 128, true, "int4 z 128"},
};

template <class T>
float rounded(float x) {
  if (std::is_same_v<T, tile::f16> && std::fabs(x) > 65504) return std::copysign(65504.0f, x);
  return test::round_to<T>(x);
}

// A block that begins with its largest magnitude and has, of the scale that follows, middles of
// values, numbers of T beside them, zeros and anything. Some are not finite.
template <class T>
void make_block(const Case& c, float tensor_scale, std::mt19937& random, std::vector<float>& x) {
  auto below = [&](int n) { return static_cast<int>(random() % n); };
  auto unit = [&] { return static_cast<float>(below(1 << 24)) / (1 << 23) - 1.0f; };
  constexpr bool kIsF16 = std::is_same_v<T, tile::f16>;
  const bool is_int4 = c.format == FourBitFormat::kInt4;
  float scale = std::ldexp(1.0f + below(3) * std::fabs(unit()), below(24) - 12);
  if (below(8) == 0) scale = std::ldexp(1.0f, below(kIsF16 ? 30 : 240) - (kIsF16 ? 17 : 126));
  if (c.format == FourBitFormat::kMxfp4) scale = std::ldexp(1.0f, std::ilogb(scale));
  if (c.format == FourBitFormat::kNvfp4) scale = e4m3_of(below(127)) * tensor_scale;
  if (is_int4) scale = test::round_to<tile::bf16>(scale);
  const int kind = below(16);
  const size_t first = x.size();
  x.push_back((below(2) ? 1.0f : -1.0f) * (is_int4 ? 7 : 4 + 4 * std::fabs(unit())) * scale);
  if (below(3) == 0) x.back() = std::copysign((is_int4 ? 7 : 6) * scale, x.back());
  if (c.has_zero_point) x.push_back(-std::copysign(8 * scale, x.back()));
  while (x.size() < first + c.block) {
    float value = unit() * 6 * scale;
    const double middle = is_int4 ? below(15) - 7 + 0.5 : kMiddles[below(7)];
    const float product = static_cast<float>(middle * scale);
    if (below(2)) value = std::copysign(std::fabs(product), is_int4 ? product : unit());
    if (below(3) == 0) value = std::nextafter(value, unit() > 0 ? INFINITY : -INFINITY);
    if (below(16) == 0) value = std::copysign(0.0f, unit());
    if (below(64) == 0) value = std::ldexp(unit(), kIsF16 ? -20 : -130);
    x.push_back(value);
  }
  for (size_t i = first; i < x.size(); ++i) {
    x[i] = rounded<T>(kind == 0 ? std::copysign(0.0f, x[i]) : x[i]);
    if (below(4) == 0 && std::fabs(x[i]) > 0 && std::isfinite(x[i]) && i > first + 1) {
      const float next = neighbour<T>(std::fabs(x[i]), below(3) - 1);
      if (std::isfinite(next)) x[i] = std::copysign(next, x[i]);
    }
  }
  if (kind == 1) {
    const float bad[] = {NAN, INFINITY, -INFINITY};
    x[first + below(c.block)] = bad[below(3)];
  }
}

template <class T>
void test_case(const char* dtype, const Case& c, int matrices, int blocks) {
  const auto name = std::string(dtype) + " to " + c.name + ", " + std::to_string(matrices) + " x " +
                    std::to_string(blocks) + " blocks";
  std::mt19937 random(blocks * 8 + c.block);
  const float units[] = {1.0f, 0x1.000002p-9f, 0x1.fffffep-7f, 0x1.000008p-3f, 0.0123f, 0x1.8p-4f,
                         3.7f};
  const bool has_tensor_scale = c.format == FourBitFormat::kNvfp4;
  Matrix x = {matrices * blocks, c.block, {}};
  std::vector<float> tensor_scales;
  std::vector<int> codes;
  FourBits wanted;
  for (int m = 0; m < matrices; ++m) {
    float tensor_scale = units[(m + blocks) % 7];
    if (!std::is_same_v<T, tile::f16> && m == 2) tensor_scale = 0x1p-126f;
    if (!std::is_same_v<T, tile::f16> && m == 3) tensor_scale = 0x1.3p+115f;
    tensor_scales.push_back(tensor_scale);
    for (int b = 0; b < blocks; ++b) {
      make_block<T>(c, tensor_scale, random, x.data);
      quantize_block(x.data.data() + x.data.size() - c.block, c.block, c.format, tensor_scale,
                     c.has_zero_point, codes, wanted);
    }
  }
  for (size_t i = 0; i < codes.size(); i += 2)
    wanted.values.push_back(codes[i] | codes[i + 1] << 4);

  const int count = matrices * blocks;
  const int scale_bytes = c.format == FourBitFormat::kInt4 ? 2 : 1;
  const test::Array<T> in = placed<T>(x, 0);
  const test::Array<float> scales(tensor_scales);
  const Buffer values(x.data.size() / 2, 0), scale(size_t(count) * scale_bytes, 0);
  const Buffer zero_point(c.has_zero_point ? tile::ceil_div(count, 2) : 0, 0);
  QuantizeFourBitParams p = {};
  p.x = in.data();
  p.tensor_scale = has_tensor_scale ? scales.data() : nullptr;
  p.values = values.data();
  p.scale = scale.data();
  p.zero_point = c.has_zero_point ? zero_point.data() : nullptr;
  p.matrices = matrices;
  p.size = int64_t{blocks} * c.block;
  p.block = c.block;
  p.dtype = kDType<T>;
  p.format = c.format;
  test::check(quantize::launch_four_bit<T>(p, nullptr), name);
  test::synchronize(name);

  std::vector<int> got, want, scale_codes, zeros;
  for (const uint8_t byte : values.host(name + " values")) {
    got.insert(got.end(), {byte & 15, byte >> 4});
  }
  for (const uint8_t byte : wanted.values) want.insert(want.end(), {byte & 15, byte >> 4});
  test::compare(name + " values", got, want, c.block);
  const std::vector<uint8_t> bytes = scale.host(name + " scale");
  for (int i = 0; i < count; ++i) {
    scale_codes.push_back(scale_bytes == 1 ? bytes[i] : bytes[2 * i] | bytes[2 * i + 1] << 8);
  }
  test::compare(name + " scale", scale_codes, wanted.scale, blocks);
  for (const uint8_t byte : zero_point.host(name + " zero points")) {
    zeros.insert(zeros.end(), {byte & 15, byte >> 4});
  }
  if (c.has_zero_point) zeros.resize(count);
  test::compare(name + " zero points", zeros, wanted.zero_point, blocks);
}

// Of finite blocks of 16.
template <class T>
void test_row_amax(const char* dtype, int rows, int cols) {
  const auto name =
      "row_amax " + std::string(dtype) + " " + std::to_string(rows) + "x" + std::to_string(cols);
  const Matrix x = make_input<T>(rows, cols, Input::kNotFinite);
  std::vector<float> wanted;
  for (int r = 0; r < rows; ++r) {
    float most = 0;
    for (int b = 0; b < cols; b += 16) {
      float amax = 0;
      for (int i = 0; i < 16; ++i) {
        const float size = std::fabs(x.data[size_t(r) * cols + b + i]);
        amax = std::isfinite(size) ? std::max(amax, size) : INFINITY;
        if (!std::isfinite(size)) break;
      }
      if (std::isfinite(amax)) most = std::max(most, amax);
    }
    wanted.push_back(most);
  }
  const test::Array<T> in = placed<T>(x, 0);
  const Buffer amax(rows * sizeof(float), 0);
  const RowAmaxParams p = {in.data(), amax.data<float>(), rows, cols, kDType<T>};
  test::check(quantize::launch_row_amax<T>(p, nullptr), name);
  test::synchronize(name);
  test::compare(name, amax.host<float>(name), wanted, 1);
}

template <class T>
void test_dtype(const char* dtype) {
  for (const Case& c : kCases) {
    for (const int blocks : {1, 3, 64, 515, 5000}) test_case<T>(dtype, c, 1, blocks);
    if (c.format == FourBitFormat::kNvfp4) test_case<T>(dtype, c, 7, 1337);
  }
  test_row_amax<T>(dtype, 1, 16);
  test_row_amax<T>(dtype, 37, 16);
  test_row_amax<T>(dtype, 130, 208);
  test_row_amax<T>(dtype, 5, 4096);
  test_row_amax<T>(dtype, 3, 40016);  // wider than the registers of a block
  test_row_amax<T>(dtype, 300, 1040);
}

}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_dtype<tile::bf16>("bf16");
  test_dtype<tile::f16>("f16");
  test_dtype<float>("f32");
  return test::finish();
}
