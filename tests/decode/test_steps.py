"""decode_steps: the tokens of a loop of one's own, and where it ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_model import CONFIGS, model_of, random_arrays

from jaxkern.decode import KVCache, decode_step, decode_steps, pack_weights, sample

BATCH, STEPS = 3, 12


@functools.cache
def packed():
    config = CONFIGS["llama"]
    return pack_weights(model_of(config, random_arrays(config)))


def cache():
    return KVCache.create(CONFIGS["llama"], BATCH, 64)


TOKENS = jnp.array([3, 50, 7], jnp.int32)


def by_hand(draw, first=0):
    """Tokens [B, STEPS] of a loop around decode_step, and the cache after it."""

    @jax.jit
    def step(weights, cache, token, i):
        logits, cache = decode_step(weights, cache, token)
        return draw(logits, i), cache

    token, state, tokens = TOKENS, cache(), []
    for i in range(STEPS):
        token, state = step(packed(), state, token, first + i)
        tokens.append(token)
    return np.stack(tokens, 1), state


def greedy(logits, i):
    return jnp.argmax(logits, -1).astype(jnp.int32)


def test_greedy():
    wanted, after = by_hand(greedy)
    got = decode_steps(packed(), cache(), TOKENS, STEPS)
    np.testing.assert_array_equal(got.tokens, wanted)
    assert not got.done.any()
    jax.tree.map(np.testing.assert_array_equal, got.cache, after)


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.6}])
def test_sampled(options, first):
    key = jax.random.key(11)

    def draw(logits, i):
        return sample(logits, jax.random.fold_in(key, i), temperature=0.8, **options)

    wanted, _ = by_hand(draw, first)
    got = decode_steps(
        packed(), cache(), TOKENS, STEPS, temperature=0.8, key=key, first=first, **options
    )
    np.testing.assert_array_equal(got.tokens, wanted)


def test_in_parts():
    """Steps that go on from others give what all at once do."""
    run = functools.partial(decode_steps, packed(), temperature=1.0, key=jax.random.key(1))
    whole = run(cache(), TOKENS, STEPS)
    start = run(cache(), TOKENS, 5)
    rest = run(start.cache, start.tokens[:, -1], STEPS - 5, first=5)
    np.testing.assert_array_equal(jnp.concatenate([start.tokens, rest.tokens], 1), whole.tokens)


def test_ends():
    """A sequence repeats its stop token; when all have ended so does the loop."""
    free, _ = by_hand(greedy)
    stops = sorted({int(row[i]) for row, i in zip(free, (4, 2, 6), strict=True)})
    got = decode_steps(packed(), cache(), TOKENS, STEPS, stop_tokens=stops)
    ends = [int(np.isin(row, stops).argmax()) for row in free]
    for row, tokens, end in zip(free, got.tokens, ends, strict=True):
        np.testing.assert_array_equal(tokens[: end + 1], row[: end + 1])
        assert (tokens[end:] == row[end]).all()
    assert got.done.all()
    assert max(ends) < STEPS - 1
    assert got.cache.lengths.tolist() == [max(ends) + 1] * BATCH


def test_ended_before():
    """Such a sequence goes on with its token; if all have there is one step."""
    done = jnp.array([False, True, False])
    got = decode_steps(packed(), cache(), TOKENS, STEPS, done=done)
    free, _ = by_hand(greedy)
    assert (got.tokens[1] == TOKENS[1]).all()
    np.testing.assert_array_equal(got.tokens[::2], free[::2])
    assert got.done.tolist() == done.tolist()
    got = decode_steps(packed(), cache(), TOKENS, STEPS, done=jnp.ones(BATCH, bool))
    np.testing.assert_array_equal(got.tokens, np.tile(TOKENS[:, None], STEPS))
    assert got.cache.lengths.tolist() == [1] * BATCH


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0, wanted a positive integer"),
        ({"done": jnp.zeros(2, bool)}, r"done is bool\[2\], wanted bool\[3\]"),
        ({"done": jnp.zeros(3, jnp.int32)}, r"done is int32\[3\], wanted bool\[3\]"),
        ({"tokens": TOKENS[:2]}, r"tokens has shape \(2,\), wanted \(3\)"),
        ({"temperature": 0.5}, "key is None"),
        ({"stop_tokens": (99,)}, "stop_tokens has 99, wanted integers from 0 to 74"),
        ({"implementation": "triton"}, "decode_steps: implementation is 'triton'"),
    ],
)
def test_errors(options, message):
    arguments = {"tokens": TOKENS, "num_steps": 2} | options
    with pytest.raises(ValueError, match=message):
        decode_steps(packed(), cache(), **arguments)
