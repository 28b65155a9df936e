"""dot_product_attention: semantics of the public function, and the kernels on a GPU."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import check_case, random_attention_case

import jaxkern
from jaxkern.testing import poison_memory, random_normal

B, T, S, N, K, H = 2, 5, 7, 4, 2, 64

implementations = pytest.mark.parametrize("implementation", [None, "xla"])


def operands(dtype="bfloat16"):
    return random_normal(1, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)


def test_signature_is_jax_nn_s_with_additions():
    ours = inspect.signature(jaxkern.dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    assert {name: ours[name].default for name in ours.keys() - theirs.keys()} == {
        "segment_ids": None,
        "logits_soft_cap": None,
        "alignment": "top_left",
        "deterministic": False,
    }
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default
    positional = [n for n, p in ours.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert positional == ["query", "key", "value", "bias", "mask"]


@pytest.mark.usefixtures("kernels")
@implementations
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_shapes_and_dtypes_of_results(implementation, dtype):
    attend = functools.partial(jaxkern.dot_product_attention, implementation=implementation)
    out = attend(*operands(dtype))
    assert (out.shape, out.dtype) == ((B, T, N, H), dtype)
    out, lse = attend(*operands(dtype), return_residual=True)
    assert (out.shape, out.dtype) == ((B, T, N, H), dtype)
    assert (lse.shape, lse.dtype) == ((B, T, N), "float32")


@pytest.mark.usefixtures("kernels")
@implementations
def test_without_a_batch(implementation):
    attend = functools.partial(
        jaxkern.dot_product_attention, implementation=implementation, return_residual=True
    )
    batched = attend(*(x[:1] for x in operands()))
    single = attend(*(x[0] for x in operands()))
    for one, many in zip(single, batched, strict=True):
        np.testing.assert_array_equal(one.astype("float32"), many[0].astype("float32"))


def test_options_without_a_batch():
    """bias and mask of fewer axes than four get leading ones, as in jax.nn."""
    query, key, value = (x[0] for x in operands("float32"))
    options = {
        "bias": random_normal(2, (T, S), dtype="float32")[0],
        "mask": np.random.default_rng(3).random((N, T, S)) < 0.7,
        "key_value_seq_lengths": jnp.array([5]),
    }
    got = jaxkern.dot_product_attention(query, key, value, **options)
    wanted = jax.nn.dot_product_attention(query, key, value, **options)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"local_window_size": 2},
        {"local_window_size": (3, 0)},
        {"is_causal": True, "scale": 0.2},
        {"query_seq_lengths": jnp.array([2, 4]), "key_value_seq_lengths": jnp.array([7, 0])},
        {"mask": np.eye(T, S, dtype=bool), "bias": np.ones((1, N, 1, S), np.float32)},
    ],
    ids=["window", "left window", "causal", "lengths", "mask and bias"],
)
def test_options_reach_the_reference(options):
    got = jaxkern.dot_product_attention(*operands("float32"), **options, return_residual=True)
    wanted = jax.nn.dot_product_attention(*operands("float32"), **options, return_residual=True)
    for g, w in zip(got, wanted, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-5)


def test_lengths_of_any_integer_dtype():
    lengths = [3, 6]
    wanted = jaxkern.dot_product_attention(*operands(), key_value_seq_lengths=jnp.array(lengths))
    for given in (lengths, np.array(lengths), jnp.array(lengths, "uint8")):
        got = jaxkern.dot_product_attention(*operands(), key_value_seq_lengths=given)
        assert (got == wanted).all()


def test_numpy_operands():
    got = jaxkern.dot_product_attention(*(np.asarray(x) for x in operands("float32")))
    assert (got == jaxkern.dot_product_attention(*operands("float32"))).all()


def test_scale_is_differentiable_in_the_reference():
    def total(scale):
        return jaxkern.dot_product_attention(*operands("float32"), scale=scale).sum()

    slope = (total(0.31) - total(0.29)) / 0.02
    np.testing.assert_allclose(jax.grad(total)(0.3), slope, rtol=0.02)


EMPTY = {
    "batch": ((0, T, N, H), (0, S, K, H)),
    "queries": ((B, 0, N, H), (B, S, K, H)),
    "keys": ((B, T, N, H), (B, 0, K, H)),
    "queries and keys": ((B, 0, N, H), (B, 0, K, H)),
    "query heads": ((B, T, 0, H), (B, S, K, H)),
    "heads": ((B, T, 0, H), (B, S, 0, H)),
    "head dim": ((B, T, N, 0), (B, S, K, 0)),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("axis", "implementation"),
    [
        (axis, i)
        for axis in EMPTY
        for i in (None, "cuda", "xla")
        if (axis, i) != ("head dim", "cuda")
    ],
)
def test_empty_axes(axis, implementation):
    """Answered without a kernel, so also by implementation="cuda" on a CPU."""
    query, key = EMPTY[axis]
    arrays = random_normal(1, query, key, key, dtype="bfloat16")

    def attend(*operands):
        return jaxkern.dot_product_attention(
            *operands, is_causal=True, implementation=implementation, return_residual=True
        )

    (out, lse), pullback = jax.vjp(attend, *arrays)
    assert (out.shape, lse.shape) == (query, query[:3])
    assert not out.any()
    if axis in ("keys", "queries and keys"):
        assert (lse == -jnp.inf).all()
    gradients = pullback((out, jnp.zeros_like(lse)))
    assert [(g.shape, g.dtype) for g in gradients] == [(x.shape, x.dtype) for x in arrays]
    assert not any(g.any() for g in gradients)
    assert jax.vmap(attend)(*(x[None] for x in arrays))[0].shape == (1, *query)


@pytest.mark.usefixtures("kernels")
def test_vmap_over_an_empty_axis():
    arrays = random_normal(1, (0, B, T, N, H), (0, B, S, K, H), (0, B, S, K, H), dtype="bfloat16")

    def gradient(*operands):
        return jax.grad(
            lambda *x: jaxkern.dot_product_attention(*x).astype(jnp.float32).sum(), (0, 1, 2)
        )(*operands)

    for got, operand in zip(jax.vmap(gradient)(*arrays), arrays, strict=True):
        assert (got.shape, got.dtype) == (operand.shape, operand.dtype)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_random_case_on_the_path_of_the_kernel(seed):
    """In bfloat16: jax.nn has no float16 attention on a CPU."""
    check_case(random_attention_case(seed)._replace(dtype="bfloat16"), None)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(300))
def test_random_case(seed):
    poison_memory(1 << 26)
    check_case(random_attention_case(seed), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(1024, 1024), (1300, 70), (2048, 2048), (2181, 2250)])
def test_long_rows(lengths, is_causal, dtype):
    """From some length on, the backward kernel takes other blocks at head dim 128."""
    query_length, key_length = lengths
    case = random_attention_case(0)._replace(
        batch=1,
        key_heads=1,
        group=2,
        head_dim=128,
        dtype=dtype,
        query_length=query_length,
        key_length=key_length,
        is_causal=is_causal,
    )
    poison_memory(1 << 26)
    check_case(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_forward_is_bitwise_repeatable(head_dim, is_causal):
    shapes = (2, 515, 4, head_dim), (2, 389, 2, head_dim), (2, 389, 2, head_dim)
    arrays = random_normal(1, *shapes, dtype="bfloat16")
    attend = functools.partial(
        jaxkern.dot_product_attention,
        is_causal=is_causal,
        implementation="cuda",
        return_residual=True,
    )
    first = attend(*arrays)
    for _ in range(3):
        poison_memory(1 << 26)
        for a, b in zip(first, attend(*arrays), strict=True):
            assert (a == b).all()


@pytest.mark.gpu
@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 0)])
def test_vmap_of_the_kernel(axes):
    arrays = random_normal(1, (3, B, T, N, H), (3, B, S, K, H), (3, B, S, K, H), dtype="bfloat16")
    arrays = [x if a == 0 else x[0] for x, a in zip(arrays, axes, strict=True)]

    def gradient(implementation, *operands):
        def loss(*operands):
            out = jaxkern.dot_product_attention(*operands, implementation=implementation)
            return jnp.sin(out.astype(jnp.float32)).sum()

        return jax.grad(loss, (0, 1, 2))(*operands)

    got = jax.vmap(functools.partial(gradient, "cuda"), axes)(*arrays)
    wanted = jax.vmap(functools.partial(gradient, "xla"), axes)(*arrays)
    for g, w in zip(got, wanted, strict=True):
        np.testing.assert_allclose(g.astype("float32"), w.astype("float32"), rtol=0.02, atol=0.02)
