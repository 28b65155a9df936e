"""decode_step and prefill against the whole sequence's forward pass, and each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_model import (
    CONFIGS,
    FOUR_BIT_CONFIGS,
    by_kv_head,
    forward,
    model_of,
    random_arrays,
)

from jaxkern.decode import KVCache, Status, decode_step, pack_weights, prefill
from jaxkern.reference import decode as reference
from jaxkern.testing import assert_close_to_reference, relative_error

configs = pytest.mark.parametrize("name", list(CONFIGS))
BATCH, T = 3, 40
BF16_LIMIT = 0.012  # of the relative error of logits; that of a plain forward pass is 0.0115
FP8_LIMIT = 0.11
FOUR_BIT_LIMIT = 0.5

run_forward = jax.jit(forward, static_argnums=(0, 3))


@functools.cache
def problem(name):
    """A config, the arrays of a model, tokens [B, T] and their logits: float32, and bfloat16's."""
    config = {**CONFIGS, **{f"{x} of 128": y for x, y in FOUR_BIT_CONFIGS.items()}}[name]
    arrays = random_arrays(config)
    tokens = np.random.default_rng(1).integers(config.vocabulary, size=(BATCH, T), dtype=np.int32)
    logits = [run_forward(config, arrays, tokens, dtype) for dtype in ("float32", "bfloat16")]
    return config, arrays, tokens, logits[0], logits[1].astype(jnp.float32)


@functools.cache
def packed(name, weights="bf16", **options):
    config, arrays, *_ = problem(name)
    return pack_weights(model_of(config, arrays), weights, multiprocessors=3, **options)


def poisoned(cache):
    """The cache with NaN wherever nothing has been written."""
    full = [jnp.full_like(x, jnp.nan) for x in (cache.keys, cache.values)]
    return dataclasses.replace(cache, keys=full[0], values=full[1])


def one_by_one(packed, cache, tokens):
    """Logits [B, T, V] of tokens [B, T], given one at a time, and the cache after them."""

    @jax.jit
    def run(packed, cache, tokens):
        def step(cache, tokens):
            logits, cache = decode_step(packed, cache, tokens)
            return cache, logits

        cache, logits = jax.lax.scan(step, cache, tokens.T)
        return logits.swapaxes(0, 1), cache

    return run(packed, cache, tokens)


@configs
def test_every_position(name):
    """Logits are as close to float32's as those of a plain bfloat16 forward pass."""
    config, _, tokens, wanted, plain = problem(name)
    cache = poisoned(KVCache.create(config, BATCH, T))
    logits, cache = one_by_one(packed(name), cache, tokens)
    assert_close_to_reference(logits, wanted, plain, atol=1e-3)
    assert relative_error(logits, wanted) < BF16_LIMIT
    assert cache.lengths.tolist() == [T] * BATCH
    assert not cache.status.any()


@pytest.mark.parametrize(
    ("name", "keep_rows"), [*((name, True) for name in CONFIGS), ("qwen2", False)]
)
def test_prefill(name, keep_rows):
    """Ragged: the steps after it give the logits of each sequence alone."""
    config, _, tokens, wanted, plain = problem(name)
    lengths = np.array([T - 5, 0, 17], np.int32)
    weights = packed(name, keep_rows=keep_rows)
    assert (weights.kept is None) != keep_rows
    cache = poisoned(KVCache.create(config, BATCH, T))
    cache = prefill(weights, cache, tokens[:, : T - 5], lengths)
    assert cache.lengths.tolist() == lengths.tolist()
    following = np.stack([tokens[b, n : n + 5] for b, n in enumerate(lengths)])
    logits, _ = one_by_one(weights, cache, following)
    at = np.arange(BATCH)[:, None], lengths[:, None] + np.arange(5)
    assert_close_to_reference(logits, wanted[at], plain[at], atol=1e-3)


def test_prefill_writes_what_steps_do():
    """The same cache, up to what bfloat16 rounds, and for the first layer all but the same."""
    config, _, tokens, *_ = problem("qwen3")
    weights = packed("qwen3")
    cache = KVCache.create(config, BATCH, T)
    _, stepped = one_by_one(weights, cache, tokens)
    filled = prefill(weights, cache, tokens)
    assert filled.lengths.tolist() == stepped.lengths.tolist()
    for i in range(config.layers):
        for ours, wanted in zip(filled.read(i), stepped.read(i), strict=True):
            assert relative_error(ours, wanted) < (1e-3 if i == 0 else BF16_LIMIT)


@pytest.mark.parametrize(
    ("name", "format", "limit"),
    [
        *((name, "fp8", FP8_LIMIT) for name in ("llama", "qwen3")),
        *(
            (f"{name} of 128", format, FOUR_BIT_LIMIT)
            for name in FOUR_BIT_CONFIGS
            for format in ("nvfp4", "mxfp4", "int4")
        ),
    ],
)
def test_quantised_weights(name, format, limit):
    """Close to the model's, and exactly those of a model that has the dequantised weights."""
    config, arrays, tokens, wanted, _ = problem(name)
    weights = packed(name, format)
    cache = KVCache.create(config, BATCH, T)
    logits, _ = one_by_one(weights, cache, tokens)
    assert BF16_LIMIT < relative_error(logits, wanted) < limit
    dequantised = dict(arrays)
    for key in ("qkv", "out", "gate_up", "down", "head"):
        rows = getattr(weights, key).unpack()
        dequantised[key] = rows.values.astype(jnp.float32) * rows.scale[..., None]
    dequantised["qkv"] = by_kv_head(config, dequantised["qkv"], inverse=True)
    exact = run_forward(config, dequantised, tokens, "float32")
    assert relative_error(logits, exact) < BF16_LIMIT


@pytest.mark.parametrize("format", ["fp8", "nvfp4", "mxfp4", "int4"])
def test_quantised_prefill(format):
    """With the rows kept it is the model's, without them the decode step's."""
    config, _, tokens, *_ = problem(name := "llama of 128")
    cache = KVCache.create(config, BATCH, T)
    kept, stepped = (packed(name, format, keep_rows=keep) for keep in (True, False))
    _, wanted = one_by_one(stepped, cache, tokens)
    quantised, model = (prefill(x, cache, tokens).read(0)[0] for x in (stepped, packed(name)))
    np.testing.assert_array_equal(prefill(kept, cache, tokens).read(0)[0], model)
    assert relative_error(quantised, wanted.read(0)[0]) < 1e-3 < relative_error(quantised, model)


def test_prefill_of_nothing():
    config, _, tokens, *_ = problem("llama")
    cache = KVCache.create(config, BATCH, 32)
    filled = prefill(packed("llama"), cache, tokens[:, :0])
    jax.tree.map(np.testing.assert_array_equal, filled, cache)


def test_sequences_do_not_see_each_other():
    """A sequence's logits do not depend on what is beside it, however long that is."""
    config, _, tokens, *_ = problem("llama")
    weights = packed("llama")
    cache = prefill(weights, KVCache.create(config, BATCH, T), tokens, np.array([3, 31, 39]))
    together, _ = decode_step(weights, cache, tokens[:, 0])
    for b, n in enumerate([3, 31, 39]):
        alone = prefill(weights, KVCache.create(config, 1, T), tokens[b : b + 1, :n])
        alone, _ = decode_step(weights, alone, tokens[b : b + 1, 0])
        np.testing.assert_allclose(together[b], alone[0], atol=0.02)


def test_token_out_of_range():
    """NaN from there on, for that sequence alone, in which the nearest token is taken."""
    config, _, tokens, *_ = problem("llama")
    weights = packed("llama")
    tokens, v = np.array(tokens[:, :3]), config.vocabulary
    legal = np.array(tokens)
    tokens[0, 1], tokens[1, 0] = -7, v
    legal[0, 1], legal[1, 0] = 0, v - 1
    cache = KVCache.create(config, BATCH, 32)
    logits, got = one_by_one(weights, cache, tokens)
    wanted, wanted_cache = one_by_one(weights, cache, legal)
    bad = Status.TOKEN_OUT_OF_RANGE
    assert got.status.tolist() == [bad, bad, Status.OK]
    assert jnp.isnan(logits[0, 1:]).all() and jnp.isnan(logits[1]).all()
    np.testing.assert_array_equal(logits[0, 0], wanted[0, 0])
    np.testing.assert_array_equal(logits[2], wanted[2])
    assert got.lengths.tolist() == [3, 3, 3]
    np.testing.assert_array_equal(got.keys, wanted_cache.keys)

    filled = prefill(weights, cache, tokens, np.array([1, 3, 3]))
    assert filled.status.tolist() == [Status.OK, bad, Status.OK]


def test_full_cache():
    """NaN for the sequence without room, whose keys and values stay."""
    config, _, tokens, *_ = problem("llama")
    weights = packed("llama")
    cache = prefill(
        weights, KVCache.create(config, BATCH, 32), tokens[:, :32], np.array([32, 4, 31])
    )
    logits, new = decode_step(weights, cache, tokens[:, 0])
    assert new.status.tolist() == [Status.CACHE_FULL, Status.OK, Status.OK]
    assert new.lengths.tolist() == [32, 5, 32]
    assert jnp.isnan(logits).all(1).tolist() == [True, False, False]
    np.testing.assert_array_equal(new.keys[:, 0], cache.keys[:, 0])
    np.testing.assert_array_equal(new.values[:, 0], cache.values[:, 0])


def test_phases():
    """What debug returns is each phase of what the one before gave."""
    config, _, tokens, *_ = problem("qwen2")
    weights = packed("qwen2")
    cache = prefill(weights, KVCache.create(config, BATCH, T), tokens[:, :9])
    logits, new, phases = decode_step(weights, cache, tokens[:, 9], debug=True)
    plain, _ = decode_step(weights, cache, tokens[:, 9])
    np.testing.assert_array_equal(logits, plain)
    sizes = {
        "qkv": (config.heads + 2 * config.kv_heads) * config.head_dim,
        "attention": config.heads * config.head_dim,
        "out": config.width,
        "gate_up": config.hidden,
        "down": config.width,
    }
    for name, size in sizes.items():
        assert phases[name].shape == (config.layers, BATCH, size)
        assert phases[name].dtype == jnp.bfloat16

    def float32(x):
        return x.astype(jnp.float32)

    h = float32(weights.embedding[tokens[:, 9]])
    for layer in range(config.layers):
        for name, before, norm in (("out", "attention", 1), ("down", "gate_up", 2)):
            rows = float32(getattr(weights, name).unpack().values[layer])
            h += float32(phases[before][layer]) @ rows.T
            wanted = float32(h.astype(jnp.bfloat16)) * float32(weights.norms[2 * layer + norm])
            np.testing.assert_allclose(float32(phases[name][layer]), wanted, rtol=2**-6)
    head = reference.head(config, h, weights.norms[-1], weights.head.unpack())
    np.testing.assert_allclose(logits, head, atol=1e-5)
    heads = phases["qkv"][0].reshape(BATCH, config.kv_heads, -1, config.head_dim)
    np.testing.assert_array_equal(new.read(0)[1][:, 9], heads[:, :, -1])


def test_donation():
    """With the cache donated no copy of it is made, and it is written in place."""
    config, _, tokens, *_ = problem("llama")
    weights = packed("llama")
    cache = KVCache.create(config, BATCH, T)
    step = jax.jit(decode_step, donate_argnums=1)
    compiled = step.lower(weights, cache, tokens[:, 0]).compile()
    aliased = compiled.memory_analysis().alias_size_in_bytes
    assert aliased >= cache.keys.nbytes + cache.values.nbytes
    shape = ",".join(map(str, cache.keys.shape))
    copies = [x for x in compiled.as_text().splitlines() if f"bf16[{shape}]" in x and " copy(" in x]
    assert not copies


def test_errors():
    config, arrays, tokens, *_ = problem("llama")
    weights = packed("llama")
    cache = KVCache.create(config, BATCH, 32)
    step = functools.partial(decode_step, weights)
    with pytest.raises(ValueError, match="tokens has dtype float32, wanted int32"):
        step(cache, jnp.ones(BATCH))
    with pytest.raises(ValueError, match=r"tokens has shape \(2,\), wanted \(3\)"):
        step(cache, tokens[:2, 0])
    with pytest.raises(ValueError, match="tokens is a str, wanted an array"):
        step(cache, "hello")
    other = KVCache.create(CONFIGS["qwen3"], BATCH, 32)
    with pytest.raises(ValueError, match="cache is of the model Config"):
        step(other, tokens[:, 0])
    with pytest.raises(ValueError, match="implementation is 'triton'"):
        step(cache, tokens[:, 0], implementation="triton")
    with pytest.raises(NotImplementedError, match="decode_step with implementation 'cuda'"):
        step(cache, tokens[:, 0], implementation="cuda")
    step(cache, tokens[:, 0], implementation=["cuda", "xla"])

    fill = functools.partial(prefill, weights)
    with pytest.raises(ValueError, match="cache is of the model Config"):
        fill(other, tokens)
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 40\), wanted \(3, T\)"):
        fill(cache, tokens[:2])
    with pytest.raises(ValueError, match="tokens has 40 for each sequence, the cache room for 32"):
        fill(cache, tokens)
    with pytest.raises(ValueError, match="lengths has dtype float32, wanted int32"):
        fill(cache, tokens[:, :8], jnp.ones(BATCH))
    with pytest.raises(ValueError, match="implementation is 'triton'"):
        fill(cache, tokens[:, :8], implementation="triton")
    fill(cache, tokens[:, :8], implementation=["cuda", "xla"])
