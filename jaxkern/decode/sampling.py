"""sample: a token from logits, and how decode steps draw theirs."""

import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jax.typing import ArrayLike

from jaxkern import _checks


def sample(
    logits: jax.Array,
    key: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
) -> jax.Array:
    """A token for each row of logits, drawn from softmax(logits / temperature), int32 [B].

    top_k comes first: the top_k largest logits stay, of equal ones those of smaller tokens. Then
    top_p (Holtzman et al. 2019, arXiv:1904.09751): with the probabilities of what stayed, which add
    up to 1 again, and from the largest on, a token stays if those before it add up to less than
    top_p. So the largest one always does. Sums are float32 ones.

    Row b is drawn by jax.random.categorical with jax.random.fold_in(key, b), whatever the other
    rows are. Logits that do not stay are -inf there. A row of NaN gives token 0. The key is one of
    threefry2x32, or one made of the words jax.random.bits(key, (2,)).

    Args:
      logits: [B, V], computed with in float32.
      key: of jax.random.
      temperature: positive; not checked.
      top_k: from 1 on; V where it is larger, like None.
      top_p: above 0 and up to 1; not checked. None is 1.
    """
    batch, vocabulary = logits.shape
    logits = logits.astype(jnp.float32)
    scaled = (logits - logits.max(-1, keepdims=True)) / temperature
    if top_k is not None or top_p is not None:
        scaled = _filtered(logits, scaled, top_k, top_p)
    return greedy(scaled + _gumbel(seeds(key, batch), vocabulary))


def greedy(logits: jax.Array) -> jax.Array:
    """The token with the largest logit in each row, of equal ones the smallest; int32 [B]."""
    return jnp.argmax(logits, -1).astype(jnp.int32)


def seeds(key: jax.Array, batch: int) -> jax.Array:
    """Keys for B rows, as uint32 [B, 2]."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(_threefry(key), jnp.arange(batch))
    return jax.random.key_data(keys)


def _threefry(key):
    if jax.random.key_impl(key) == "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.bits(key, (2,)), impl="threefry2x32")


def _gumbel(seeds, vocabulary):
    """jax.random.gumbel of V tokens for each of the seeds, float32 [B, V]."""
    # NOTE: not by jax.random, which may do something else in another configuration: the kernel
    # draws the same.
    shape = len(seeds), vocabulary
    first, second = (jnp.broadcast_to(word, shape) for word in jnp.split(seeds, 2, axis=1))
    tokens = jnp.broadcast_to(jnp.arange(vocabulary, dtype=jnp.uint32), shape)
    high, low = threefry2x32_p.bind(first, second, jnp.zeros_like(tokens), tokens)
    one = np.float32(1).view(np.uint32)
    uniform = jax.lax.bitcast_convert_type((high ^ low) >> 9 | one, jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))


def _filtered(logits, scaled, top_k, top_p):
    """scaled, and -inf for the tokens that do not stay."""
    batch, vocabulary = logits.shape
    _, tokens = jax.lax.top_k(logits, min(top_k or vocabulary, vocabulary))
    rows = jnp.arange(batch)[:, None]
    stays = jnp.ones(tokens.shape, bool)
    if top_p is not None:
        probabilities = jax.nn.softmax(scaled[rows, tokens])
        before = jnp.cumsum(probabilities, -1) - probabilities
        stays = (before < top_p).at[:, 0].set(True)
    stays = jnp.zeros(logits.shape, bool).at[rows, tokens].set(stays)
    return jnp.where(stays, scaled, -jnp.inf)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "key"],
    meta_fields=["top_k", "greedy"],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: greedily, or by `sample` with keys for each place.

    Numbers are numpy's, which a compiled function takes as they are: to make a jax.Array of one is
    a computation of its own, for which `generate` would wait.
    """

    temperature: np.float32 | jax.Array
    top_p: np.float32 | jax.Array | None
    key: jax.Array | None
    top_k: int | None
    greedy: bool

    @classmethod
    def create(cls, temperature: Any, top_k: Any, top_p: Any, key: Any) -> "Sampling":
        """From the arguments of `generate`. ValueError if one is out of range."""
        if not _is_number(temperature) or not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature!r}, wanted a Python number, 0 or above")
        if top_k is not None:
            top_k = _checks.positive_int("top_k", top_k)
        if top_p is not None:
            if not _is_number(top_p) or not 0 < top_p <= 1:
                raise ValueError(f"top_p is {top_p!r}, wanted a Python number above 0, 1 at most")
            top_p = np.float32(top_p)
        if temperature and key is None:
            raise ValueError(f"key is None, wanted one of jax.random for temperature {temperature}")
        key = None if key is None else _threefry(key)
        greedily = temperature < _checks.FLOAT32.tiny  # nothing to divide float32 numbers by
        return cls(np.float32(temperature), top_p, key, top_k, greedily)

    def __call__(self, logits: jax.Array, i: ArrayLike) -> jax.Array:
        """The tokens after i others."""
        if self.greedy:
            return greedy(logits)
        key = jax.random.fold_in(self.key, i)
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return sample(logits, key, **options)

    def seeds(self, first: ArrayLike, n: int, batch: int) -> jax.Array:
        """Those of n tokens from the one after `first` others on, uint32 [n, B, 2]."""
        places = first + jnp.arange(n)
        return jax.vmap(lambda i: seeds(jax.random.fold_in(self.key, i), batch))(places)


def _is_number(x):
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)


def stop_tokens_of(config: Any, stop_tokens: Any) -> np.ndarray:
    """int32 [S]. ValueError if one is none of the vocabulary."""
    if not isinstance(stop_tokens, Collection):
        raise ValueError(f"stop_tokens is {stop_tokens!r}, wanted a collection of integers")
    for token in stop_tokens:
        if not isinstance(token, int | np.integer) or not 0 <= token < config.vocabulary:
            raise ValueError(
                f"stop_tokens has {token!r}, wanted integers from 0 to {config.vocabulary - 1}"
            )
    return np.array(list(stop_tokens), np.int32)
