// Weights as decode_test.cu and decode_four_bit_test.cu have them, and as docs/decode.md packs
// them.
#pragma once

#include "cuda/decode/rows.h"
#include "cuda/tests/test.h"

namespace jaxkern {

using decode::WeightFormat;
using tile::bf16;
using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;

inline int block_of(WeightFormat format) { return format == WeightFormat::kNvfp4 ? 16 : 32; }
inline bool is_four_bit(WeightFormat format) {
  return decode::slice_format(format).scale_bytes > 0;
}

// --- Numbers -------------------------------------------------------------------------------------

inline float most_of(const float* x, size_t count) {
  float most = 0.0f;
  for (size_t k = 0; k < count; ++k) most = std::max(most, std::abs(x[k]));
  return most;
}

// The scale of a block of a row besides that of the row. What it makes of a block gives it again.
inline float block_scale(WeightFormat format, const float* x, float row_scale) {
  const float most = most_of(x, block_of(format)) / row_scale;
  if (format == WeightFormat::kNvfp4) return test::round_to<tile::e4m3>(most / 6.0f);
  if (format == WeightFormat::kMxfp4) return std::ldexp(1.0f, std::ilogb(most) - 2);
  return test::round_to<bf16>(most / 7.0f);
}

// What rows are multiplied by: of NVFP4 all the same.
inline Floats scales_of(WeightFormat format, const Floats& matrix, size_t K) {
  Floats scales;
  for (size_t start = 0; start < matrix.size(); start += K) {
    const float most = most_of(matrix.data() + start, K);
    scales.push_back(format == WeightFormat::kFp8     ? most / 448.0f
                     : format == WeightFormat::kNvfp4 ? 3e-4f
                     : format == WeightFormat::kMxfp4 ? std::ldexp(1.0f, std::ilogb(most) - 2)
                                                      : 1.0f);
  }
  return scales;
}

constexpr float kMagnitudes[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

// The four bits of the number next to x, those of an integer 8 larger.
inline uint32_t code_of(WeightFormat format, float x) {
  if (format == WeightFormat::kInt4) {
    return static_cast<uint32_t>(std::clamp(std::round(x), -8.0f, 7.0f) + 8);
  }
  uint32_t best = 0;
  for (uint32_t code = 1; code < 8; ++code) {
    const float magnitude = std::abs(x);
    if (std::abs(kMagnitudes[code] - magnitude) < std::abs(kMagnitudes[best] - magnitude)) {
      best = code;
    }
  }
  return best | (std::signbit(x) ? 8 : 0);
}
inline float value_of(WeightFormat format, uint32_t code) {
  if (format == WeightFormat::kInt4) return static_cast<float>(code) - 8.0f;
  return (code & 8) ? -kMagnitudes[code & 7] : kMagnitudes[code & 7];
}

// The matrix rounded to what the format can say.
inline Floats rounded_to(WeightFormat format, Floats w, size_t K) {
  if (format == WeightFormat::kBf16) return w;
  const Floats scales = scales_of(format, w, K);
  for (size_t i = 0; i < w.size(); i += is_four_bit(format) ? block_of(format) : 1) {
    const float row_scale = scales[i / K];
    if (format == WeightFormat::kFp8) {
      w[i] = test::round_to<tile::e4m3>(w[i] / row_scale) * row_scale;
      continue;
    }
    const float scale = block_scale(format, &w[i], row_scale) * row_scale;
    for (int k = 0; k < block_of(format); ++k) {
      w[i + k] = value_of(format, code_of(format, w[i + k] / scale)) * scale;
    }
  }
  return w;
}

// --- Bits ----------------------------------------------------------------------------------------

inline void append(Bytes& to, uint32_t bits, int count) {
  for (int i = 0; i < count; ++i) to.push_back(static_cast<uint8_t>(bits >> 8 * i));
}

// Four e4m3 numbers in a word: see docs/decode.md.
inline uint32_t word_of(const uint8_t (&x)[4]) {
  const auto half = [&](uint32_t one, uint32_t two, uint32_t others) {
    return (one >> 7) << 15 | (two >> 3 & 15) << 11 | (one & 127) << 4 | (others >> 7) << 3 |
           (two & 7);
  };
  return half(x[0], x[2], x[3]) | half(x[1], x[3], x[2]) << 16;
}
// Eight codes of four bits in a word: see cuda/tile/four_bit.cuh.
inline uint32_t word_of(WeightFormat format, const uint32_t (&codes)[8]) {
  constexpr int kPlaces[4][4] = {{15, 8, 7, 6}, {12, 5, 4, 3}, {9, 2, 1, 0}, {13, 11, 10, 14}};
  uint32_t word = 0;
  for (int k = 0; k < 8; ++k) {
    for (int bit = 0; bit < 4; ++bit) {  // from the highest
      const int place = format == WeightFormat::kInt4 ? 4 * (k / 2) + 3 - bit : kPlaces[k / 2][bit];
      word |= (codes[k] >> (3 - bit) & 1) << (place + 16 * (k % 2));
    }
  }
  return word;
}

// The values of a row of a slice, from `row`, its first column, on. They are of the row's scale.
inline void pack_values(Bytes& to, WeightFormat format, const float* row, float row_scale) {
  if (format == WeightFormat::kBf16) {
    for (int k = 0; k < decode::kSlice; ++k) {
      append(to, __bfloat16_as_ushort(__float2bfloat16_rn(row[k])), 2);
    }
    return;
  }
  for (int word = 0; word < 16; ++word) {
    const int c = word / 4;
    if (format == WeightFormat::kFp8) {
      const int h = word / 2 % 2, j = word % 2;
      uint8_t x[4];
      for (int i = 0; i < 4; ++i) {
        x[i] = tile::e4m3(row[32 * h + 8 * c + 4 * j + i] / row_scale).__x;
      }
      append(to, word_of(x), 4);
      continue;
    }
    const float* eight = row + 32 * (word % 4) + 8 * c;
    const float* block = row + (32 * (word % 4) + 8 * c) / block_of(format) * block_of(format);
    const float scale = block_scale(format, block, row_scale) * row_scale;
    uint32_t codes[8];
    for (int k = 0; k < 8; ++k) codes[k] = code_of(format, eight[k] / scale);
    append(to, word_of(format, codes), 4);
  }
}
// And its scales, 8 bytes.
inline void pack_scales(Bytes& to, WeightFormat format, const float* row, float row_scale) {
  for (int k = 0; k < decode::slice_format(format).columns; k += block_of(format)) {
    const float scale = block_scale(format, row + k, row_scale);
    if (format == WeightFormat::kNvfp4) {
      const int exponent = std::ilogb(scale);
      const float mantissa = std::ldexp(scale, -exponent);  // from 1 on, below 2
      append(to, (exponent + 10) * 8 + static_cast<int>((mantissa - 1.0f) * 8.0f), 1);
    } else if (format == WeightFormat::kMxfp4) {
      append(to, (202 + std::ilogb(scale)) << 7, 2);
    } else {
      append(to, __bfloat16_as_ushort(__float2bfloat16_rn(scale)), 2);
    }
  }
}

// Rows of units, and their scales. `matrix`: [unit_rows][units][K].
inline void pack(Bytes& to, WeightFormat format, Floats& scales, const Floats& matrix,
                 const decode::Rows& rows, int units) {
  const size_t K = rows.K, columns = rows.columns;
  const Floats own = scales_of(format, matrix, K);
  scales.insert(scales.end(), own.begin(), own.end());
  for (int block = 0, first = 0; block < rows.blocks; ++block) {
    const int count = rows.each + (block < rows.extra);
    for (size_t slice = 0; slice < K / columns; ++slice) {
      const auto each = [&](const auto& pack_row) {
        for (int part = 0; part < rows.unit_rows; ++part) {
          for (int unit = first; unit < first + count; ++unit) {
            const size_t index = size_t(part) * units + unit;
            pack_row(to, format, matrix.data() + index * K + slice * columns, own[index]);
          }
        }
      };
      each(pack_values);
      if (!is_four_bit(format)) continue;
      each(pack_scales);
      to.resize((to.size() + 15) / 16 * 16);
    }
    first += count;
  }
}

}  // namespace jaxkern
