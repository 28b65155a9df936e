"""rms_norm: root-mean-square normalisation over the last axis."""

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
from jaxkern.reference import norm as reference

_OP = "rms_norm"
_KERNEL_DTYPES = ("float32", "bfloat16", "float16")

# Rows of the backward kernel's workspace of partial sums.
_PARTIAL_ROWS = 256


def rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    epsilon: ArrayLike = 1e-6,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """x / sqrt(mean(x**2) + epsilon) * scale over the last axis (Zhang and Sennrich 2019).

    Computed in float32, whatever the dtype of x.

    Args:
      x: [..., W], floating point.
      scale: [W], floating point; ones when None.
      epsilon: a positive scalar, added to the mean square.
      implementation: "cuda", "xla", or a sequence of them to take the first that supports the
        call. None is ("cuda", "xla"). "cuda" is a kernel for compute capability 9.0: float32,
        bfloat16 or float16 x of any width, epsilon a Python number. It is used where the
        computation is lowered for CUDA, and differentiable once, in reverse mode. "xla" is plain
        jax.numpy.

    Returns:
      An array of x's shape and dtype.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: implementation "cuda", and the kernel cannot run the call; also when
        such a call is lowered for another platform.
      ExceptionGroup: no implementation of a sequence can.
    """
    x = _checks.float_array("x", x)
    if x.ndim == 0:
        raise ValueError("x has shape (), wanted at least one axis")
    scale = check_scale(scale, x)
    check_epsilon(epsilon)
    choice = _dispatch.choose(_OP, implementation, _unsupported(x, epsilon))
    if choice.kernel:
        return _kernel_rms_norm(Config(float(epsilon), choice.fallback), x, scale)
    return _reference_rms_norm(x, scale, epsilon)


# --- Arguments ------------------------------------------------------------------------------------


def check_scale(scale, x):
    if scale is None:
        return None
    scale = _checks.float_array("scale", scale)
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"scale has shape {scale.shape}, wanted x's last axis {x.shape[-1:]}")
    return scale


def ones_if_none(scale, x):
    return jnp.ones(x.shape[-1:], jnp.float32) if scale is None else scale


def check_epsilon(epsilon):
    if np.ndim(epsilon) != 0:
        raise ValueError(f"epsilon has shape {np.shape(epsilon)}, wanted a scalar")
    if isinstance(epsilon, jax.Array | np.ndarray):
        return
    tiny, largest = _checks.FLOAT32.tiny, _checks.FLOAT32.max
    if not isinstance(epsilon, numbers.Real) or not tiny <= epsilon <= largest:
        raise ValueError(f"epsilon is {epsilon!r}, wanted a positive float32")


def _unsupported(x, epsilon):
    """Why the kernel cannot take this call, or None."""
    if x.dtype.name not in _KERNEL_DTYPES:
        return f"x has dtype {x.dtype}, wanted one of {', '.join(_KERNEL_DTYPES)}"
    if not isinstance(epsilon, numbers.Real):
        return "epsilon is an array, wanted a Python number"
    return None


# --- Reference ------------------------------------------------------------------------------------


@jax.jit
def _reference_rms_norm(x, scale, epsilon):
    scale = ones_if_none(scale, x)

    def plain(x, scale, epsilon):
        return reference.rms_norm(x, scale, epsilon=epsilon)

    axes = _axes(x.ndim, scale.ndim)
    result_axes = (axes[0], axes[0][:-1])
    return _partitioning.on_auto_mesh(plain, axes, result_axes)(x, scale, epsilon)[0]


# --- Kernel ---------------------------------------------------------------------------------------


class Config(NamedTuple):
    epsilon: float
    fallback: bool  # to the reference, where the lowering is not for CUDA
    kernel: bool = True  # else the reference everywhere


@functools.partial(jax.jit, static_argnums=0)
def _kernel_rms_norm(config, x, scale):
    scale = ones_if_none(scale, x)
    if scale.dtype != x.dtype:
        scale = scale.astype(jnp.float32)
    return _rms_norm(config, *_partitioning.alike((x, scale), _axes(x.ndim, scale.ndim)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(config, x, scale):
    return _forward_op(config)(x, scale)[0]


def _rms_norm_fwd(config, x, scale):
    y, rstd = _forward_op(config)(x, scale)
    return y, (x, scale, checkpoint_name(rstd, "jaxkern_rms_norm_rstd"))


def _rms_norm_bwd(config, residuals, dy):
    _, scale, _ = residuals
    dx, dscale = gradients(config, *residuals, dy)
    return dx, dscale.astype(scale.dtype)


_rms_norm.defvjp(_rms_norm_fwd, _rms_norm_bwd)


def gradients(config, x, scale, rstd, dy):
    """The gradients of x [..., W] and scale [W], the latter in float32, from that of rms_norm.

    scale is float32 or of x's dtype, rstd float32 [...]. After vmap scale may have x's first axes.
    """
    return _backward_op(config)(x, scale, rstd, dy)


# Under vmap, x has more leading axes, and a scale that is vmapped too has the first of them.


@functools.cache
def _forward_op(config):
    def kernel(x, scale):
        rows = x.reshape(-1, x.shape[-1])
        results = [(rows.shape, x.dtype), (rows.shape[:1], np.dtype(np.float32))]
        y, rstd = _ffi.call(
            "jaxkern.rms_norm_fwd", results, rows, scale, epsilon=np.float32(config.epsilon)
        )
        return y.reshape(x.shape), rstd.reshape(x.shape[:-1])

    def plain(x, scale):
        return reference.rms_norm(x, scale, epsilon=config.epsilon)

    def axes(x, scale):
        x, scale = _axes(x, scale)
        return (x, scale), (x, x[:-1])

    return _stack.kernel_op(
        _OP,
        _for_each_scale(kernel),
        _for_each_scale(plain),
        axes,
        fallback=config.fallback,
        vmap=_with_vmapped_axis,
    )


@functools.cache
def _backward_op(config):
    single = np.dtype(np.float32)

    def kernel(x, scale, rstd, dy):
        rows = x.reshape(-1, x.shape[-1])
        partial = (_PARTIAL_ROWS, *scale.shape)
        dx, dscale, _ = _ffi.call(
            "jaxkern.rms_norm_bwd",
            [(rows.shape, x.dtype), (scale.shape, single), (partial, single)],
            rows,
            scale,
            rstd.reshape(-1),
            dy.reshape(rows.shape),
        )
        return dx.reshape(x.shape), dscale

    def plain(x, scale, rstd, dy):
        del rstd
        _, pullback = jax.vjp(
            lambda *args: reference.rms_norm(*args, epsilon=config.epsilon)[0],
            x,
            scale.astype(single),
        )
        return pullback(dy)

    def axes(x, scale, *_):
        x, scale = _axes(x, scale)
        return (x, scale, x[:-1], x), (x, scale)

    def vmapped(op, axis_size, in_batched, operands):
        x, scale, rstd, dy = operands = _stack.broadcast_unbatched(axis_size, in_batched, operands)
        if in_batched[1] or scale.ndim > 2:
            return op(*operands)
        # A scale shared by the examples has a gradient for each: not the sum that the kernel takes.
        dx, _ = op(x, scale[0], rstd, dy)
        share = dy.astype(single) * x.astype(single) * rstd[..., None]
        return dx, share.sum(tuple(range(1, x.ndim - 1)))

    return _stack.kernel_op(
        _OP,
        _for_each_scale(kernel if config.kernel else plain),
        _for_each_scale(plain),
        axes,
        fallback=config.fallback,
        vmap=vmapped,
    )


def _axes(x_rank, scale_rank):
    x = (*(f"b{i}" for i in range(x_rank - 1)), "w")
    return x, (*x[: scale_rank - 1], "w")


def _for_each_scale(function):
    """function(x, scale, ...) of one scale [W], mapped over the leading axes of the scale."""

    def mapped(x, scale, *rest):
        lead = scale.shape[:-1]
        if not lead:
            return function(x, scale, *rest)
        flat = [a.reshape(math.prod(lead), *a.shape[len(lead) :]) for a in (x, scale, *rest)]
        results = jax.lax.map(lambda operands: function(*operands), flat)
        return tuple(r.reshape(*lead, *r.shape[1:]) for r in results)

    return mapped


def _with_vmapped_axis(op, axis_size, in_batched, operands):
    """vmap of the forward op: a scale shared by everything stays one row."""
    x, scale = operands
    whole = _stack.broadcast_unbatched(axis_size, in_batched, operands)
    return op(whole[0], scale if scale.ndim == 1 else whole[1])
