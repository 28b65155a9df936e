"""Quantisation to FP8 in plain jax.numpy: the kernels' oracle, implementation="xla".

Scales are powers of two, and are worked out on the bits of float32 numbers: an amax or an element
may be subnormal, which backends that flush subnormal numbers to zero would otherwise lose.
"""

import math

import jax
import jax.numpy as jnp

# Rows and columns of a block that has one scale.
BLOCK = 128

_MANTISSA_BITS = 23
_SMALLEST_NORMAL = 1 << _MANTISSA_BITS
_INFINITY = 0xFF << _MANTISSA_BITS
_ABOVE_SEVEN_QUARTERS = 0x1FFFFF  # carries into the exponent if the mantissa is above 1.75


def blocks(size):
    """How many blocks an axis of this size has; the last one may be ragged."""
    return -(-size // BLOCK)


def quantize(x, format, *, scaling):
    """values in `format`, [..., R, C], and their scale: x is about values * scale.

    Args:
      x: [..., R, C], bfloat16, float16 or float32.
      format: float8_e4m3fn or float8_e5m2.
      scaling: "tensor", "row", "1x128" or "128x128"; see scale_of.
    """
    scale = scale_of(x, format, scaling=scaling)
    return cast(x, scale, format), scale


def scale_of(x, format, *, scaling):
    """The smallest power of two, from 2^-126 on, with max |x| / scale in the range of `format`.

    NaN where the block holds a NaN or an infinity. float32, of the shape [..., 1, 1] for "tensor",
    [..., R, 1] for "row", [..., R, ceil(C / 128)] for "1x128", and
    [..., ceil(R / 128), ceil(C / 128)] for "128x128".
    """
    amax = _block_max(_magnitude_bits(x), scaling)
    # The largest number of both formats is 1.75 * 2^top.
    top = math.frexp(float(jnp.finfo(format).max))[1] - 1
    exponent = jnp.maximum(((amax + _ABOVE_SEVEN_QUARTERS) >> _MANTISSA_BITS) - top, 1)
    return jnp.where(amax < _INFINITY, _power_of_two(exponent), jnp.nan)


def cast(x, scale, format):
    """x / scale in `format`, rounded to the nearest, ties to even. NaN where the scale is NaN.

    Args:
      x: [..., R, C], bfloat16, float16 or float32.
      scale: of `scale_of`: powers of two, which leave no quotient out of range.
      format: float8_e4m3fn or float8_e5m2.
    """
    bits = _magnitude_bits(x)
    scale = spread(scale, x.shape)
    exponent = jax.lax.bitcast_convert_type(scale, jnp.int32) >> _MANTISSA_BITS
    normal = _from_bits(bits) * _power_of_two(254 - exponent)
    # A subnormal number is an integer times 2^-149. The product of one is zero in either format
    # where its factor would be below 2^-126.
    subnormal = bits.astype(jnp.float32) * _power_of_two(jnp.maximum(105 - exponent, 0))
    quotient = jnp.where(bits < _SMALLEST_NORMAL, subnormal, normal)
    quotient = jnp.where(jnp.signbit(x), -quotient, quotient)
    values = jnp.where(jnp.isnan(scale), jnp.nan, quotient).astype(format)
    # NOTE: without this XLA for GPUs leaves out a way to FP8 and back: it may keep more precision.
    return jax.lax.optimization_barrier(values)


def dequantize(values, scale):
    """values * scale, float32 [..., R, C].

    Args:
      values: [..., R, C], of any floating-point dtype.
      scale: float32 [..., r, c]; r is 1, ceil(R / 128) or R, and so c for C.
    """
    return values.astype(jnp.float32) * spread(scale, values.shape)


def spread(scale, shape):
    """The scale [..., r, c] of each element of an array of this shape [..., R, C]."""
    for axis in (-2, -1):
        if scale.shape[axis] not in (1, shape[axis]):
            scale = jnp.repeat(scale, BLOCK, axis)
            scale = jax.lax.slice_in_dim(scale, 0, shape[axis], axis=axis)
    return jnp.broadcast_to(scale, shape)


def _magnitude_bits(x):
    """The bits of |x| as float32. As integers they are in the order of the numbers, NaN last."""
    if x.dtype == jnp.bfloat16:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.int32) << 16
    else:
        bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    return bits & 0x7FFFFFFF


def _block_max(bits, scaling):
    """The maximum over each block of an array [..., R, C] of non-negative integers."""
    if scaling == "tensor":
        return bits.max((-2, -1), keepdims=True, initial=0)
    if scaling == "row":
        return bits.max(-1, keepdims=True, initial=0)
    if scaling == "128x128":
        bits = _max_of_blocks(bits, -2)
    return _max_of_blocks(bits, -1)


def _max_of_blocks(bits, axis):
    axis %= bits.ndim
    count = blocks(bits.shape[axis])
    pad = count * BLOCK - bits.shape[axis]
    bits = jnp.pad(bits, [(0, pad if i == axis else 0) for i in range(bits.ndim)])
    return bits.reshape(*bits.shape[:axis], count, BLOCK, *bits.shape[axis + 1 :]).max(axis + 1)


def _from_bits(bits):
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _power_of_two(exponent):
    """2^(exponent - 127) for 1 <= exponent <= 254, and zero for 0."""
    return _from_bits(exponent << _MANTISSA_BITS)
