"""PackedWeight: a weight of four bits in the order in which kernels read it.

Tiles are of 16 rows and 128 columns, and everything of one lies together: the values, then the
scales, then the zero points. A warp takes a tile as the operand A of eight products by
mma.m16n8k16, or four warps take one each for wgmma.m64nNk16. In what follows lane 4 g + c and step
s belong together where the tile's rows are g and g + 8, and its columns 16 s + 2 c + 0, 1, 8 and 9.

Values: uint32 [s / 4, lane, s % 4]. A word has the eight of a lane and a step: in the lower half
those of even columns, in the upper half those of odd ones. In each half value i is that of row i %
2 and columns from 8 (i / 2) on. Its bits, from the half's highest:

    e2m1:     s0 c3 s3 s1 a3 b3 s2 a0 b0 c0 a1 b1 c1 a2 b2 c2
    integers: value 3, 2, 1 and 0, to each of which 8 is added

Here s is the sign and a, b, c the rest of e2m1. Value 0 is where bfloat16 has it for 2^-126 of the
value, values 1 and 2 are 3 and 6 bits from there, and value 3 is what is left.

Scales: [g, block, row / 8], of the blocks of a tile's columns. Of NVFP4 a byte is one of "e5m3":
(1 + m / 8) 2^(e - 10), for which 4 bits to the left there are bfloat16's, and 0 where the scale is
0. Of MXFP4 it is the exponent of the row's largest scale, less that of this one. 255 stands for
NaN. Of integers scales are bfloat16, and zero points bfloat16 numbers 136 larger.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxkern import _partitioning
from jaxkern.ops import scales
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference import four_bit

ROWS, COLUMNS = 16, 128  # of a tile
_VALUE_WORDS = ROWS * COLUMNS // 8
_NAN = 255

# Where the bits of the values of a half are, from the sign on.
_E2M1_BITS = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (13, 11, 10, 14))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "row_scale", "tensor_scale"],
    meta_fields=["format", "block", "zero_points", "rows", "columns"],
)
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A weight [..., N, K] as `pack_weight` makes it. A pytree of arrays.

    Attributes:
      data: uint32 [..., ceil(N / 16), ceil(K / 128), words], a tile's, as this module has them.
      row_scale: float32 [..., ceil(N / 16) * 16]: what rows are multiplied by besides; NaN where a
        scale of the row is.
      tensor_scale: of NVFP4, float32 [..., 1, 1], or None.
      format: "nvfp4", "mxfp4" or "int4".
      block: columns that share a scale.
      zero_points: whether there are any.
      rows, columns: N and K.
    """

    data: jax.Array
    row_scale: jax.Array
    tensor_scale: jax.Array | None
    format: str
    block: int
    zero_points: bool
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.data.shape[:-3], self.rows, self.columns)

    @property
    def ndim(self) -> int:
        return self.data.ndim - 1

    def unpack(self) -> QuantizedArray:
        """What was packed."""
        return _unpack(self)

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """What the values stand for, computed in float32 and rounded to dtype, [..., N, K]."""
        return self.unpack().dequantize(dtype)


def words_of_tile(format: str, block: int, zero_points: bool) -> int:
    """How many words a tile has."""
    scale_bits = {"nvfp4": 8, "mxfp4": 8, "int4": 32 if zero_points else 16}[format]
    return _VALUE_WORDS + ROWS * (COLUMNS // block) * scale_bits // 32


def format_of(w: QuantizedArray) -> str:
    """Of four-bit values with scales that belong to them."""
    if w.values.dtype == jnp.int4:
        return "int4"
    return "nvfp4" if w.scale.dtype == four_bit.E4M3 else "mxfp4"


def relative_row_scale(row_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of MXFP4's row_scale [..., rows], without NaN: over the largest, and the largest [...]."""
    power = _largest(row_scale)
    largest = power.max(-1)
    bits = jnp.maximum(power - largest[..., None] + 127, 0) << 23
    return jax.lax.bitcast_convert_type(bits, jnp.float32), _row_scale(largest, False)


@jax.jit
def pack(w: QuantizedArray) -> PackedWeight:
    """w [..., N, K] of four bits, checked."""
    format, (rows, columns) = format_of(w), w.shape[-2:]
    block = columns // w.scale.shape[-1]
    lead = tuple(f"b{i}" for i in range(w.ndim - 2))
    axes = (*lead, "bn", "bk")
    run = _partitioning.on_auto_mesh(
        lambda _, w: _packed(w, format), [axes], [(*axes, "words"), (*lead, "bn")]
    )
    data, row_scale = run(w.values, w)
    zero_points = w.zero_point is not None
    return PackedWeight(data, row_scale, w.tensor_scale, format, block, zero_points, rows, columns)


def _packed(w, format):
    """data and row_scale."""
    rows, columns = w.shape[-2:]
    block = columns // w.scale.shape[-1]
    size = scales.round_up(rows, ROWS), scales.round_up(columns, COLUMNS)

    def whole(x, columns, filler=0):
        """x with more of the filler, up to whole tiles."""
        pads = [(0, 0)] * (x.ndim - 2) + [(0, size[0] - rows), (0, columns - x.shape[-1])]
        return jnp.pad(x, pads, constant_values=filler)

    bad = jnp.isnan(w.scale.astype(jnp.float32))
    if format == "int4":
        codes, filler = w.values.astype(jnp.int32) + 8, 8
        row_scale = jnp.where(bad.any(-1), jnp.nan, jnp.float32(1))
        stored = [_bits_of(w.scale)]
        if w.zero_point is not None:
            stored.append(_bits_of((w.zero_point.astype(jnp.float32) + 136).astype(jnp.bfloat16)))
    else:
        codes, filler = _bits_of(w.values), 0
        code = _bits_of(w.scale)
        if format == "nvfp4":
            row_scale = jnp.where(bad.any(-1), jnp.nan, w.tensor_scale[..., 0])
            of_scale = jnp.asarray(_E5M3)[jnp.where(bad, 0, code)]
            # The kernels take a scale of 0 for one of 2^-10.
            codes &= jnp.where(jnp.repeat(code == 0, block, -1), 8, 15)
        else:
            largest = jnp.where(bad, 0, code).max(-1, initial=0)
            row_scale = _row_scale(largest, bad.any(-1))
            of_scale = largest[..., None] - code
        stored = [jnp.where(bad, _NAN, of_scale)]
    bits = 16 if format == "int4" else 8
    wide = size[1] // COLUMNS
    parts = [_scale_words(whole(x, size[1] // block), wide, bits) for x in stored]
    data = jnp.concatenate([_value_words(whole(codes, size[1], filler), format), *parts], -1)
    row_scale = jnp.pad(row_scale, [(0, 0)] * (w.ndim - 2) + [(0, size[0] - rows)])
    return data, row_scale


@jax.jit
def _unpack(w):
    lead = tuple(f"b{i}" for i in range(w.ndim - 2))
    axes = (*lead, "bn", "bk")
    results = [axes, axes] + [axes] * w.zero_points
    run = _partitioning.on_auto_mesh(lambda _, w: _unpacked(w), [(*axes, "words")], results)
    values, scale, *zero_point = run(w.data, w)
    return QuantizedArray(values, scale, w.tensor_scale, *zero_point)


def _unpacked(w):
    """values, scale and, if there are any, zero points."""
    words, rest = w.data[..., :_VALUE_WORDS], w.data[..., _VALUE_WORDS:]
    codes = _codes(words, w.format)[..., : w.rows, : w.columns]
    bits = 16 if w.format == "int4" else 8
    parts = jnp.split(rest, 1 + w.zero_points, -1)
    stored = [_scales(x, bits)[..., : w.rows, : w.columns // w.block] for x in parts]
    if w.format == "int4":
        scale, *zeros = (_from_bits(x, jnp.bfloat16) for x in stored)
        zeros = ((x.astype(jnp.float32) - 136).astype(jnp.int4) for x in zeros)
        return (codes - 8).astype(jnp.int4), scale, *zeros
    values, (of_scale,) = _from_bits(codes, four_bit.E2M1), stored
    if w.format == "nvfp4":
        return values, _from_bits(jnp.asarray(_E4M3)[of_scale], four_bit.E4M3)
    largest = _largest(w.row_scale[..., : w.rows])[..., None]
    code = jnp.where(of_scale == _NAN, _NAN, largest - of_scale)
    return values, _from_bits(code, four_bit.E8M0)


# --- Words ----------------------------------------------------------------------------------------


def _value_words(codes, format):
    """Words [..., N / 16, K / 128, 256] of codes [..., N, K] of four bits, int32."""
    *lead, rows, columns = codes.shape
    x = codes.astype(jnp.uint32).reshape(*lead, rows // 16, 2, 8, columns // 128, 2, 4, 2, 4, 2)
    # From tile row, i % 2, g, tile column, s / 4, s % 4, i / 2, c and odd to tile, s / 4, g, c,
    # s % 4, i and odd.
    n = len(lead)
    order = [n + axis for axis in (0, 3, 4, 2, 7, 5, 6, 1, 8)]
    x = x.transpose(*range(n), *order)
    x = x.reshape(*x.shape[: n + 6], 4, 2)
    halves = sum(spread(x[..., i, :], i, format) for i in range(4))
    words = halves[..., 0] | halves[..., 1] << 16
    return words.reshape(*words.shape[: n + 2], _VALUE_WORDS)


def _codes(words, format):
    """The inverse of _value_words."""
    *lead, high, wide, _ = words.shape
    n = len(lead)
    x = words.reshape(*lead, high, wide, 2, 8, 4, 4)  # tile, s / 4, g, c, s % 4
    halves = jnp.stack([x & 0xFFFF, x >> 16], -1)
    x = jnp.stack([gathered(halves, i, format) for i in range(4)], -2)
    x = x.reshape(*x.shape[: n + 6], 2, 2, 2)  # i / 2, i % 2, odd
    back = [n + axis for axis in (0, 7, 3, 1, 2, 5, 6, 4, 8)]
    x = x.transpose(*range(n), *back)
    return x.reshape(*lead, high * ROWS, wide * COLUMNS).astype(jnp.int32)


def spread(code, i, format):
    """The bits of value i of four in its half of a word, uint32."""
    if format == "int4":
        return code << 4 * i
    return sum((code >> 3 - j & 1) << place for j, place in enumerate(_E2M1_BITS[i]))


def gathered(half, i, format):
    """The inverse of spread."""
    if format == "int4":
        return half >> 4 * i & 15
    return sum((half >> place & 1) << 3 - j for j, place in enumerate(_E2M1_BITS[i]))


def _scale_words(x, wide, bits):
    """Words [..., N / 16, wide, _] of numbers [..., N, blocks] of so many bits."""
    *lead, rows, blocks = x.shape
    n, each = len(lead), 32 // bits
    x = x.astype(jnp.uint32).reshape(*lead, rows // ROWS, 2, 8, wide, blocks // wide)
    x = x.transpose(*range(n), *(n + axis for axis in (0, 3, 2, 4, 1)))
    x = x.reshape(*lead, rows // ROWS, wide, -1, each)
    return sum(x[..., i] << bits * i for i in range(each))


def _scales(words, bits):
    """The inverse of _scale_words, int32."""
    *lead, high, wide, count = words.shape
    n, each = len(lead), 32 // bits
    x = jnp.stack([words >> bits * i & (1 << bits) - 1 for i in range(each)], -1)
    x = x.reshape(*lead, high, wide, 8, count * each // ROWS, 2)
    x = x.transpose(*range(n), *(n + axis for axis in (0, 4, 2, 1, 3)))
    return x.reshape(*lead, high * ROWS, -1).astype(jnp.int32)


# --- Numbers --------------------------------------------------------------------------------------


def _e5m3_of_e4m3():
    """Of the codes 0 to 126, by their value: zero is 0."""
    values = np.arange(127, dtype=np.uint8).view(four_bit.E4M3).astype(np.float64)
    mantissa, exponent = np.frexp(values[1:])  # in [0.5, 1)
    codes = (exponent + 9) * 8 + (mantissa * 16 - 8)
    return np.concatenate([[0], codes]).astype(np.int32)


_E5M3 = _e5m3_of_e4m3()
_E4M3 = np.full(256, 0x7F, np.int32)  # by the code of e5m3
_E4M3[_E5M3] = np.arange(127)

_QUIET_NAN, _LARGEST_SUBNORMAL_POWER = 0x7FC00000, 1 << 22


def _row_scale(largest, bad):
    """2^(largest - 127), float32, or a NaN that has `largest` among its bits."""
    bits = jnp.where(largest == 0, _LARGEST_SUBNORMAL_POWER, largest << 23)
    bits = jnp.where(bad, _QUIET_NAN | largest, bits)
    return jax.lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


def _largest(row_scale):
    """The inverse of _row_scale."""
    bits = jax.lax.bitcast_convert_type(row_scale, jnp.int32)
    return jnp.where(bits & _QUIET_NAN == _QUIET_NAN, bits & 0xFF, bits >> 23)


def _bits_of(x):
    """As int32."""
    bits = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}[jnp.finfo(x.dtype).bits]
    return jax.lax.bitcast_convert_type(x, bits).astype(jnp.int32)


def _from_bits(x, dtype):
    bits = {4: jnp.uint4, 8: jnp.uint8, 16: jnp.uint16}[jnp.finfo(dtype).bits]
    return jax.lax.bitcast_convert_type(x.astype(bits), dtype)
