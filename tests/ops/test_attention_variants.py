"""Masks, segments, windows and the soft cap of dot_product_attention, alone and combined.

What takes an `implementation` runs on the CPU by the reference, and on a GPU by the kernel.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    MASKED_LSE,
    RESULTS,
    AttentionCase,
    attention_variants,
    check_case,
    oracle,
    solve,
    with_gradients,
)

import jaxkern
from jaxkern.testing import poison_memory, random_normal

each_implementation = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("cuda", marks=pytest.mark.gpu)]
)

MORE_QUERIES, MORE_KEYS = (130, 65), (65, 200)
VARIANTS = {
    "window": {"window": (20, 7)},
    "left window": {"window": (64, 0), "soft_cap": 5.0},
    "right window": {"window": (0, 64), "lengths": "both"},
    "own key alone": {"window": 0},
    "causal window of more queries": {
        "is_causal": True,
        "window": 70,
        "query_length": MORE_QUERIES[0],
        "key_length": MORE_QUERIES[1],
    },
    "bottom right of more queries": {
        "is_causal": True,
        "alignment": "bottom_right",
        "query_length": MORE_QUERIES[0],
        "key_length": MORE_QUERIES[1],
    },
    "bottom right of more keys": {
        "window": (30, 5),
        "alignment": "bottom_right",
        "query_length": MORE_KEYS[0],
        "key_length": MORE_KEYS[1],
    },
    "bottom right by lengths": {
        "is_causal": True,
        "alignment": "bottom_right",
        "lengths": "both",
        "batch": 4,
    },
    "query lengths": {"lengths": "queries", "batch": 4},
    "key lengths": {"lengths": "keys", "batch": 4, "is_causal": True},
    "packed": {"segments": "packed", "is_causal": True},
    "padded": {"segments": "padded", "window": (10, 0), "soft_cap": 1.0},
    "unsorted": {"segments": "unsorted", "is_causal": True, "lengths": "keys"},
    "ids that no key has": {"segments": "missing", "key_length": MORE_KEYS[1]},
    "soft cap": {"soft_cap": 1.0, "scale": 0.5},
    "everything": {
        "is_causal": True,
        "window": (90, 3),
        "alignment": "bottom_right",
        "lengths": "both",
        "segments": "packed",
        "soft_cap": 30.0,
        "deterministic": True,
        "key_length": MORE_KEYS[1],
    },
}


def variant(name, head_dim, dtype="bfloat16"):
    """Four query heads on one key head, which makes MQA of them all."""
    plain = AttentionCase(2, 150, 150, 1, 4, head_dim, dtype, seed=7)
    return plain._replace(**VARIANTS[name])


def check_path(case):
    """On a CPU the path of the kernel ends in the reference: equal but for a unit in the last
    place, where XLA fuses differently."""
    arrays = case.operands()
    results = zip(RESULTS, solve(case, None, arrays), solve(case, "xla", arrays), strict=True)
    for name, got, wanted in results:
        assert got.dtype == wanted.dtype
        got, wanted = np.float32(got), np.float32(wanted)
        atol = 1e-5 * np.abs(wanted).max(initial=0, where=wanted > -1e30)
        np.testing.assert_allclose(got, wanted, 2**-7, atol, err_msg=f"{name} of {case}")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", VARIANTS)
def test_variant_on_the_path_of_the_kernel(name):
    check_path(variant(name, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", VARIANTS)
def test_variant(name, head_dim):
    poison_memory(1 << 26)
    check_case(variant(name, head_dim), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["window", "query lengths", "key lengths", "packed", "unsorted"])
def test_long_rows_of_a_variant(name, head_dim, deterministic):
    """From some length on, the backward kernel takes other blocks at head dim 128."""
    poison_memory(1 << 26)
    case = variant(name, head_dim)._replace(query_length=2100, key_length=2100)
    check_case(case._replace(group=2, deterministic=deterministic), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_keys_past_the_end_have_no_weight(head_dim):
    """The weight of a logit of zero would overflow here, and zero times infinity is no number."""
    (key,) = random_normal(1, (1, 40, 1, head_dim), dtype="float16")
    poison_memory(1 << 26)
    attend = attention("cuda", local_window_size=0, scale=0.5)
    (out, _), pullback = jax.vjp(attend, -key, key, key)
    gradients = pullback((out, jnp.zeros((1, 40, 1), "float32")))
    wanted = jnp.zeros_like(key), jnp.zeros_like(key), key
    for gradient, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(gradient, want, atol=0.1)


def check_random_variants(seed, count, longest, check):
    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, deadline=None, database=None)
    @hypothesis.given(attention_variants(longest))
    def check_all(case):
        check(case)

    check_all()


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(16))
def test_random_variants(part):
    def check(case):
        poison_memory(1 << 26)
        check_case(case, "cuda")

    check_random_variants(part, 20, 400, check)


@pytest.mark.usefixtures("kernels")
def test_random_variants_on_the_path_of_the_kernel():
    check_random_variants(0, 8, 70, check_path)


def attention(implementation, **options):
    return functools.partial(
        jaxkern.dot_product_attention,
        **options,
        implementation=implementation,
        return_residual=True,
    )


def normal(implementation, *shapes):
    """Standard normal arrays of the dtype to test an implementation in."""
    return random_normal(1, *shapes, dtype="float32" if implementation == "xla" else "bfloat16")


def close(got, wanted, implementation):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    limit = 1e-5 if implementation == "xla" else 2e-2
    np.testing.assert_allclose(got, wanted, rtol=limit, atol=limit * np.abs(wanted).max())


@each_implementation
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"local_window_size": (40, 2)}, {"logits_soft_cap": 2.0}],
    ids=["all", "causal", "window", "soft cap"],
)
def test_packed_documents_are_as_separate_ones(implementation, options):
    """Values and gradients, for documents within, across and of whole tiles."""
    documents = [5, 64, 1, 130, 30, 26]
    ends = np.cumsum(documents)
    ids = np.repeat(np.arange(len(documents)), documents)[None]
    query, key = (1, ends[-1], 4, 64), (1, ends[-1], 2, 64)
    *arrays, dlse = normal(implementation, query, key, key, query, query[:3])
    arrays.append(dlse.astype("float32"))
    packed = with_gradients(attention(implementation, **options, segment_ids=ids), *arrays)
    attend = attention(implementation, **options)
    parts = [
        with_gradients(attend, *(x[:, end - length : end] for x in arrays))
        for length, end in zip(documents, ends, strict=True)
    ]
    for name, got, *wanted in zip(RESULTS, packed, *parts, strict=True):
        assert got.shape[1] == ends[-1], name
        close(got, jnp.concatenate(wanted, axis=1), implementation)


@each_implementation
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_another_segment_changes_nothing(implementation, head_dim):
    """Not a bit of what the other one gives or takes, within a tile."""
    length, first = 96, 41
    query, key = (1, length, 2, head_dim), (1, length, 1, head_dim)
    arrays = normal(implementation, query, key, key, query)
    ids = (np.arange(length) >= first).astype(np.int32)[None]
    attend = attention(implementation, segment_ids=ids)
    dlse = jnp.ones(query[:3])

    def only_first(x):
        return x.at[:, first:].set(0)

    def loud(x):
        return x.at[:, first:].mul(100)

    zeroed = *arrays[:3], only_first(arrays[3]), only_first(dlse)
    one = with_gradients(attend, *zeroed)
    other = with_gradients(attend, arrays[0], loud(arrays[1]), loud(arrays[2]), *zeroed[3:])
    for name, a, b in zip(RESULTS, one, other, strict=True):
        np.testing.assert_array_equal(np.float32(a)[:, :first], np.float32(b)[:, :first], name)
    for gradient in other[2:]:
        assert not gradient[:, first:].any()
        assert gradient[:, :first].any()


@each_implementation
@pytest.mark.parametrize(
    ("options", "sees"),  # sees: the last key of query t
    [
        ({"local_window_size": (20, 0)}, lambda t, s: t),
        ({"local_window_size": (20, 9)}, lambda t, s: t + 9),
        ({"is_causal": True}, lambda t, s: t),
        ({"is_causal": True, "local_window_size": (20, 0)}, lambda t, s: t),
        ({"is_causal": True, "local_window_size": 20}, lambda t, s: t),
        ({"is_causal": True, "alignment": "bottom_right"}, lambda t, s: t + s - 150),
        (
            {"local_window_size": (20, 3), "alignment": "bottom_right"},
            lambda t, s: t + 3 + s - 150,
        ),
    ],
)
@pytest.mark.parametrize("key_length", [150, 200])
def test_the_future_changes_nothing(implementation, options, sees, key_length):
    """A query's output and log-sum-exp are the same whatever comes after its last key."""
    query, key = (1, 150, 2, 64), (1, key_length, 1, 64)
    q, k, v = normal(implementation, query, key, key)
    attend = attention(implementation, **options)
    before = attend(q, k, v)
    for t in (0, 63, 64, 100):
        last = sees(t, key_length)
        after = attend(q, *(x.at[:, last + 1 :].mul(-50) for x in (k, v)))
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(np.float32(a)[:, : t + 1], np.float32(b)[:, : t + 1])
        changed = attend(q, *(x.at[:, last].mul(-50) for x in (k, v)))
        assert (changed[0][:, t] != before[0][:, t]).any()


@each_implementation
def test_a_cotangent_of_the_log_sum_exp_alone(implementation):
    """Its gradients are the softmax's: not zero for query and key, and zero for value."""
    case = AttentionCase(2, 130, 70, 2, 2, 64, "bfloat16", seed=3, is_causal=True, soft_cap=5.0)
    query, key, value, dout, dlse = case.operands("float32" if implementation == "xla" else None)
    arrays = query, key, value, jnp.zeros_like(dout), dlse
    _, _, *got = solve(case, implementation, arrays)
    _, _, *wanted = oracle(case, *arrays)
    for g, w in zip(got[:2], wanted[:2], strict=True):
        assert np.abs(w).max() > 0.1
        close(g, w, implementation)
    assert not got[2].any()


@each_implementation
def test_the_log_sum_exp_has_all_its_bits(implementation):
    """As it would not if it went through 16 bits on the way."""
    case = AttentionCase(1, 100, 300, 1, 2, 64, "bfloat16", seed=5, scale=1.0)
    arrays = case.operands("float32" if implementation == "xla" else None)
    _, lse, *_ = solve(case, implementation, arrays)
    _, wanted, *_ = oracle(case, *arrays)
    assert lse.dtype == jnp.float32 and lse.min() > 8
    np.testing.assert_allclose(lse, wanted, rtol=3e-6)
    assert np.abs(wanted - np.float64(lse.astype(jnp.bfloat16))).max() > 1e-2


@each_implementation
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_query_with_one_key_has_no_gradient(implementation, head_dim):
    """Its weight is 1 whatever it is: rowsum(out * dout) is the weight's own gradient.

    They cancel only if that row sum is of the out that the forward pass returned, in float32.
    """
    case = AttentionCase(1, 130, 130, 1, 2, head_dim, "bfloat16", seed=9, window=0)
    arrays = case.operands("float32" if implementation == "xla" else None)
    out, _, dquery, dkey, _ = solve(
        case._replace(lse_cotangent=False), implementation, (*arrays[:4], jnp.zeros_like(arrays[4]))
    )
    assert (out[:, :, 0] == arrays[2][:, :, 0]).all()
    assert max(np.abs(np.float32(x)).max() for x in (dquery, dkey)) < 1e-4


@each_implementation
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_queries_without_a_key(implementation, head_dim):
    """By ids, by windows and by a length of zero: the mean of all values."""
    batch, length, keys = 2, 100, 70
    query, key = (batch, length, 2, head_dim), (batch, keys, 1, head_dim)
    *arrays, dout = normal(implementation, query, key, key, query)
    dlse = jnp.ones(query[:3])
    mean = np.asarray(arrays[2], np.float64).mean(1, keepdims=True)
    share = np.asarray(dout, np.float64).sum((1, 2))[:, None, None] / keys
    alone = np.arange(length), -1 - np.arange(keys)
    for options in (
        {"segment_ids": tuple(np.broadcast_to(x, (batch, x.size)) for x in alone)},
        {"key_value_seq_lengths": np.zeros(batch, np.int32)},
        {"key_value_seq_lengths": np.full(batch, -3), "is_causal": True},
    ):
        results = with_gradients(attention(implementation, **options), *arrays, dout, dlse)
        out, lse, dquery, dkey, dvalue = results
        close(out, np.broadcast_to(mean, out.shape), implementation)
        assert (lse == np.float32(MASKED_LSE)).all()
        assert not dquery.any() and not dkey.any()
        close(dvalue, np.broadcast_to(share, dvalue.shape), implementation)


@each_implementation
def test_queries_beyond_their_length(implementation):
    """Out zero, the log-sum-exp of a query without a key, and no gradient for anything."""
    query, key = (3, 100, 2, 64), (3, 70, 1, 64)
    *arrays, dout = normal(implementation, query, key, key, query)
    attend = attention(implementation, query_seq_lengths=np.array([0, 33, 100]))
    dlse = jnp.ones(query[:3])
    out, lse, dquery, dkey, dvalue = with_gradients(attend, *arrays, dout, dlse)
    beyond = np.arange(100) >= np.array([[0], [33], [100]])
    assert not out[beyond].any() and not dquery[beyond].any()
    assert (lse[beyond] == np.float32(MASKED_LSE)).all()
    assert not dkey[0].any() and not dvalue[0].any()
    other = with_gradients(attend, *arrays, dout + 100 * beyond[:, :, None, None], dlse)
    for a, b in zip((dquery, dkey, dvalue), other[2:], strict=True):
        close(a, b, implementation)


def test_lengths_of_narrow_dtypes():
    """Which cannot count to the end of the arrays."""
    query, key = (2, 200, 1, 8), (2, 300, 1, 8)
    arrays = random_normal(1, query, key, key, dtype="float32")
    lengths = np.array([100, 250])
    options = {"alignment": "bottom_right", "is_causal": True}
    wanted = attention("xla", key_value_seq_lengths=lengths, **options)(*arrays)
    got = attention("xla", key_value_seq_lengths=lengths.astype("uint8"), **options)(*arrays)
    for g, w in zip(got, wanted, strict=True):
        assert (g == w).all()


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32"])
@pytest.mark.usefixtures("kernels")
def test_segment_ids_of_any_dtype(dtype):
    """Both ends of the dtype's range are ids like others; kernel and reference agree."""
    arrays = random_normal(1, *[(1, 6, 1, 64)] * 3, dtype="bfloat16")
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    given = np.array([[low, high, 5, 6, high, low]], dtype)
    wanted = attention("xla", segment_ids=np.array([[0, 1, 2, 3, 1, 0]]))(*arrays)
    for implementation in (None, "xla"):
        for ids in (given, (given, given)):
            got = attention(implementation, segment_ids=ids)(*arrays)
            for g, w in zip(got, wanted, strict=True):
                assert (g == w).all()


def test_segment_ids_without_a_batch():
    query, key, value = random_normal(1, *[(6, 2, 8)] * 3, dtype="float32")
    ids = np.array([0, 0, 1, 1, 1, 0])
    attend = functools.partial(jaxkern.dot_product_attention, query, key, value)
    wanted = jaxkern.dot_product_attention(
        query[None], key[None], value[None], segment_ids=ids[None]
    )
    assert (attend(segment_ids=ids) == wanted[0]).all()
    assert (attend(segment_ids=(ids, ids)) == wanted[0]).all()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", [None, "cuda", "xla"])
@pytest.mark.parametrize(
    "shape", [(0, 5, 7), (2, 0, 7), (2, 5, 0)], ids=["batch", "queries", "keys"]
)
def test_empty_axes_with_masks(implementation, shape):
    batch, t, s = shape
    query, key = (batch, t, 2, 64), (batch, s, 1, 64)
    arrays = random_normal(1, query, key, key, query, query[:3], dtype="bfloat16")
    attend = attention(
        implementation,
        query_seq_lengths=jnp.zeros(batch, int),
        key_value_seq_lengths=jnp.zeros(batch, int),
        segment_ids=(jnp.zeros((batch, t), int), jnp.zeros((batch, s), int)),
        local_window_size=2,
        alignment="bottom_right",
        logits_soft_cap=1.0,
    )
    results, pullback = jax.vjp(attend, *arrays[:3])
    gradients = pullback((arrays[3], arrays[4].astype("float32")))
    wanted = [query, query[:3], query, key, key]
    assert [x.shape for x in (*results, *gradients)] == wanted
    assert not any(g.any() for g in gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", ["plain", "causal", "window", "packed", "unsorted", "everything"])
def test_repeats_bitwise(name, head_dim):
    """The forward pass always, the backward pass if deterministic."""
    plain = {"plain": {"is_causal": False}, "causal": {"is_causal": True}}
    case = AttentionCase(2, 150, 150, 1, 4, head_dim, "bfloat16", seed=7)
    case = case._replace(**(plain | VARIANTS)[name])
    case = case._replace(query_length=2100, key_length=2100, deterministic=True)
    arrays = case.operands()
    first = solve(case, "cuda", arrays)
    for _ in range(3):
        poison_memory(1 << 26)
        for result, a, b in zip(RESULTS, first, solve(case, "cuda", arrays), strict=True):
            assert (a == b).all(), result
    forward = solve(case._replace(deterministic=False), "cuda", arrays)[:2]
    assert all((a == b).all() for a, b in zip(first, forward, strict=False))
