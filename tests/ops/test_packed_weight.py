"""pack_weight: the order of docs, and the way back."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import PackedWeight, pack_weight, quantize
from jaxkern.ops.packed_weight import relative_row_scale

FORMATS = {
    "nvfp4": {},
    "mxfp4": {},
    "int4": {},
    "int4, 64": {"group_size": 64},
    "int4, 32, zero points": {"group_size": 32, "zero_point": True},
}
formats = pytest.mark.parametrize("name", FORMATS)


def weight(name, shape, seed=0):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return quantize(w, name.split(",")[0], **FORMATS[name])


def assert_same(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


@formats
@pytest.mark.parametrize("shape", [(16, 128), (1, 128), (130, 384), (3, 70, 256)])
def test_there_and_back(name, shape):
    w = weight(name, shape)
    packed = pack_weight(w)
    assert isinstance(packed, PackedWeight)
    assert packed.shape == shape and packed.ndim == len(shape)
    assert_same(packed.unpack(), w)
    np.testing.assert_array_equal(packed.dequantize(), w.dequantize())


@pytest.mark.parametrize("columns", [16, 112, 240])
def test_blocks_that_fill_no_tile(columns):
    w = weight("nvfp4", (5, columns))
    packed = pack_weight(w)
    assert packed.data.shape == (1, -(-columns // 128), 288)
    assert_same(packed.unpack(), w)


@pytest.mark.parametrize(
    ("name", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25), ("int4", 4.125), ("int4, 64", 4.25)]
)
def test_size(name, bits):
    packed = pack_weight(weight(name, (128, 256)))
    assert packed.data.nbytes * 8 == bits * 128 * 256


@formats
def test_words(name):
    """One after the other, as the module describes them."""
    w = weight(name, (128, 256), seed=4)
    data = np.asarray(pack_weight(w).data)
    integers = name.startswith("int4")
    values = np.float32(w.values)
    if integers:
        codes = (values + 8).astype(int)
    else:
        magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        codes = np.vectorize(magnitudes.index)(np.abs(values)) + 8 * np.signbit(values)
    order = "s0 c3 s3 s1 a3 b3 s2 a0 b0 c0 a1 b1 c1 a2 b2 c2".split()
    for tile_row, tile_column, step, lane in np.random.default_rng(0).integers(
        [8, 2, 8, 32], size=(200, 4)
    ):
        g, c = divmod(lane, 4)
        word = data[tile_row, tile_column, (step // 4 * 32 + lane) * 4 + step % 4]
        for odd in range(2):
            half = int(word) >> 16 * odd & 0xFFFF
            for i in range(4):
                row = 16 * tile_row + 8 * (i % 2) + g
                column = 128 * tile_column + 16 * step + 8 * (i // 2) + 2 * c + odd
                if integers:
                    got = half >> 4 * i & 15
                else:
                    bits = [half >> 15 - order.index(f"{part}{i}") & 1 for part in "sabc"]
                    got = int("".join(map(str, bits)), 2)
                assert got == codes[row, column]


@formats
def test_scales(name):
    w = weight(name, (128, 256), seed=5)
    packed = pack_weight(w)
    block = 256 // w.scale.shape[1]
    per_tile, integers = 128 // block, name.startswith("int4")
    bytes_ = np.asarray(packed.data)[..., 256:].copy().view(np.uint16 if integers else np.uint8)
    scale, row_scale = np.float64(w.scale), np.float64(packed.row_scale)
    for row, index in np.ndindex(scale.shape):
        tile, in_tile = divmod(row, 16)
        half, g = divmod(in_tile, 8)
        wide, b = divmod(index, per_tile)
        place = (g * per_tile + b) * 2 + half
        got = int(bytes_[tile, wide, place])
        if integers:
            value = np.uint32(got << 16).view(np.float32)
            assert value == scale[row, index] and row_scale[row] == 1
            if w.zero_point is not None:
                zero = int(bytes_[tile, wide, 16 * per_tile + place]) << 16
                wanted = 136 + np.float32(w.zero_point[row, index])
                assert np.uint32(zero).view(np.float32) == wanted
        elif name == "nvfp4":
            assert (1 + got % 8 / 8) * 2.0 ** (got // 8 - 10) == scale[row, index]
            assert row_scale[row] == np.float32(w.tensor_scale[0, 0])
        else:
            assert row_scale[row] == scale[row].max()
            assert row_scale[row] * 2.0**-got == scale[row, index]


@formats
def test_what_is_not_finite_or_zero(name):
    x = np.random.default_rng(1).standard_normal((70, 256)).astype(np.float32)
    x[3, 5], x[66, 200] = np.nan, np.inf
    x[4], x[7, 128:] = 0, 0
    w = quantize(x, name.split(",")[0], **FORMATS[name])
    packed = pack_weight(w)
    bad = np.isnan(np.asarray(packed.row_scale))
    assert sorted(np.flatnonzero(bad)) == [3, 66]
    assert_same(packed.unpack(), w)


def test_scale_of_zero():
    """Its values become zeros, as they are."""
    w = weight("nvfp4", (2, 32))
    scale = w.scale.at[0, 1].set(0)
    got = pack_weight(type(w)(w.values, scale, w.tensor_scale)).unpack()
    assert (np.float32(got.values)[0, 16:] == 0).all()
    np.testing.assert_array_equal(np.float32(got.values)[1], np.float32(w.values)[1])
    assert float(got.scale[0, 1]) == 0


@formats
def test_transforms(name):
    w = weight(name, (3, 70, 256))
    assert_same(jax.jit(pack_weight)(w), pack_weight(w))
    assert_same(jax.vmap(pack_weight)(w).data, pack_weight(w).data)
    assert_same(jax.vmap(lambda w: pack_weight(w).unpack())(w), w)


@formats
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("axis", [0, 1])
def test_tiles_stay_where_they_are(name, kind, axis):
    mesh = jax.make_mesh((4,), ("x",), (kind,), devices=jax.devices("cpu")[:4])
    w = weight(name, (256, 512))
    spec = P(*("x" if i == axis else None for i in range(2)))

    def put(a):
        whole = a.shape[0] == 1 or a.shape[1] == 1
        return jax.device_put(a, NamedSharding(mesh, P() if whole else spec))

    with jax.set_mesh(mesh):
        sharded = jax.tree.map(put, w)
        text = jax.jit(pack_weight).lower(sharded).compile().as_text()
        got = jax.jit(pack_weight)(sharded)
        back = jax.jit(PackedWeight.unpack)(got)
    assert "all-gather" not in text
    assert got.data.sharding.spec[axis] == "x"
    assert_same(got, pack_weight(w))
    assert_same(back, w)


def test_errors():
    w = weight("nvfp4", (64, 128))
    with pytest.raises(ValueError, match="w is a PackedWeight, wanted a QuantizedArray"):
        pack_weight(pack_weight(w))
    with pytest.raises(ValueError, match="w.values has dtype float8_e4m3fn"):
        pack_weight(quantize(jnp.ones((64, 128))))
    with pytest.raises(ValueError, match=r"w.scale has shape \(64, 7\), wanted \(64, 8\)"):
        pack_weight(type(w)(w.values, w.scale[:, 1:], w.tensor_scale))
    with pytest.raises(ValueError, match=r"w.values has shape \(128,\), wanted two axes"):
        pack_weight(type(w)(w.values[0], w.scale[0], w.tensor_scale))


def test_scales_of_rows_relative_to_the_largest():
    """Powers of two, also where a row has NaN or the least of scales."""
    codes = [[0, 120, 0, 100], [127, 3, 255, 127], [90, 130, 7, 1], [0, 0, 0, 0]]
    scale = jax.lax.bitcast_convert_type(jnp.array([codes, codes], jnp.uint8), jnp.float8_e8m0fnu)
    w = quantize(jnp.ones((2, 4, 128)), "mxfp4")
    packed = pack_weight(dataclasses.replace(w, scale=scale.at[1, 2].set(1)))
    factor, largest = relative_row_scale(packed.row_scale)
    powers = np.array([[120, 127, 130, 0], [120, 127, 127, 0]])
    wanted = np.ldexp(1.0, powers - powers.max(1, keepdims=True))
    np.testing.assert_array_equal(factor[:, :4], np.where(powers == 0, 0, wanted))
    assert largest.tolist() == [8.0, 1.0]
    least, _ = relative_row_scale(packed.row_scale[:, 3:4])
    np.testing.assert_array_equal(least, [[1], [1]])
