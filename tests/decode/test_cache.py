"""KVCache: its layouts, ragged sequences, what it writes and what it does not."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_model import CONFIGS

from jaxkern.decode import KVCache, Status
from jaxkern.decode.layout import number_of_blocks
from jaxkern.testing import random_normal

CONFIG = dataclasses.replace(CONFIGS["llama"], head_dim=64)
L, K, H = CONFIG.layers, CONFIG.kv_heads, CONFIG.head_dim


def random_tokens(seed, batch, t):
    return random_normal(seed, *[(L, batch, t, K, H)] * 2, dtype="bfloat16")


def poisoned(cache):
    """The cache with NaN wherever nothing has been written."""
    full = [jnp.full_like(x, jnp.nan) for x in (cache.keys, cache.values)]
    return dataclasses.replace(cache, keys=full[0], values=full[1])


def test_create():
    cache = KVCache.create(CONFIG, 3, 33)
    assert (cache.batch, cache.max_length) == (3, 64)
    assert cache.keys.shape == (L, 3, K, 64 // 8, H // 32, 8, 32)
    assert cache.values.shape == (L, 3, K, 64 // 32, H, 32)
    assert cache.keys.dtype == cache.values.dtype == jnp.bfloat16
    assert cache.lengths.dtype == cache.status.dtype == jnp.int32
    assert not cache.lengths.any() and not cache.status.any()


def test_layouts():
    """Element by element, as docs/decode.md has them."""
    keys, values = random_tokens(1, 2, 40)
    cache = KVCache.create(CONFIG, 2, 64).write(keys, values, jnp.array([40, 7]))
    stored, keys = np.asarray(cache.keys), np.asarray(keys)
    for t in range(40):
        for d in range(H):
            got = stored[:, :, :, t // 8, d // 32, t % 8, d % 32]
            np.testing.assert_array_equal(got, keys[:, :, t, :, d])
    stored, values = np.asarray(cache.values), np.asarray(values)
    for t in range(40):
        got = stored[:, :, :, t // 32, :, t % 32]
        np.testing.assert_array_equal(got, values[:, :, t])


@pytest.mark.parametrize("t", [0, 1, 8, 31, 32, 33, 64])
def test_write_and_read(t):
    keys, values = random_tokens(2, 3, t)
    lengths = jnp.array([t, t // 2, 0])
    cache = poisoned(KVCache.create(CONFIG, 3, 64)).write(keys, values, lengths)
    assert cache.lengths.tolist() == lengths.tolist()
    for i in range(L):
        got_keys, got_values = cache.read(i)
        assert got_keys.shape == got_values.shape == (3, 64, K, H)
        np.testing.assert_array_equal(got_keys[:, :t], keys[i])
        np.testing.assert_array_equal(got_values[:, :t], values[i])


def test_write_begins_anew():
    """Lengths are clipped, the status is OK again."""
    keys, values = random_tokens(3, 2, 5)
    cache = KVCache.create(CONFIG, 2, 32)
    cache = dataclasses.replace(cache, status=jnp.array([1, 2], jnp.int32))
    cache = jax.jit(KVCache.write)(cache, keys, values, jnp.array([-1, 9]))
    assert cache.lengths.tolist() == [0, 5]
    assert cache.status.tolist() == [0, 0]


def test_append():
    """At each sequence's own position, and nowhere else."""
    t, steps = 30, 12
    keys, values = random_tokens(4, 3, t + steps)
    lengths = np.array([30, 0, 19])
    cache = poisoned(KVCache.create(CONFIG, 3, 64)).write(keys[:, :, :t], values[:, :, :t], lengths)
    wanted = [np.asarray(x, np.float32) for x in zip(*map(cache.read, range(L)), strict=True)]

    @jax.jit
    def append(cache, keys, values):
        for i in range(L):
            cache = cache.append(i, keys[i], values[i])
        return cache.advance(jnp.zeros(3, jnp.int32))

    for step in range(steps):
        new = keys[:, :, t + step], values[:, :, t + step]
        cache = append(cache, *new)
        for b in range(3):
            for x, part in zip(wanted, new, strict=True):
                x[:, b, lengths[b] + step] = part[:, b]
    assert cache.lengths.tolist() == (lengths + steps).tolist()
    got = zip(*map(cache.read, range(L)), strict=True)
    for x, part in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(np.asarray(part, np.float32), x)


def test_full():
    """A full sequence keeps what it has, and others go on."""
    keys, values = random_tokens(5, 2, 32)
    cache = KVCache.create(CONFIG, 2, 32).write(keys, values, jnp.array([32, 3]))
    new = cache.append(1, jnp.ones((2, K, H)), jnp.ones((2, K, H))).advance(jnp.zeros(2, jnp.int32))
    assert new.lengths.tolist() == [32, 4]
    assert new.status.tolist() == [Status.CACHE_FULL, Status.OK]
    for before, after in zip(cache.read(1), new.read(1), strict=True):
        np.testing.assert_array_equal(before[0], after[0])
        np.testing.assert_array_equal(after[1, 3], np.ones((K, H)))


def test_status_stays():
    cache = KVCache.create(CONFIG, 4, 32)
    v = CONFIG.vocabulary
    cache = cache.advance(jnp.array([-1, v, v - 1, 0], jnp.int32))
    out = Status.TOKEN_OUT_OF_RANGE
    assert cache.status.tolist() == [out, out, 0, 0]
    full = dataclasses.replace(cache, lengths=jnp.full(4, 32, jnp.int32))
    assert full.advance(jnp.zeros(4, jnp.int32)).status.tolist() == [out, out, 2, 2]


def test_errors():
    with pytest.raises(ValueError, match="batch is 0, wanted a positive integer"):
        KVCache.create(CONFIG, 0, 32)
    with pytest.raises(ValueError, match=r"max_length is 1\.5, wanted a positive integer"):
        KVCache.create(CONFIG, 1, 1.5)
    with pytest.raises(ValueError, match="max_length is 129, above the context 128"):
        KVCache.create(CONFIG, 1, 129)
    with pytest.raises(ValueError, match="head_dim is 48, wanted a multiple of 32"):
        KVCache.create(dataclasses.replace(CONFIG, head_dim=48), 1, 32)
    cache = KVCache.create(CONFIG, 2, 32)
    keys, values = random_tokens(6, 2, 4)
    lengths = jnp.array([1, 2])
    with pytest.raises(ValueError, match=r"keys has shape .*, wanted \(2, 2, 'T', 2, 64\)"):
        cache.write(keys[:1], values, lengths)
    with pytest.raises(ValueError, match="values has shape"):
        cache.write(keys, values[:, :, :3], lengths)
    with pytest.raises(ValueError, match="keys has dtype int32, wanted one of bfloat16"):
        cache.write(keys.astype(jnp.int32), values, lengths)
    with pytest.raises(ValueError, match="keys has 33 tokens, the cache room for 32"):
        cache.write(*random_tokens(7, 2, 33), lengths)
    with pytest.raises(ValueError, match=r"lengths has shape \(3,\), wanted \(2\)"):
        cache.write(keys, values, jnp.array([1, 2, 3]))


@pytest.mark.parametrize("multiprocessors", [1, 78, 132, 256])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"width": 64, "hidden": 32, "heads": 1, "kv_heads": 1},
        {"width": 2048, "hidden": 8192, "heads": 32, "kv_heads": 8},
        {"width": 4096, "hidden": 14336, "heads": 32, "kv_heads": 8, "head_dim": 128},
    ],
)
def test_workspace(sizes, multiprocessors):
    """It has room for a header and all that blocks send, twice: see plan_step() in cuda/decode."""
    config = dataclasses.replace(CONFIG, **sizes)
    heads = config.heads * config.head_dim
    outputs = heads + 2 * config.kv_heads * config.head_dim
    blocks = number_of_blocks(config.width, multiprocessors, config.head_dim)
    values = outputs + heads + config.width + config.hidden + config.width + 16 * heads
    sums = 2 * 4 * math.ceil(blocks / 4) + 16 * config.heads
    wanted = 6 * 128 + 3 * 2 * (2 * values + 4 * sums)
    workspace = KVCache.create(config, 3, 32).workspace
    assert workspace.nbytes >= wanted
    assert (workspace == -1).all()
