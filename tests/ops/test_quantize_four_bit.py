"""quantize to NVFP4, MXFP4 and integers, beside numpy's float64 and ml_dtypes' roundings."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from four_bit import FORMATS
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import QuantizedArray, quantize

E2M1, E4M3, E8M0 = (
    ml_dtypes.float4_e2m1fn,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e8m0fnu,
)
formats = pytest.mark.parametrize("name", FORMATS)


def run(name, x, **options):
    return quantize(x, name.split()[0], **FORMATS[name], **options)


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def blocks(x, size):
    return np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, size)


def expected(name, x):
    """values, scale, tensor_scale and zero_point of finite x, by exact quotients."""
    size = {"nvfp4": 16, "mxfp4": 32}.get(name) or FORMATS[name]["group_size"]
    x = blocks(x, size)
    amax = np.abs(x).max(-1)
    if name == "nvfp4":
        whole = amax.max((-2, -1), keepdims=True).astype(np.float32) * np.float32(1 / 2688)
        scale = (amax / (6 * whole.astype(np.float64))).astype(E4M3)
        unit = np.float32(scale) * whole
        values = (x / unit[..., None].astype(np.float64)).astype(E2M1)
        return values, scale, whole, None
    if name == "mxfp4":
        scale = np.exp2(np.floor(np.log2(amax)) - 2)
        values = np.clip(x / scale[..., None], -6, 6).astype(E2M1)
        return values, scale.astype(E8M0), None, None
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    zeros = FORMATS[name].get("zero_point", False)
    span, steps = (high - low, 15) if zeros else (amax, 7)
    scale = (np.float32(span) * np.float32(1 / steps)).astype(ml_dtypes.bfloat16)
    unit = scale.astype(np.float64)
    zero = np.clip(np.round(-low / unit) - 8, -8, 7) if zeros else np.zeros_like(unit)
    values = np.clip(np.round(x / unit[..., None]) + zero[..., None], -8, 7)
    return values, scale, None, zero if zeros else None


def check(got, name, x):
    values, scale, whole, zero = expected(name, x)
    np.testing.assert_array_equal(np.float32(got.values), np.float32(values).reshape(x.shape))
    np.testing.assert_array_equal(np.float32(got.scale), np.float32(scale))
    for field, wanted in (("tensor_scale", whole), ("zero_point", zero)):
        if wanted is None:
            assert getattr(got, field) is None
        else:
            np.testing.assert_array_equal(np.float32(getattr(got, field)), np.float32(wanted))
    unit = np.float64(scale)
    exact = (
        blocks(np.float64(values).reshape(x.shape), values.shape[-1])
        - (0 if zero is None else zero[..., None])
    ) * unit[..., None]
    exact = exact.reshape(x.shape) * (1 if whole is None else np.float64(whole))
    np.testing.assert_array_equal(got.dequantize(), exact.astype(np.float32))


@formats
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(5, 128), (2, 1, 3, 256), (1, 64)])
def test_values(name, dtype, shape):
    x = normal(shape, dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    got = run(name, x)
    assert got.shape == shape
    check(got, name, x)


def test_dtypes():
    x = normal((4, 128))
    for name, values, scale in (
        ("nvfp4", jnp.float4_e2m1fn, jnp.float8_e4m3fn),
        ("mxfp4", jnp.float4_e2m1fn, jnp.float8_e8m0fnu),
        ("int4", jnp.int4, jnp.bfloat16),
    ):
        got = run(name, x)
        assert (got.values.dtype, got.scale.dtype) == (values, scale)
    assert quantize(x, "int4").scale.shape == (4, 1)
    assert run("nvfp4", x).tensor_scale.dtype == jnp.float32
    assert run("int4 with zero points", x).zero_point.dtype == jnp.int4


@pytest.mark.parametrize("largest", [6.0, 6.0 * 2**-40, 6.0 * 2**90])
def test_ties(largest):
    """Half of what lies between two values goes to the even code, on both sides of zero."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.0], np.float32)
    row = np.concatenate([ties, -ties, [6.0], np.zeros(15)]).astype(np.float32)
    wanted = np.concatenate([np.float32(row[:16].astype(E2M1)), row[16:]])
    got = quantize(row[None] * np.float32(largest / 6), "mxfp4")
    values = np.float32(got.values)[0]
    np.testing.assert_array_equal(values, wanted)
    np.testing.assert_array_equal(np.signbit(values[:16]), np.signbit(row[:16]))
    assert float(got.scale[0, 0]) == largest / 6


def test_ties_of_integers():
    """To even integers, where quotients that are rounded first would not see that they are none."""
    scale = np.float32(1.0078125)  # bfloat16 has no fewer bits for it
    exact = np.float32(np.arange(-6, 6) + 0.5) * scale
    nearly = np.nextafter(exact, np.float32(np.inf))
    row = np.zeros(32, np.float32)
    row[:12], row[12:24], row[24] = exact, nearly, 7 * scale
    got = quantize(row[None], "int4", group_size=32)
    assert float(got.scale[0, 0]) == scale
    values = np.float32(got.values)[0]
    np.testing.assert_array_equal(values[:12], np.round(np.arange(-6, 6) + 0.5))
    np.testing.assert_array_equal(values[12:24], np.arange(-5, 7))


def test_saturation():
    """Of MXFP4, whose scales are of the power of two below the largest."""
    row = np.zeros((1, 32), np.float32)
    row[0, :4] = 7.9, -7.9, 6.1, 4.9
    got = quantize(row, "mxfp4")
    assert float(got.scale[0, 0]) == 1
    np.testing.assert_array_equal(np.float32(got.values)[0, :4], [6, -6, 6, 4])


@formats
@pytest.mark.parametrize("search", [False, True])
def test_zeros_and_what_is_not_finite(name, search):
    x = normal((4, 256))
    x[0] = 0.0
    x[1, 3], x[2, 70], x[2, 200] = np.nan, np.inf, -np.inf
    got = run(name, x, search=search)
    size = x.shape[1] // got.scale.shape[1]
    bad = np.zeros((4, x.shape[1] // size), bool)
    bad[1, 3 // size] = bad[2, 70 // size] = bad[2, 200 // size] = True
    np.testing.assert_array_equal(np.isnan(np.float32(got.scale)), bad)
    back = blocks(got.dequantize(), size)
    assert np.isnan(back[bad]).all()
    assert (back[0] == 0).all()
    clean = np.where(np.isfinite(x), x, 0)
    others = blocks(run(name, clean, search=search).dequantize(), size)
    alone = ~bad & ~np.isnan(back).any(-1)
    np.testing.assert_array_equal(back[alone], others[alone])


@formats
def test_a_nan_anywhere(name):
    """Wherever in its block it is."""
    x = np.repeat(normal((1, 128)), 128, 0)
    np.fill_diagonal(x, np.nan)
    got = run(name, x)
    size = 128 // got.scale.shape[1]
    wanted = np.arange(128)[:, None] // size == np.arange(128 // size)
    np.testing.assert_array_equal(np.isnan(np.float32(got.scale)), wanted)


def test_small_blocks():
    """An e4m3 scale that is rounded to zero makes zeros."""
    x = np.full((1, 32), 1e-6, np.float32)
    x[0, 16:] = 448.0
    got = quantize(x, "nvfp4")
    assert float(got.scale[0, 0]) == 0
    assert (np.asarray(got.dequantize())[0, :16] == 0).all()


@pytest.mark.parametrize("x", [np.zeros((2, 64)), np.full((2, 64), 1e-42), np.full((2, 64), -0.0)])
def test_zero_matrix(x):
    got = quantize(x.astype(np.float32), "nvfp4")
    assert (np.asarray(got.tensor_scale) == 1).all()
    assert (np.asarray(got.dequantize()) == 0).all()
    np.testing.assert_array_equal(np.signbit(np.float32(got.values)), np.signbit(x))


@formats
def test_search(name):
    """The squared error of no block grows, and that of all gets smaller."""
    x = normal((16, 512), seed=3)
    plain, searched = run(name, x), run(name, x, search=True)
    size = x.shape[1] // plain.scale.shape[1]

    def errors(got):
        return np.square(blocks(np.asarray(got.dequantize()) - x, size)).sum(-1)

    assert (errors(searched) <= errors(plain) * (1 + 1e-5)).all()
    assert errors(searched).sum() < 0.99 * errors(plain).sum()


@formats
def test_rounding_at_random(name):
    """To one of the values around, with the mean kept; the same key rounds the same way."""
    x = np.repeat(normal((1, 128), seed=1), 2000, 0)
    key = jax.random.key(0)
    got = run(name, x, key=key)
    again = jax.jit(functools.partial(run, name))(x, key=key)
    np.testing.assert_array_equal(np.float32(got.values), np.float32(again.values))
    plain = run(name, x)
    np.testing.assert_array_equal(np.float32(got.scale), np.float32(plain.scale))
    back, nearest = np.asarray(got.dequantize()), np.asarray(plain.dequantize())
    size = x.shape[1] // got.scale.shape[1]
    unit = np.repeat(np.float32(got.scale), size, -1)
    unit *= 1 if got.tensor_scale is None else np.float32(got.tensor_scale)
    inside = np.abs(x) <= (6 if "fp4" in name else 7) * unit * (1 if "zero" not in name else 0.5)
    assert inside.mean() > 0.5
    assert len(np.unique(back[:, 0])) <= 2 < len(np.unique(nearest[0]))
    off = np.abs(back.mean(0) - x.mean(0)) / unit.mean(0)
    assert off[inside.all(0)].max() < 6 / np.sqrt(len(x))


@formats
def test_transforms(name):
    x = normal((3, 4, 128))
    whole = run(name, x)
    mapped = jax.vmap(functools.partial(run, name))(x)
    jitted = jax.jit(functools.partial(run, name))(x)
    for got in (mapped, jitted):
        assert isinstance(got, QuantizedArray)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(np.float32(a), np.float32(b))
    with pytest.raises(NotImplementedError, match="quantize has no derivative"):
        jax.grad(lambda x: run(name, x).dequantize().sum())(x)


@formats
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_rows_stay_where_they_are(name, kind):
    mesh = jax.make_mesh((8,), ("x",), (kind,), devices=jax.devices("cpu"))
    x = normal((16, 128))
    sharded = jax.device_put(x, NamedSharding(mesh, P("x", None)))
    with jax.set_mesh(mesh):
        compiled = jax.jit(functools.partial(run, name)).lower(sharded).compile()
        got = compiled(sharded)
    assert "all-gather" not in compiled.as_text()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(run(name, x)), strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))
    assert got.values.sharding.spec[0] == "x"


def test_errors():
    x = normal((4, 128))
    for options, message in (
        ({"format": "nvfp4", "group_size": 16}, "group_size is 16, wanted None for 'nvfp4'"),
        ({"format": "mxfp4", "zero_point": True}, "zero_point is True, wanted False for 'mxfp4'"),
        ({"format": "int4", "group_size": 16}, "group_size is 16, wanted one of 32, 64, 128"),
        ({"format": "nvfp4", "scaling": "tensor"}, "scaling is 'tensor', wanted the default"),
        ({"format": "int4", "orientation": "both"}, "orientation is 'both', wanted the default"),
        ({"format": "int4", "search": 1}, "search is 1, wanted True or False"),
        ({"search": True}, "search is True, wanted the default for FP8"),
        ({"group_size": 32}, "group_size is 32, wanted the default for FP8"),
        ({"format": "fp4"}, "format is 'fp4', wanted one of"),
        ({"format": "nvfp4", "implementation": "triton"}, "implementation is 'triton'"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(x, **options)
    with pytest.raises(ValueError, match="x has 120 columns, wanted a multiple of 16 for 'nvfp4'"):
        quantize(x[:, :120], "nvfp4")
    with pytest.raises(NotImplementedError, match="'cuda': search is True, wanted False"):
        quantize(x, "nvfp4", search=True, implementation="cuda")
    quantize(x, "nvfp4", search=True, implementation=["cuda", "xla"])
