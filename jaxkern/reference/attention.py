"""Attention in plain jax.numpy: what the kernels are tested against, and implementation="xla".

Everything is computed in float32 (float64 for float64 operands), in blocks of queries, so that
memory grows with T and S and not with their product. Products of 16-bit operands leave their
precision to the backend: a GPU's TF32 holds the operands exactly, and rounds the weights and the
gradients of the logits to more bits than the operands have. Shape letters are those of jax.nn:
B batch, T query length, S key length, N query heads, K key heads, G = N / K, H head dim.
"""

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
    is_causal=False,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    window=None,
):
    """Softmax attention with jax.nn.dot_product_attention's semantics.

    Args:
      query: [B, T, N, H], any floating-point dtype.
      key, value: [B, S, K, H]; N is a multiple of K.
      bias: added to the scaled logits, rank 4, broadcastable to [B, N, T, S].
      mask: bool, rank 4, broadcastable to [B, N, T, S]; False leaves a key out.
      scale: factor of the logits.
      is_causal: query i sees keys 0..i, also when T != S.
      query_seq_lengths: int [B]; rows from there on are zero.
      key_value_seq_lengths: int [B]; keys from there on are left out.
      window: (left, right); query i sees keys i - left .. i + right.

    Returns:
      The output [B, T, N, H] in the query's dtype, and the natural-log log-sum-exp of the masked
      logits, float32 [B, T, N].
    """
    batch, length, heads, _ = query.shape
    rows = _rows_per_block(length, batch, key.shape[1], heads)

    def attend(positions, query, bias, mask):
        return _attend(
            positions,
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            window=window,
        )

    if rows is None:
        return attend(jnp.arange(length), query, bias, mask)

    count = -(-length // rows)
    pad = count * rows - length

    def split(x, axis):  # [.., T, ..] -> [count, .., rows, ..]
        if x is None or x.shape[axis] == 1:
            return None
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, rows, *x.shape[axis + 1 :]), axis, 0)

    @jax.checkpoint
    def block(xs):
        positions, query, bias_rows, mask_rows = xs
        return attend(
            positions,
            query,
            bias if bias_rows is None else bias_rows,
            mask if mask_rows is None else mask_rows,
        )

    positions = jnp.arange(count * rows).reshape(count, rows)
    blocks = jax.lax.map(block, (positions, split(query, 1), split(bias, 2), split(mask, 2)))

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


def _attend(
    positions,
    query,
    key,
    value,
    bias,
    mask,
    *,
    scale,
    is_causal,
    query_seq_lengths,
    key_value_seq_lengths,
    window,
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
    if bias is not None:
        logits = logits + bias.astype(dtype)
    seen = _visible(
        positions,
        jnp.arange(length),
        mask,
        is_causal,
        query_seq_lengths,
        key_value_seq_lengths,
        window,
    )
    if seen is not None:
        logits = jnp.where(seen, logits, jnp.asarray(_MASKED, dtype))

    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf))
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse = (jnp.log(total) + peak)[..., 0].swapaxes(1, 2).astype(jnp.float32)

    weights = (weights / total).reshape(batch, key_heads, groups, rows, length)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(dtype), precision=precision)
    out = out.reshape(batch, rows, heads, width).astype(query.dtype)
    if query_seq_lengths is not None:
        live = positions < query_seq_lengths[:, None]
        out = jnp.where(live[:, :, None, None], out, jnp.zeros((), out.dtype))
    return out, lse


def _visible(rows, columns, mask, is_causal, query_seq_lengths, key_value_seq_lengths, window):
    """Which keys a query sees: bool, broadcastable to [B, N, t, S], or None for all."""
    parts = [] if mask is None else [mask]
    if is_causal:
        parts.append(columns <= rows[:, None])
    if window is not None:
        left, right = window
        parts.append((rows[:, None] - left <= columns) & (columns <= rows[:, None] + right))
    if query_seq_lengths is not None:
        parts.append(rows[:, None] < query_seq_lengths[:, None, None, None])
    if key_value_seq_lengths is not None:
        parts.append(columns < key_value_seq_lengths[:, None, None, None])
    seen = None
    for part in parts:
        seen = part if seen is None else seen & part
    return seen
