"""Attention in plain jax.numpy: what the kernels are tested against, and implementation="xla".

Everything is computed in float32 (float64 for float64 operands), in blocks of queries, so that
memory grows with T and S and not with their product. Products of 16-bit operands leave their
precision to the backend: a GPU's TF32 holds the operands exactly, and rounds the weights and the
gradients of the logits to more bits than the operands have. Shape letters are those of jax.nn:
B batch, T query length, S key length, N query heads, K key heads, G = N / K, H head dim.
"""

import functools
import math

import jax
import jax.numpy as jnp

# Logits that a block holds at once: 128 MiB in float32.
_BLOCK_ELEMENTS = 1 << 25

# What a masked logit becomes. Finite, so that a row with nothing left is the mean of the values.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def attention(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale,
    soft_cap=None,
    window=(None, None),
    bottom_right=False,
    query_lengths=None,
    key_lengths=None,
    segments=None,
):
    """Softmax attention with jaxkern.dot_product_attention's semantics.

    Args:
      query: [B, T, N, H], any floating-point dtype.
      key, value: [B, S, K, H]; N is a multiple of K.
      bias: added to the scaled and capped logits, rank 4, broadcastable to [B, N, T, S].
      mask: bool, rank 4, broadcastable to [B, N, T, S]; False leaves a key out.
      scale: factor of the logits.
      soft_cap: a scaled logit x becomes soft_cap * tanh(x / soft_cap).
      window: (left, right); query i sees keys i - left .. i + right. None is without a bound.
      bottom_right: the window of query i is around key i + S - T, with a sequence's own lengths.
      query_lengths: int [B], 0 to T; rows from there on are zero.
      key_lengths: int [B], 0 to S; keys from there on are left out.
      segments: integers [B, T] and [B, S]; a query sees the keys of its own number.

    Returns:
      The output [B, T, N, H] in the query's dtype, and the natural-log log-sum-exp of the masked
      logits, float32 [B, T, N].
    """
    batch, length, heads, _ = query.shape
    rows = _rows_per_block(length, batch, key.shape[1], heads)
    query_segments, key_segments = (None, None) if segments is None else segments
    attend = functools.partial(
        _attend,
        key=key,
        value=value,
        scale=scale,
        soft_cap=soft_cap,
        window=window,
        shift=_shift(bottom_right, length, key.shape[1], query_lengths, key_lengths),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        key_segments=key_segments,
    )
    if rows is None:
        return attend(jnp.arange(length), query, query_segments, bias, mask)

    count = -(-length // rows)
    pad = count * rows - length

    def split(x, axis):  # [.., T, ..] -> [count, .., rows, ..]
        if x is None or x.shape[axis] == 1:
            return None
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, rows, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def block(xs):
        *own, bias_rows, mask_rows = xs
        return attend(
            *own,
            bias if bias_rows is None else bias_rows,
            mask if mask_rows is None else mask_rows,
        )

    positions = jnp.arange(count * rows).reshape(count, rows)
    by_rows = split(query, 1), split(query_segments, 1), split(bias, 2), split(mask, 2)
    blocks = jax.lax.map(block, (positions, *by_rows))

    def join(x):  # [count, B, rows, ..] -> [B, T, ..]
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(batch, count * rows, *x.shape[3:])[:, :length]

    return jax.tree.map(join, blocks)


def _rows_per_block(length, *others):
    """How many queries to compute at once, or None for all. A symbolic dimension counts as 1."""
    if not isinstance(length, int):
        return None
    rows = max(1, _BLOCK_ELEMENTS // max(1, math.prod(d for d in others if isinstance(d, int))))
    if length <= rows:
        return None
    return -(-length // -(-length // rows))


def _shift(bottom_right, query_length, key_length, query_lengths, key_lengths):
    """How far a query's key is from its own position: 0 or, by sequence, [B, 1, 1, 1]."""
    if not bottom_right:
        return 0
    queries = query_length if query_lengths is None else query_lengths
    keys = key_length if key_lengths is None else key_lengths
    return jnp.reshape(jnp.asarray(keys) - jnp.asarray(queries), (-1, 1, 1, 1))


def _attend(
    positions,
    query,
    query_segments,
    bias,
    mask,
    *,
    key,
    value,
    scale,
    soft_cap,
    window,
    shift,
    query_lengths,
    key_lengths,
    key_segments,
):
    """Attention of the queries [B, t, N, H] at `positions` [t] to all keys."""
    batch, rows, heads, width = query.shape
    _, length, key_heads, _ = key.shape
    groups = heads // key_heads if key_heads else 1
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    precision = None if query.dtype.itemsize < 4 else jax.lax.Precision.HIGHEST

    grouped = query.reshape(batch, rows, key_heads, groups, width).astype(dtype)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, key.astype(dtype), precision=precision)
    logits = logits.reshape(batch, heads, rows, length) * jnp.asarray(scale, dtype)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is not None:
        logits = logits + bias.astype(dtype)

    columns = jnp.arange(length)
    allowed = [] if mask is None else [mask]
    allowed += _in_window(positions[:, None] + shift, columns, window)
    if query_lengths is not None:
        allowed.append(positions[:, None] < query_lengths[:, None, None, None])
    if key_lengths is not None:
        allowed.append(columns < key_lengths[:, None, None, None])
    if key_segments is not None:
        allowed.append(query_segments[:, None, :, None] == key_segments[:, None, None, :])
    if allowed:
        seen = functools.reduce(jnp.logical_and, allowed)
        logits = jnp.where(seen, logits, jnp.asarray(_MASKED, dtype))

    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # NOTE: XLA may reorder this sum, and for a query that sees no key a part of it overflows.
    lse = jnp.where(peak == jnp.asarray(_MASKED, dtype), peak, jnp.log(total) + peak)
    lse = lse[..., 0].swapaxes(1, 2).astype(jnp.float32)

    weights = (weights / total).reshape(batch, key_heads, groups, rows, length)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(dtype), precision=precision)
    out = out.reshape(batch, rows, heads, width).astype(query.dtype)
    if query_lengths is not None:
        live = positions < query_lengths[:, None]
        out = jnp.where(live[:, :, None, None], out, jnp.zeros((), out.dtype))
    return out, lse


def _in_window(places, columns, window):
    """For each bound of the window, which columns are within it of the queries' places."""
    left, right = window
    within = [] if left is None else [places - left <= columns]
    return within if right is None else [*within, columns <= places + right]
