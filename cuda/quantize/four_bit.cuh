// Blocks of elements as values of four bits with a scale: NVFP4, MXFP4 and integers of groups, bit
// by bit as jaxkern/reference/four_bit.py has them. A format of elements T has
//
//   kBlock               elements of a block, or 0 where calls say
//   Stored               the type of a scale in memory
//   kHasZeroPoint        whether there are zero points
//   kStays               whether to make it costs so much that blocks of threads keep it
//   Shared               what a block of threads has in shared memory
//   Extent               of elements: what the scale of a block follows from
//   Block                the scale and zero point of a block, in the form in which values need it
//   block(extent)
//   values(run, block)   four bits for each element, the first in the lowest
//
// Values are to the nearest, ties to even. Products with a scale's reciprocal, which is rounded,
// are not exact; each format says why its values are. (Of NVFP4 they are not where what lies in the
// middle of two is subnormal, which the reference flushes to zero on some platforms.)
#pragma once

#include "cuda/quantize/elements.cuh"
#include "cuda/tile/ptx/special.cuh"

namespace jaxkern::quantize {

inline constexpr int kEight = 8;

// What a thread has of a row at a time: the elements of a word of values.
template <class T>
using Eight = Run<Bits<T>, kEight>;

template <class T>
__device__ __forceinline__ float element_of(const Eight<T>& run, int e) {
  return element<T>(run.words.data[e / kPerWord<T>], e % kPerWord<T>);
}

inline constexpr uint32_t kInfinityBits = 0x7f800000;
inline constexpr float kSmallestNormal = 0x1p-126f;

// --- Extents -------------------------------------------------------------------------------------

// The largest magnitude.
template <class T>
struct Amax {
  uint32_t word = 0;  // the larger ones of kPerWord streams of elements

  template <int kCount>
  __device__ __forceinline__ void see(const Run<Bits<T>, kCount>& run) {
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

  __device__ __forceinline__ void see(const Eight<T>& run) {
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

// --- Values of e2m1 ------------------------------------------------------------------------------

// Adding this to a number below 2^22 rounds it to an integer, which is in the lowest bits then.
inline constexpr float kToInteger = 0x1p23f, kToSignedInteger = 0x1.8p23f;
inline constexpr uint32_t kToIntegerBits = 0x4b000000, kToSignedIntegerBits = 0x4b400000;

// Times a number, that number for each element of a word of values.
inline constexpr uint32_t kEach = 0x11111111;

// The elements of a run times `inverse`. Codes of e2m1 are linear between 0, 2, 4 and 6, and so is
// what lies in the middle of two numbers: the code is the least of three linear functions, rounded
// to an integer, with ties to the even code.
template <class T>
__device__ __forceinline__ uint32_t e2m1_codes(const Eight<T>& x, float inverse) {
  uint32_t word = 0;
#pragma unroll
  for (int e = kEight - 1; e >= 0; --e) {
    const float value = element_of<T>(x, e), magnitude = fabsf(value);
    const uint32_t code =
        __vimin3_u32(__float_as_uint(fmaf(magnitude, 2 * inverse, kToInteger)),
                     __float_as_uint(fmaf(magnitude, inverse, kToInteger + 2)),
                     __float_as_uint(fmaf(magnitude, inverse / 2, kToInteger + 4)));
    word = __funnelshift_l(__float_as_uint(value), word, 1);  // the sign
    word = (word << 3) + min(code, kToIntegerBits + 7);
  }
  return word - kToIntegerBits * kEach;
}

// The same of products that are rounded to a multiple of 2^-19, of less than 13, without signs.
template <class T>
__device__ __forceinline__ uint32_t e2m1_codes_of_rounded(const Eight<T>& x, float inverse) {
  constexpr float kToMultiple = 23.0f;  // its eighth is seven eighths and an integer
  uint32_t word = 0;
#pragma unroll
  for (int e = kEight - 1; e >= 0; --e) {
    const float product = fmaf(element_of<T>(x, e), inverse, kToMultiple);
    word <<= 4;
    word += __vimin3_u32(__float_as_uint(fmaf(product, 2.0f, kToInteger - 2 * kToMultiple)),
                         __float_as_uint(product + (kToInteger + 2 - kToMultiple)),
                         __float_as_uint(fmaf(product, 0.125f, kToInteger + 3)));
  }
  return word - kToIntegerBits * kEach;
}

// The signs of a run of 16-bit elements, where its codes have them.
__device__ __forceinline__ uint32_t signs_of(const uint32_t (&words)[4]) {
  // A byte of each element, with its sign.
  const uint32_t front = __byte_perm(words[0], words[1], 0x7531);
  const uint32_t back = __byte_perm(words[2], words[3], 0x7531);
  const uint32_t even = __byte_perm(front, back, 0x6420);
  const uint32_t odd = __byte_perm(front, back, 0x7531);
  return tile::ptx::select_or(even >> 4, 0x08080808, odd & 0x80808080);
}

// Zeros, with the signs of the elements.
template <class T>
__device__ __forceinline__ void keep_signs(Eight<T>& x) {
#pragma unroll
  for (uint32_t& word : x.words.data) word ^= magnitudes<T>(word);
}

// --- NVFP4 ---------------------------------------------------------------------------------------

// Of a code, without a sign.
__device__ __forceinline__ float e2m1_value(uint32_t code) {
  return __uint_as_float(code << 22) * 0x1p126f;
}
__device__ __forceinline__ float e4m3_value(uint32_t code) {
  return __uint_as_float(code << 20) * 0x1p120f;
}

// What lies in the middle of the values of a code and the next one.
__device__ __forceinline__ float e2m1_middle(uint32_t code) {
  return (e2m1_value(code) + e2m1_value(code + 1)) / 2;
}

// Of a scale and a code but the last: a word of the largest number of T that has the code or one
// below.
template <class T>
__device__ __forceinline__ uint32_t e2m1_threshold(float scale, uint32_t code) {
  const float product = e2m1_middle(code) * scale;
  return word_below<T>(__uint_as_float(__float_as_uint(product) - code % 2));  // ties: to even
}

// What values turn on, of a scale.
template <class T>
struct Nvfp4Scale {
  static_assert(sizeof(T) == 2);
  // NOTE: what is a reciprocal of the scale for numbers of so few bits: thresholds and the numbers
  // above them are on the sides of the middles where they belong, by 2^-16 or more, or in the
  // middle, if the scale has few bits too. Then products are rounded to the middle.
  float inverse;
  uint32_t limit;  // a word of the least number of code 7, which larger ones stand for

  static __device__ __forceinline__ float up(float tensor_scale) {
    return std::is_same_v<T, tile::bf16> && tensor_scale < 0x1p-60f ? 0x1p64f : 1.0f;
  }
  __device__ __forceinline__ void set(float scale, float up) {
    float least = 0.0f, most = INFINITY;
#pragma unroll
    for (int i = 0; i < 7; ++i) {
      const uint32_t below = e2m1_threshold<T>(scale, i);
      limit = below + 0x00010001;
      least = fmaxf(least, e2m1_middle(i) / (element<T>(limit, 0) * up));
      most = fminf(most, e2m1_middle(i) / (element<T>(below, 0) * up));
    }
    inverse = (least + fminf(most, 1.2f * least)) / 2;
  }
  __device__ __forceinline__ void set_zero() { inverse = 0.0f, limit = 0; }

  __device__ __forceinline__ uint32_t values(const Eight<T>& x, float up) const {
    Eight<T> y;
#pragma unroll
    for (int w = 0; w < kEight / 2; ++w) {
      y.words.data[w] = scaled(__vminu2(magnitudes<T>(x.words.data[w]), limit), up);
    }
    return e2m1_codes_of_rounded<T>(y, inverse) | signs_of(x.words.data);
  }

 private:
  // Where the reciprocal of a scale may be too large for a float32, numbers are made larger first.
  static __device__ __forceinline__ uint32_t scaled(uint32_t word, float up) {
    if constexpr (std::is_same_v<T, tile::bf16>) {
      const auto pair = __hmul2(reinterpret_cast<__nv_bfloat162&>(word), __float2bfloat162_rn(up));
      return reinterpret_cast<const uint32_t&>(pair);
    }
    return word;
  }
};

// Of float32 the thresholds themselves.
template <>
struct alignas(16) Nvfp4Scale<float> {
  uint32_t thresholds[8];  // 7 of them

  static __device__ __forceinline__ float up(float) { return 1.0f; }
  __device__ __forceinline__ void set(float scale, float) {
#pragma unroll
    for (int i = 0; i < 7; ++i) thresholds[i] = e2m1_threshold<float>(scale, i);
  }
  __device__ __forceinline__ void set_zero() {
#pragma unroll
    for (int i = 0; i < 7; ++i) thresholds[i] = kInfinityBits;
  }

  __device__ __forceinline__ uint32_t values(const Eight<float>& x, float) const {
    uint32_t word = 0;
#pragma unroll
    for (int e = kEight - 1; e >= 0; --e) {
      const float value = element_of<float>(x, e);
      float code = kToInteger;  // counts in the arithmetic units
#pragma unroll
      for (int i = 0; i < 7; ++i) {
        code += fabsf(value) > __uint_as_float(thresholds[i]) ? 1.0f : 0.0f;
      }
      word = __funnelshift_l(__float_as_uint(value), word, 1);
      word = (word << 3) + __float_as_uint(code);
    }
    return word - kToIntegerBits * kEach;
  }
};

// A matrix has 127 scales at most. What codes turn on is in a table: of a scale's code the least
// amax that takes it, and what values turn on with it.
template <class T>
struct Nvfp4 {
  using Stored = uint8_t;
  using Extent = Amax<T>;
  static constexpr int kBlock = 16;
  static constexpr bool kStays = true;
  static constexpr bool kHasZeroPoint = false;
  static constexpr uint32_t kCodes = 127, kNan = 0x7f;

  struct Shared {
    Nvfp4Scale<T> scales[kCodes];
    float least[kCodes + 1];
  };
  struct Block {
    bool finite;
    uint32_t code;

    __device__ __forceinline__ Stored stored() const { return finite ? code : kNan; }
  };

  __device__ __forceinline__ Nvfp4(float tensor_scale, Shared& shared)
      : shared_(shared), up_(Nvfp4Scale<T>::up(tensor_scale)) {
    const float unit = 6.0f * tensor_scale;
    // Products with amax are too small, but by less than a code.
    inverse_unit_ = (1.0f - 0x1p-20f) / unit;
    for (uint32_t code = threadIdx.x; code < kCodes; code += blockDim.x) {
      const float middle = (e4m3_value(code) + e4m3_value(code + 1)) / 2 * unit;
      // A tie goes to an even code.
      const float least = __uint_as_float(__float_as_uint(middle) + (code + 1) % 2);
      shared_.least[code + 1] = code + 1 < kCodes ? least : INFINITY;
      if (code == 0) {
        shared_.scales[code].set_zero();
      } else {
        shared_.scales[code].set(e4m3_value(code) * tensor_scale, up_);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ Block block(const Extent& extent) const {
    const uint32_t amax = extent.bits();
    const bool finite = amax < kInfinityBits;
    const float most = __uint_as_float(finite ? amax : 0);
    uint32_t code = tile::e4m3(most * inverse_unit_).__x;
    code += most >= shared_.least[code + 1];
    return {finite, code};
  }
  // Zeros, of whatever, where the scale is zero.
  __device__ __forceinline__ uint32_t values(const Eight<T>& x, const Block& block) const {
    return Nvfp4Scale<T>(shared_.scales[block.code]).values(x, up_);
  }

 private:
  Shared& shared_;
  float inverse_unit_;
  float up_;
};

// --- MXFP4 ---------------------------------------------------------------------------------------

// Scales are powers of two: products with their reciprocals are exact.
template <class T>
struct Mxfp4 {
  using Stored = uint8_t;
  using Extent = Amax<T>;
  static constexpr int kBlock = 32;
  static constexpr bool kStays = false;
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
  __device__ __forceinline__ uint32_t values(Eight<T> x, const Block& block) const {
    if (!block.finite) keep_signs<T>(x);
    return e2m1_codes<T>(x, __uint_as_float((254 - block.code) << 23));
  }
};

// --- Integers ------------------------------------------------------------------------------------

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
    return fmaf(x, inverse, kToMultiple) + (kToSignedInteger - kToMultiple);
  }
  const float to = fmaf(x, inverse, kToSignedInteger);
  const float rest = fmaf(kToSignedInteger - to, scale, x);  // exact
  const bool odd = __float_as_uint(to) & 1;
  const float size = fabsf(rest), half = scale / 2;
  const bool wrong = (size > half) | ((size >= half) & odd);  // no branch
  return to + (wrong ? copysignf(1.0f, rest) : 0.0f);
}

template <class T, bool kZeroPoint>
struct Int4 {
  using Stored = uint16_t;
  using Extent = std::conditional_t<kZeroPoint, Range<T>, Amax<T>>;
  static constexpr int kBlock = 0;
  static constexpr bool kStays = false;
  static constexpr bool kHasZeroPoint = kZeroPoint;
  static constexpr Stored kNan = 0x7fc0;

  struct Shared {};
  struct Block {
    bool finite;
    float scale, inverse;
    float origin;  // what stands for zero, from 0 to 15, plus kToSignedInteger

    __device__ __forceinline__ Stored stored() const {
      return finite ? __float_as_uint(scale) >> 16 : kNan;
    }
    __device__ __forceinline__ uint32_t zero() const {
      return __float_as_uint(origin) - kToSignedIntegerBits;
    }
    __device__ __forceinline__ uint32_t zero_point() const { return zero() ^ 8; }  // four bits
  };

  __device__ __forceinline__ Int4(float, Shared&) {}

  __device__ __forceinline__ Block block(const Extent& extent) const {
    Block block = {};
    if constexpr (kZeroPoint) {
      block.finite = extent.finite();
      const float low = block.finite ? extent.low() : 0, high = block.finite ? extent.high() : 0;
      set_scale(block, (high - low) * (1.0f / 15));
      block.origin = nearest_integer<T>(-low, block.scale, block.inverse);
    } else {
      const uint32_t amax = extent.bits();
      block.finite = amax < kInfinityBits;
      set_scale(block, __uint_as_float(block.finite ? amax : 0) * (1.0f / 7));
      block.origin = kToSignedInteger + 8;
    }
    return block;
  }
  // None is below the smallest, for which the origin stands in, but rounding both may make 16.
  __device__ __forceinline__ uint32_t values(Eight<T> x, const Block& block) const {
    if (!block.finite) x.words = {};
    const float most = kToSignedInteger + 15 - (block.origin - kToSignedInteger);
    uint32_t word = 0;
#pragma unroll
    for (int e = kEight - 1; e >= 0; --e) {
      float to = nearest_integer<T>(element_of<T>(x, e), block.scale, block.inverse);
      if constexpr (kZeroPoint) to = fminf(to, most);
      word = (word << 4) + __float_as_uint(to);
    }
    // As numbers from 0 to 15, which do not borrow from each other, and then with a sign.
    return (word + (block.zero() - kToSignedIntegerBits) * kEach) ^ 8 * kEach;
  }

 private:
  __device__ __forceinline__ static void set_scale(Block& block, float span) {
    block.scale = bfloat16_scale(span);
    block.inverse = tile::ptx::reciprocal_approx(block.scale);
  }
};

}  // namespace jaxkern::quantize
