"""A decode step in plain jax.numpy: the kernel's oracle, phase by phase, implementation="xla".

Sums are float32. The hidden state h stays in float32 too, and what a phase reads of it is
bfloat16; so is what one phase hands to the next, except for h and the logits. A normalised row is
rounded before it is multiplied by 1 / sqrt(mean square), which the product with it gets instead.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkern.reference import rotary


class Rows(NamedTuple):
    """A matrix: values [..., N, K], bfloat16 or float32, and what row n is multiplied by, [..., N],
    or None.
    """

    values: Any
    scale: Any = None


def decode_step(packed, cache, tokens, *, debug=False):
    """jaxkern.decode.decode_step, without its checks."""
    config = packed.config
    positions = cache.lengths
    h = embed(packed.embedding, tokens)

    def layer(carry, i, weights):
        h, cache = carry
        phases = {}
        phases["qkv"] = x = qkv(config, h, weights)
        query, key, value = heads(config, x, positions, weights, packed.frequencies)
        cache = cache.append(i, key, value)
        phases["attention"] = x = attention(query, *cache.read(i), positions)
        h = out(h, x, weights)
        phases["out"] = scaled(h, weights["norms"][1])
        phases["gate_up"] = x = gate_up(config, h, weights)
        phases["down"] = h = down(h, x, weights)
        return (h, cache), phases if debug else None

    (h, cache), phases = packed.scan_layers(layer, (h, cache))
    logits = head(config, h, packed.norms[-1], packed.head.unpack())
    cache = cache.advance(tokens)
    logits = jnp.where(cache.status[:, None] == 0, logits, jnp.nan)
    if not debug:
        return logits, cache
    return logits, cache, phases | {"down": scaled(phases["down"], packed.norms[2::2, None])}


def decode_steps(packed, cache, tokens, done, draw, stop_tokens, first, n):
    """jaxkern.decode.decode_steps, without its checks.

    Args:
      packed: PackedWeights.
      cache: KVCache.
      tokens: int32 [B].
      done: bool [B].
      draw: from logits and the number of tokens before to tokens.
      stop_tokens: int32 [S].
      first: how many tokens were drawn before.
      n: how many shall be.
    """

    def step(state):
        i, cache, tokens, done, drawn = state
        logits, cache = decode_step(packed, cache, tokens)
        tokens = jnp.where(done, tokens, draw(logits, first + i))
        done |= jnp.isin(tokens, stop_tokens)
        return i + 1, cache, tokens, done, drawn.at[:, i].set(tokens)

    def goes_on(state):
        i, _, _, done, _ = state
        return (i < n) & ~done.all()

    drawn = jnp.zeros((len(tokens), n), jnp.int32)
    state = step((jnp.int32(0), cache, tokens, done, drawn))
    i, cache, tokens, done, drawn = jax.lax.while_loop(goes_on, step, state)
    drawn = jnp.where(jnp.arange(n) < i, drawn, tokens[:, None])
    return drawn, done, cache


# --- Phases ---------------------------------------------------------------------------------------
# `weights` are those of one layer, of PackedWeights.scan_layers. [...] is B, or B, T.


def embed(embedding, tokens):
    """The rows of tokens [...], those out of range clipped, as h [..., D]."""
    return jnp.take(embedding, tokens, axis=0, mode="clip").astype(jnp.float32)


def qkv(config, h, weights):
    """For each kv head, the projections of its query, key and value, [..., (N + 2 K) H]."""
    product = _of_normalized(config, h, weights["norms"][0], weights["qkv"])
    if weights["qkv_bias"] is not None:
        product += weights["qkv_bias"].astype(jnp.float32)
    return _rounded(product)


def heads(config, x, positions, weights, frequencies):
    """Query [..., N, H], key and value [..., K, H] of what `qkv` gave; normalised and rotated."""
    group = config.heads // config.kv_heads
    x = x.reshape(*x.shape[:-1], config.kv_heads, group + 2, config.head_dim)
    query, key, value = x[..., :-2, :], x[..., -2, :], x[..., -1, :]
    query = query.reshape(*x.shape[:-3], config.heads, config.head_dim)
    query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    if weights["qk_norms"] is not None:
        query, key = (
            x * _rstd(x, config.norm_epsilon) * scale.astype(jnp.float32)
            for x, scale in zip((query, key), weights["qk_norms"], strict=True)
        )
    query, key = (_rounded(rotary.rotate(x, positions, frequencies)) for x in (query, key))
    return query, key, value


def attention(query, keys, values, positions):
    """Attention of one query per sequence to the keys up to its position, [B, N H].

    Numbers exp(logit - maximum) are rounded to bfloat16 for the product with the values, which is
    divided by their sum before rounding.

    Args:
      query: [B, N, H].
      keys, values: [B, T, K, H]. What is beyond the positions may be NaN.
      positions: int32 [B].
    """
    batch, heads, head_dim = query.shape
    query = query.reshape(batch, keys.shape[2], -1, head_dim)
    seen = jnp.arange(keys.shape[1]) <= positions[:, None]
    logits = _einsum("bkgh,btkh->bkgt", query, keys) * head_dim**-0.5
    logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    values = jnp.where(seen[:, :, None, None], values, 0)
    x = _einsum("bkgt,btkh->bkgh", _rounded(weights), values) / weights.sum(-1, keepdims=True)
    return _rounded(x.reshape(batch, heads * head_dim))


def out(h, x, weights):
    """h [..., D] plus the projection of the attention's x [..., N H]."""
    return h + _product(x, weights["out"])


def gate_up(config, h, weights):
    """silu(gate) * up, [..., F]."""
    product = _of_normalized(config, h, weights["norms"][1], weights["gate_up"])
    gate, up = jnp.split(product, 2, axis=-1)
    return _rounded(jax.nn.silu(gate) * up)


def down(h, x, weights):
    """h [..., D] plus the projection of the MLP's x [..., F]."""
    return h + _product(x, weights["down"])


def head(config, h, norm, rows):
    """The logits, float32 [..., V]."""
    return _of_normalized(config, h, norm, rows)


def scaled(h, norm):
    """What is multiplied of h: h times the weights of the norm, both rounded."""
    return _rounded(_rounded(h).astype(jnp.float32) * norm.astype(jnp.float32))


def _of_normalized(config, h, norm, rows):
    return _product(scaled(h, norm), rows) * _rstd(_rounded(h), config.norm_epsilon)


def _rstd(x, epsilon):
    """1 / sqrt(mean square) over the last axis, which is kept."""
    mean = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return jax.lax.rsqrt(mean + epsilon)


def _product(x, rows):
    product = _einsum("...k,nk->...n", x, rows.values)
    return product if rows.scale is None else product * rows.scale


def _einsum(axes, a, b):
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _rounded(x):
    # NOTE: XLA for GPUs may leave out a way to bfloat16 and back, but not this.
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7).astype(jnp.bfloat16)
