"""reference.attention against jax.nn's XLA path and against float64 NumPy."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    RESULTS,
    AttentionCase,
    attention_variants,
    oracle,
    random_attention_case,
    solve,
)
from jax.test_util import check_grads

from jaxkern.reference import attention as reference
from jaxkern.testing import random_normal

B, T, S, N, K, H = 2, 7, 11, 4, 2, 8


def ours(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=H**-0.5,
    is_causal=False,
    window=(None, None),
    **options,
):
    left, right = window
    if is_causal:
        right = 0 if right is None else min(right, 0)
    return reference.attention(
        query, key, value, bias, mask, scale=scale, window=(left, right), **options
    )


def jax_nn(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    window=None,
    query_lengths=None,
    key_lengths=None,
    **options,
):
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        mask,
        local_window_size=window,
        query_seq_lengths=query_lengths,
        key_value_seq_lengths=key_lengths,
        implementation="xla",
        return_residual=True,
        **options,
    )


def assert_is_the_oracle_s(case):
    """Values and gradients, that of the log-sum-exp included. Returns them."""
    arrays = case.operands()
    got = solve(case, "xla", arrays)
    for name, g, w in zip(RESULTS, got, oracle(case, *arrays), strict=True):
        size = np.abs(w, where=np.abs(w) < 1e30, out=np.ones_like(w)).max(initial=1)
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=2e-5 * size, err_msg=f"{name} of {case}")
    return got


@pytest.mark.parametrize("seed", range(16))
def test_random_case(seed):
    """Against NumPy with gradients, and against jax.nn."""
    case = random_attention_case(seed)._replace(dtype="float32")
    out, lse, *_ = assert_is_the_oracle_s(case)
    options = {"scale": case.scale, "is_causal": case.is_causal}
    wanted = jax.jit(functools.partial(jax_nn, **options))(*case.operands()[:3])
    for g, w in zip((out, lse), wanted, strict=True):
        np.testing.assert_allclose(g, w, atol=5e-5)


@pytest.mark.parametrize("part", range(4))
def test_random_variants(part):
    """Combinations of all masks and the cap, on heads of odd sizes: all pairs of options occur."""

    @hypothesis.seed(part)
    @hypothesis.settings(max_examples=12, deadline=None, database=None)
    @hypothesis.given(attention_variants(40, head_dims=(1, 4, 10), dtypes=("float32",)))
    def check(case):
        assert_is_the_oracle_s(case)

    check()


def mask(*shape):
    return np.random.default_rng(5).random(shape) < 0.6


def bias(*shape):
    return random_normal(6, shape, dtype="float32")[0]


def segments(*lengths):
    rng = np.random.default_rng(7)
    return tuple(jnp.array(rng.integers(0, 3, (B, length))) for length in lengths)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "window": {"window": (2, 1)},
    "left window": {"window": (2, 0)},
    "causal window": {"window": (3, 3), "is_causal": True},
    "query lengths": {"query_lengths": jnp.array([3, 7])},
    "key lengths": {"key_lengths": jnp.array([5, 11])},
    "empty sequences": {
        "query_lengths": jnp.array([0, 7]),
        "key_lengths": jnp.array([11, 0]),
    },
    "causal lengths": {"key_lengths": jnp.array([5, 2]), "is_causal": True},
    "full mask": {"mask": mask(B, N, T, S)},
    "head mask": {"mask": mask(1, N, 1, S)},
    "key mask": {"mask": mask(B, 1, 1, S)},
    "query mask": {"mask": mask(1, 1, T, 1)},
    "nothing visible": {"mask": np.zeros((1, 1, 1, 1), bool)},
    "full bias": {"bias": bias(B, N, T, S)},
    "batch bias": {"bias": bias(B, 1, 1, S)},
    "head bias": {"bias": bias(1, N, T, 1)},
    "all of jax.nn's": {
        "bias": bias(1, N, T, S),
        "mask": mask(B, 1, T, S),
        "is_causal": True,
        "window": (6, 2),
        "query_lengths": jnp.array([6, 2]),
        "key_lengths": jnp.array([11, 9]),
    },
}


BEYOND_JAX_NN = {
    "soft cap": {"soft_cap": 1.5},
    "soft cap, bias and mask": {
        "soft_cap": 1.5,
        "bias": bias(1, N, T, S),
        "mask": mask(B, 1, T, S),
    },
    "segments": {"segments": segments(T, S)},
    "bottom right": {"window": (3, 2), "bottom_right": True},
    "bottom right lengths": {
        "is_causal": True,
        "bottom_right": True,
        "query_lengths": jnp.array([3, 7]),
        "key_lengths": jnp.array([11, 4]),
    },
    "all of ours": {
        "soft_cap": 1.5,
        "segments": segments(T, S),
        "window": (5, 0),
        "bottom_right": True,
        "query_lengths": jnp.array([7, 5]),
        "key_lengths": jnp.array([9, 11]),
    },
}


def gradients_of_inputs(attend, query, key, value, bias=None, **options):
    """(out, lse) and the gradients of the inputs, bias too, for a cotangent of out."""

    @jax.jit
    def run(operands):
        results, pullback = jax.vjp(lambda operands: attend(*operands, **options), operands)
        cotangent = jnp.cos(jnp.arange(query.size, dtype=query.dtype)).reshape(query.shape)
        return results, pullback((cotangent, jnp.zeros_like(results[1])))[0]

    return run((query, key, value) if bias is None else (query, key, value, bias))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_jax_nn_s(name):
    check_options(name, T, S)


@pytest.mark.parametrize("name", ["plain", "causal", "window", "left window", "causal window"])
def test_options_with_more_queries_than_keys(name):
    check_options(name, S, T)


def operands_of(t, s):
    return random_normal(1, (B, t, N, H), (B, s, K, H), (B, s, K, H), dtype="float32")


@functools.cache
def in_one_block(name, t, s):
    return gradients_of_inputs(ours, *operands_of(t, s), **(OPTIONS | BEYOND_JAX_NN)[name])


def check_options(name, t, s):
    options, operands = OPTIONS[name], operands_of(t, s)
    got = in_one_block(name, t, s)
    wanted = gradients_of_inputs(jax_nn, *operands, **options)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_operands_are_computed_in_float32(dtype):
    operands = random_normal(1, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)
    out, lse = ours(*operands)
    wanted, wanted_lse = ours(*(x.astype("float32") for x in operands))
    assert (out.dtype, lse.dtype) == (dtype, "float32")
    assert (out == wanted.astype(dtype)).all()
    assert (lse == wanted_lse).all()


def test_float64():
    with jax.enable_x64():
        operands = random_normal(1, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype="float64")
        out, lse = ours(*operands)
        zeros = (np.zeros(out.shape), np.zeros(lse.shape))
        case = AttentionCase(B, T, S, K, N // K, H, "float64", seed=0)
        wanted, wanted_lse, *_ = oracle(case, *operands, *zeros)
    assert (out.dtype, lse.dtype) == ("float64", "float32")
    np.testing.assert_allclose(out, wanted, atol=1e-14)
    np.testing.assert_allclose(lse, wanted_lse, rtol=1e-6)


@pytest.mark.parametrize("name", [*OPTIONS, *BEYOND_JAX_NN])
def test_blocks_of_queries_change_nothing(name, monkeypatch):
    """Blocks of 3 queries, the last one padded, against one block."""
    options = (OPTIONS | BEYOND_JAX_NN)[name]
    assert reference._rows_per_block(T, B, S, N) is None
    wanted = in_one_block(name, T, S)
    monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 3 * B * S * N)
    assert reference._rows_per_block(T, B, S, N) == 3
    got = gradients_of_inputs(ours, *operands_of(T, S), **options)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "rows"),
    [(1, None), (2048, None), (2049, 1025), (4096, 2048), (32768, 2048), (10**6, 2045)],
)
def test_rows_per_block(length, rows):
    """As few blocks as hold 2048 rows at most, all of one size."""
    assert reference._rows_per_block(length, 2, 2048, 4) == rows


def test_memory_is_linear_in_length():
    """Gradients at 32k tokens: the logits alone would take 4 GiB for each head."""
    length = 32768
    shapes = [jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)] * 3

    def loss(query, key, value, ids, ends):
        out, lse = ours(
            query,
            key,
            value,
            window=(1000, 0),
            bottom_right=True,
            query_lengths=ends,
            key_lengths=ends,
            segments=(ids, ids),
            soft_cap=10.0,
        )
        return out.sum() + lse.sum()

    masks = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, length), (1,))]
    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes, *masks).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**30


@pytest.mark.parametrize("blocks", [False, True])
def test_derivatives_of_any_order(blocks, monkeypatch):
    if blocks:
        monkeypatch.setattr(reference, "_BLOCK_ELEMENTS", 1)
    operands = random_normal(1, (1, 3, 2, 4), (1, 2, 1, 4), (1, 2, 1, 4), dtype="float32")
    attend = jax.jit(lambda *x: ours(*x, is_causal=True))
    check_grads(attend, operands, order=2, atol=0.02, rtol=0.02)
