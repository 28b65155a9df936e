"""Quantisation to four bits in plain jax.numpy: NVFP4, MXFP4 and integers of groups.

Blocks are of the last axis: 16 elements for NVFP4, 32 for MXFP4, a group for integers. What is
compared are float32 products, each rounded once, and no quotients: they are the same everywhere.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

E2M1, E4M3, E8M0 = jnp.float4_e2m1fn, jnp.float8_e4m3fn, jnp.float8_e8m0fnu

# Magnitudes of e2m1 by their code, and what lies in the middle of two of them. That is rounded to
# the even code, which for every second one is the upper.
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)

_NVFP4_BLOCK = 16
_LARGEST_CODE = 126  # of e4m3: 448
_MANTISSA_BITS = 23  # of float32
_INFINITY = 0xFF << _MANTISSA_BITS
_TINY = float(jnp.finfo(jnp.float32).tiny)

# Where weights become e4m3: the least exponent of a row's largest scale that counts, and how much
# larger than a row's factor that scale is, by a power of two.
_LEAST_EXPONENTS = {"nvfp4": -10, "mxfp4": -120, "int4": -111}
_EXPONENTS_OF_SHARES = {"nvfp4": 5, "mxfp4": 6, "int4": 3}

# Parts of the largest magnitude that a search tries to represent, as steps of a block's scale: of
# codes of e4m3, and of factors.
_E4M3_STEPS = (-2, -1, 1, 2, 3, 4, 5)
_FACTORS = tuple(np.float32(1 - i / 20) for i in range(1, 9))


class FourBit(NamedTuple):
    """Values [..., R, C] of four bits, and what they are multiplied by.

    scale: [..., R, blocks]: e4m3 for NVFP4, e8m0 for MXFP4, bfloat16 for integers.
    tensor_scale: float32 [..., 1, 1], of NVFP4, or None.
    zero_point: int4 [..., R, blocks], the integer that stands for zero, or None.
    """

    values: jax.Array
    scale: jax.Array
    tensor_scale: jax.Array | None = None
    zero_point: jax.Array | None = None


def dequantize(x):
    """(values - zero_point) * scale * tensor_scale, from left to right, float32 [..., R, C]."""
    out = _blocks(x.values, x.values.shape[-1] // x.scale.shape[-1])
    if x.zero_point is not None:
        out -= x.zero_point.astype(jnp.float32)[..., None]
    out *= x.scale.astype(jnp.float32)[..., None]
    out = out.reshape(x.values.shape)
    return out if x.tensor_scale is None else out * x.tensor_scale


def to_e4m3(x):
    """e4m3 values [..., R, C] and a float32 scale for each row [..., R, 1]: dequantize(x), rounded.

    A row has a factor, a power of two: that of its largest scale, of which 2^5 (NVFP4), 2^6 (MXFP4)
    or 2^3 (integers) makes a share below 2^6, 2^6 or 2^4. Values times their scale as a share of
    the factor, of integers rounded to float16, are rounded to e4m3. The factor times tensor_scale
    is the scale of the row, which a NaN among its scales makes NaN.
    """
    format = {jnp.dtype(E4M3): "nvfp4", jnp.dtype(E8M0): "mxfp4"}.get(x.scale.dtype, "int4")
    scale = x.scale.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.abs(scale).max(-1, keepdims=True), jnp.int32)
    exponent = jnp.maximum((bits >> _MANTISSA_BITS) - 127, _LEAST_EXPONENTS[format])
    exponent -= _EXPONENTS_OF_SHARES[format]
    share = _float16(scale * _power_of_two(-exponent))
    out = _blocks(x.values, x.values.shape[-1] // scale.shape[-1])
    if x.zero_point is not None:
        out -= x.zero_point.astype(jnp.float32)[..., None]
    out = _e4m3(_float16(out * share[..., None])).reshape(x.values.shape)
    factor = jnp.where(jnp.isnan(scale).any(-1, keepdims=True), jnp.nan, _power_of_two(exponent))
    return out.astype(E4M3), factor if x.tensor_scale is None else factor * x.tensor_scale


def nvfp4(x, *, tensor_scale=None, search=False, noise=None):
    """A FourBit of float32 x [..., R, C]: e2m1, with e4m3 scales of 16 and a float32 one of all.

    tensor_scale is a matrix's amax / (448 * 6), or 1 if that is subnormal. A block's scale is its
    amax / (6 tensor_scale), rounded to the nearest; where that is zero so are the values. A block
    that holds a NaN or an infinity has the scale NaN, and counts in no other.

    Args:
      tensor_scale: of tensor_scale_of; None computes it.
      search: take that one of some scales around which has the least squared error.
      noise: uniform in [0, 1), of x's shape: values are rounded up with the probability that keeps
        their mean. None rounds to the nearest, ties to the even code.
    """
    blocks = _blocks(x, _NVFP4_BLOCK)
    amax, finite = _amax(blocks)
    if tensor_scale is None:
        tensor_scale = tensor_scale_of(row_amax(x))
    code = _e4m3_code(amax, 6 * tensor_scale)

    def scale_of(code):
        return _from_e4m3_code(code) * tensor_scale

    if search:
        others = (jnp.clip(code + step, 0, _LARGEST_CODE) for step in _E4M3_STEPS)
        code = _best(code, others, lambda code: _error(blocks, scale_of(code)))
    values = _e2m1(blocks, scale_of(code), finite, noise)
    scale = jax.lax.bitcast_convert_type(jnp.where(finite, code, 0x7F).astype(jnp.uint8), E4M3)
    return FourBit(values.reshape(x.shape), scale, tensor_scale)


def row_amax(x):
    """The largest magnitude of each row, of those blocks of NVFP4 that are finite, [..., R]."""
    amax, _ = _amax(_blocks(x, _NVFP4_BLOCK))
    return amax.max(-1, initial=0)


def tensor_scale_of(row_amax):
    """nvfp4's, float32 [..., 1, 1], of row_amax [..., R]."""
    scale = row_amax.max(-1, initial=0)[..., None, None] * np.float32(1 / (448 * 6))
    return jnp.where(scale < _TINY, 1, scale)


def mxfp4(x, *, search=False, noise=None):
    """A FourBit of float32 x [..., R, C]: e2m1 with e8m0 scales of 32, as OCP's MX 1.0 converts.

    A block's scale is 2^(floor(log2(amax)) - 2), from 2^-126 on: values above 6 become 6. A block
    that holds a NaN or an infinity has the scale NaN. search: or twice that scale. Else as nvfp4.
    """
    blocks = _blocks(x, 32)
    amax, finite = _amax(blocks)
    exponent = jax.lax.bitcast_convert_type(amax, jnp.int32) >> _MANTISSA_BITS
    code = jnp.maximum(exponent - 2, 1)

    def scale_of(code):
        return jax.lax.bitcast_convert_type(code << _MANTISSA_BITS, jnp.float32)

    if search:
        code = _best(code, [code + 1], lambda code: _error(blocks, scale_of(code)))
    values = _e2m1(blocks, scale_of(code), finite, noise)
    scale = jax.lax.bitcast_convert_type(jnp.where(finite, code, 0xFF).astype(jnp.uint8), E8M0)
    return FourBit(values.reshape(x.shape), scale)


def int4(x, *, group, zero_point=False, search=False, noise=None):
    """A FourBit of float32 x [..., R, C]: integers with a bfloat16 scale for a group of columns.

    The scale is amax / 7 rounded to bfloat16, or 1 for zeros; the values are x / scale to the
    nearest, ties to even, from -8 to 7. With zero points they are (x - zero) / scale, where the
    scale is (largest - smallest) / 15, of x and zero, and zero stands for itself. A group that
    holds a NaN or an infinity has the scale NaN. search: of scales of less than all, too. Else as
    nvfp4.
    """
    blocks = _blocks(x, group)
    amax, finite = _amax(blocks)
    clean = jnp.where(finite[..., None], blocks, 0)
    low, high = jnp.minimum(clean.min(-1), 0), jnp.maximum(clean.max(-1), 0)
    span = (high - low) * np.float32(1 / 15) if zero_point else amax * np.float32(1 / 7)

    def scale_of(factor):
        scale = _bfloat16(span * factor)
        return jnp.where(scale < _TINY, 1, scale)

    def zero_of(scale):
        if not zero_point:
            return jnp.zeros_like(scale)
        return jnp.clip(_nearest_integer(-low, scale) - 8, -8, 7)

    def integers(scale, noise=None):
        quotient = _nearest_integer(clean, scale[..., None], noise)
        return jnp.clip(quotient + zero_of(scale)[..., None], -8, 7)

    def error(scale):
        back = (integers(scale) - zero_of(scale)[..., None]) * scale[..., None]
        return jnp.square(clean - back).sum(-1)

    scale = scale_of(np.float32(1))
    if search:
        scale = _best(scale, (scale_of(factor) for factor in _FACTORS), error)
    noise = None if noise is None else _blocks(noise, group)
    values = integers(scale, noise).astype(jnp.int4).reshape(x.shape)
    zeros = zero_of(scale).astype(jnp.int4) if zero_point else None
    scale = jnp.where(finite, scale, jnp.nan).astype(jnp.bfloat16)
    return FourBit(values, scale, zero_point=zeros)


# --- Blocks ---------------------------------------------------------------------------------------


def _blocks(x, size):
    return x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size)


def _amax(blocks):
    """The largest magnitude of each block, and whether all of it are finite; zero where not."""
    # NOTE: of the bits, as XLA for CPUs may lose a NaN in the maximum of numbers.
    bits = jax.lax.bitcast_convert_type(blocks, jnp.int32) & 0x7FFFFFFF
    bits = bits.max(-1)
    finite = bits < _INFINITY
    amax = jax.lax.bitcast_convert_type(jnp.where(finite, bits, 0), jnp.float32)
    return amax, finite


def _best(first, others, error):
    """What has the least error, of each block the first of those."""
    best, least = first, error(first)
    for one in others:
        now = error(one)
        best, least = jnp.where(now < least, one, best), jnp.minimum(now, least)
    return best


# --- Values ---------------------------------------------------------------------------------------


def _e2m1(blocks, scale, finite, noise):
    """blocks / scale as e2m1; zeros where the scale is zero or the block is not finite."""
    magnitude, scale = jnp.abs(blocks), scale[..., None]
    if noise is None:
        code = _nearest_code(magnitude, scale)
    else:
        code = sum((magnitude >= step * scale).astype(jnp.int32) for step in _MAGNITUDES[1:])
        low, high = (_magnitude(jnp.minimum(code + i, 7)) * scale for i in range(2))
        code += _blocks(noise, blocks.shape[-1]) * (high - low) < magnitude - low
        code = jnp.minimum(code, 7)
    # A product of a small scale may be flushed to zero, which a magnitude of zero then reaches.
    code = jnp.where(finite[..., None] & (scale > 0) & (magnitude > 0), code, 0)
    code |= jnp.signbit(blocks) * 8
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint4), E2M1)


def _nearest_code(magnitude, scale):
    """Of e2m1, for magnitude / scale."""
    code = 0
    for i, middle in enumerate(_MIDDLES):
        product = middle * scale
        code += (magnitude >= product if i % 2 else magnitude > product).astype(jnp.int32)
    return code


def _magnitude(code):
    return jnp.asarray(_MAGNITUDES, jnp.float32)[code]


def _error(blocks, scale):
    """The squared error of each block as e2m1."""
    magnitude, scale = jnp.abs(blocks), scale[..., None]
    code = jnp.where(scale > 0, _nearest_code(magnitude, scale), 0)
    return jnp.square(magnitude - _magnitude(code) * scale).sum(-1)


def _from_e4m3_code(code):
    return jax.lax.bitcast_convert_type(code.astype(jnp.uint8), E4M3).astype(jnp.float32)


def _e4m3_code(x, unit):
    """The code of the e4m3 number nearest to x / unit, ties to even; up to 448."""

    def middle(code):
        """Of that and the next code, times the unit."""
        return (_from_e4m3_code(code) + _from_e4m3_code(code + 1)) / 2 * unit

    quotient = jnp.clip(x / unit, 0, 448).astype(E4M3)
    code = jax.lax.bitcast_convert_type(quotient, jnp.uint8).astype(jnp.int32)
    # What a quotient that is rounded before may be beyond.
    odd = code % 2 == 1
    above, below = middle(jnp.minimum(code, _LARGEST_CODE - 1)), middle(jnp.maximum(code - 1, 0))
    up = (code < _LARGEST_CODE) & ((x > above) | ((x == above) & odd))
    down = (code > 0) & ((x < below) | ((x == below) & odd))
    return code + up - down


def _nearest_integer(x, scale, noise=None):
    """x / scale, of a scale with bfloat16's bits, as integers in float32: to the nearest, ties to
    even, or up where noise says so.
    """
    quotient = jnp.round(x / scale) if noise is None else jnp.floor(x / scale)
    rest = x - quotient * scale  # exact but for the largest quotients, which are clipped
    if noise is not None:
        quotient += jnp.where(rest < 0, -1, jnp.where(rest >= scale, 1, 0))
        return quotient + (noise * scale < x - quotient * scale)
    odd = quotient % 2 == 1
    half = scale / 2
    up = (rest > half) | ((rest == half) & odd)
    down = (rest < -half) | ((rest == -half) & odd)
    return quotient + up - down.astype(jnp.float32)


def _bfloat16(x):
    # NOTE: XLA may leave out a way to bfloat16 and back, but not this.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _float16(x):
    """To the nearest float16; what is below 2^-14 becomes zero."""
    return jax.lax.reduce_precision(x, exponent_bits=5, mantissa_bits=10)


def _e4m3(x):
    """To the nearest e4m3, for |x| <= 448."""
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    return jnp.where(jnp.abs(x) < 2.0**-6, jnp.round(x * 512) / 512, normal)


def _power_of_two(exponent):
    return jax.lax.bitcast_convert_type((exponent + 127) << _MANTISSA_BITS, jnp.float32)
