"""generate: tokens that continue prompts."""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxkern import _checks, _dispatch
from jaxkern.decode.cache import KVCache
from jaxkern.decode.pack import PackedWeights
from jaxkern.decode.sampling import Sampling, stop_tokens_of
from jaxkern.decode.step import draw_steps, prefill, steps_choice

_CHUNK = 16  # tokens of a call of the callback
_LAUNCH = 64  # steps of a launch of the kernel, which leaves the GPU to nobody else meanwhile


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

    With a callback the tokens come in chunks of up to 16, after each of which the host waits for
    it. Else everything is one computation. That changes no token. When all sequences have ended so
    do the steps.

    Args:
      packed: from `pack_weights`.
      prompt: int32 [B, T], T from 1 on.
      max_new_tokens: how many tokens to generate.
      lengths: int32 [B], of the prompts, clipped to 1..T: tokens after them are ignored. None is T
        for all.
      temperature: a Python number. 0 takes the most likely token, whatever top_k and top_p are.
        Else `sample` draws them, with jax.random.fold_in(k, i) for the token after i others; k is
        the key of threefry2x32 that it makes of key.
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
        lengths = _checks.int32("lengths", lengths, (batch,))
    how = Sampling.create(temperature, top_k, top_p, key)
    stops = stop_tokens_of(packed.config, stop_tokens)
    implementation = _dispatch.as_static(implementation)
    arguments = packed, prompt, lengths
    if callback is None:
        return _generate(*arguments, how, stops, max_new_tokens, implementation)

    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((*arguments, how))):
        raise ValueError("callback is given under a transformation such as jax.jit, wanted None")
    state = _start(*arguments, max_new_tokens, implementation)
    chunks = []
    for first in range(0, max_new_tokens, _CHUNK):
        n = min(_CHUNK, max_new_tokens - first)
        state, tokens = _steps(packed, state, how, stops, n, implementation)
        chunks.append(tokens)
        callback(np.asarray(tokens))
        if state.done.all():
            rest = max_new_tokens - first - n
            chunks.append(jnp.broadcast_to(state.token[:, None], (batch, rest)))
            break
    tokens = jnp.concatenate(chunks, axis=1)
    return GeneratedTokens(tokens, _lengths(tokens, stops), state.cache.status)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _generate(packed, prompt, lengths, how, stops, n, implementation):
    """All of `generate` but its checks."""
    state = _start(packed, prompt, lengths, n, implementation)
    state, tokens = _steps(packed, state, how, stops, n, implementation)
    return GeneratedTokens(tokens, _lengths(tokens, stops), state.cache.status)


class _State(NamedTuple):
    cache: KVCache
    token: jax.Array  # int32 [B], the last one, which the cache has not
    done: jax.Array  # bool [B]
    i: jax.Array  # int32, how many have been drawn


@functools.partial(jax.jit, static_argnums=(3, 4))
def _start(packed, prompt, lengths, n, implementation):
    """The state after all but the last token of each prompt, with room for n more."""
    batch, t = prompt.shape
    cache = KVCache.create(packed.config, batch, t - 1 + n)
    before = None if lengths is None else jnp.clip(lengths, 1, t) - 1
    if t > 1:
        cache = prefill(packed, cache, prompt[:, :-1], before, implementation=implementation)
    last = jnp.full(batch, t - 1) if before is None else before
    token = jnp.take_along_axis(prompt, last[:, None], axis=1)[:, 0]
    return _State(cache, token, jnp.zeros(batch, bool), jnp.int32(0))


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=1)
def _steps(packed, state, how, stops, n, implementation):
    """The state after n more tokens, and those [B, n]."""
    choice = steps_choice(packed, state.cache, how, implementation)
    full, rest = divmod(n, _LAUNCH)

    def launch(state, n):
        drawn, done, cache = draw_steps(
            packed, state.cache, state.token, state.done, how, stops, state.i, n, choice
        )
        return _State(cache, drawn[:, -1], done, state.i + n), drawn

    def body(carry):
        state, tokens, count = carry
        state, drawn = launch(state, _LAUNCH)
        return state, tokens.at[:, count].set(drawn), count + 1

    batch = len(state.token)
    tokens = jnp.zeros((batch, full, _LAUNCH), jnp.int32)
    if full:
        carry = state, tokens, jnp.int32(0)
        if not stops.size:  # a number of launches that is known needs no look at it in between
            carry = jax.lax.fori_loop(0, full, lambda _, carry: body(carry), carry)
        else:
            carry = jax.lax.while_loop(lambda x: (x[2] < full) & ~x[0].done.all(), body, carry)
        state, tokens, count = carry
        left = jnp.arange(full)[:, None] >= count
        tokens = jnp.where(left, state.token[:, None, None], tokens)
    tokens = tokens.reshape(batch, full * _LAUNCH)
    if rest:
        state, last = launch(state, rest)
        tokens = jnp.concatenate([tokens, last], axis=1)
    return state, tokens


@jax.jit
def _lengths(tokens, stops):
    """Up to the first stop token, with it, int32 [B]."""
    ended = jnp.cumsum(jnp.isin(tokens, stops), axis=1)
    return (ended[:, :-1] == 0).sum(1, dtype=jnp.int32) + 1
