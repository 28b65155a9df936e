"""The arguments of dot_product_attention: checked, and in the form that both paths take."""

import math
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _checks

_KERNEL_DTYPES = ("bfloat16", "float16")
_KERNEL_HEAD_DIMS = (64, 128, 256)
_ALIGNMENTS = ("top_left", "bottom_right")
_SYMBOLIC_LENGTH = 1 << 30  # the most that a dimension without a number may be


class Pattern(NamedTuple):
    """What decides the weights and is known when the call is traced.

    Query t sees keys t + shift - left to t + shift + right; None is without a bound. The shift is
    zero, or with bottom_right the number of keys less the number of queries of the sequence.
    """

    window: tuple[int | None, int | None]  # left, right
    bottom_right: bool
    soft_cap: float | None


class Masks(NamedTuple):
    """What decides the weights and is an array, each as the caller gave it."""

    query_lengths: jax.Array | None  # [B]
    key_lengths: jax.Array | None  # [B]
    segments: tuple[jax.Array, jax.Array] | None  # [B, T], [B, S]

    def clipped_lengths(self, query_length, key_length):
        """Both lengths, int32 and within the arrays; None where the caller gave none."""
        given = (self.query_lengths, query_length), (self.key_lengths, key_length)
        return tuple(None if x is None else _clip(x, most) for x, most in given)

    def kernel_operands(self, queries, keys):
        """Both lengths if there is one, and both segment ids, for these shapes [B, T], [B, S]."""
        lengths = self.clipped_lengths(queries[1], keys[1])
        if any(x is not None for x in lengths):
            for x, (batch, length) in zip(lengths, (queries, keys), strict=True):
                yield jnp.full(batch, length, jnp.int32) if x is None else x
        if self.segments is not None:
            yield from map(_int32, self.segments)


def operands(query, key, value):
    """query [B, T, N, H], key and value [B, S, K, H], and the batch axis of query: (B,) or ()."""
    arrays = [_operand(name, x) for name, x in (("query", query), ("key", key), ("value", value))]
    lead = arrays[0].shape[:-3]
    query, key, value = (x if x.ndim == 4 else x[None] for x in arrays)
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}, "
            "wanted one"
        )
    if value.shape != key.shape:
        raise ValueError(f"value has shape {value.shape}, wanted key's {key.shape}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"key has batch size {key.shape[0]}, wanted query's {query.shape[0]}")
    if query.shape[3] != key.shape[3]:
        raise ValueError(f"key has head dim {key.shape[3]}, wanted query's {query.shape[3]}")
    heads, key_heads = query.shape[2], key.shape[2]
    if heads and (not key_heads or heads % key_heads):
        raise ValueError(f"query has {heads} heads, which key's {key_heads} do not divide")
    return query, key, value, lead


def _operand(name, x):
    x = _checks.float_array(name, x)
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{name} has shape {x.shape}, wanted rank 4 [batch, length, heads, head dim] or rank 3 "
            "without the batch"
        )
    return x


def broadcastable(name, x, logits_shape):
    """bias or mask, of rank 4, or None."""
    if x is None:
        return None
    x = _checks.array(name, x) if name == "mask" else _checks.float_array(name, x)
    if name == "mask" and x.dtype != bool:
        raise ValueError(f"mask has dtype {x.dtype}, wanted bool; an additive mask is a bias")
    padded = (1,) * (4 - x.ndim) + x.shape
    if len(padded) != 4 or any(
        got != 1 and got != wanted for got, wanted in zip(padded, logits_shape, strict=True)
    ):
        raise ValueError(
            f"{name} has shape {x.shape}, which does not broadcast to [batch, query heads, query "
            f"length, key length] = {logits_shape}"
        )
    return x.reshape(padded)


def scale(scale, head_dim):
    """The scale, or what it is by default."""
    if scale is None:
        return 1.0 / math.sqrt(max(head_dim, 1))
    if np.ndim(scale) != 0:
        raise ValueError(f"scale has shape {np.shape(scale)}, wanted a scalar")
    if not isinstance(scale, numbers.Real | jax.Array | np.ndarray):
        raise ValueError(f"scale is {scale!r}, wanted a real number")
    return scale


def pattern(query_length, key_length, masks, *, is_causal, window, alignment, soft_cap):
    """A Pattern without what changes nothing, so that plain calls stay plain."""
    if not isinstance(alignment, str) or alignment not in _ALIGNMENTS:
        wanted = " or ".join(map(repr, _ALIGNMENTS))
        raise ValueError(f"alignment is {alignment!r}, wanted {wanted}")
    left, right = _window(window)
    if _checks.flag("is_causal", is_causal):
        right = 0 if right is None else min(right, 0)
    bottom_right = alignment == "bottom_right"
    if masks.query_lengths is None and masks.key_lengths is None and query_length == key_length:
        bottom_right = False  # every shift is 0
    # To the left the last query reaches furthest, and to the right the first one.
    left = _bound(left, key_length if bottom_right else query_length)
    right = _bound(right, query_length if bottom_right else key_length)
    bounded = left is not None or right is not None
    return Pattern((left, right), bottom_right and bounded, _soft_cap(soft_cap))


def _window(window):
    if window is None:
        return None, None
    pair = window if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2 or not all(isinstance(w, int | np.integer) and w >= 0 for w in pair):
        raise ValueError(
            f"local_window_size is {window!r}, wanted a non-negative int or a pair (left, right) "
            "of them"
        )
    return int(pair[0]), int(pair[1])


def _bound(size, length):
    """One side of the window, or None if it reaches over a sequence of this length."""
    reach = length - 1 if isinstance(length, int) else _SYMBOLIC_LENGTH
    return None if size is None or size >= reach else size


def _soft_cap(soft_cap):
    if soft_cap is None:
        return None
    if (
        not isinstance(soft_cap, numbers.Real)
        or isinstance(soft_cap, bool)
        or not _checks.FLOAT32.tiny <= soft_cap <= _checks.FLOAT32.max
    ):
        raise ValueError(f"logits_soft_cap is {soft_cap!r}, wanted a positive Python number")
    return float(soft_cap)


def lengths(name, lengths, batch):
    """query_seq_lengths or key_value_seq_lengths, or None."""
    if lengths is None:
        return None
    lengths = _checks.array(name, lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"{name} has shape {lengths.shape}, wanted ({batch},), one per sequence")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {lengths.dtype}, wanted an integer dtype")
    return lengths


def segments(ids, lead, query_length, key_length):
    """Query and key ids of segment_ids, or None. `lead` is the batch axis, as a shape."""
    if ids is None:
        return None
    if not isinstance(ids, tuple):
        if query_length != key_length:
            raise ValueError(
                f"segment_ids is one array, and query length {query_length} is not key length "
                f"{key_length}; wanted a pair (query ids, key ids)"
            )
        ids = _segment_ids("segment_ids", ids, (*lead, query_length))
        return ids, ids
    if len(ids) != 2:
        raise ValueError(
            f"segment_ids is a tuple of {len(ids)}, wanted an array or a pair (query ids, key ids)"
        )
    pair = tuple(
        _segment_ids(f"segment_ids[{i}]", x, (*lead, length))
        for i, (x, length) in enumerate(zip(ids, (query_length, key_length), strict=True))
    )
    if pair[0].dtype != pair[1].dtype:
        raise ValueError(f"segment_ids has dtypes {pair[0].dtype} and {pair[1].dtype}, wanted one")
    return pair


def _segment_ids(name, ids, shape):
    ids = _checks.array(name, ids)
    if ids.shape != shape:
        raise ValueError(f"{name} has shape {ids.shape}, wanted {shape}")
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {ids.dtype}, wanted an integer dtype")
    return ids.reshape(math.prod(shape[:-1]), shape[-1])


def unsupported(query, scale, bias, mask, masks):
    """Why the kernel cannot take this call, or None."""
    given = [name for name, x in (("bias", bias), ("mask", mask)) if x is not None]
    if given:
        return f"got {', '.join(given)}, which only implementation 'xla' supports"
    if query.dtype.name not in _KERNEL_DTYPES:
        return f"query has dtype {query.dtype}, wanted one of {', '.join(_KERNEL_DTYPES)}"
    if query.shape[-1] not in _KERNEL_HEAD_DIMS:
        return f"query has head dim {query.shape[-1]}, wanted one of {_KERNEL_HEAD_DIMS}"
    if not isinstance(scale, numbers.Real):
        return "scale is an array, wanted a Python number"
    if not _checks.FLOAT32.tiny <= scale <= _checks.FLOAT32.max:
        return f"scale is {scale}, wanted a positive float32"
    if masks.segments is not None and masks.segments[0].dtype.itemsize > 4:
        return f"segment_ids has dtype {masks.segments[0].dtype}, wanted at most 32 bits"
    return None


def _clip(lengths, most):
    if lengths.dtype.itemsize < 4:  # which may be too narrow for `most`
        lengths = lengths.astype(jnp.int32)
    return jnp.clip(lengths, 0, most).astype(jnp.int32)


def _int32(ids):
    """Segment ids of at most 32 bits as int32, equal where they were."""
    if ids.dtype == jnp.uint32:
        return jax.lax.bitcast_convert_type(ids, jnp.int32)
    return ids.astype(jnp.int32)
