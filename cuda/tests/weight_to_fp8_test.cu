// Weights of four bits as e4m3 against a scalar loop over what their bits mean.
#include "cuda/matmul/weight_to_fp8.h"

#include "cuda/tests/four_bit_weight.h"

namespace jaxkern {
namespace {

using test::guarded, test::kGuard;
using tile::e4m3, tile::f16;

enum class Scales { kClose, kWide, kZero };  // of a row: alike, all that there are, or none

// A weight with random bits, and what it is as e4m3, by the description in packed_weight.py.
struct Weight : test::FourBitTiles {
  int64_t strips, panels;
  std::vector<uint8_t> data;
  std::vector<float> row_scale, values, factors;

  Weight(FourBitFormat format, int blocks, bool zero_points, int64_t strips, int64_t panels,
         Scales scales)
      : FourBitTiles{format, blocks, zero_points}, strips(strips), panels(panels) {
    data.resize(strips * panels * bytes());
    std::mt19937 random(static_cast<unsigned>(strips * 31 + panels));
    for (auto& byte : data) byte = static_cast<uint8_t>(random());
    for (int64_t tile = 0; tile < strips * panels; ++tile) {
      fill_scales(data.data() + tile * bytes() + kFourBitValueBytes, scales, random);
    }
    for (int64_t row = 0; row < strips * kFourBitRows; ++row) {
      row_scale.push_back(row % 13 == 5 ? NAN : std::ldexp(1.0f, static_cast<int>(random() % 3)));
      const int exponent = factor(row);
      factors.push_back(row_scale.back() * std::ldexp(1.0f, exponent));
      for (int64_t col = 0; col < panels * kFourBitColumns; ++col) {
        values.push_back(
            rounded(tile_of(row, col), row % kFourBitRows, col % kFourBitColumns, exponent));
      }
    }
  }

 private:
  void fill_scales(uint8_t* scales, Scales which, std::mt19937& random) const {
    const bool wide = which == Scales::kWide;
    for (int i = 0; i < this->scales(); ++i) {
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
        test::put_bf16(scales, i, which == Scales::kZero ? 0.0f : std::ldexp(one, exponent));
        if (zero_points) {
          const float zero = 128.0f + static_cast<float>(random() % 16);
          test::put_bf16(scales, this->scales() + i, zero);
        }
      }
    }
  }
  const uint8_t* tile_of(int64_t row, int64_t col) const {
    return data.data() + (row / kFourBitRows * panels + col / kFourBitColumns) * bytes();
  }

  // The exponent of the factor of a row: that of its largest scale, of MXFP4 always 1, and less.
  int factor(int64_t row) const {
    if (format == FourBitFormat::kMxfp4) return -6;
    float largest = format == FourBitFormat::kInt4 ? 0x1p-111f : 0x1p-10f;
    for (int64_t col = 0; col < panels * kFourBitColumns; col += kFourBitColumns / blocks) {
      largest = std::max(largest, scale(tile_of(row, col), row % kFourBitRows, block_of(col)));
    }
    return std::ilogb(largest) - (format == FourBitFormat::kInt4 ? 3 : 5);
  }

  float rounded(const uint8_t* tile, int row, int col, int exponent) const {
    const float own = scale(tile, row, block_of(col));
    const float share = std::ldexp(value(tile, row, col) * own, -exponent);
    // Products of integers are rounded to float16 before they are to e4m3.
    return test::round_to<e4m3>(format == FourBitFormat::kInt4 ? test::round_to<f16>(share)
                                                               : share);
  }
};

template <FourBitFormat kFormat>
void test_weight(std::string what, const Weight& w) {
  what += ", strips " + std::to_string(w.strips) + ", panels " + std::to_string(w.panels);
  std::vector<float> values = w.values, scale = w.factors;
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
