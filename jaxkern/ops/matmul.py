"""scaled_matmul: jax.nn's function for FP8 operands with a CUDA kernel behind it."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxkern import _checks, _dispatch, _ffi, _partitioning, _stack
from jaxkern.ops import matmul_arguments as arguments
from jaxkern.ops import scales
from jaxkern.reference import matmul as reference
from jaxkern.reference.quantize import BLOCK

_OP = "scaled_matmul"
_RESULTS = ("float32", "bfloat16", "float16")
_SINGLE = np.dtype(np.float32)

# What the kernel wants K and N to be multiples of: rows of 16 bytes, of the operands and of out.
_DEPTH_MULTIPLE, _WIDTH_MULTIPLE = 16, 8


def scaled_matmul(
    lhs: ArrayLike,
    rhs: ArrayLike,
    lhs_scales: ArrayLike,
    rhs_scales: ArrayLike,
    preferred_element_type: DTypeLike = jnp.float32,
    *,
    bias: ArrayLike | None = None,
    fast_accumulation: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """(lhs * lhs_scales) (rhs * rhs_scales)^T + bias, as jax.nn.scaled_matmul of FP8 operands.

    Names, order and meaning are jax.nn's; operands without a batch, scales of more kinds, bias and
    fast_accumulation are additions. Products are summed in float32.

    Args:
      lhs: [B, M, K] or [M, K], float8_e4m3fn or float8_e5m2.
      rhs: [B, N, K] or [N, K], either format, also next to the other one.
      lhs_scales: float32, with lhs's batch in front: [1, 1], one scale; [M, 1], one per row; or
        [M, ceil(K / 128)], one per 128 columns of a row.
      rhs_scales: float32, likewise [1, 1], [N, 1] or [N, ceil(K / 128)]; also
        [ceil(N / 128), ceil(K / 128)], one per block of 128 x 128. Both operands have scales for
        blocks of K, or neither.
      preferred_element_type: of the result: float32, bfloat16 or float16.
      bias: [N], floating point, added in float32 before the result is rounded.
      fast_accumulation: let the tensor cores, which keep fewer bits than float32 has, sum over all
        of K, instead of adding up every 128 products in float32. Without blocks of K only.
        implementation "xla" always sums in float32.
      implementation: "cuda", "xla", or a sequence of them to take the first that supports the
        call. None is ("cuda", "xla"). "cuda" is a kernel for compute capability 9.0, used where the
        computation is lowered for CUDA. "xla" is plain jax.numpy.

    Returns:
      [B, M, N] or [M, N].

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: differentiation, which scaled_matmul has not; implementation "cuda" where
        the kernel cannot run the call, or when such a call is lowered for another platform.
      ExceptionGroup: no implementation of a sequence can.
    """
    lhs, rhs = arguments.operands(lhs, rhs)
    (lhs_scales, lhs_scaling), (rhs_scales, rhs_scaling) = arguments.scales(
        lhs, rhs, lhs_scales, rhs_scales
    )
    bias = arguments.bias(bias, rhs.shape[-2])
    dtype = _checks.dtype("preferred_element_type", preferred_element_type, _RESULTS)
    fast_accumulation = _checks.flag("fast_accumulation", fast_accumulation)
    if fast_accumulation and lhs_scales.shape[-1] != 1:
        raise ValueError("fast_accumulation is True, wanted False with scales for blocks of K")
    choice = _dispatch.choose(_OP, implementation, None)
    config = Config(
        lhs_scaling,
        rhs_scaling,
        depth=names("depth", lhs.shape[-1], blocked=lhs_scaling == "1x128"),
        width=names("width", rhs.shape[-2], blocked=rhs_scaling == "128x128"),
        dtype=dtype,
        fast_accumulation=fast_accumulation,
        has_bias=bias is not None,
        kernel=choice.kernel,
        fallback=choice.fallback,
    )
    operands = (lhs, rhs, lhs_scales, rhs_scales) + (() if bias is None else (bias,))
    return _stack.without_derivative(_OP, functools.partial(_scaled_matmul, config))(*operands)


# --- Axes -----------------------------------------------------------------------------------------


class Names(NamedTuple):
    """What K, or N, is to the op: its axes in an operand, and the axis of its blocks' scales."""

    axes: tuple[str, ...]
    blocks: str | None = None


def names(name, size, *, blocked):
    """Of an axis that can be sharded if it is one of elements, or of blocks that fill it.

    Blocks are an axis of their own then, [size / 128, 128], which has the name of their scales'.
    """
    if not blocked:
        return Names((f"b{name}",))
    if size % BLOCK:
        return Names((name,), f"{name}_blocks")
    return Names((f"b{name}", name), f"b{name}")


class Config(NamedTuple):
    lhs_scaling: str
    rhs_scaling: str
    depth: Names  # of K
    width: Names  # of N
    dtype: np.dtype  # of the result
    fast_accumulation: bool
    has_bias: bool
    kernel: bool
    fallback: bool  # to the reference, where the lowering is not for CUDA

    @property
    def rhs_rank(self):
        """The number of axes of a single rhs."""
        return len(self.width.axes) + len(self.depth.axes)

    def axes(self, lhs_rank, rhs_rank, *_):
        """Names of the axes of the operands, and of the result.

        The leading axes of rhs are the first ones of lhs.
        """
        depth, width = self.depth.axes, self.width.axes
        lead = tuple(f"b{i}" for i in range(lhs_rank - 1 - len(depth)))
        rhs_lead = lead[: rhs_rank - self.rhs_rank]
        scale_rows = {"tensor": "one", "128x128": self.width.blocks}
        scale_depth = self.depth.blocks or "one_block"
        operands = (
            (*lead, "brows", *depth),
            (*rhs_lead, *width, *depth),
            (*lead, scale_rows.get(self.lhs_scaling, "brows"), scale_depth),
            (*rhs_lead, scale_rows.get(self.rhs_scaling, "bwidth"), scale_depth),
        )
        return operands + (width,) * self.has_bias, ((*lead, "brows", *width),)


@functools.partial(jax.jit, static_argnums=0)
def _scaled_matmul(config, lhs, rhs, lhs_scales, rhs_scales, *bias):
    shape = (*lhs.shape[:-1], rhs.shape[-2])
    depth = (lhs.ndim - 1,) * (len(config.depth.axes) - 1)
    width = (lhs.ndim - 2,) * (len(config.width.axes) - 1)
    operands = (
        _partitioning.split_axes(lhs, depth, BLOCK),
        _partitioning.split_axes(rhs, width + depth, BLOCK),
        lhs_scales,
        rhs_scales,
        *(_partitioning.split_axes(x, (0,) * len(width), BLOCK) for x in bias),
    )
    operand_axes, result_axes = config.axes(operands[0].ndim, operands[1].ndim)
    if config.kernel:
        (out,) = _op(config)(*_partitioning.alike(operands, operand_axes))
    else:
        plain = functools.partial(by_reference, config)
        (out,) = _partitioning.on_auto_mesh(plain, operand_axes, result_axes)(*operands)
    return out.reshape(shape)


# --- Kernel ---------------------------------------------------------------------------------------


@functools.cache
def _op(config):
    # Sums over a sharded K are float32 up to their end, where the bias and the rounding belong.
    shares = config._replace(dtype=_SINGLE, has_bias=False)

    def finish(results, *operands):
        (out,) = results
        for bias in operands[4:]:
            mapped = bias.shape[: bias.ndim - len(config.width.axes)]
            ones = (1,) * (out.ndim - bias.ndim)
            out = out + bias.reshape(*mapped, *ones, *bias.shape[len(mapped) :])
        return (out.astype(config.dtype),)

    def vmapped(op, axis_size, in_batched, operands):
        if any(in_batched[4:]):  # each example has a bias of its own, which the kernel does not add
            results = vmapped(_op(shares), axis_size, in_batched[:4], operands[:4])
            return finish(results, *operands)
        whole = _stack.broadcast_unbatched(axis_size, in_batched[:4], operands[:4])
        if not in_batched[1] and not in_batched[3] and operands[1].ndim == config.rhs_rank:
            _, whole[1], _, whole[3] = operands[:4]  # examples are more rows of one product
        return op(*whole, *operands[4:])

    return _stack.kernel_op(
        _OP,
        functools.partial(by_kernel, config),
        functools.partial(by_reference, config),
        config.axes,
        fallback=config.fallback,
        vmap=vmapped,
        shares=_stack.Shares(
            lambda _: lambda *operands: by_kernel(shares, *operands[:4]),
            lambda _: lambda *operands: by_reference(shares, *operands[:4]),
            finish,
        ),
    )


def by_kernel(config, *operands):
    """The product by the kernel."""
    (lhs, rhs, lhs_scale, rhs_scale, *bias), lhs_scaling, shape = _fold(config, *operands)
    n, k = rhs.shape[1:]
    depth, width = scales.round_up(k, _DEPTH_MULTIPLE), scales.round_up(n, _WIDTH_MULTIPLE)
    if config.rhs_scaling in ("row", "1x128"):
        rhs_scale = scales.pad(rhs_scale, 1, width)
    results = [((*lhs.shape[:2], width), config.dtype)]
    (out,) = _ffi.call(
        "jaxkern.scaled_matmul",
        results,
        scales.pad(lhs, 2, depth),
        scales.pad(scales.pad(rhs, 2, depth), 1, width),
        scales.to_kernel(lhs_scale, lhs_scaling),
        scales.to_kernel(rhs_scale, config.rhs_scaling),
        scales.pad(bias[0], 0, width) if bias else lhs_scale.reshape(-1)[:0],
        lhs_scaling=scales.code(lhs_scaling),
        rhs_scaling=scales.code(config.rhs_scaling),
        fast_accumulation=np.bool_(config.fast_accumulation),
    )
    return (out[..., :n].reshape(shape),)


def by_reference(config, *operands):
    """The product by the reference."""
    operands, _, shape = _fold(config, *operands)
    return (reference.scaled_matmul(*operands, dtype=config.dtype).reshape(shape),)


def _fold(config, lhs, rhs, lhs_scale, rhs_scale, *bias):
    """The operands [B, M, K], [B, N, K], their scales and the bias [N]; lhs's scaling; and the
    shape of the result.

    B is the leading axes that both have. Those that lhs alone has are part of M.
    """
    depth = len(config.depth.axes)
    shape = (*lhs.shape[:-depth], *rhs.shape[rhs.ndim - config.rhs_rank : -depth])
    lead = rhs.ndim - config.rhs_rank
    batch = math.prod(rhs.shape[:lead])
    rows = lhs.shape[lead:-depth]
    scaling = config.lhs_scaling
    if len(rows) > 1 and scaling == "tensor":
        lhs_scale = jnp.broadcast_to(lhs_scale, (*lhs.shape[:-depth], 1))
        scaling = "row"

    def matrices(x, columns):
        return x.reshape(batch, math.prod(x.shape[lead:-columns]), math.prod(x.shape[-columns:]))

    operands = (
        matrices(lhs, depth),
        matrices(rhs, depth),
        matrices(lhs_scale, 1),
        matrices(rhs_scale, 1),
        *(x.reshape(-1) for x in bias),
    )
    return operands, scaling, shape
