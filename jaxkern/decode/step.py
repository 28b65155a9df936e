"""decode_step and prefill: a model's forward pass for one token, and for many."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxkern import _checks, _dispatch, _ffi
from jaxkern.decode.cache import KVCache, Status, pack_keys, pack_values, status_of
from jaxkern.decode.layout import largest_block
from jaxkern.decode.pack import PackedWeights
from jaxkern.ops.attention import dot_product_attention
from jaxkern.reference import decode as reference

_OP = "decode_step"

# What the kernel takes, as in cuda/decode/params.h: sequences, heads that share a kv head, and
# units of attention that a multiprocessor has.
_MAX_BATCH, _MAX_GROUP, _MAX_UNITS = 8, 8, 8


def decode_step(
    packed: PackedWeights,
    cache: KVCache,
    tokens: ArrayLike,
    *,
    implementation: str | Sequence[str] | None = None,
) -> tuple[jax.Array, KVCache]:
    """The logits that follow one more token of each sequence, and the cache with it.

    Donate the cache in jax.jit (donate_argnums) for it to be written in place.

    A token out of the vocabulary, and one that the cache has no room for, cannot be known here. The
    first is taken for the nearest one in it, the second is not written. Either is noted in the
    status of its sequence, whose logits are NaN from then on; other sequences do not notice.

    Args:
      packed: from `pack_weights`.
      cache: of as many sequences, and of the same model.
      tokens: int32 [B].
      implementation: "cuda", the kernel: for up to 8 sequences, heads of 64 or 128 elements, of
        which up to 8 share one of key and value, and bfloat16 weights; "xla", plain jax.numpy; a
        sequence of names, of which the first runs that can; or None, which is ("cuda", "xla").

    Returns:
      Logits, float32 [B, V], and the cache.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: implementation "cuda", which cannot.
      ExceptionGroup: no implementation of a sequence can.
    """
    tokens = _checks.int32("tokens", tokens, (cache.batch,))
    _check_cache(packed, cache)
    choice = _dispatch.choose(_OP, implementation, _unsupported(packed, cache))
    return _decode_step(packed, cache, tokens, choice)


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
    if packed.weights != "bf16":
        return f"weights are {packed.weights!r}, supported is 'bf16'"
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


@functools.partial(jax.jit, static_argnums=3)
def _decode_step(packed, cache, tokens, choice):
    if not choice.kernel:
        return reference.decode_step(packed, cache, tokens)
    if not choice.fallback:
        return _kernel(packed, cache, tokens)
    return jax.lax.platform_dependent(
        packed, cache, tokens, cuda=_kernel, default=reference.decode_step
    )


def _kernel(packed, cache, tokens):
    config = packed.config
    none = jnp.zeros(0, jnp.bfloat16)
    state = cache.lengths, cache.status, cache.keys, cache.values, cache.workspace
    results = [((cache.batch, config.vocabulary), np.dtype(np.float32))]
    logits, *state = _ffi.call(
        "jaxkern.decode_step",
        results + [(x.shape, x.dtype) for x in state],
        tokens,
        *state,
        packed.embedding,
        packed.norms,
        *(getattr(packed, name).values for name in ("qkv", "out", "gate_up", "down", "head")),
        packed.frequencies,
        none if packed.qkv_bias is None else packed.qkv_bias,
        none if packed.qk_norms is None else packed.qk_norms,
        aliases={i: i for i in range(1, 6)},
        epsilon=np.float32(config.norm_epsilon),
        multiprocessors=np.int32(packed.multiprocessors),
    )
    names = ("lengths", "status", "keys", "values", "workspace")
    return logits, dataclasses.replace(cache, **dict(zip(names, state, strict=True)))


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
