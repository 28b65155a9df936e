"""dot_product_attention: jax.nn's function with a CUDA kernel behind it."""

import functools
import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxkern import _checks, _dispatch, _ffi, _partitioning, _stack
from jaxkern.reference import attention as reference

_OP = "dot_product_attention"
_KERNEL_DTYPES = ("bfloat16", "float16")
_KERNEL_HEAD_DIMS = (64, 128)


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale * query key^T + bias) value for each head, as jax.nn.dot_product_attention.

    Names, order and meaning are jax.nn's, except that the residual is float32 and differentiable.
    B is batch, T query length, S key length, N query heads, K key heads, H head dim.

    Args:
      query: [B, T, N, H] or [T, N, H], floating point.
      key, value: [B, S, K, H] or [S, K, H], of the query's dtype. K divides N: query head n reads
        key head n // (N / K).
      bias: added to the scaled logits; broadcastable to [B, N, T, S].
      mask: bool, broadcastable to [B, N, T, S]; False leaves a key out. A query with no key left
        gets the mean of the values.
      scale: a scalar; 1 / sqrt(H) when None.
      is_causal: query i sees keys 0..i, also when T != S.
      query_seq_lengths: integers [B]; the output is zero from there on.
      key_value_seq_lengths: integers [B]; keys from there on are left out.
      local_window_size: (left, right), or one int for both: query i sees keys i - left to
        i + right.
      implementation: "cuda", "xla", or a sequence of them to take the first that supports the
        call. None is ("cuda", "xla"). "cuda" is a FlashAttention kernel (Dao 2023,
        arXiv:2307.08691) for compute capability 9.0: bfloat16 or float16, H of 64 or 128, scale a
        positive Python number, no bias, mask, lengths or window. It is used where the
        computation is lowered for CUDA, and differentiable once, in reverse mode. "xla" is plain
        jax.numpy in float32, with memory linear in T and S.
      return_residual: return the log-sum-exp of the logits too.

    Returns:
      The output, of the query's shape and dtype. With return_residual, also the natural-log
      log-sum-exp of each query's masked logits, float32 [B, T, N] or [T, N].

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: implementation "cuda", and the kernel cannot run the call; also when
        such a call is lowered for another platform.
      ExceptionGroup: no implementation of a sequence can.
    """
    query, key, value = (
        _operand(name, x) for name, x in (("query", query), ("key", key), ("value", value))
    )
    shape = query.shape
    query, key, value = (x if x.ndim == 4 else x[None] for x in (query, key, value))
    _check_operands(query, key, value)
    logits_shape = (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
    bias = _broadcastable("bias", bias, logits_shape)
    mask = _broadcastable("mask", mask, logits_shape)
    scale = _check_scale(scale, query.shape[-1])
    is_causal = _checks.flag("is_causal", is_causal)
    return_residual = _checks.flag("return_residual", return_residual)
    query_seq_lengths = _lengths("query_seq_lengths", query_seq_lengths, query.shape[0])
    key_value_seq_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, query.shape[0])
    window = _window(local_window_size)

    options = {
        "bias": bias,
        "mask": mask,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
        "local_window_size": window,
    }
    choice = _dispatch.choose(_OP, implementation, _unsupported(query, scale, options))
    if choice.kernel:
        config = _Config(float(scale), is_causal, choice.fallback)
        out, lse = _kernel_attention(config, query, key, value)
    else:
        out, lse = _reference_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale,
            query_seq_lengths,
            key_value_seq_lengths,
            is_causal=is_causal,
            window=window,
        )
    out = out.reshape(shape)
    return (out, lse.reshape(shape[:-1])) if return_residual else out


# --- Arguments ------------------------------------------------------------------------------------


def _operand(name, x):
    x = _checks.float_array(name, x)
    if x.ndim not in (3, 4):
        raise ValueError(
            f"{name} has shape {x.shape}, wanted rank 4 [batch, length, heads, head dim] or rank 3 "
            "without the batch"
        )
    return x


def _check_operands(query, key, value):
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


def _broadcastable(name, x, logits_shape):
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


def _check_scale(scale, head_dim):
    if scale is None:
        return 1.0 / math.sqrt(max(head_dim, 1))
    if np.ndim(scale) != 0:
        raise ValueError(f"scale has shape {np.shape(scale)}, wanted a scalar")
    if not isinstance(scale, numbers.Real | jax.Array | np.ndarray):
        raise ValueError(f"scale is {scale!r}, wanted a real number")
    return scale


def _lengths(name, lengths, batch):
    if lengths is None:
        return None
    lengths = _checks.array(name, lengths)
    if lengths.shape != (batch,):
        raise ValueError(f"{name} has shape {lengths.shape}, wanted ({batch},), one per sequence")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {lengths.dtype}, wanted an integer dtype")
    return lengths


def _window(window):
    if window is None:
        return None
    pair = window if isinstance(window, tuple | list) else (window, window)
    if len(pair) != 2 or not all(isinstance(w, int | np.integer) and w >= 0 for w in pair):
        raise ValueError(
            f"local_window_size is {window!r}, wanted a non-negative int or a pair (left, right) "
            "of them"
        )
    return int(pair[0]), int(pair[1])


def _unsupported(query, scale, options):
    """Why the kernel cannot take this call, or None."""
    given = [name for name, option in options.items() if option is not None]
    if given:
        return f"got {', '.join(given)}, which only implementation 'xla' supports"
    if query.dtype.name not in _KERNEL_DTYPES:
        return f"query has dtype {query.dtype}, wanted one of {', '.join(_KERNEL_DTYPES)}"
    if query.shape[-1] not in _KERNEL_HEAD_DIMS:
        wanted = " or ".join(map(str, _KERNEL_HEAD_DIMS))
        return f"query has head dim {query.shape[-1]}, wanted {wanted}"
    if not isinstance(scale, numbers.Real):
        return "scale is an array, wanted a Python number"
    if not _checks.FLOAT32.tiny <= scale <= _checks.FLOAT32.max:
        return f"scale is {scale}, wanted a positive float32"
    return None


# --- Reference ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("is_causal", "window"))
def _reference_attention(
    query, key, value, bias, mask, scale, query_lengths, key_lengths, *, is_causal, window
):
    def plain(query, key, value, bias, mask, scale, query_lengths, key_lengths):
        return reference.attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_lengths,
            key_value_seq_lengths=key_lengths,
            window=window,
        )

    axes = _axes(4)
    out_axes = (axes[0], ("b0", "t", "n"))
    return _partitioning.on_auto_mesh(plain, axes[:3], out_axes)(
        query, key, value, bias, mask, scale, query_lengths, key_lengths
    )


# --- Kernel ---------------------------------------------------------------------------------------


class _Config(NamedTuple):
    scale: float
    is_causal: bool
    fallback: bool  # to the reference, where the lowering is not for CUDA

    def attributes(self):
        return {"scale": np.float32(self.scale), "is_causal": np.bool_(self.is_causal)}


@functools.partial(jax.jit, static_argnums=0)
def _kernel_attention(config, query, key, value):
    out, lse = _attention(config, *_partitioning.alike((query, key, value), _axes(4)[:3]))
    return out, lse.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config, query, key, value):
    """out [B, T, N, H] and lse [B, N, T]."""
    return _forward_op(config)(query, key, value)


def _attention_fwd(config, query, key, value):
    out, lse = _attention(config, query, key, value)
    out = checkpoint_name(out, "jaxkern_attention_out")
    lse = checkpoint_name(lse, "jaxkern_attention_lse")
    return (out, lse), (query, key, value, out, lse)


def _attention_bwd(config, residuals, cotangents):
    return _backward_op(config)(*residuals, *cotangents)


_attention.defvjp(_attention_fwd, _attention_bwd)


@functools.cache
def _forward_op(config):
    def kernel(query, key, value):
        query, key, value, unfold = _fold(query, key, value)
        batch, length, heads, _ = query.shape
        lse, counter = ((batch, heads, length), np.dtype(np.float32)), ((1,), np.dtype(np.int32))
        results = _ffi.call(
            "jaxkern.attention_fwd",
            [(query.shape, query.dtype), lse, counter],
            *(query, key, value),
            **config.attributes(),
        )
        return unfold(results[:2])

    def axes(rank, *_):
        query, key, value, lse = _axes(rank)
        return (query, key, value), (query, lse)

    return _stack.kernel_op(_OP, kernel, _plain(config), axes, fallback=config.fallback)


@functools.cache
def _backward_op(config):
    def kernel(*operands):
        *operands, unfold = _fold(*operands)
        query, key, value, *_ = operands
        batch, length, heads, width = query.shape
        padded = (batch, heads, -(-length // 128) * 128)
        single = np.dtype(np.float32)
        gradients = [(x.shape, x.dtype) for x in (query, key, value)]
        workspaces = [(padded, single), (padded, single), ((*padded, width), single)]
        results = _ffi.call(
            "jaxkern.attention_bwd", gradients + workspaces, *operands, **config.attributes()
        )
        return unfold(results[:3])

    def plain(query, key, value, out, lse, dout, dlse):
        del out, lse
        _, pullback = jax.vjp(_plain(config), query, key, value)
        return pullback((dout, dlse))

    def axes(rank, *_):
        query, key, value, lse = _axes(rank)
        return (query, key, value, query, lse, query, lse), (query, key, value)

    return _stack.kernel_op(_OP, kernel, plain, axes, fallback=config.fallback)


def _plain(config):
    """The reference, with the kernel's operands and results."""

    def plain(query, key, value):
        query, key, value, unfold = _fold(query, key, value)
        out, lse = reference.attention(
            query, key, value, scale=config.scale, is_causal=config.is_causal
        )
        return unfold((out, lse.swapaxes(1, 2)))

    return plain


def _axes(rank):
    """Names of the axes of query, key, value and lse, for the rank of the query."""
    lead = tuple(f"b{i}" for i in range(rank - 3))
    key = (*lead, "s", "k", "h")
    return (*lead, "t", "n", "h"), key, key, (*lead, "n", "t")


def _fold(query, *others):
    """The operands with their leading axes folded into one, and the way back for results."""
    lead = query.shape[:-3]
    operands = [x.reshape(math.prod(lead), *x.shape[len(lead) :]) for x in (query, *others)]
    return *operands, lambda results: tuple(x.reshape(*lead, *x.shape[1:]) for x in results)
