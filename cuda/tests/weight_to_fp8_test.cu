// Weights of four bits as e4m3 against a scalar loop over what their bits mean.
#include "cuda/matmul/weight_to_fp8.h"

#include "cuda/tests/test.h"

namespace jaxkern {
namespace {

using tile::bf16, tile::e4m3, tile::f16;

constexpr size_t kGuard = 1024;  // bytes or elements, NaN, behind each operand and the results

template <class T>
std::vector<T> guarded(const std::vector<T>& x) {
  std::vector<T> copy = x;
  std::vector<unsigned char> bytes(kGuard * sizeof(T), 0xff);
  const T* end = reinterpret_cast<const T*>(bytes.data());
  copy.insert(copy.end(), end, end + kGuard);
  return copy;
}

enum class Scales { kClose, kWide, kZero };  // of a row: alike, all that there are, or none

// A weight with random bits, and what it is as e4m3, by the description in packed_weight.py.
struct Weight {
  FourBitFormat format;
  int blocks;
  bool zero_points;
  int64_t strips, panels;
  int bytes;
  std::vector<uint8_t> data;
  std::vector<float> row_scale, values, scale;

  Weight(FourBitFormat format, int blocks, bool zero_points, int64_t strips, int64_t panels,
         Scales scales)
      : format(format),
        blocks(blocks),
        zero_points(zero_points),
        strips(strips),
        panels(panels),
        bytes(four_bit_tile_bytes(format, blocks, zero_points)),
        data(strips * panels * bytes) {
    std::mt19937 random(static_cast<unsigned>(strips * 31 + panels));
    for (auto& byte : data) byte = static_cast<uint8_t>(random());
    for (int64_t tile = 0; tile < strips * panels; ++tile) {
      fill_scales(data.data() + tile * bytes + kFourBitValueBytes, scales, random);
    }
    for (int64_t row = 0; row < strips * kFourBitRows; ++row) {
      row_scale.push_back(row % 13 == 5 ? NAN : std::ldexp(1.0f, static_cast<int>(random() % 3)));
      const int exponent = factor(row);
      scale.push_back(row_scale.back() * std::ldexp(1.0f, exponent));
      for (int64_t col = 0; col < panels * kFourBitColumns; ++col) {
        values.push_back(
            value(tile_of(row, col), row % kFourBitRows, col % kFourBitColumns, exponent));
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
        const bool zero = which == Scales::kZero || (wide && random() % 16 == 0);
        scales[i] = static_cast<uint8_t>(zero ? 0 : code);
      } else if (format == FourBitFormat::kMxfp4) {
        scales[i] = static_cast<uint8_t>(wide ? random() % 40 : random() % 4);
      } else {
        const float one = 1.0f + static_cast<float>(random() % 128) / 128;
        const int exponent = wide ? static_cast<int>(random() % 30) - 20 : 0;
        put(scales, i, which == Scales::kZero ? 0.0f : std::ldexp(one, exponent));
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
  const uint8_t* tile_of(int64_t row, int64_t col) const {
    return data.data() + (row / kFourBitRows * panels + col / kFourBitColumns) * bytes;
  }

  // The scale of a block, relative to row_scale.
  float block_scale(const uint8_t* tile, int row, int block) const {
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

  // The exponent of the factor of a row: that of its largest scale, of MXFP4 always 1, and less.
  int factor(int64_t row) const {
    if (format == FourBitFormat::kMxfp4) return -6;
    float largest = format == FourBitFormat::kInt4 ? 0x1p-111f : 0x1p-10f;
    for (int64_t col = 0; col < panels * kFourBitColumns; col += kFourBitColumns / blocks) {
      const int block = static_cast<int>(col % kFourBitColumns * blocks / kFourBitColumns);
      largest = std::max(largest, block_scale(tile_of(row, col), row % kFourBitRows, block));
    }
    return std::ilogb(largest) - (format == FourBitFormat::kInt4 ? 3 : 5);
  }

  float value(const uint8_t* tile, int row, int col, int exponent) const {
    const float own = block_scale(tile, row, col * blocks / kFourBitColumns);
    const float share = std::ldexp(element(tile, row, col) * own, -exponent);
    // Products of integers are rounded to float16 before they are to e4m3.
    return test::round_to<e4m3>(format == FourBitFormat::kInt4 ? test::round_to<f16>(share)
                                                               : share);
  }
};

template <FourBitFormat kFormat>
void test_weight(std::string what, const Weight& w) {
  what += ", strips " + std::to_string(w.strips) + ", panels " + std::to_string(w.panels);
  std::vector<float> values = w.values, scale = w.scale;
  values.insert(values.end(), kGuard, NAN);
  scale.insert(scale.end(), kGuard, NAN);
  const test::Array<uint8_t> data(guarded(w.data));
  const test::Array<float> row_scale(guarded(w.row_scale)), out_scale(scale.size());
  const test::Array<e4m3> out(values.size());
  const FourBitWeight weight = {w.format, w.blocks, w.zero_points, data.data(), row_scale.data()};
  const WeightToFp8Params params = {weight, w.strips, static_cast<int32_t>(w.panels), out.data(),
                                    out_scale.data()};
  test::check(launch_weight_to_fp8_of<kFormat>(params, nullptr), what);
  test::synchronize(what);
  test::compare(what + ", values", out.host(), values, w.panels * kFourBitColumns);
  test::compare(what + ", scales", out_scale.host(), scale, 1);
}

template <FourBitFormat kFormat>
void test_format(std::string what, int blocks, bool zero_points = false) {
  what += ", blocks " + std::to_string(blocks) + (zero_points ? ", zero points" : "");
  const auto test = [&](int64_t strips, int64_t panels, Scales scales) {
    test_weight<kFormat>(what, Weight(kFormat, blocks, zero_points, strips, panels, scales));
  };
  for (const Scales scales : {Scales::kClose, Scales::kWide, Scales::kZero}) {
    test(1, 1, scales);    // fewer tiles than warps
    test(3, 8, scales);    // one for each
    test(17, 19, scales);  // several
    test(3, 37, scales);   // two blocks for a strip
    test(2, 75, scales);   // four
  }
  test(700, 3, Scales::kWide);  // more strips than blocks at once
}

}  // namespace
}  // namespace jaxkern

int main() {
  using namespace jaxkern;
  test_format<FourBitFormat::kNvfp4>("nvfp4", 8);
  test_format<FourBitFormat::kMxfp4>("mxfp4", 4);
  for (const int blocks : {1, 2, 4}) {
    test_format<FourBitFormat::kInt4>("int4", blocks);
    test_format<FourBitFormat::kInt4>("int4", blocks, true);
  }
  return test::finish();
}
