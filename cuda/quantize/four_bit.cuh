// Blocks of elements as values of four bits with a scale: NVFP4, MXFP4 and integers of groups, bit
// by bit as jaxkern/reference/four_bit.py has them. A format of elements T has
//
//   kBlock               elements of a block, or 0 where calls say
//   Stored               the type of a scale in memory
//   kHasZeroPoint        whether there are zero points
//   Shared               what a block of threads has in shared memory
//   Extent               of elements: what the scale of a block follows from
//   Block                the scale and zero point of a block, in the form in which values need it
//   block(extent)
//   values(run, block)   four bits for each element, the first in the lowest
//
// Values are to the nearest, ties to even. Products with a scale's reciprocal, which is rounded,
// would round some wrongly; each format says why its own do not.
#pragma once

#include "cuda/quantize/elements.cuh"
#include "cuda/tile/ptx/special.cuh"

namespace jaxkern::quantize {

inline constexpr uint32_t kInfinityBits = 0x7f800000;
inline constexpr float kSmallestNormal = 0x1p-126f;

// --- Extents
// --------------------------------------------------------------------------------------

// The largest magnitude.
template <class T>
struct Amax {
  uint32_t word = 0;  // the larger ones of kPerWord streams of elements

  __device__ __forceinline__ void see(const Load<T>& run) {
#pragma unroll
    for (const uint32_t more : run.words.data) word = larger<T>(word, magnitudes<T>(more));
  }
  __device__ __forceinline__ void join_lane(int offset) {
    word = larger<T>(word, __shfl_xor_sync(0xffffffffu, word, offset));
  }
  // The float32's bits; infinite or above that if an element is not finite.
  __device__ __forceinline__ uint32_t bits() const { return largest<T>(word); }
};

// The largest and the smallest element, or zero. As integers, positive numbers are in their order,
// and negative ones, which are above them if unsigned, in the opposite one.
template <class T>
struct Range {
  uint32_t above = 0, below = 0;

  __device__ __forceinline__ void see(const Load<T>& run) {
#pragma unroll
    for (const uint32_t more : run.words.data) join(more, more);
  }
  __device__ __forceinline__ void join_lane(int offset) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, above, offset);
    join(other, __shfl_xor_sync(0xffffffffu, below, offset));
  }
  __device__ __forceinline__ float high() const {
    return element<T>(sizeof(T) == 4 ? above : __vmaxs2(above, above >> 16), 0);
  }
  __device__ __forceinline__ float low() const { return fminf(lowest(), 0.0f); }
  __device__ __forceinline__ bool finite() const {
    return high() < INFINITY && fabsf(lowest()) < INFINITY;
  }

 private:
  __device__ __forceinline__ void join(uint32_t a, uint32_t b) {
    if constexpr (sizeof(T) == 4) {
      above = max(static_cast<int32_t>(above), static_cast<int32_t>(a));
      below = max(below, b);
    } else {
      above = __vmaxs2(above, a);
      below = __vmaxu2(below, b);
    }
  }
  // The largest if nothing is negative.
  __device__ __forceinline__ float lowest() const {
    return element<T>(sizeof(T) == 4 ? below : __vmaxu2(below, below >> 16), 0);
  }
};

// --- Values of e2m1
// -------------------------------------------------------------------------------

// Adding this to a number below 2^22 rounds it to an integer, which is in the lowest bits then.
inline constexpr float kToInteger = 0x1p23f, kToSignedInteger = 0x1.8p23f;
inline constexpr uint32_t kToIntegerBits = 0x4b000000, kToSignedIntegerBits = 0x4b400000;

// Four bits of each element of a run: multiplied by a number, that in all of them.
template <class T>
inline constexpr uint32_t kEach = sizeof(T) == 2 ? 0x11111111 : 0x1111;

// The elements of a run times `inverse`. Codes of e2m1 are linear between 0, 2, 4 and 6, and so is
// what lies in the middle of two numbers: the code is the least of three linear functions, rounded
// to an integer, with ties to the even code.
template <class T>
__device__ __forceinline__ uint32_t e2m1_codes(const Load<T>& x, float inverse) {
  uint32_t word = 0;
#pragma unroll
  for (int e = kVec<T> - 1; e >= 0; --e) {
    const float value = element<T>(x, e), magnitude = fabsf(value);
    const uint32_t code =
        __vimin3_u32(__float_as_uint(fmaf(magnitude, 2 * inverse, kToInteger)),
                     __float_as_uint(fmaf(magnitude, inverse, kToInteger + 2)),
                     __float_as_uint(fmaf(magnitude, inverse / 2, kToInteger + 4)));
    word = __funnelshift_l(__float_as_uint(value), word, 1);  // the sign
    word = (word << 3) + min(code, kToIntegerBits + 7);
  }
  return word - kToIntegerBits * kEach<T>;
}

// The same of the elements over `scale`, by rounded products of it with what lies in the middle.
template <class T>
__device__ __forceinline__ uint32_t e2m1_codes_by_products(const Load<T>& x, float scale) {
  const float middles[] = {0.25f * scale, 0.75f * scale, 1.25f * scale, 1.75f * scale,
                           2.5f * scale,  3.5f * scale,  5.0f * scale};
  uint32_t word = 0;
#pragma unroll
  for (int e = kVec<T> - 1; e >= 0; --e) {
    const float value = element<T>(x, e), magnitude = fabsf(value);
    uint32_t code = 0;
#pragma unroll
    for (int i = 0; i < 7; ++i) code += i % 2 ? magnitude >= middles[i] : magnitude > middles[i];
    word = __funnelshift_l(__float_as_uint(value), word, 1);
    word = (word << 3) + code;
  }
  return word;
}

// Zeros, with the signs of the elements.
template <class T>
__device__ __forceinline__ void keep_signs(Load<T>& x) {
#pragma unroll
  for (uint32_t& word : x.words.data) word ^= magnitudes<T>(word);
}

// --- NVFP4
// ----------------------------------------------------------------------------------------

__device__ __forceinline__ float e4m3_value(uint32_t code) {
  return __uint_as_float(code << 20) * 0x1p120f;
}

// A matrix has 127 scales at most. A table has, for the code of each, the smallest amax that takes
// it, and its reciprocal.
template <class T>
struct Nvfp4 {
  using Stored = uint8_t;
  using Extent = Amax<T>;
  static constexpr int kBlock = 16;
  static constexpr bool kHasZeroPoint = false;
  static constexpr uint32_t kCodes = 127, kNan = 0x7f;

  struct Shared {
    float least[kCodes + 1];
    float inverse[kCodes];
  };
  struct Block {
    bool finite;
    uint32_t code;
    float inverse;

    __device__ __forceinline__ Stored stored() const { return finite ? code : kNan; }
  };

  __device__ __forceinline__ Nvfp4(float tensor_scale, Shared& shared)
      : shared_(shared), tensor_scale_(tensor_scale) {
    const float unit = 6.0f * tensor_scale;
    // Products with amax are too small, but by less than a code.
    inverse_unit_ = (1.0f - 0x1p-20f) / unit;
    for (uint32_t code = threadIdx.x; code <= kCodes; code += blockDim.x) {
      if (code == kCodes) {
        shared_.least[code] = INFINITY;
        break;
      }
      const float below = code == 0 ? 0.0f : e4m3_value(code - 1);
      const float middle = (below + e4m3_value(code)) / 2 * unit;
      // A tie goes to the even code.
      shared_.least[code] = code % 2 ? __uint_as_float(__float_as_uint(middle) + 1) : middle;
      shared_.inverse[code] = inverse_of(code);
    }
    __syncthreads();
  }

  __device__ __forceinline__ Block block(const Extent& extent) const {
    const uint32_t amax = extent.bits();
    const bool finite = amax < kInfinityBits;
    const float most = __uint_as_float(finite ? amax : 0);
    uint32_t code = tile::e4m3(most * inverse_unit_).__x;
    code += most >= shared_.least[code + 1];
    return {finite, code, shared_.inverse[code]};
  }
  __device__ __forceinline__ uint32_t values(Load<T> x, const Block& block) const {
    if (!block.finite) keep_signs<T>(x);
    if constexpr (sizeof(T) == 4) return by_products(x, block.code);
    return e2m1_codes<T>(x, block.inverse);
  }

  // The code of the block's scale if values() may be wrong, else 0.
  __device__ __forceinline__ static uint32_t inexact(const Block& block) {
    return sizeof(T) == 2 && block.inverse < 0 ? block.code : 0;
  }
  __device__ __forceinline__ uint32_t by_products(const Load<T>& x, uint32_t code) const {
    return e2m1_codes_by_products<T>(x, code == 0 ? INFINITY : scale_of(code));
  }

 private:
  __device__ __forceinline__ float scale_of(uint32_t code) const {
    return e4m3_value(code) * tensor_scale_;
  }
  // The reciprocal of a scale; negative where an element of T may be so close to what lies between
  // two values that rounding the reciprocal would matter: where one of those, of which 1, 3, 5 and
  // 7 times the scale have all the mantissas, is almost a number of T, or one.
  __device__ __forceinline__ float inverse_of(uint32_t code) const {
    if (code == 0) return 0.0f;
    constexpr uint32_t kMore = std::is_same_v<T, tile::f16> ? 1 << 13 : 1 << 16;  // than T's bits
    constexpr uint32_t kMargin = 8;
    const float scale = scale_of(code);
    bool close = scale < 0x1p-100f || scale > 0x1p100f;
#pragma unroll
    for (int odd = 1; odd < 8; odd += 2) {
      close |= (__float_as_uint(odd * scale) + kMargin) % kMore <= 2 * kMargin;
    }
    return close ? -1.0f : 1.0f / scale;
  }

  Shared& shared_;
  const float tensor_scale_;
  float inverse_unit_;
};

// --- MXFP4
// ----------------------------------------------------------------------------------------

// Scales are powers of two: products with their reciprocals are exact.
template <class T>
struct Mxfp4 {
  using Stored = uint8_t;
  using Extent = Amax<T>;
  static constexpr int kBlock = 32;
  static constexpr bool kHasZeroPoint = false;
  static constexpr uint32_t kNan = 0xff;

  struct Shared {};
  struct Block {
    bool finite;
    uint32_t code;

    __device__ __forceinline__ Stored stored() const { return finite ? code : kNan; }
  };

  __device__ __forceinline__ Mxfp4(float, Shared&) {}

  __device__ __forceinline__ Block block(const Extent& extent) const {
    const uint32_t amax = extent.bits();
    return {amax < kInfinityBits, max(amax >> 23, 3u) - 2};
  }
  __device__ __forceinline__ uint32_t values(Load<T> x, const Block& block) const {
    if (!block.finite) keep_signs<T>(x);
    return e2m1_codes<T>(x, __uint_as_float((254 - block.code) << 23));
  }
};

// --- Integers
// -------------------------------------------------------------------------------------

// Such numbers have 8 bits, and so does what divides by them: see nearest_integer.
__device__ __forceinline__ float bfloat16_scale(float span) {
  const float scale = __bfloat162float(__float2bfloat16_rn(span));
  return scale < kSmallestNormal ? 1.0f : scale;
}

// x / scale to the nearest, plus kToSignedInteger. inverse: of the scale, to 2^-22 or so.
template <class T>
__device__ __forceinline__ float nearest_integer(float x, float scale, float inverse) {
  if constexpr (sizeof(T) == 2) {
    // The quotient of 11 bits and 8 is half of an odd number, or 2^-14 or more away from one. To
    // multiples of 2^-16 it is rounded to what it should be.
    constexpr float kToMultiple = 192.0f;
    return fmaf(x, inverse, kToMultiple) - kToMultiple + kToSignedInteger;
  }
  float to = fmaf(x, inverse, kToSignedInteger);
  const float rest = fmaf(kToSignedInteger - to, scale, x);  // exact
  const bool odd = __float_as_uint(to) & 1;
  const float size = fabsf(rest), half = scale / 2;
  if (size > half || (size >= half && odd)) to += copysignf(1.0f, rest);
  return to;
}

template <class T, bool kZeroPoint>
struct Int4 {
  using Stored = uint16_t;
  using Extent = std::conditional_t<kZeroPoint, Range<T>, Amax<T>>;
  static constexpr int kBlock = 0;
  static constexpr bool kHasZeroPoint = kZeroPoint;
  static constexpr Stored kNan = 0x7fc0;
  static constexpr int kLeast = -8, kMost = 7;

  struct Shared {};
  struct Block {
    bool finite;
    float scale, inverse;
    float zero;  // what stands for zero

    __device__ __forceinline__ Stored stored() const {
      return finite ? __float_as_uint(scale) >> 16 : kNan;
    }
  };

  __device__ __forceinline__ Int4(float, Shared&) {}

  __device__ __forceinline__ Block block(const Extent& extent) const {
    Block block = {};
    if constexpr (kZeroPoint) {
      block.finite = extent.finite();
      const float low = block.finite ? extent.low() : 0, high = block.finite ? extent.high() : 0;
      set_scale(block, (high - low) * (1.0f / 15));
      const float zero = nearest_integer<T>(-low, block.scale, block.inverse) - kToSignedInteger;
      block.zero = fminf(zero + kLeast, kMost);
    } else {
      block.finite = extent.bits() < kInfinityBits;
      const float amax = block.finite ? __uint_as_float(extent.bits()) : 0;
      set_scale(block, amax * (1.0f / 7));
    }
    return block;
  }
  __device__ __forceinline__ uint32_t values(Load<T> x, const Block& block) const {
    if (!block.finite) x.words = {};
    uint32_t word = 0;
#pragma unroll
    for (int e = kVec<T> - 1; e >= 0; --e) {
      float to = nearest_integer<T>(element<T>(x, e), block.scale, block.inverse);
      if constexpr (kZeroPoint) {
        to = fmaxf(to, kToSignedInteger + kLeast - block.zero);
        to = fminf(to, kToSignedInteger + kMost - block.zero);
      }
      word = (word << 4) + __float_as_uint(to);
    }
    // As numbers from 0 to 15, which do not borrow from each other, and then with a sign.
    word += (static_cast<uint32_t>(static_cast<int>(block.zero) - kLeast) - kToSignedIntegerBits) *
            kEach<T>;
    return word ^ 8 * kEach<T>;
  }

 private:
  __device__ __forceinline__ static void set_scale(Block& block, float span) {
    block.scale = bfloat16_scale(span);
    block.inverse = tile::ptx::reciprocal_approx(block.scale);
  }
};

}  // namespace jaxkern::quantize
