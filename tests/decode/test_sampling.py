"""sample: which tokens can come, how often, and which key draws which."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern.decode import sample
from jaxkern.testing import random_normal

DRAWS = 4000
LOGITS = jnp.log(jnp.array([0.05, 0.3, 0.1, 0.3, 0.2, 0.05]))


def frequencies(logits=LOGITS, **options):
    """How often each token comes in many draws."""
    tokens = sample(jnp.tile(logits, (DRAWS, 1)), jax.random.key(0), **options)
    assert (tokens.shape, tokens.dtype) == ((DRAWS,), jnp.int32)
    return np.bincount(tokens, minlength=len(logits)) / DRAWS


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [0.05, 0.3, 0.1, 0.3, 0.2, 0.05]),
        ({"temperature": 0.5}, np.square([0.05, 0.3, 0.1, 0.3, 0.2, 0.05]) / 0.235),
        ({"top_k": 6}, [0.05, 0.3, 0.1, 0.3, 0.2, 0.05]),
        ({"top_k": 99}, [0.05, 0.3, 0.1, 0.3, 0.2, 0.05]),
        ({"top_k": 3}, np.array([0, 0.3, 0, 0.3, 0.2, 0]) / 0.8),
        ({"top_k": 1}, [0, 1, 0, 0, 0, 0]),  # of equal ones the smaller token
        ({"top_k": 5}, np.array([0.05, 0.3, 0.1, 0.3, 0.2, 0]) / 0.95),
        ({"top_p": 1.0}, [0.05, 0.3, 0.1, 0.3, 0.2, 0.05]),
        ({"top_p": 0.01}, [0, 1, 0, 0, 0, 0]),
        ({"top_p": 0.31}, [0, 0.5, 0, 0.5, 0, 0]),
        ({"top_p": 0.79}, np.array([0, 0.3, 0, 0.3, 0.2, 0]) / 0.8),
        ({"top_p": 0.81}, np.array([0, 0.3, 0.1, 0.3, 0.2, 0]) / 0.9),
        # Of the 0.8 of three tokens 0.74 is less than two, 0.76 more.
        ({"top_k": 3, "top_p": 0.74}, [0, 0.5, 0, 0.5, 0, 0]),
        ({"top_k": 3, "top_p": 0.76}, np.array([0, 0.3, 0, 0.3, 0.2, 0]) / 0.8),
        ({"temperature": 1e-37}, [0, 0.5, 0, 0.5, 0, 0]),
        # Probabilities with the temperature: 0.38 is that of token 1.
        ({"temperature": 0.5, "top_p": 0.37}, [0, 1, 0, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.39}, [0, 0.5, 0, 0.5, 0, 0]),
    ],
)
def test_distribution(options, wanted):
    got = frequencies(**options)
    assert ((got > 0) == (np.asarray(wanted) > 0)).all()
    np.testing.assert_allclose(got, wanted, atol=4 * 0.5 / DRAWS**0.5)


def test_keys():
    """A row's token is that of its key and its place, whatever is beside it."""
    logits = random_normal(1, (8, 50), dtype="float32")[0]
    for options in ({}, {"top_k": 20}, {"top_p": 0.9}):
        run = functools.partial(sample, **options)
        tokens = run(logits, jax.random.key(3))
        np.testing.assert_array_equal(run(logits, jax.random.key(3)), tokens)
        assert (run(logits, jax.random.key(4)) != tokens).any()
        np.testing.assert_array_equal(run(logits[:3], jax.random.key(3)), tokens[:3])
        np.testing.assert_array_equal(jax.jit(run)(logits, jax.random.key(3)), tokens)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_categorical(impl):
    """The draw is jax.random.categorical's, with the key that is documented."""
    logits = random_normal(1, (5, 300), dtype="float32")[0]
    key = jax.random.key(7, impl=impl)
    got = sample(logits, key, temperature=0.7)
    if impl != "threefry2x32":
        key = jax.random.wrap_key_data(jax.random.bits(key, (2,)), impl="threefry2x32")
    for b, token in enumerate(got):
        k = jax.random.fold_in(key, b)
        assert token == jax.random.categorical(k, (logits[b] - logits[b].max()) / 0.7)


def test_noise_is_the_tokens():
    """What top_k and top_p leave are drawn as if the others were -inf."""
    logits = random_normal(1, (64, 40), dtype="float32")[0]
    tokens = sample(logits, jax.random.key(2), top_k=7)
    seventh = jnp.sort(logits)[:, -7:-6]
    masked = jnp.where(logits >= seventh, logits, -jnp.inf)
    np.testing.assert_array_equal(sample(masked, jax.random.key(2)), tokens)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}])
def test_infinite_and_nan(options):
    """A token of logit -inf does not come; a row of NaN gives token 0."""
    logits = LOGITS.at[1].set(-jnp.inf)
    assert frequencies(logits, **options)[1] == 0
    assert frequencies(jnp.full(6, jnp.nan), **options)[0] == 1


def test_dtype():
    logits = random_normal(1, (4, 50), dtype="bfloat16")[0]
    key = jax.random.key(0)
    np.testing.assert_array_equal(sample(logits, key), sample(logits.astype(jnp.float32), key))
