"""generate: tokens that continue prompts."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxkern import _checks, _dispatch
from jaxkern.decode.cache import KVCache
from jaxkern.decode.pack import PackedWeights
from jaxkern.decode.sampling import greedy, sample
from jaxkern.decode.step import decode_step, prefill

_CHUNK = 16  # tokens between two looks at whether all sequences have ended


class GeneratedTokens(NamedTuple):
    """What `generate` returns.

    tokens: int32 [B, max_new_tokens]. After a stop token there are more of it.
    lengths: int32 [B], how many of the tokens are the sequence's, its stop token included.
    status: int32 [B], of `Status`; tokens of a sequence that is not OK mean nothing.
    """

    tokens: jax.Array
    lengths: jax.Array
    status: jax.Array


def generate(
    packed: PackedWeights,
    prompt: ArrayLike,
    *,
    max_new_tokens: int,
    lengths: ArrayLike | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    stop_tokens: Collection[int] = (),
    callback: Callable[[np.ndarray], None] | None = None,
    implementation: str | Sequence[str] | None = None,
) -> GeneratedTokens:
    """Tokens that continue each of B prompts.

    With stop tokens or a callback the tokens come in chunks of up to 16, after each of which the
    host waits for it: to end early, and to call back. Else, and under a transformation such as
    jax.jit, everything is computed at once. That changes no token.

    Args:
      packed: from `pack_weights`.
      prompt: int32 [B, T], T from 1 on.
      max_new_tokens: how many tokens to generate.
      lengths: int32 [B], of the prompts, clipped to 1..T: tokens after them are ignored. None is T
        for all.
      temperature: a Python number. 0 takes the most likely token, whatever top_k and top_p are.
        Else `sample` draws them, with jax.random.fold_in(key, i) for the token after i others.
      top_k, top_p: of `sample`; Python numbers.
      key: of jax.random. Needed where the temperature is not 0.
      stop_tokens: a sequence ends with the first of these.
      callback: called with the tokens of each chunk, int32 [B, n], in order.
      implementation: of `prefill` and of `decode_step`.

    Raises:
      ValueError: arguments that do not fit together or are out of range, such as more tokens than
        config.context; a callback under a transformation.
      NotImplementedError, ExceptionGroup: as in `prefill` and `decode_step`.
    """
    prompt = _checks.int32("prompt", prompt, ("B", "T"))
    batch, t = prompt.shape
    if not prompt.size:
        raise ValueError(f"prompt has shape {prompt.shape}, wanted one token at least")
    max_new_tokens = _checks.positive_int("max_new_tokens", max_new_tokens)
    context = packed.config.context
    if t + max_new_tokens > context:
        raise ValueError(
            f"prompt has {t} tokens and max_new_tokens is {max_new_tokens}, together above the "
            f"context {context}"
        )
    if lengths is not None:
        lengths = jnp.clip(_checks.int32("lengths", lengths, (batch,)), 1, t)
    how = _sampling(temperature, top_k, top_p, key)
    stops = _stop_tokens(packed.config, stop_tokens)
    implementation = _dispatch.as_static(implementation)

    state = _start(packed, prompt, lengths, t - 1 + max_new_tokens, implementation)
    traced = isinstance(state.token, jax.core.Tracer)
    if traced and callback is not None:
        raise ValueError("callback is given under a transformation such as jax.jit, wanted None")
    chunked = not traced and (callback is not None or stops.size > 0)
    chunk = _CHUNK if chunked else max_new_tokens
    chunks = []
    for first in range(0, max_new_tokens, chunk):
        n = min(chunk, max_new_tokens - first)
        state, tokens = _steps(packed, state, how, stops, n, implementation)
        chunks.append(tokens)
        if callback is not None:
            callback(np.asarray(tokens))
        if chunked and state.done.all():
            rest = max_new_tokens - first - n
            chunks.append(jnp.broadcast_to(state.token[:, None], (batch, rest)))
            break
    return GeneratedTokens(jnp.concatenate(chunks, axis=1), state.lengths, state.cache.status)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p", "key"],
    meta_fields=["top_k", "greedy"],
)
@dataclasses.dataclass(frozen=True)
class _Sampling:
    temperature: jax.Array
    top_p: jax.Array | None
    key: jax.Array | None
    top_k: int | None
    greedy: bool

    def __call__(self, logits, i):
        """The tokens after i others."""
        if self.greedy:
            return greedy(logits)
        key = jax.random.fold_in(self.key, i)
        options = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return sample(logits, key, **options)


def _sampling(temperature, top_k, top_p, key):
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}, wanted a Python number, 0 or above")
    if top_k is not None:
        top_k = _checks.positive_int("top_k", top_k)
    if top_p is not None:
        if not _is_number(top_p) or not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p!r}, wanted a Python number above 0, 1 at most")
        top_p = jnp.float32(top_p)
    if temperature and key is None:
        raise ValueError(f"key is None, wanted one of jax.random for temperature {temperature}")
    greedily = temperature < _checks.FLOAT32.tiny  # nothing to divide float32 numbers by
    return _Sampling(jnp.float32(temperature), top_p, key, top_k, greedily)


def _is_number(x):
    return isinstance(x, int | float | np.integer | np.floating) and not isinstance(x, bool)


def _stop_tokens(config, stop_tokens):
    if not isinstance(stop_tokens, Collection):
        raise ValueError(f"stop_tokens is {stop_tokens!r}, wanted a collection of integers")
    for token in stop_tokens:
        if not isinstance(token, int | np.integer) or not 0 <= token < config.vocabulary:
            raise ValueError(
                f"stop_tokens has {token!r}, wanted integers from 0 to {config.vocabulary - 1}"
            )
    return jnp.array(list(stop_tokens), jnp.int32)


class _State(NamedTuple):
    cache: KVCache
    token: jax.Array  # int32 [B], the last one, which the cache has not
    done: jax.Array  # bool [B]
    lengths: jax.Array  # int32 [B], of what has been generated
    i: jax.Array  # int32, how many steps there were


@functools.partial(jax.jit, static_argnums=(3, 4))
def _start(packed, prompt, lengths, max_length, implementation):
    """The state after all but the last token of each prompt."""
    batch, t = prompt.shape
    cache = KVCache.create(packed.config, batch, max_length)
    before = None if lengths is None else lengths - 1
    if t > 1:
        cache = prefill(packed, cache, prompt[:, :-1], before, implementation=implementation)
    last = jnp.full(batch, t - 1) if before is None else before
    token = jnp.take_along_axis(prompt, last[:, None], axis=1)[:, 0]
    zeros = jnp.zeros(batch, jnp.int32)
    return _State(cache, token, zeros.astype(bool), zeros, jnp.int32(0))


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=1)
def _steps(packed, state, how, stops, n, implementation):
    """The state after n more steps, and their tokens [B, n]."""

    def step(state, _):
        logits, cache = decode_step(packed, state.cache, state.token, implementation=implementation)
        token = jnp.where(state.done, state.token, how(logits, state.i))
        done = state.done | jnp.isin(token, stops)
        lengths = state.lengths + ~state.done
        return _State(cache, token, done, lengths, state.i + 1), token

    state, tokens = jax.lax.scan(step, state, length=n)
    return state, tokens.T
