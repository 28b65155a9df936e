"""quantized_matmul with activation_format "fp8", beside float64 products of what both stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxkern import pack_weight, quantize, quantized_matmul
from jaxkern.ops.quantized_matmul_fp8 import weight_to_fp8
from jaxkern.testing import FOUR_BIT_TIMES_FP8_LIMITS, relative_error

FORMATS = {
    "nvfp4": {},
    "mxfp4": {},
    "int4": {},
    "int4 with zero points": {"zero_point": True},
    "int4 of 64": {"group_size": 64, "zero_point": True},
    "int4 of 32": {"group_size": 32},
}
formats = pytest.mark.parametrize("name", FORMATS)
N, K = 24, 256
FEW, MANY = 256, 257  # rows of x, from which on the weight is rounded too


def weight(name, shape=(N, K), seed=0):
    w = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return quantize(w, name.split()[0], **FORMATS[name])


def normal(*shape, dtype="float32", seed=1):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def float64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def run(x, w, **options):
    return quantized_matmul(x, w, activation_format="fp8", **options)


def e4m3(x):
    """To the nearest, ties to even: of |x| from 2^-6 on three bits of mantissa, else 2^-9 steps."""
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)
    return np.ldexp(np.round(np.ldexp(x, 3 - exponent)), exponent - 3)


def numpy_weight_to_fp8(w):
    """Values and scales by rows, in float64 but for float16's roundings."""
    values, scale = float64(w.values), float64(w.scale)
    integers, block = w.values.dtype == jnp.int4, values.shape[1] // scale.shape[1]
    if w.zero_point is not None:
        values = values - float64(w.zero_point).repeat(block, 1)
    out, factors = np.zeros_like(values), np.ones((len(values), 1))
    for row, of_row in enumerate(scale):
        top = 3 if integers else 6 if w.tensor_scale is None else 5
        factors[row] = 2.0 ** (np.floor(np.log2(of_row.max())) - top)
        share = values[row] * of_row.repeat(block) / factors[row]
        out[row] = e4m3(np.float64(np.float16(share)) if integers else share)
    return out, factors * (1 if w.tensor_scale is None else float64(w.tensor_scale))


def numpy_rounded(w):
    values, scale = numpy_weight_to_fp8(w)
    return values * scale


def rounded(w):
    return weight_to_fp8(w).dequantize()


@pytest.mark.parametrize(
    "name, columns",
    [(name, 256) for name in FORMATS] + [(name, 160) for name in ("nvfp4", "mxfp4", "int4 of 32")],
)
@pytest.mark.parametrize("spread", [0, 8, 30])
def test_weight_to_fp8(name, columns, spread):
    """spread: of magnitudes along a row, as an exponent of 2."""
    w = np.random.default_rng(0).standard_normal((N, columns), np.float32)
    w *= 2.0 ** -(spread * np.random.default_rng(1).random((N, columns // 32, 1))).repeat(
        32, 1
    ).reshape(w.shape)
    w = quantize(w, name.split()[0], **FORMATS[name])
    values, scale = numpy_weight_to_fp8(w)
    assert np.abs(values).max() <= 448
    for same in (w, pack_weight(w)):
        got = weight_to_fp8(same)
        assert (got.values.dtype, got.scale.shape) == (jnp.float8_e4m3fn, (N, 1))
        np.testing.assert_array_equal(float64(got.values), values)
        np.testing.assert_allclose(got.scale, scale, rtol=2**-23)
    if name == "mxfp4" and spread < 30:
        np.testing.assert_array_equal(rounded(w), w.dequantize())
    else:
        assert (np.float32(rounded(w)) != np.float32(w.dequantize())).any()


@formats
def test_a_weight_of_zeros(name):
    w = quantize(jnp.zeros((N, K)), name.split()[0], **FORMATS[name])
    np.testing.assert_array_equal(rounded(w), np.zeros((N, K)))


def test_nvfp4_is_exact_where_it_fits():
    """All codes but +-1.5, 3 and 6, and those with scales of an even mantissa, 6 excepted."""
    w = weight("nvfp4", (256, 1024))
    values, scale = np.abs(float64(w.values)), float64(w.scale).repeat(16, 1)
    mantissa = np.frexp(scale)[0] * 16 % 8
    fits = np.isin(values, [0, 0.5, 1, 2, 4]) | np.isin(mantissa, [0, 2, 4])
    same = float64(rounded(w)) == float64(w.dequantize())
    np.testing.assert_array_equal(same, fits)


@formats
@pytest.mark.parametrize(
    "dtype, lead",
    [
        ("float32", (5,)),
        ("bfloat16", (2, 3)),
        ("float16", ()),
        ("bfloat16", (FEW,)),
        ("float32", (MANY,)),
        ("float16", (2, 150)),
    ],
)
def test_product(name, dtype, lead):
    """Of x as it is quantised, and of the weight, which is rounded if there are many rows, but for
    integers in groups of 128."""
    x, w = normal(*lead, K, dtype=dtype), weight(name)
    quantized = float64(quantize(jnp.atleast_2d(x)).dequantize()).reshape(*lead, K)
    rounds = int(np.prod(lead)) >= MANY and w_format(w) != ("int4", 128)
    wanted = quantized @ (numpy_rounded(w) if rounds else float64(w.dequantize())).T
    got = run(x, w)
    assert (got.shape, got.dtype) == ((*lead, N), dtype)
    limit = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    np.testing.assert_allclose(float64(got), wanted, rtol=limit, atol=1e-4)
    single = run(x, w, preferred_element_type=jnp.float32)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, wanted, rtol=1e-5, atol=1e-4)
    packed = run(x, pack_weight(w))
    np.testing.assert_allclose(float64(packed), wanted, rtol=limit, atol=1e-4)


@formats
def test_error(name):
    """Beside float64 products of x and of what the weight stands for."""
    x, w = normal(MANY, 1024, dtype="bfloat16"), weight(name, (256, 1024))
    exact = float64(x) @ float64(w.dequantize()).T
    limit = FOUR_BIT_TIMES_FP8_LIMITS[w_format(w)]
    assert 0.9 * limit < relative_error(run(x, w, preferred_element_type="float32"), exact) < limit
    few = relative_error(run(x[:64], w, preferred_element_type="float32"), exact[:64])
    of_x = FOUR_BIT_TIMES_FP8_LIMITS["mxfp4", 32]  # an exact weight
    assert 0.9 * of_x < few < of_x


def w_format(w):
    packed = pack_weight(w)
    return packed.format, packed.block


@formats
@pytest.mark.parametrize("rows", [5, MANY])
def test_gradient(name, rows):
    """As without."""
    x, w = normal(rows, K, dtype="bfloat16"), weight(name)
    dy = normal(rows, N, dtype="bfloat16", seed=2)
    got, wanted = (
        jax.vjp(lambda x, f=f: quantized_matmul(x, w, activation_format=f), x)[1](dy)[0]
        for f in ("fp8", None)
    )
    np.testing.assert_array_equal(float64(got), float64(wanted))


@formats
@pytest.mark.parametrize("rows", [5, MANY])
def test_transforms(name, rows):
    x, w = normal(3, rows, K), weight(name)
    wanted = run(x, w)
    for other in (jax.vmap(run, (0, None)), jax.jit(run)):
        np.testing.assert_allclose(other(x, w), wanted, rtol=1e-5, atol=1e-5)
    many = jax.tree.map(lambda *a: jnp.stack(a), *(weight(name, seed=i) for i in range(3)))
    got = jax.vmap(run)(x, many)
    for i in range(3):
        np.testing.assert_allclose(got[i], run(x[i], weight(name, seed=i)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [4, MANY])
def test_what_is_not_finite(rows):
    x, w = np.array(normal(rows, K)), np.array(normal(N, K, seed=2))
    x[1, 3], w[5, 7] = np.inf, np.nan
    got = np.isnan(run(jnp.asarray(x), quantize(jnp.asarray(w), "nvfp4")))
    wanted = np.zeros_like(got)
    wanted[1], wanted[:, 5] = True, True
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rows", [4, MANY])
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_rows_of_the_weight_stay_where_they_are(kind, rows):
    mesh = jax.make_mesh((8,), ("x",), (kind,), devices=jax.devices("cpu"))
    x, w = normal(rows, K), pack_weight(weight("nvfp4", (512, K)))

    def put(a):
        return jax.device_put(a, NamedSharding(mesh, P("x" if a.shape[0] > 1 else None)))

    with jax.set_mesh(mesh):
        sharded = jax.tree.map(put, w)
        text = jax.jit(run).lower(x, sharded).compile().as_text()
        got = jax.jit(run)(x, sharded)
    assert not [c for c in ("all-gather", "all-reduce") if c in text]
    assert got.sharding.spec[-1] == "x"
    np.testing.assert_allclose(got, run(x, w), rtol=1e-5, atol=1e-5)


def test_errors():
    x, w = normal(5, K), weight("mxfp4")
    with pytest.raises(ValueError, match="'int8', wanted None, 'fp8' or 'nvfp4'"):
        quantized_matmul(x, w, activation_format="int8")
    with pytest.raises(ValueError, match="'nvfp4', wanted None or 'fp8' for a w of 'mxfp4'"):
        quantized_matmul(x, w, activation_format="nvfp4")
    with pytest.raises(ValueError, match="wanted False for activation_format None"):
        quantized_matmul(x, w, fast_accumulation=True)
    with pytest.raises(ValueError, match="fast_accumulation is 1, wanted True or False"):
        run(x, w, fast_accumulation=1)
    with pytest.raises(NotImplementedError, match="wanted what pack_weight makes of it"):
        run(x, w, implementation="cuda")
