"""scaled_matmul: semantics of the public function, on the path of the kernel and the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8 import BLOCKS, E4M3, E5M2, SCALES, numpy_scaled_matmul, random_operands
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkern import quantize, scaled_matmul
from jaxkern.testing import FP8_PRODUCT_LIMITS, random_normal, relative_error

pytestmark = pytest.mark.usefixtures("kernels")

implementations = pytest.mark.parametrize("implementation", [None, "xla"])
scales = pytest.mark.parametrize("scalings", SCALES, ids="-".join)


def assert_close(got, wanted, dtype="float32"):
    wanted, size = wanted
    assert (got.dtype, got.shape) == (dtype, wanted.shape)
    eps = {"float32": 0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    error = np.abs(np.asarray(got).astype(np.float64) - wanted)
    assert (error <= 1e-6 * size + eps * np.abs(wanted)).all()


@implementations
@scales
@pytest.mark.parametrize("shape", [(5, 7, 300), (130, 256, 384), (3, 8, 128)])
def test_scales(implementation, scalings, shape):
    for batch in ((), (2,)):
        operands = random_operands(1, *shape, *scalings, batch=batch)
        got = scaled_matmul(*operands, implementation=implementation)
        assert_close(got, numpy_scaled_matmul(*operands))


@implementations
@pytest.mark.parametrize("lhs_format", [E4M3, E5M2])
@pytest.mark.parametrize("rhs_format", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_formats_results_and_bias(implementation, lhs_format, rhs_format, dtype):
    formats = lhs_format, rhs_format
    operands = random_operands(2, 17, 128, 256, "1x128", "128x128", formats=formats)
    bias = random_normal(3, (128,), dtype="bfloat16")[0]
    for options in ({}, {"bias": bias}):
        got = scaled_matmul(*operands, dtype, implementation=implementation, **options)
        assert_close(got, numpy_scaled_matmul(*operands, **options), dtype)


@pytest.mark.parametrize("formats", FP8_PRODUCT_LIMITS, ids="-".join)
@scales
def test_product_of_quantised_matrices(formats, scalings):
    """Against the product of the matrices before they were quantised."""
    arrays = random_normal(4, (200, 300), (260, 300), dtype="float32")
    lhs, rhs = (
        quantize(x, format, scaling=scaling)
        for x, format, scaling in zip(arrays, formats, scalings, strict=True)
    )
    got = scaled_matmul(lhs.values, rhs.values, lhs.scale, rhs.scale, "bfloat16")
    a, b = (np.asarray(x, np.float64) for x in arrays)
    limit = FP8_PRODUCT_LIMITS[formats]
    assert limit / 1.25 < relative_error(got, a @ b.T) < limit


@implementations
@pytest.mark.parametrize("scalings", [("tensor", "row"), ("1x128", "1x128")], ids="-".join)
def test_long_sums(implementation, scalings):
    operands = random_operands(5, 4, 8, 65536, *scalings)
    got = scaled_matmul(*operands, implementation=implementation)
    assert_close(got, numpy_scaled_matmul(*operands))


@settings(max_examples=10, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 300)] * 3),
    scalings=st.sampled_from(SCALES),
    with_bias=st.booleans(),
)
def test_any_shape(sizes, scalings, with_bias):
    operands = random_operands(6, *sizes, *scalings)
    bias = np.arange(sizes[1], dtype=np.float32) if with_bias else None
    assert_close(scaled_matmul(*operands, bias=bias), numpy_scaled_matmul(*operands, bias))


@implementations
@pytest.mark.parametrize("n", [1, 100, 200])
def test_blocks_of_rows_without_blocks_of_depth(implementation, n):
    """K of one block: [ceil(N / 128), 1] scales go with any of lhs."""
    for lhs_scaling in ("tensor", "row", "1x128"):
        operands = random_operands(7, 5, n, 100, lhs_scaling, "128x128")
        got = scaled_matmul(*operands, implementation=implementation)
        assert_close(got, numpy_scaled_matmul(*operands))


@implementations
@scales
@pytest.mark.parametrize("shape", [(0, 8, 256), (4, 0, 256), (4, 8, 0)])
def test_empty_axes(implementation, scalings, shape):
    m, n, k = shape
    lhs, rhs = jnp.zeros((m, k), E4M3), jnp.zeros((n, k), E4M3)
    operands = lhs, rhs
    for x, scaling in zip((lhs, rhs), scalings, strict=True):
        high, wide = BLOCKS[scaling]
        rows = 1 if high is None else -(-x.shape[0] // high)
        operands += (jnp.ones((rows, 1 if wide is None else -(-k // wide))),)
    bias = jnp.arange(n, dtype=jnp.float32)
    got = scaled_matmul(*operands, bias=bias, implementation=implementation)
    assert (got == jnp.broadcast_to(bias, (m, n))).all()


# --- Transforms -----------------------------------------------------------------------------------


@implementations
@scales
@pytest.mark.parametrize("batched", ["all", "lhs", "lhs values", "rhs", "rhs scales", "bias"])
def test_vmap(implementation, scalings, batched):
    m, n, k = (5, 128, 256) if scalings[1] == "128x128" else (5, 12, 256)
    several = random_operands(8, m, n, k, *scalings, batch=(3,))
    several += (np.random.default_rng(9).standard_normal((3, n)).astype(np.float32),)
    is_batched = {
        "all": (1, 1, 1, 1, 1),
        "lhs": (1, 0, 1, 0, 0),
        "lhs values": (1, 0, 0, 0, 0),
        "rhs": (0, 1, 0, 1, 0),
        "rhs scales": (0, 0, 0, 1, 0),
        "bias": (0, 0, 0, 0, 1),
    }[batched]
    operands = [x if is_it else x[0] for x, is_it in zip(several, is_batched, strict=True)]

    def run(*operands):
        *operands, bias = operands
        return scaled_matmul(*operands, "bfloat16", bias=bias, implementation=implementation)

    got = jax.vmap(run, [0 if is_it else None for is_it in is_batched])(*operands)
    for i in range(3):
        own = [x[i] if is_it else x for x, is_it in zip(operands, is_batched, strict=True)]
        assert_close(got[i], numpy_scaled_matmul(*own), "bfloat16")


@implementations
@pytest.mark.parametrize("scalings", [("tensor", "row"), ("1x128", "128x128")], ids="-".join)
def test_vmap_twice(implementation, scalings):
    """lhs over both axes, and rhs over either, both or none."""
    lhs, _, lhs_scale, _ = random_operands(10, 5, 8, 256, *scalings, batch=(2, 3))
    run = functools.partial(scaled_matmul, implementation=implementation)
    for batch, inner, outer in (((), None, None), ((3,), 0, None), ((2,), None, 0), ((2, 3), 0, 0)):
        _, rhs, _, rhs_scale = random_operands(11, 5, 8, 256, *scalings, batch=batch)
        once = jax.vmap(run, (0, inner, 0, inner))
        got = jax.vmap(once, (0, outer, 0, outer))(lhs, rhs, lhs_scale, rhs_scale)
        if inner is None and outer == 0:
            rhs, rhs_scale = rhs[:, None], rhs_scale[:, None]
        rhs, rhs_scale = (np.broadcast_to(x, (2, 3, *x.shape[-2:])) for x in (rhs, rhs_scale))
        assert_close(got, numpy_scaled_matmul(lhs, rhs, lhs_scale, rhs_scale))


def test_vmap_of_a_batch():
    operands = random_operands(12, 5, 8, 256, "row", "row", batch=(2, 3))
    got = jax.vmap(scaled_matmul, (0, None, 0, None))(
        operands[0], operands[1][0], operands[2], operands[3][0]
    )
    shared = [x if i % 2 == 0 else np.stack([x[0]] * 2) for i, x in enumerate(operands)]
    assert_close(got, numpy_scaled_matmul(*shared))


@implementations
def test_no_derivative(implementation):
    lhs, rhs, lhs_scale, rhs_scale = random_operands(13, 4, 8, 32, "row", "row")

    def loss(scale):
        return scaled_matmul(lhs, rhs, scale, rhs_scale, implementation=implementation).sum()

    for transform in (jax.grad, jax.jacfwd, lambda f: jax.grad(jax.jit(f))):
        with pytest.raises(NotImplementedError, match="^scaled_matmul has no derivative"):
            transform(loss)(jnp.asarray(lhs_scale))


# --- Wrong arguments ------------------------------------------------------------------------------


def call(m=4, n=6, k=256, lhs_scales=(4, 1), rhs_scales=(6, 1), batch=(), **options):
    arrays = {
        "lhs": jnp.zeros((*batch, m, k), E4M3),
        "rhs": jnp.zeros((*batch, n, k), E4M3),
        "lhs_scales": jnp.ones(lhs_scales) if isinstance(lhs_scales, tuple) else lhs_scales,
        "rhs_scales": jnp.ones(rhs_scales),
    }
    return scaled_matmul(**{**arrays, **options})


def zeros(*shape, dtype=E4M3):
    return jnp.zeros(shape, dtype)


WRONG = {
    "lhs of bfloat16": ({"lhs": zeros(4, 256, dtype="bfloat16")}, "lhs has dtype bfloat16, wanted"),
    "rhs of int8": (
        {"rhs": zeros(6, 256, dtype="int8")},
        "rhs has dtype int8, wanted one of float8",
    ),
    "lhs of rank 1": ({"lhs": zeros(256)}, r"lhs has shape \(256,\), wanted rank 2 \(M, K\) or 3"),
    "lhs of rank 4": ({"batch": (1, 1)}, r"lhs has shape \(1, 1, 4, 256\), wanted rank 2"),
    "rhs without the batch": (
        {"lhs": zeros(2, 4, 256)},
        r"rhs has shape \(6, 256\), wanted \(2, N, 256\) for lhs's \(2, 4, 256\)",
    ),
    "rhs of another depth": (
        {"rhs": zeros(6, 255)},
        r"rhs has shape \(6, 255\), wanted \(N, 256\) for lhs's \(4, 256\)",
    ),
    "lhs_scales of another shape": (
        {"lhs_scales": (3, 2)},
        r"lhs_scales has shape \(3, 2\), wanted \(1, 1\), \(M, 1\) or \(M, ceil\(K / 128\)\) with "
        "M 4, K 256$",
    ),
    "rhs_scales of another shape": (
        {"rhs_scales": (2, 2)},
        r"rhs_scales has shape \(2, 2\), wanted \(1, 1\), \(N, 1\), \(N, ceil\(K / 128\)\) or "
        r"\(ceil\(N / 128\), ceil\(K / 128\)\) with N 6, K 256$",
    ),
    "lhs_scales of blocks of rows": ({"m": 130, "lhs_scales": (2, 2)}, r"lhs_scales has shape \(2"),
    "one lhs_scales per block of depth": ({"lhs_scales": (1, 2)}, r"lhs_scales has shape \(1, 2\)"),
    "scales without the batch": (
        {"batch": (2,)},
        r"lhs_scales has shape \(4, 1\), wanted \(B, 1, 1\), \(B, M, 1\) or .* B 2, M 4, K 256",
    ),
    "scales of another batch": (
        {"batch": (2,), "lhs_scales": (3, 4, 1)},
        r"lhs_scales has shape \(3, 4, 1\), wanted \(B, 1, 1\)",
    ),
    "scales are a vector": ({"rhs_scales": (6,)}, r"rhs_scales has shape \(6,\), wanted \(1, 1\)"),
    "scales of bfloat16": (
        {"lhs_scales": jnp.ones((4, 1), "bfloat16")},
        "lhs_scales has dtype bfloat16, wanted float32",
    ),
    "blocks of 32": (
        {"lhs_scales": (4, 8), "rhs_scales": (6, 8)},
        "lhs_scales has shape .*; blocks along K have 128 here, jax.nn.scaled_matmul takes other",
    ),
    "one side with blocks": (
        {"lhs_scales": (4, 2)},
        "lhs_scales has 2 blocks along K and rhs_scales 1, wanted the same number",
    ),
    "the other side with blocks": (
        {"rhs_scales": (1, 2)},
        "lhs_scales has 1 blocks along K and rhs_scales 2, wanted the same number",
    ),
    "result of float64": (
        {"preferred_element_type": "float64"},
        "preferred_element_type is 'float64', wanted one of float32, bfloat16, float16",
    ),
    "result of nothing": ({"preferred_element_type": None}, "preferred_element_type is None, want"),
    "bias of another width": ({"bias": jnp.ones(4)}, r"bias has shape \(4,\), wanted \(6,\), one"),
    "bias of rank 2": ({"bias": jnp.ones((1, 6))}, r"bias has shape \(1, 6\), wanted \(6,\)"),
    "bias of integers": (
        {"bias": jnp.ones(6, int)},
        "bias has dtype int32, wanted one of bfloat16",
    ),
    "fast_accumulation is a number": (
        {"fast_accumulation": 1},
        "fast_accumulation is 1, wanted Tr",
    ),
    "fast_accumulation of blocks": (
        {"lhs_scales": (4, 2), "rhs_scales": (1, 2), "fast_accumulation": True},
        "fast_accumulation is True, wanted False with scales for blocks of K",
    ),
    "unknown implementation": (
        {"implementation": "cublas"},
        "scaled_matmul: implementation is 'cublas', wanted",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_right_arguments():
    """What the cases above start from."""
    assert call(fast_accumulation=True).shape == (4, 6)


def test_the_kernel_is_not_for_a_cpu():
    with pytest.raises(NotImplementedError, match="scaled_matmul with implementation 'cuda'"):
        call(implementation="cuda")
