"""The decode step's kernel against its oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_model import CONFIGS, model_of, random_arrays

from jaxkern.decode import KVCache, Status, decode_step, decode_steps, generate, pack_weights
from jaxkern.models import Config
from jaxkern.testing import relative_error

pytestmark = pytest.mark.gpu

SEVEN = 0, 31, 32, 33, 255, 256, 500  # lengths

LIMIT = 0.012  # of the relative error of logits, as in test_step.py

CASES = {
    "llama": dataclasses.replace(CONFIGS["llama"], head_dim=64, context=1024),
    "llama3": dataclasses.replace(CONFIGS["llama3"], head_dim=128, context=1024),
    "qwen2": dataclasses.replace(CONFIGS["qwen2"], context=1024),
    "qwen3": dataclasses.replace(CONFIGS["qwen3"], head_dim=128, context=1024),
    "wide": Config(500, 2, 1024, 16, 4, 64, 4096, 1024, tied_embeddings=True),
    "1.5b": Config(1000, 2, 1536, 12, 2, 128, 8960, 1024, qkv_bias=True),
    "far": dataclasses.replace(CONFIGS["llama3"], head_dim=64, context=17_000),
}


@functools.cache
def packed(name, weights="bf16"):
    config = CASES[name]
    return pack_weights(model_of(config, random_arrays(config)), weights)


def random_cache(name, lengths):
    """Anything in a cache up to the lengths, and NaN after them."""
    config, key = CASES[name], jax.random.key(1)
    cache = KVCache.create(config, len(lengths), max(lengths) + 40)
    shape = config.layers, len(lengths), max(lengths), config.kv_heads, config.head_dim
    keys, values = jax.random.normal(key, (2, *shape))
    full = [jnp.full_like(x, jnp.nan) for x in (cache.keys, cache.values)]
    for n, length in enumerate(lengths):
        one = KVCache.create(config, 1, max(lengths) + 40).write(
            keys[:, n : n + 1, :length], values[:, n : n + 1, :length], jnp.array([length])
        )
        k, v = -(-length // 8), -(-length // 32)
        full[0] = full[0].at[:, n, :, :k].set(one.keys[:, 0, :, :k])
        full[1] = full[1].at[:, n, :, :v].set(one.values[:, 0, :, :v])
    lengths = jnp.array(lengths, jnp.int32)
    return dataclasses.replace(cache, keys=full[0], values=full[1], lengths=lengths)


@functools.partial(jax.jit, static_argnums=3)
def run(packed, cache, tokens, implementation):
    """Logits [steps, B, V] of tokens [steps, B], and the cache after them."""

    def step(cache, tokens):
        logits, cache = decode_step(packed, cache, tokens, implementation=implementation)
        return cache, logits

    cache, logits = jax.lax.scan(step, cache, tokens)
    return logits, cache


def tokens_of(name, steps, batch):
    rng = np.random.default_rng(0)
    return rng.integers(CASES[name].vocabulary, size=(steps, batch), dtype=np.int32)


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "wide", "1.5b"])
@pytest.mark.parametrize("lengths", [(0,), (255,), (900,), (3, 400), SEVEN, (*SEVEN, 1, 64, 2)])
def test_logits(name, lengths):
    check_steps(name, "bf16", lengths)


@pytest.mark.parametrize("lengths", [(8190,), (16_383,), (9000, 20)])
def test_far_positions(lengths):
    """Of scaled rotary frequencies, and in all splits of attention."""
    check_steps("far", "bf16", lengths)


@pytest.mark.parametrize("name", ["wide", "1.5b"])
@pytest.mark.parametrize("weights", ["nvfp4", "mxfp4", "int4"])
@pytest.mark.parametrize("lengths", [(0,), (255,), (3, 400), SEVEN, (*SEVEN, *SEVEN, 2, 3)])
def test_four_bit_logits(name, weights, lengths):
    check_steps(name, weights, lengths)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "wide", "1.5b"])
@pytest.mark.parametrize("lengths", [(255,), (3, 400), SEVEN, (*SEVEN, *SEVEN, 2, 3)])
def test_fp8_logits(name, lengths):
    check_steps(name, "fp8", lengths)


def check_steps(name, weights, lengths):
    """Logits and cache of four steps are the oracle's."""
    weights = packed(name, weights)
    cache, tokens = random_cache(name, lengths), tokens_of(name, 4, len(lengths))
    got, after = run(weights, cache, tokens, "cuda")
    wanted, expected = run(weights, cache, tokens, "xla")
    assert relative_error(got, wanted) < LIMIT
    assert after.lengths.tolist() == expected.lengths.tolist()
    for layer in range(CASES[name].layers):
        for x, y in zip(after.read(layer), expected.read(layer), strict=True):
            for n, length in enumerate(expected.lengths):
                assert relative_error(x[n, :length], y[n, :length]) < LIMIT


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        *((weights, name) for weights in ("bf16", "fp8") for name in ("llama", "qwen3", "1.5b")),
        *((weights, name) for weights in ("nvfp4", "mxfp4", "int4") for name in ("wide", "1.5b")),
    ],
)
@pytest.mark.parametrize("lengths", [(300,), (3, 400), (*SEVEN, 1, 64, 2)])
def test_phases(name, weights, lengths):
    """What each phase of each layer hands on is what the oracle's does."""
    cache, tokens = random_cache(name, lengths), tokens_of(name, 1, len(lengths))[0]
    run = functools.partial(decode_step, packed(name, weights), cache, tokens, debug=True)
    (logits, after, got), (_, _, wanted) = (run(implementation=i) for i in ("cuda", "xla"))
    assert got.keys() == wanted.keys()
    for phase, layers in wanted.items():
        for layer, values in enumerate(layers):
            assert relative_error(got[phase][layer], values) < LIMIT, (phase, layer)
    plain, cache = decode_step(packed(name, weights), cache, tokens, implementation="cuda")
    np.testing.assert_array_equal(logits, plain)
    # What debug leaves is fit for more steps.
    results = [
        decode_step(packed(name, weights), x, tokens, implementation="cuda")[0]
        for x in (after, cache)
    ]
    np.testing.assert_array_equal(*results)


def test_repeats_bitwise():
    cache, tokens = random_cache("wide", (300, 7)), tokens_of("wide", 6, 2)
    first, *others = (run(packed("wide"), cache, tokens, "cuda") for _ in range(3))
    for other in others:
        np.testing.assert_array_equal(first[0], other[0])


def test_status():
    """Nothing is written beyond a full cache, and a bad token does not disturb the others."""
    config = CASES["llama"]
    cache = random_cache("llama", (20, 30, 40))
    cache = dataclasses.replace(cache, lengths=jnp.array([20, cache.max_length, 40], jnp.int32))
    cache = jax.tree.map(lambda x: jnp.nan_to_num(x), cache)
    tokens = np.array([[config.vocabulary, 1, 2], [3, 4, 5]], np.int32)
    got, after = run(packed("llama"), cache, tokens, "cuda")
    wanted, expected = run(packed("llama"), cache, tokens, "xla")
    assert after.status.tolist() == [Status.TOKEN_OUT_OF_RANGE, Status.CACHE_FULL, Status.OK]
    assert expected.status.tolist() == after.status.tolist()
    assert after.lengths.tolist() == expected.lengths.tolist()
    assert jnp.isnan(got[:, :2]).all() and jnp.isfinite(got[:, 2]).all()
    assert relative_error(got[:, 2], wanted[:, 2]) < LIMIT
    np.testing.assert_array_equal(after.keys[:, 1], cache.keys[:, 1])


MODES = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 0.9, "top_p": 0.5},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 10**6, "top_p": 1.0},
    {"temperature": 1e-37},
]
FILTERS = MODES[2:6]


@pytest.mark.parametrize(
    ("name", "batch", "options"),
    [
        *(("wide", 1, options) for options in MODES),
        *(("qwen2", 3, options) for options in FILTERS),
        *(("1.5b", batch, MODES[0]) for batch in (8, 16)),
        *(("1.5b", batch, FILTERS[-1]) for batch in (8, 11)),
    ],
)
def test_steps(name, batch, options):
    """Draws are the oracle's, of which logits nearly the same may once give another token."""
    seen = drawn = 0
    for seed in range(3):
        cache = random_cache(name, tuple(range(20, 20 + batch)))
        tokens = tokens_of(name, seed + 1, batch)[-1]
        got, wanted = (
            decode_steps(
                packed(name),
                cache,
                tokens,
                6,
                key=jax.random.key(seed),
                first=seed,
                **options,
                implementation=implementation,
            )
            for implementation in ("cuda", "xla")
        )
        assert got.cache.lengths.tolist() == wanted.cache.lengths.tolist()
        for row, oracle in zip(np.asarray(got.tokens), np.asarray(wanted.tokens), strict=True):
            same = int(np.cumprod(row == oracle).sum())
            seen += same
            drawn += min(same + 1, 6)  # after another token all may be others
    assert seen / drawn > 0.9


@pytest.mark.parametrize("options", MODES)
def test_draws_of_the_same_logits(options):
    """Where logits have no error, as those of a head of zeros, draws are exactly the oracle's."""
    weights = dataclasses.replace(
        packed("wide"), head=jax.tree.map(jnp.zeros_like, packed("wide").head)
    )
    cache = random_cache("wide", (3, 9, 1))
    run = functools.partial(
        decode_steps, weights, cache, jnp.zeros(3, jnp.int32), 8, key=jax.random.key(5), **options
    )
    got, wanted = (run(implementation=i).tokens for i in ("cuda", "xla"))
    assert (np.asarray(got) < CASES["wide"].vocabulary).all()
    np.testing.assert_array_equal(got, wanted)


def test_steps_end():
    """Early, where all have ended; the rest of the tokens are repeated, and caches as long."""
    run = functools.partial(decode_steps, packed("wide"), temperature=1.0, key=jax.random.key(2))
    tokens = jnp.array([1, 2], jnp.int32)
    free = run(random_cache("wide", (8, 30)), tokens, 20, implementation="cuda").tokens
    stops = [int(free[0, 5]), int(free[1, 2])]
    ends = [int(jnp.isin(row, jnp.array(stops)).argmax()) for row in free]
    got = run(random_cache("wide", (8, 30)), tokens, 20, stop_tokens=stops, implementation="cuda")
    for row, drawn, end in zip(free, got.tokens, ends, strict=True):
        np.testing.assert_array_equal(drawn[: end + 1], row[: end + 1])
        assert (drawn[end:] == row[end]).all()
    count = max(ends) + 1
    assert got.done.all() and count < 20
    assert got.cache.lengths.tolist() == [8 + count, 30 + count]
    # The workspace is fit for another launch.
    again = run(got.cache, tokens, 3, implementation="cuda")
    wanted = run(got.cache, tokens, 3, implementation="xla")
    assert (again.tokens == wanted.tokens).mean() > 0.8


def test_steps_fill_the_cache():
    """A sequence that becomes full draws token 0, and nothing else is written."""
    cache = jax.tree.map(jnp.nan_to_num, random_cache("llama", (20, 55)))
    room = cache.max_length - 55
    tokens = jnp.array([1, 2], jnp.int32)
    got, wanted = (
        decode_steps(packed("llama"), cache, tokens, room + 4, implementation=implementation)
        for implementation in ("cuda", "xla")
    )
    assert got.cache.status.tolist() == wanted.cache.status.tolist() == [0, Status.CACHE_FULL]
    assert got.cache.lengths.tolist() == [20 + room + 4, cache.max_length]
    assert (got.tokens[1, room:] == 0).all() and (wanted.tokens[1, room:] == 0).all()


def test_generate():
    prompt = jnp.asarray(tokens_of("wide", 3, 20))
    got, wanted = (
        generate(packed("wide"), prompt, max_new_tokens=20, implementation=implementation)
        for implementation in ("cuda", "xla")
    )
    same = (got.tokens == wanted.tokens).mean()
    assert same > 0.9  # a near tie may go either way, and all after it with it


def test_cache_stays_in_place():
    """A donated cache is not copied."""
    cache, tokens = random_cache("llama", (5,)), tokens_of("llama", 1, 1)[0]
    step = jax.jit(decode_step, donate_argnums=1, static_argnames="implementation")
    text = step.lower(packed("llama"), cache, tokens, implementation="cuda").compile().as_text()
    assert "jaxkern.decode_step" in text
    for x in (cache.keys, cache.values):
        shape = "bf16[" + ",".join(map(str, x.shape)) + "]"
        assert shape in text
        assert not [line for line in text.splitlines() if " copy(" in line and shape in line]
