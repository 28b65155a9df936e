"""decode_step, decode_steps and prefill: a model's forward pass for one token, and for many."""

import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxkern import _checks, _dispatch, _ffi
from jaxkern.decode.cache import KVCache, Status, pack_keys, pack_values, status_of
from jaxkern.decode.layout import ROW, largest_block
from jaxkern.decode.pack import WEIGHTS, PackedWeights
from jaxkern.decode.sampling import Sampling, stop_tokens_of
from jaxkern.ops.attention import dot_product_attention
from jaxkern.reference import decode as reference

_OP = "decode_step"

# What the kernel takes, as in cuda/decode/params.h: sequences, heads that share a kv head, and
# units of attention that a multiprocessor has.
_MAX_BATCH, _MAX_GROUP, _MAX_UNITS = 16, 8, 8
# And fewer tokens than this, where it draws with noise.
_MAX_VOCABULARY = 1 << 20


def decode_step(
    packed: PackedWeights,
    cache: KVCache,
    tokens: ArrayLike,
    *,
    debug: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, KVCache] | tuple[jax.Array, KVCache, dict[str, jax.Array]]:
    """The logits that follow one more token of each sequence, and the cache with it.

    Donate the cache in jax.jit (donate_argnums) for it to be written in place.

    A token out of the vocabulary, and one that the cache has no room for, cannot be known here. The
    first is taken for the nearest one in it, the second is not written. Either is noted in the
    status of its sequence, whose logits are NaN from then on; other sequences do not notice.

    Args:
      packed: from `pack_weights`.
      cache: of as many sequences, and of the same model.
      tokens: int32 [B].
      debug: whether to return also what the phases of all layers hand on.
      implementation: "cuda", the kernel: for up to 16 sequences, and heads of 64 or 128 elements,
        of which up to 8 share one of key and value; "xla", plain jax.numpy; a sequence of names, of
        which the first runs that can; or None, which is ("cuda", "xla").

    Returns:
      Logits, float32 [B, V], and the cache. With debug also a dict of bfloat16 arrays: "qkv"
      [L, B, (N + 2 K) H], by kv head as PackedWeights.qkv, before norms and rotation; "attention"
      [L, B, N H]; "gate_up" [L, B, F]; and of "out" and "down" [L, B, D] the hidden state that they
      give, times the weights of the norm that follows it.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: implementation "cuda", which cannot.
      ExceptionGroup: no implementation of a sequence can.
    """
    tokens = _checks.int32("tokens", tokens, (cache.batch,))
    debug = _checks.flag("debug", debug)
    _check_cache(packed, cache)
    choice = _dispatch.choose(_OP, implementation, _unsupported(packed, cache))
    return _decode_step(packed, cache, tokens, choice, debug)


class DecodedTokens(NamedTuple):
    """What `decode_steps` returns.

    tokens: int32 [B, num_steps]. After a stop token there are more of it.
    done: bool [B], whether a sequence has ended.
    cache: with the first token of each sequence, and with those drawn but for the last one.
    """

    tokens: jax.Array
    done: jax.Array
    cache: KVCache


def decode_steps(
    packed: PackedWeights,
    cache: KVCache,
    tokens: ArrayLike,
    num_steps: int,
    *,
    done: ArrayLike | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: jax.Array | None = None,
    first: ArrayLike = 0,
    stop_tokens: Collection[int] = (),
    implementation: str | Sequence[str] | None = None,
) -> DecodedTokens:
    """Up to num_steps tokens that follow, each decoded and drawn: one launch of the kernel.

    A sequence that has ended goes on with its last token, in the cache too. When all have, steps
    end: after one at least. Status and donation are as in `decode_step`; a sequence that is not OK
    draws token 0.

    Args:
      packed: from `pack_weights`.
      cache: of as many sequences, and of the same model.
      tokens: int32 [B].
      num_steps: how many. A launch leaves the GPU to nobody else while it lasts.
      done: bool [B], which sequences have ended before. None is none of them.
      temperature, top_k, top_p, key: as in `generate`.
      first: how many tokens were drawn before, which in `generate` the first of these comes after.
      stop_tokens: a sequence ends with the first of these.
      implementation: as in `decode_step`. The kernel takes vocabularies below 2^20 where the
        temperature is not 0.

    Raises:
      ValueError: arguments that do not fit together or are out of range, or an unknown
        implementation.
      NotImplementedError: implementation "cuda", which cannot.
      ExceptionGroup: no implementation of a sequence can.
    """
    tokens = _checks.int32("tokens", tokens, (cache.batch,))
    _check_cache(packed, cache)
    num_steps = _checks.positive_int("num_steps", num_steps)
    done = jnp.zeros(cache.batch, bool) if done is None else jnp.asarray(done)
    if (done.shape, done.dtype) != ((cache.batch,), bool):
        raise ValueError(f"done is {done.dtype}{list(done.shape)}, wanted bool[{cache.batch}]")
    how = Sampling.create(temperature, top_k, top_p, key)
    stops = stop_tokens_of(packed.config, stop_tokens)
    choice = steps_choice(packed, cache, how, implementation)
    return draw_steps(packed, cache, tokens, done, how, stops, first, num_steps, choice)


def prefill(
    packed: PackedWeights,
    cache: KVCache,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    implementation: str | Sequence[str] | None = None,
) -> KVCache:
    """The cache with the tokens of B sequences, and nothing of what it held before.

    It gives no logits: leave the last token of a prompt for `decode_step`.

    Args:
      packed: from `pack_weights`.
      cache: of B sequences, and of the same model. Only its memory is used.
      tokens: int32 [B, T]. One out of the vocabulary is noted in the status, as in `decode_step`.
      lengths: int32 [B], of the sequences, clipped to 0..T: tokens after them are ignored. None
        is T for all.
      implementation: of `jaxkern.dot_product_attention`.

    Raises:
      ValueError: arguments that do not fit together, T above the cache's max_length included.
      NotImplementedError, ExceptionGroup: as in `jaxkern.dot_product_attention`.
    """
    tokens = _checks.int32("tokens", tokens, (cache.batch, "T"))
    _check_cache(packed, cache)
    t = tokens.shape[1]
    if t > cache.max_length:
        raise ValueError(f"tokens has {t} for each sequence, the cache room for {cache.max_length}")
    ragged = lengths is not None
    lengths = jnp.full(cache.batch, t) if lengths is None else lengths
    lengths = jnp.clip(_checks.int32("lengths", lengths, (cache.batch,)), 0, t)
    implementation = _dispatch.as_static(implementation)
    return _prefill(packed, cache, tokens, lengths, ragged, implementation)


def _check_cache(packed, cache):
    """ValueError if the cache is one of another model."""
    if cache.config != packed.config:
        raise ValueError(f"cache is of the model {cache.config}, packed of {packed.config}")


def _unsupported(packed, cache):
    """Why the kernel cannot do this, or None."""
    config = packed.config
    if config.head_dim not in (64, 128):
        return f"head_dim is {config.head_dim}, supported are 64 and 128"
    if config.heads > _MAX_GROUP * config.kv_heads:
        shared = f"{config.heads} heads share {config.kv_heads} kv_heads"
        return f"{shared}, supported are {_MAX_GROUP} for each"
    if cache.batch > _MAX_BATCH:
        return f"there are {cache.batch} sequences, supported are up to {_MAX_BATCH}"
    count, multiprocessors = cache.batch * config.kv_heads, packed.multiprocessors
    if count > (most := _MAX_UNITS * multiprocessors):
        return f"there are {count} kv_heads of all sequences, supported are {most}"
    rows = largest_block(config.head_dim) * multiprocessors
    if config.width > rows:
        return f"width is {config.width}, supported is up to {rows}"
    return None


def steps_choice(
    packed: PackedWeights,
    cache: KVCache,
    how: Sampling,
    implementation: str | Sequence[str] | None,
) -> _dispatch.Choice:
    """What `draw_steps` shall do. Raises what `decode_steps` does."""
    reason = _unsupported(packed, cache)
    vocabulary = packed.config.vocabulary
    if reason is None and not how.greedy and vocabulary >= _MAX_VOCABULARY:
        reason = f"vocabulary is {vocabulary}, supported is below {_MAX_VOCABULARY} to draw from"
    return _dispatch.choose("decode_steps", implementation, reason)


@functools.partial(jax.jit, static_argnums=(7, 8))
def draw_steps(
    packed: PackedWeights,
    cache: KVCache,
    tokens: jax.Array,
    done: jax.Array,
    how: Sampling,
    stop_tokens: jax.Array,
    first: ArrayLike,
    n: int,
    choice: _dispatch.Choice,
) -> DecodedTokens:
    """decode_steps, without its checks."""
    arguments = packed, cache, tokens, done, how, stop_tokens, first
    run, otherwise = (functools.partial(f, n=n) for f in (_draw_kernel, _draw_reference))
    if not choice.kernel:
        return otherwise(*arguments)
    if not choice.fallback:
        return run(*arguments)
    return jax.lax.platform_dependent(*arguments, cuda=run, default=otherwise)


def _draw_reference(packed, cache, tokens, done, how, stop_tokens, first, n):
    results = reference.decode_steps(packed, cache, tokens, done, how, stop_tokens, first, n)
    return DecodedTokens(*results)


def _draw_kernel(packed, cache, tokens, done, how, stop_tokens, first, n):
    seeds, parameters, filters = jnp.zeros(0, jnp.uint32), jnp.zeros(0, jnp.float32), (0, False)
    if not how.greedy:
        seeds = how.seeds(first, n, cache.batch)
        top_p = jnp.float32(1) if how.top_p is None else how.top_p
        parameters = jnp.stack([how.temperature, top_p])
        filters = how.top_k or 0, how.top_p is not None
    done = done.astype(jnp.int32)
    drawn, _, done, cache, _ = _call(
        packed, cache, tokens, done, n, stop_tokens, seeds, parameters, *filters
    )
    return DecodedTokens(drawn, done.astype(bool), cache)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _decode_step(packed, cache, tokens, choice, debug):
    kernel = functools.partial(_kernel, debug=debug)
    otherwise = functools.partial(reference.decode_step, debug=debug)
    if not choice.kernel:
        return otherwise(packed, cache, tokens)
    if not choice.fallback:
        return kernel(packed, cache, tokens)
    return jax.lax.platform_dependent(packed, cache, tokens, cuda=kernel, default=otherwise)


def _kernel(packed, cache, tokens, debug):
    config, batch = packed.config, cache.batch
    done = jnp.zeros(batch, jnp.int32)
    if not debug:
        _, logits, _, cache, _ = _call(packed, cache, tokens, done)
        return logits, cache
    # As before the first step of all.
    cache = dataclasses.replace(cache, workspace=jnp.full_like(cache.workspace, -1))
    heads = config.heads * config.head_dim
    outputs = heads + 2 * config.kv_heads * config.head_dim
    sizes = {
        "qkv": outputs,
        "attention": heads,
        "out": config.width,
        "gate_up": config.hidden,
        "down": config.width,
    }
    layers = 1 << (config.layers - 1).bit_length()
    count = layers * batch * sum(sizes.values())
    nothing = jax.lax.bitcast_convert_type(jnp.full(count, 0xFFFF, jnp.uint16), jnp.bfloat16)
    _, logits, _, cache, sent = _call(packed, cache, tokens, done, debug=nothing)
    ends = np.cumsum([layers * batch * size for size in sizes.values()])
    phases = {}
    for (name, size), x in zip(sizes.items(), jnp.split(sent, ends[:-1]), strict=True):
        if name != "qkv":  # vectors lie side by side, and of floats of few bits they are larger
            x = jnp.swapaxes(x.reshape(layers, size // ROW, batch, ROW), 1, 2)
            x *= 2.0**-64 if packed.weights in ("fp8", "nvfp4", "mxfp4") else 1.0
        # A layer is where the number of layers before it is, from -1 on.
        phases[name] = jnp.roll(x.reshape(layers, batch, size), 1, 0)[: config.layers]
    return logits, cache, phases


def _call(
    packed,
    cache,
    tokens,
    done,
    n=0,
    stop_tokens=None,
    seeds=None,
    parameters=None,
    top_k=0,
    top_p=False,
    debug=None,
):
    """Tokens drawn in n steps, the last logits, done, the cache and debug. n = 0: one step, no
    token.
    """
    config, batch = packed.config, cache.batch
    none = jnp.zeros(0, jnp.bfloat16)
    matrices = packed.qkv, packed.out, packed.gate_up, packed.down, packed.head
    state = cache.lengths, cache.status, cache.keys, cache.values, cache.workspace, done
    operands = [
        tokens,
        *state,
        packed.embedding,
        packed.norms,
        *(matrix.values for matrix in matrices),
        *(jnp.zeros(0, jnp.float32) if x.scale is None else x.scale for x in matrices),
        packed.frequencies,
        none if packed.qkv_bias is None else packed.qkv_bias,
        none if packed.qk_norms is None else packed.qk_norms,
        jnp.zeros(0, jnp.int32) if stop_tokens is None else stop_tokens,
        jnp.zeros(0, jnp.uint32) if seeds is None else seeds,
        jnp.zeros(0, jnp.float32) if parameters is None else parameters,
        none if debug is None else debug,
    ]
    results = [
        ((batch, n), np.dtype(np.int32)),
        ((batch, config.vocabulary), np.dtype(np.float32)),
        *((x.shape, x.dtype) for x in (*state, operands[-1])),
    ]
    aliases = {i: i + 1 for i in range(1, 7)}
    if debug is not None:
        aliases[len(operands) - 1] = len(results) - 1
    drawn, logits, *state, done, debug = _ffi.call(
        "jaxkern.decode_step",
        results,
        *operands,
        aliases=aliases,
        format=np.int32(WEIGHTS.index(packed.weights)),
        epsilon=np.float32(config.norm_epsilon),
        multiprocessors=np.int32(packed.multiprocessors),
        top_k=np.int32(min(top_k, config.vocabulary)),
        top_p=np.bool_(top_p),
    )
    names = ("lengths", "status", "keys", "values", "workspace")
    cache = dataclasses.replace(cache, **dict(zip(names, state, strict=True)))
    return drawn, logits, done, cache, debug


@functools.partial(jax.jit, static_argnums=(4, 5))
def _prefill(packed, cache, tokens, lengths, ragged, implementation):
    config = packed.config
    batch, t = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(t), (batch, t))
    masks = {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths} if ragged else {}

    def layer(h, _, weights):
        x = reference.qkv(config, h, weights)
        query, key, value = reference.heads(config, x, positions, weights, packed.frequencies)
        x = dot_product_attention(
            query, key, value, is_causal=True, implementation=implementation, **masks
        )
        h = reference.out(h, x.reshape(batch, t, config.heads * config.head_dim), weights)
        h = reference.down(h, reference.gate_up(config, h, weights), weights)
        return h, (pack_keys(key), pack_values(value))

    h = reference.embed(packed.embedding, tokens)
    _, written = packed.scan_layers(layer, h, prefill=True)
    status = status_of(config, tokens, Status.OK)
    status = jnp.where(positions < lengths[:, None], status, Status.OK).max(1, initial=Status.OK)
    return cache.with_packed(*written, lengths, status)
