"""dot_product_attention: jax.nn's function with a CUDA kernel behind it."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from jaxkern import _checks, _dispatch, _ffi, _partitioning, _stack
from jaxkern.ops import attention_arguments as arguments
from jaxkern.reference import attention as reference

_OP = "dot_product_attention"


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
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    logits_soft_cap: float | None = None,
    alignment: str = "top_left",
    deterministic: bool = False,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(scale * query key^T + bias) value for each head, as jax.nn.dot_product_attention.

    Names, order and meaning are jax.nn's, except that the residual is float32 and differentiable.
    segment_ids, logits_soft_cap, alignment and deterministic are additions. B is batch, T query
    length, S key length, N query heads, K key heads, H head dim.

    Args:
      query: [B, T, N, H] or [T, N, H], floating point.
      key, value: [B, S, K, H] or [S, K, H], of the query's dtype. K divides N: query head n reads
        key head n // (N / K).
      bias: added to the scaled and capped logits; broadcastable to [B, N, T, S].
      mask: bool, broadcastable to [B, N, T, S]; False leaves a key out. A query with no key left,
        whatever leaves them out, gets the mean of the values and, as its log-sum-exp, -0.7 times
        the largest float32.
      scale: a scalar; 1 / sqrt(H) when None.
      is_causal: query i sees keys up to its own, also next to local_window_size.
      query_seq_lengths: integers [B], clipped to 0..T; the output is zero from there on, the
        log-sum-exp that of a query with no key left, and there is no gradient.
      key_value_seq_lengths: integers [B], clipped to 0..S; keys from there on are left out.
      local_window_size: (left, right), or one int for both: query i sees the keys from `left`
        before its own to `right` after it.
      segment_ids: integers in any order, which keep sequences packed into one row apart (Krell et
        al. 2021, arXiv:2107.02027): a query sees the keys with its own id. [B, T], or [T] without
        a batch, where T == S; or a pair (query ids [B, T], key ids [B, S]).
      logits_soft_cap: a positive Python number: a scaled logit x becomes cap * tanh(x / cap), as in
        Gemma 2 (arXiv:2408.00118).
      alignment: which key is a query's own, for is_causal and local_window_size: "top_left", query
        i's is key i, also when T != S; "bottom_right", the last query's is the last key, by the
        lengths of the sequence where they are given.
      deterministic: whether the gradients of the kernel repeat bitwise. The output always does, and
        so does all of "xla".
      implementation: "cuda", "xla", or a sequence of them to take the first that supports the
        call. None is ("cuda", "xla"). "cuda" is a FlashAttention kernel (Dao 2023,
        arXiv:2307.08691) for compute capability 9.0: bfloat16 or float16, H of 64, 128 or 256,
        scale a positive Python number, no bias, no mask, ids of at most 32 bits. It is used where
        the computation is lowered for CUDA, and differentiable once, in reverse mode. "xla" is
        plain jax.numpy in float32, with memory linear in T and S.
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
    query, key, value, lead = arguments.operands(query, key, value)
    batch, t, heads, width = query.shape
    s = key.shape[1]
    bias = arguments.broadcastable("bias", bias, (batch, heads, t, s))
    mask = arguments.broadcastable("mask", mask, (batch, heads, t, s))
    scale = arguments.scale(scale, width)
    masks = arguments.Masks(
        arguments.lengths("query_seq_lengths", query_seq_lengths, batch),
        arguments.lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
        arguments.segments(segment_ids, lead, t, s),
    )
    pattern = arguments.pattern(
        t,
        s,
        masks,
        is_causal=is_causal,
        window=local_window_size,
        alignment=alignment,
        soft_cap=logits_soft_cap,
    )
    deterministic = _checks.flag("deterministic", deterministic)
    return_residual = _checks.flag("return_residual", return_residual)

    unsupported = arguments.unsupported(query, scale, bias, mask, masks)
    choice = _dispatch.choose(_OP, implementation, unsupported)
    if choice.kernel:
        config = _Config(
            float(scale),
            pattern,
            has_lengths=masks.query_lengths is not None or masks.key_lengths is not None,
            has_segments=masks.segments is not None,
            deterministic=deterministic,
            fallback=choice.fallback,
        )
        out, lse = _kernel_attention(config, query, key, value, masks)
    else:
        out, lse = _reference_attention(pattern, query, key, value, bias, mask, scale, masks)
    out, lse = (x.reshape(*lead, *x.shape[1:]) for x in (out, lse))
    return (out, lse) if return_residual else out


# --- Reference ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def _reference_attention(pattern, query, key, value, bias, mask, scale, masks):
    def plain(query, key, value, bias, mask, scale, masks):
        query_lengths, key_lengths = masks.clipped_lengths(query.shape[1], key.shape[1])
        return reference.attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            **pattern._asdict(),
            query_lengths=query_lengths,
            key_lengths=key_lengths,
            segments=masks.segments,
        )

    query_axes, key_axes, _ = _axes(4)
    operand_axes, result_axes = (query_axes, key_axes, key_axes), (query_axes, ("b0", "t", "n"))
    return _partitioning.on_auto_mesh(plain, operand_axes, result_axes)(
        query, key, value, bias, mask, scale, masks
    )


# --- Kernel ---------------------------------------------------------------------------------------


class _Config(NamedTuple):
    scale: float
    pattern: arguments.Pattern
    has_lengths: bool
    has_segments: bool
    deterministic: bool
    fallback: bool  # to the reference, where the lowering is not for CUDA

    def attributes(self):
        left, right = (_UNBOUNDED if x is None else x for x in self.pattern.window)
        return {
            "scale": np.float32(self.scale),
            "soft_cap": np.float32(self.pattern.soft_cap or 0),
            "left": np.int32(left),
            "right": np.int32(right),
            "bottom_right": np.bool_(self.pattern.bottom_right),
            "has_lengths": np.bool_(self.has_lengths),
            "has_segments": np.bool_(self.has_segments),
            "deterministic": np.bool_(self.deterministic),
        }

    def axes_of_masks(self, rank):
        """Names of the axes of the operands that follow the floating-point ones.

        Segment ids name their lengths differently, so that how they are sharded along them is not
        taken over for the results.
        """
        lead = _lead(rank)
        lengths = (lead, lead) if self.has_lengths else ()
        return (*lengths, (*lead, "tids"), (*lead, "sids")) if self.has_segments else lengths


_UNBOUNDED = np.iinfo(np.int32).max


@functools.partial(jax.jit, static_argnums=0)
def _kernel_attention(config, query, key, value, masks):
    query_axes, key_axes, _ = _axes(4)
    operands = query, key, value, *masks.kernel_operands(query.shape[:2], key.shape[:2])
    axes = query_axes, key_axes, key_axes, *config.axes_of_masks(4)
    out, lse = _attention(config, *_partitioning.alike(operands, axes))
    return out, lse.swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(config, query, key, value, *masks):
    """out [B, T, N, H] and lse [B, N, T]."""
    return _forward_op(config)(query, key, value, *masks)


def _attention_fwd(config, query, key, value, *masks):
    out, lse = _attention(config, query, key, value, *masks)
    out = checkpoint_name(out, "jaxkern_attention_out")
    lse = checkpoint_name(lse, "jaxkern_attention_lse")
    return (out, lse), (query, key, value, out, lse, masks)


def _attention_bwd(config, residuals, cotangents):
    *residuals, masks = residuals
    gradients = _backward_op(config)(*residuals, *cotangents, *masks)
    return *gradients, *(None for _ in masks)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _granule_words(batch, rows):
    # For each 64 rows, where the keys that they all see lie, and those that each of them sees.
    return batch * -(-rows // 64) * (4 + 2 * 64)


@functools.cache
def _forward_op(config):
    def kernel(*operands):
        *operands, unfold = _fold(*operands)
        query, key, *_ = operands
        batch, t, heads, _ = query.shape
        results = [
            (query.shape, query.dtype),
            ((batch, heads, t), np.dtype(np.float32)),
            ((4 + _granule_words(batch, t),), np.dtype(np.int32)),
        ]
        results = _ffi.call("jaxkern.attention_fwd", results, *operands, **config.attributes())
        return unfold(results[:2])

    def axes(rank, *_):
        query, key, lse = _axes(rank)
        return (query, key, key, *config.axes_of_masks(rank)), (query, lse)

    return _stack.kernel_op(_OP, kernel, _plain(config), axes, fallback=config.fallback)


@functools.cache
def _backward_op(config):
    def kernel(*operands):
        *operands, unfold = _fold(*operands)
        query, key, value, *_ = operands
        batch, t, heads, width = query.shape
        s, key_heads = key.shape[1:3]
        tiles = -(-(t + 79) // 128)  # room for blocks of 64, 80 or 128 queries
        padded = (batch, heads, 128 * tiles)
        counters = _granule_words(batch, s) + batch * key_heads * width + 16 * batch * heads * tiles
        single = np.dtype(np.float32)
        results = [
            *((x.shape, x.dtype) for x in (query, key, value)),
            (padded, single),
            (padded, single),
            ((*padded, width), single),
            ((counters,), np.dtype(np.int32)),
        ]
        results = _ffi.call("jaxkern.attention_bwd", results, *operands, **config.attributes())
        return unfold(results[:3])

    def plain(query, key, value, out, lse, dout, dlse, *masks):
        del out, lse
        attend = _plain(config)
        _, pullback = jax.vjp(lambda *operands: attend(*operands, *masks), query, key, value)
        return pullback((dout, dlse))

    def axes(rank, *_):
        query, key, lse = _axes(rank)
        operands = query, key, key, query, lse, query, lse, *config.axes_of_masks(rank)
        return operands, (query, key, key)

    return _stack.kernel_op(_OP, kernel, plain, axes, fallback=config.fallback)


def _plain(config):
    """The reference, with the kernel's operands and results."""

    def plain(*operands):
        query, key, value, *masks, unfold = _fold(*operands)
        segments = tuple(masks[-2:]) if config.has_segments else None
        query_lengths, key_lengths = masks[:2] if config.has_lengths else (None, None)
        out, lse = reference.attention(
            query,
            key,
            value,
            scale=config.scale,
            **config.pattern._asdict(),
            query_lengths=query_lengths,
            key_lengths=key_lengths,
            segments=segments,
        )
        return unfold((out, lse.swapaxes(1, 2)))

    return plain


def _lead(rank):
    """Names of the batch axes, for the rank of the query."""
    return tuple(f"b{i}" for i in range(rank - 3))


def _axes(rank):
    """Names of the axes of query, key (and value), and lse, for the rank of the query."""
    lead = _lead(rank)
    return (*lead, "t", "n", "h"), (*lead, "s", "k", "h"), (*lead, "n", "t")


def _fold(query, *others):
    """The operands with their leading axes folded into one, and the way back for results."""
    lead = query.shape[:-3]
    operands = [x.reshape(math.prod(lead), *x.shape[len(lead) :]) for x in (query, *others)]
    return *operands, lambda results: tuple(x.reshape(*lead, *x.shape[1:]) for x in results)
