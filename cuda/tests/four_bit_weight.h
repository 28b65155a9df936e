// What the bits of a packed weight of four bits mean, by the description in packed_weight.py.
#pragma once

#include "cuda/matmul/four_bit.h"
#include "cuda/tests/test.h"

namespace jaxkern::test {

// With NaN behind it: what a kernel reads too far shows.
constexpr size_t kGuard = 1024;  // elements
template <class T>
std::vector<T> guarded(const std::vector<T>& x) {
  std::vector<T> copy = x;
  std::vector<unsigned char> bytes(kGuard * sizeof(T), 0xff);
  const T* end = reinterpret_cast<const T*>(bytes.data());
  copy.insert(copy.end(), end, end + kGuard);
  return copy;
}

// Numbers of bfloat16 among bytes.
inline void put_bf16(uint8_t* to, int i, float x) {
  const tile::bf16 rounded = __float2bfloat16_rn(x);
  std::memcpy(to + 2 * i, &rounded, 2);
}
inline float get_bf16(const uint8_t* from, int i) {
  tile::bf16 x;
  std::memcpy(&x, from + 2 * i, 2);
  return to_float(x);
}

// The tiles of a weight.
struct FourBitTiles {
  FourBitFormat format;
  int blocks;
  bool zero_points;

  int bytes() const { return four_bit_tile_bytes(format, blocks, zero_points); }
  int scales() const { return kFourBitRows * blocks; }  // of a tile
  int block_of(int64_t col) const {
    return static_cast<int>(col % kFourBitColumns * blocks / kFourBitColumns);
  }

  // The scale of a block of a row, relative to that of the row.
  float scale(const uint8_t* tile, int row, int block) const {
    const uint8_t* scales = tile + kFourBitValueBytes;
    const int at = place(row, block);
    if (format == FourBitFormat::kInt4) return get_bf16(scales, at);
    const int code = scales[at];
    if (code == 255) return NAN;
    if (format == FourBitFormat::kMxfp4) return std::ldexp(1.0f, -code);
    return std::ldexp((8.0f + static_cast<float>(code % 8)) / 8, code / 8 - 10);
  }

  // A value without its scale.
  float value(const uint8_t* tile, int row, int col) const {
    const int step = col / 16, odd = col % 2, lane = row % 8 * 4 + col % 8 / 2;
    const int i = col % 16 / 8 * 2 + row / 8;
    uint16_t half;
    std::memcpy(&half, tile + ((step / 4 * 32 + lane) * 4 + step % 4) * 4 + 2 * odd, 2);
    if (format == FourBitFormat::kInt4) {
      const int at = scales() + place(row, block_of(col));
      const float zero = zero_points ? get_bf16(tile + kFourBitValueBytes, at) : 136.0f;
      return static_cast<float>(half >> 4 * i & 15) + 128.0f - zero;
    }
    constexpr float kMagnitudes[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    constexpr int kBits[4][4] = {{15, 8, 7, 6}, {12, 5, 4, 3}, {9, 2, 1, 0}, {13, 11, 10, 14}};
    int bits = 0;
    for (const int bit : kBits[i]) bits = 2 * bits + (half >> bit & 1);
    return bits & 8 ? -kMagnitudes[bits & 7] : kMagnitudes[bits];
  }

 private:
  int place(int row, int block) const { return (row % 8 * blocks + block) * 2 + row / 8; }
};

}  // namespace jaxkern::test
