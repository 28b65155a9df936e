// Weights of four bits, and what the launchers of products with them take. The order of a weight is
// that of jaxkern/ops/packed_weight.py: tiles of 16 rows and 128 columns.
#pragma once

#include <cstdint>

#include "cuda/dtype.h"

namespace jaxkern {

constexpr int kFourBitRows = 16, kFourBitColumns = 128;  // of a tile

constexpr int kFourBitValueBytes = kFourBitRows * kFourBitColumns / 2;  // before scales

// Bytes of a tile whose rows have so many blocks: values, scales, and zero points of integers.
constexpr int four_bit_tile_bytes(FourBitFormat format, int blocks, bool zero_points) {
  const int block_bytes = format == FourBitFormat::kInt4 ? (zero_points ? 4 : 2) : 1;
  return kFourBitValueBytes + kFourBitRows * blocks * block_bytes;
}

// Blocks of a row of a tile, at most.
template <FourBitFormat kFormat>
constexpr int kMostBlocks = kFormat == FourBitFormat::kNvfp4 ? 8 : 4;

struct FourBitWeight {
  FourBitFormat format;
  int blocks;  // of a row of a tile, with a scale each: 8 of kNvfp4, 4 of kMxfp4, or 1, 2 or 4
  bool zero_points;
  const void* data;        // (B, ceil(N / 16), ceil(K / 128), bytes of a tile)
  const float* row_scale;  // (B, ceil(N / 16) * 16)

  int tile_bytes() const { return four_bit_tile_bytes(format, blocks, zero_points); }
};

// out = x w^T, for each of B matrices. All row-major, contiguous and 16-byte aligned; K is a
// multiple of 8, N of 16, and no size is zero.
//
// Or out = x w, the gradient of that, where K is a multiple of 128. Scales of rows would belong to
// what is summed there: w.row_scale is not read. What all rows have in common, sums are multiplied
// by; what rows of kMxfp4 have besides, powers of two up to 1, their values.
struct QuantizedMatmulParams {
  DType x_dtype;    // kBFloat16 or kFloat16
  DType out_dtype;  // x's or kFloat32
  int64_t B, M, N, K;
  const void* x;  // (B, M, K), of the gradient (B, M, N)
  FourBitWeight w;
  void* out;                         // (B, M, N), of the gradient (B, M, K)
  const float* sum_scale = nullptr;  // (B,), of the gradient
  const void* row_factor = nullptr;  // (B, N) of x_dtype, of the gradient of kMxfp4
};

// The weight as e4m3, and what each row of that is multiplied by, where rows of all matrices are
// one matrix. Sizes are not zero.
struct WeightToFp8Params {
  FourBitWeight w;
  int64_t strips;  // of 16 rows, all
  int32_t panels;  // of 128 columns
  void* values;    // (strips * 16, panels * 128)
  float* scale;    // (strips * 16,)
};

}  // namespace jaxkern
