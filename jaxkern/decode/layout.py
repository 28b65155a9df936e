"""The formats of docs/decode.md: matrices in blocks of rows, rows in slices, and these in words."""

import jax
import jax.numpy as jnp

from jaxkern.ops import packed_weight

ROW = 32  # bfloat16 values of a row that lie together
SLICE_BYTES = 64  # of a row of weights that lie together
FP8_COLUMNS = 64  # in so many
FOUR_BIT_COLUMNS = 128  # and of four bits
SCALE_BYTES = 8  # of a row, in each slice of four bits

# As exponents of what scales are stored as. NVFP4's are (1 + m / 8) 2^(e - 10), e in five bits and
# m in three; MXFP4's are bfloat16, 2^75 of what they are relative to the row's largest.
_E5M3_BIAS, _E8M0_BIAS = 10, 127 + 75


def fp8_words(w: jax.Array) -> jax.Array:
    """float8_e4m3fn [..., K], K a multiple of 64, as uint32 [..., K / 4]."""
    bits = jax.lax.bitcast_convert_type(w, jnp.uint8).astype(jnp.uint32)
    bits = bits.reshape(*w.shape[:-1], -1, 2, 4, 2, 4)  # h, c, j, i of a slice
    x = jnp.moveaxis(bits, -4, -3)
    one, two = x[..., :2], x[..., 2:]
    halves = (one >> 7 << 15) | (two >> 3 & 15) << 11 | (one & 127) << 4 | (two & 7)
    halves |= two[..., ::-1] >> 7 << 3
    words = halves[..., 0] | halves[..., 1] << 16
    return words.reshape(*w.shape[:-1], -1)


def fp8_of_words(words: jax.Array) -> jax.Array:
    """The inverse of fp8_words, float8_e4m3fn [..., K]."""
    halves = jnp.stack([words & 0xFFFF, words >> 16], -1)
    one = (halves >> 15 << 7) | (halves >> 4 & 127)
    two = (halves[..., ::-1] >> 3 & 1) << 7 | (halves >> 11 & 15) << 3 | (halves & 7)
    x = jnp.concatenate([one, two], -1).reshape(*words.shape[:-1], -1, 4, 2, 2, 4)
    bits = jnp.moveaxis(x, -3, -4).reshape(*words.shape[:-1], -1).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)


def four_bit_words(codes: jax.Array, format: str) -> jax.Array:
    """Codes of four bits [..., K], K a multiple of 128, as uint32 [..., K / 8].

    format: "nvfp4" and "mxfp4" are codes of e2m1; "int4" integers and 8.
    """
    x = codes.astype(jnp.uint32).reshape(*codes.shape[:-1], -1, 4, 4, 4, 2)  # part, c, i, odd
    halves = sum(packed_weight.spread(x[..., i, :], i, format) for i in range(4))
    words = halves[..., 0] | halves[..., 1] << 16
    return words.swapaxes(-1, -2).reshape(*codes.shape[:-1], -1)


def codes_of_words(words: jax.Array, format: str) -> jax.Array:
    """The inverse of four_bit_words, uint32 [..., K]."""
    x = words.reshape(*words.shape[:-1], -1, 4, 4).swapaxes(-1, -2)
    halves = jnp.stack([x & 0xFFFF, x >> 16], -1)
    codes = jnp.stack([packed_weight.gathered(halves, i, format) for i in range(4)], -2)
    return codes.reshape(*words.shape[:-1], -1)


def scale_words(scale: jax.Array, format: str) -> jax.Array:
    """Scales of blocks of rows, 16 columns each or 32, as uint32 [..., K / 64].

    scale: float32 [..., blocks], numbers that the format has. Of "mxfp4" relative to the largest
    of the row: those below 2^-126 of it become zero.
    """
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    if format == "nvfp4":
        codes = jnp.where(scale > 0, (bits >> 20) - (127 - _E5M3_BIAS) * 8, 0)
        return _joined(codes, 8)
    if format == "mxfp4":
        exponent = bits >> 23
        return _joined(jnp.where(exponent > 0, exponent + (_E8M0_BIAS - 127), 0) << 7, 16)
    return _joined(bits >> 16, 16)


def scales_of_words(words: jax.Array, format: str) -> jax.Array:
    """The inverse of scale_words, float32 [..., blocks]."""
    codes = _parted(words, 8 if format == "nvfp4" else 16)
    if format == "nvfp4":
        bits = jnp.where(codes > 0, (codes + (127 - _E5M3_BIAS) * 8) << 20, 0)
    elif format == "mxfp4":
        bits = jnp.where(codes > 0, ((codes >> 7) - (_E8M0_BIAS - 127)) << 23, 0)
    else:
        bits = codes << 16
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _joined(codes, bits):
    """Words of codes of so many bits, uint32, the first of a word the lowest."""
    x = codes.reshape(*codes.shape[:-1], -1, 32 // bits)
    return sum(x[..., i] << bits * i for i in range(32 // bits))


def _parted(words, bits):
    """The inverse of _joined."""
    parts = [words >> bits * i & (1 << bits) - 1 for i in range(32 // bits)]
    return jnp.stack(parts, -1).reshape(*words.shape[:-1], -1)


def largest_block(head_dim: int) -> int:
    """How many rows a block of a model with such heads has at most."""
    return 128 if head_dim == 64 else 136


def number_of_blocks(rows: int, multiprocessors: int, head_dim: int, rows_of_unit: int = 1) -> int:
    """How many blocks a matrix of so many rows has: as few as leave none more than `largest_block`.

    A multiple of multiprocessors. The rows_of_unit rows of a unit are in the same block.
    """
    needed = -(-(rows // rows_of_unit) // (largest_block(head_dim) // rows_of_unit))
    return -(-needed // multiprocessors) * multiprocessors


def pack_rows(
    w: jax.Array, blocks: int, rows_of_unit: int = 1, scales: jax.Array | None = None
) -> jax.Array:
    """w [..., N, K] in this many blocks of rows, [..., N K]; rows are of whole slices.

    With rows_of_unit, w is that many matrices of N / rows_of_unit rows, one below the other, and a
    unit is a row of each. A block has the rows of the first matrix, then those of the next.

    scales: of w of words, for each row and slice two more, uint32 [..., N, K / 8]. They follow the
    slice of the whole block, up to a multiple of four of them: the result has more then.
    """
    *lead, n, k = w.shape
    units, columns = n // rows_of_unit, SLICE_BYTES // w.itemsize
    size, larger = divmod(units, blocks)

    def pack(first, count, each):
        def slices(w, columns):
            """[..., count, slices, values of a slice of a block]."""
            w = w.reshape(*lead, rows_of_unit, units, -1, columns)
            w = w[..., first : first + count * each, :, :]
            w = w.reshape(*lead, rows_of_unit, count, each, -1, columns)
            w = jnp.moveaxis(w, (-4, -2), (-5, -4))
            return w.reshape(*w.shape[:-3], -1)

        packed = slices(w, columns)
        if scales is not None:
            words = slices(scales, SCALE_BYTES // 4)
            padding = [(0, 0)] * (words.ndim - 1) + [(0, -words.shape[-1] % 4)]
            packed = jnp.concatenate([packed, jnp.pad(words, padding)], -1)
        return packed.reshape(*lead, -1)

    parts = (0, larger, size + 1), (larger * (size + 1), blocks - larger, size)
    return jnp.concatenate([pack(*x) for x in parts if x[1] * x[2]], -1)


def unpack_rows(
    flat: jax.Array, rows: int, columns: int, blocks: int, rows_of_unit: int = 1
) -> jax.Array:
    """The inverse of pack_rows without scales, [..., N, K]."""
    return _unpack(flat, rows, columns, blocks, rows_of_unit, 0)[0]


def unpack_scaled_rows(
    flat: jax.Array, rows: int, columns: int, blocks: int, rows_of_unit: int = 1
) -> tuple[jax.Array, jax.Array]:
    """The inverse of pack_rows with scales: w [..., N, K] and those."""
    w, scales = _unpack(flat, rows, columns, blocks, rows_of_unit, SCALE_BYTES // 4)
    return w, scales


def _unpack(flat, rows, columns, blocks, rows_of_unit, scale_columns):
    """A list of w and, if there are columns of scales of a slice, scales."""
    lead, slice_columns = flat.shape[:-1], SLICE_BYTES // flat.itemsize
    slices = columns // slice_columns
    size, larger = divmod(rows // rows_of_unit, blocks)
    found, start = [], 0
    for count, each in ((larger, size + 1), (blocks - larger, size)):
        if not count * each:
            continue
        values, more = (rows_of_unit * each * x for x in (slice_columns, scale_columns))
        all = values + more + -more % 4
        packed = flat[..., start : start + count * slices * all].reshape(*lead, count, slices, all)
        start += count * slices * all

        def rows_of(w, each=each):
            w = w.reshape(*w.shape[:-1], rows_of_unit, each, -1)
            w = jnp.moveaxis(w, (-5, -4), (-4, -2))
            return w.reshape(*lead, rows_of_unit, -1, slices * w.shape[-1])

        parts = [rows_of(packed[..., :values])]
        if more:
            parts.append(rows_of(packed[..., values : values + more]))
        found.append(parts)
    return [jnp.concatenate(x, -2).reshape(*lead, rows, -1) for x in zip(*found, strict=True)]
