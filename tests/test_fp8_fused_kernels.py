"""The CUDA kernels of the fused quantisers, and fp8_mlp on the GPU."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from fp8 import E4M3, E5M2, RECIPES, assert_near, assert_same_fp8, numpy_quantize

from jaxkern import fp8_mlp, quantize_rms_norm, quantize_swiglu, quantize_swiglu_grad
from jaxkern.testing import poison_memory

pytestmark = pytest.mark.gpu

SHAPES = [(128, 128), (3, 5), (130, 200), (257, 1000), (256, 384), (3, 40000)]


def draw(rows, columns, dtype):
    """gate, up and dh."""
    rng = np.random.default_rng(rows * 1_000_003 + columns)
    dtype = getattr(ml_dtypes, dtype) if dtype == "bfloat16" else np.dtype(dtype)
    gate = 3 * rng.standard_normal((rows, columns))
    gate[0] = 0.0
    others = [rng.standard_normal(gate.shape) * 2.0 ** rng.integers(-4, 4) for _ in range(2)]
    return [x.astype(dtype) for x in (gate, *others)]


def numpy_matrices(gate, up, dh):
    """h and the gradients of gate and up, rounded to the operands' dtype."""
    dtype = gate.dtype
    gate, up, dh = (x.astype(np.float64) for x in (gate, up, dh))
    s = 1 / (1 + np.exp(-gate))
    wanted = gate * s * up, dh * up * s * (1 + gate * (1 - s)), dh * gate * s
    return [x.astype(np.float32).astype(dtype) for x in wanted]


def check(got, wanted, format, scaling):
    """Equal, but that a number between two of the format may become the other one."""
    values, scale = numpy_quantize(wanted, format, scaling)
    same = np.asarray(got.scale) == scale
    assert same.mean() >= 0.99 or (~same).sum() <= 1  # an amax between two powers of two
    scales = np.repeat(np.repeat(same, 128, -1), 128, -2) if scaling == "128x128" else same
    if scaling == "1x128":
        scales = np.repeat(same, 128, -1)
    scales = np.broadcast_to(scales[..., : values.shape[-2], : values.shape[-1]], values.shape)
    found, values = (
        np.where(scales, np.asarray(x).astype(np.float32), 0) for x in (got.values, values)
    )
    step = 2.0 ** -(3 if format == E4M3 else 2)
    tiny = 2.0 ** -(9 if format == E4M3 else 16)
    error = np.abs(found - values)
    assert (error <= np.maximum(step * np.abs(values), tiny)).all()
    assert (error > 0).mean() < 2e-3 or (error > 0).sum() <= 1


orientations = pytest.mark.parametrize("orientation", ["natural", "transposed", "both"])
scalings = pytest.mark.parametrize("scaling", ["row", "1x128", "128x128"])
dtypes = pytest.mark.parametrize(
    "dtype, format", [("bfloat16", E4M3), ("float32", E5M2), ("float16", E4M3)]
)


def pairs(arrays, x, orientation):
    """What a quantiser gave, each beside the matrix that it is of."""
    matrices = {"natural": [x], "transposed": [x.T], "both": [x, x.T]}[orientation]
    return zip(arrays if orientation == "both" else [arrays], matrices, strict=True)


@pytest.mark.parametrize("rows, columns", SHAPES)
@orientations
@scalings
@dtypes
def test_quantize_swiglu(rows, columns, orientation, scaling, dtype, format):
    gate, up, dh = draw(rows, columns, dtype)
    options = {
        "format": format,
        "scaling": scaling,
        "orientation": orientation,
        "implementation": "cuda",
    }
    h = jax.jit(functools.partial(quantize_swiglu, **options))(gate, up)
    grads = jax.jit(functools.partial(quantize_swiglu_grad, **options))(gate, up, dh)
    for arrays, x in zip((h, *grads), numpy_matrices(gate, up, dh), strict=True):
        for array, matrix in pairs(arrays, x, orientation):
            check(array, matrix, format, scaling)


def check_rms_norm(rows, columns, orientation, scaling, dtype, format):
    """The bits of what NumPy makes of rstd, computed or given; with a NaN and an infinity in x."""
    x, _, scale = draw(rows, columns, dtype)
    x[-1, columns // 2] = np.nan
    x[-2, columns // 3] = np.inf
    scale = scale[0].astype(np.float32)
    poison_memory(1 << 26)
    options = {"scaling": scaling, "orientation": orientation, "implementation": "cuda"}

    @jax.jit
    def run(x, scale):
        computed, rstd = quantize_rms_norm(x, scale, format, epsilon=0.5, **options)
        given, _ = quantize_rms_norm(x, scale, format, rstd=0.75 * rstd, **options)
        return (computed, rstd), (given, 0.75 * rstd)

    results = run(x, scale)
    with np.errstate(invalid="ignore"):
        mean = (x.astype(np.float64) ** 2).mean(-1)
        np.testing.assert_allclose(results[0][1], 1 / np.sqrt(mean + 0.5), rtol=1e-5)
        for arrays, rstd in results:
            single = x.astype(np.float32) * np.asarray(rstd)[:, None] * scale
            for array, matrix in pairs(arrays, single.astype(x.dtype), orientation):
                values, scales = numpy_quantize(matrix, format, scaling)
                np.testing.assert_array_equal(array.scale, scales)
                assert_same_fp8(array.values, values)


@pytest.mark.parametrize("rows, columns", [*SHAPES, (3, 40001), (1100, 1500)])
@orientations
@scalings
@dtypes
def test_quantize_rms_norm(rows, columns, orientation, scaling, dtype, format):
    check_rms_norm(rows, columns, orientation, scaling, dtype, format)


@pytest.mark.parametrize("rows, columns", [(13001, 72), (300, 17000)])
@pytest.mark.parametrize("scaling", ["row", "1x128"])
def test_quantize_rms_norm_of_more_rows_than_blocks(rows, columns, scaling):
    """Blocks go from row to row; the wider ones are more than they keep in registers."""
    check_rms_norm(rows, columns, "natural", scaling, "bfloat16", E4M3)


def test_quantize_rms_norm_repeats_bitwise():
    x, _, scale = draw(3000, 4096, "bfloat16")
    run = jax.jit(functools.partial(quantize_rms_norm, scaling="128x128", orientation="both"))
    first, *others = (jax.device_get(run(x, scale[0])) for _ in range(5))
    for other in others:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("m", [8, 300])
def test_fp8_mlp(recipe, m):
    """Against the reference on the CPU: y and all gradients.

    Products differ in their last bits, and a value in a hundred then rounds to another FP8 number.
    """
    rng = np.random.default_rng(m)
    shapes = (m, 512), (512,), (512, 1024), (512, 1024), (1024, 512), (m, 512)
    sizes = 1, 1, 512**-0.5, 512**-0.5, 1024**-0.5, 1
    x, scale, *weights, dy = (
        jnp.asarray(size * rng.standard_normal(shape), jnp.float32)
        for shape, size in zip(shapes, sizes, strict=True)
    )
    x, dy = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation, *operands):
        *primals, dy = operands
        mlp = functools.partial(fp8_mlp, recipe=recipe, implementation=implementation)
        y, pull = jax.vjp(mlp, *primals)
        return y, *pull(dy)

    operands = x, scale, *weights, dy
    got, wanted = (
        run(name, *jax.device_put(operands, jax.devices(platform)[0]))
        for name, platform in (("cuda", "cuda"), ("xla", "cpu"))
    )
    assert_near(got, wanted, 1e-2)
