"""fp8_matmul: a matrix product with FP8 operands, in its gradients too."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from jaxkern import _checks, _dispatch, _partitioning, _stack
from jaxkern.ops import fp8_arguments as arguments
from jaxkern.ops import matmul
from jaxkern.ops import quantize as quantization
from jaxkern.ops.fp8_arguments import QuantizedWeight
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference.quantize import BLOCK

_OP = "fp8_matmul"
_SINGLE = np.dtype(np.float32)


def fp8_matmul(
    x: ArrayLike,
    w: ArrayLike,
    *,
    recipe: str = "row",
    gradient_format: DTypeLike | None = None,
    fast_accumulation: bool = False,
    quantized_weight: QuantizedWeight | None = None,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """x w, of which this product and those of both gradients have FP8 operands.

    With q for `quantize` and dy for the gradient of y = x w, and all of x's leading axes as M:

        y  [M, N] = q(x)   q(w^T)^T      x per row (token), w per column
        dx [M, K] = q(dy)  q(w)^T        dy per row, w per row
        dw [K, N] = q(x^T) q(dy^T)^T     x and dy per column

    Every operand is quantised from its own values, not from those that another product has
    quantised, and sums are in float32. dw is float32 up to its cast to w's dtype: float32 weights
    have gradients that are not rounded. Scales are powers of two, of the values at hand: there is
    no history of them.

    Arrays stay sharded along tokens, K and N. Each device quantises the shards it has, with scales
    of its own: on more devices there are more scales. Devices exchange only what the products sum
    over: y over shards of K, dx over those of N, dw over those of tokens, in float32.

    Args:
      x: [..., K], bfloat16, float16 or float32.
      w: [K, N], of these dtypes too, also next to another one.
      recipe: what has a scale of its own. "tensor": each operand. "row": each row of an operand of
        the products above, as q(x) has tokens for rows and q(x^T) has K. "block": 128 elements of
        a row of x and dy, and 128 x 128 elements of w, which is the recipe of DeepSeek-V3
        (DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2).
      gradient_format: of dy. None is float8_e5m2 for "tensor" and "row", float8_e4m3fn for "block".
        x and w are float8_e4m3fn.
      fast_accumulation: of y, as in scaled_matmul. Not for "block". Gradients are never summed so.
      quantized_weight: of `quantize_weight`, with the same recipe: taken instead of w's values,
        which are not read then. The gradient still is w's, and none is quantized_weight's. Its
        "block" scales stay sharded where devices have whole blocks; else operands are made whole.
      preferred_element_type: of the result: bfloat16, float16 or float32; None is x's dtype.
      implementation: "cuda", "xla", or a sequence of them to take the first that supports the
        call. None is ("cuda", "xla"). "cuda" is kernels for compute capability 9.0, used where the
        computation is lowered for CUDA. "xla" is plain jax.numpy. Both quantise to the same bits.

    Returns:
      [..., N]. To be differentiated once, in reverse mode. A remat policy knows the result by the
      name "jaxkern_fp8_matmul_out".

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: second derivatives; implementation "cuda" where the kernels cannot run
        the call, or when such a call is lowered for another platform.
      ExceptionGroup: no implementation of a sequence can.
    """
    x, w = arguments.operands(x, w)
    scalings = arguments.recipe(recipe)
    format = scalings.gradient_format if gradient_format is None else gradient_format
    format = _checks.dtype("gradient_format", format, _checks.FP8)
    fast_accumulation = _checks.flag("fast_accumulation", fast_accumulation)
    if fast_accumulation and recipe == "block":
        raise ValueError("fast_accumulation is True, wanted False with recipe 'block'")
    dtype = x.dtype if preferred_element_type is None else preferred_element_type
    dtype = _checks.dtype("preferred_element_type", dtype, arguments.DTYPES)
    quantized = arguments.quantized_weight(quantized_weight, w, scalings.weight)
    choice = _dispatch.choose(_OP, implementation, None)
    blocked = bool(quantized) and recipe == "block"
    config = _Config(
        scalings,
        format,
        fast_accumulation,
        dtype,
        weight_dtype=w.dtype,
        tokens=x.ndim - 1,
        depth=matmul.names("depth", w.shape[0], blocked=blocked),
        width=matmul.names("width", w.shape[1], blocked=blocked),
        has_quantized=bool(quantized),
        kernel=choice.kernel,
        fallback=choice.fallback,
    )
    return _of_any_sharding(config, x, w, *quantized)


def quantize_weight(
    w: ArrayLike, recipe: str = "row", *, implementation: str | Sequence[str] | None = None
) -> QuantizedWeight:
    """w as fp8_matmul quantises it, for its `quantized_weight`: once for many calls.

    Not differentiable, and no obstacle to it: w's gradient is what fp8_matmul gives. Scales are
    those of all of w, however it is sharded; "row" and "block" make w whole on each device first.

    Args:
      w: [K, N], bfloat16, float16 or float32.
      recipe: as in fp8_matmul.
      implementation: as in fp8_matmul.

    Raises:
      ValueError: a wrong argument, or an unknown implementation.
      NotImplementedError, ExceptionGroup: as in fp8_matmul.
    """
    w = arguments.operand("w", w)
    if w.ndim != 2:
        raise ValueError(f"w has shape {w.shape}, wanted rank 2 (K, N)")
    backward, forward = quantization.quantize(
        jax.lax.stop_gradient(w),
        arguments.FORMAT,
        scaling=arguments.recipe(recipe).weight,
        orientation="both",
        implementation=implementation,
    )
    return QuantizedWeight(forward, backward)


class _Config(NamedTuple):
    recipe: arguments.Recipe
    gradient_format: np.dtype
    fast_accumulation: bool
    dtype: np.dtype  # of the result
    weight_dtype: np.dtype
    tokens: int  # how many axes of x are M
    depth: matmul.Names  # of K
    width: matmul.Names  # of N
    has_quantized: bool  # whether the weight is given quantised
    kernel: bool
    fallback: bool  # to the reference, where the lowering is not for CUDA

    @property
    def weight_rank(self):
        """The number of axes of a single weight."""
        return len(self.depth.axes) + len(self.width.axes)

    def lead(self, x_rank):
        """The number of axes that vmap has put in front of x."""
        return x_rank - self.tokens - len(self.depth.axes)


@functools.partial(jax.jit, static_argnums=0)
def _of_any_sharding(config, x, w, *quantized):
    def split(x, *names):
        """x, whose last axes have these names, with axes of their own for blocks."""
        first = x.ndim - len(names)
        axes = [first + i for i, name in enumerate(names) if len(name.axes) > 1]
        return _partitioning.split_axes(x, axes, BLOCK)

    depth, width = config.depth, config.width
    operands = [split(x, depth), split(w, depth, width)]
    if quantized:
        values_t, scale_t, values, scale = quantized
        operands += [split(values_t, width, depth), scale_t, split(values, depth, width), scale]
    axes = _axes(config, *(a.ndim for a in operands[:2]))
    operand_axes = (axes.x, axes.w, *(axes.forward + axes.backward if quantized else ()))
    y = _fp8_matmul(config, *_partitioning.alike(operands, operand_axes))
    return y.reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fp8_matmul(config, x, w, *quantized):
    (y,) = _forward_op(config)(x, *(quantized[:2] or (w,)))
    return y


def _fp8_matmul_fwd(config, x, w, *quantized):
    (y,) = _forward_op(config)(x, *(quantized[:2] or (w,)))
    y = checkpoint_name(y, "jaxkern_fp8_matmul_out")
    return y, (x, *(quantized[2:] or (w,)))


def _fp8_matmul_bwd(config, residuals, dy):
    return *_backward_op(config)(*residuals, dy), *((None,) * 4 if config.has_quantized else ())


_fp8_matmul.defvjp(_fp8_matmul_fwd, _fp8_matmul_bwd)


# --- Operations -----------------------------------------------------------------------------------
# The operands are x, the weight, and backward dy. A quantised weight is two arrays, values and
# scale. vmap puts axes in front; those of the weight are the first ones of x.


class _Axes(NamedTuple):
    """Names of the axes of every array."""

    x: tuple[str, ...]
    w: tuple[str, ...]
    y: tuple[str, ...]
    dw: tuple[str, ...]
    forward: tuple[tuple[str, ...], ...]  # of the arrays that are the weight
    backward: tuple[tuple[str, ...], ...]


def _axes(config, x_rank, weight_rank):
    depth, width = config.depth, config.width
    lead = tuple(f"b{i}" for i in range(config.lead(x_rank)))
    weight_lead = lead[: weight_rank - config.weight_rank]
    rows = (*lead, *(f"btoken{i}" for i in range(config.tokens)))
    w = (*weight_lead, *depth.axes, *width.axes)

    def quantized(rows, columns):
        scale = {
            "tensor": ("one", "one_block"),
            "row": (rows.axes[0], "one_block"),
            "128x128": (rows.blocks, columns.blocks),
        }[config.recipe.weight]
        return (*weight_lead, *rows.axes, *columns.axes), (*weight_lead, *scale)

    return _Axes(
        x=(*rows, *depth.axes),
        w=w,
        y=(*rows, *width.axes),
        dw=(*lead, *depth.axes, *width.axes),
        forward=quantized(width, depth) if config.has_quantized else (w,),
        backward=quantized(depth, width) if config.has_quantized else (w,),
    )


@functools.cache
def _forward_op(config):
    def axes(x_rank, weight_rank, *_):
        axes = _axes(config, x_rank, weight_rank)
        return (axes.x, *axes.forward), (axes.y,)

    def finish(sums, *_):
        return (sums[0].astype(config.dtype),)

    return kernel_op(_OP, config, _forward, axes, finish, weight=slice(1, None))


@functools.cache
def _backward_op(config):
    def axes(x_rank, weight_rank, *_):
        axes = _axes(config, x_rank, weight_rank)
        return (axes.x, *axes.backward, axes.y), (axes.x, axes.dw)

    def finish(sums, x, *_):
        return sums[0].astype(x.dtype), sums[1].astype(config.weight_dtype)

    return kernel_op(_OP, config, _backward, axes, finish, weight=slice(1, -1))


def kernel_op(op, config, function, axes, finish, *, weight):
    """A function of (config, ...) through the whole stack; operands[weight] are the weights.

    The reference is called on each device too, so that it quantises what the kernels would.
    """
    by_reference = config._replace(kernel=False)

    def vmapped(op, axis_size, in_batched, operands):
        whole = _stack.broadcast_unbatched(axis_size, in_batched, operands)
        if not any(in_batched[weight]) and operands[1].ndim == config.weight_rank:
            whole[weight] = operands[weight]  # the examples share it
        return op(*whole)

    def shares(config):
        return lambda summed: functools.partial(function, config, summed)

    return _stack.kernel_op(
        op,
        functools.partial(function, config, ()),
        functools.partial(function, by_reference, ()),
        axes,
        fallback=config.fallback,
        vmap=vmapped,
        shares=_stack.Shares(shares(config), shares(by_reference), finish),
        derivatives="it can be differentiated once, in reverse mode",
    )


# --- One device -----------------------------------------------------------------------------------


def share_dtype(summed, result, dtype):
    """The dtype of a device's share of a result, which has this one: float32 if it is a sum.

    summed: which results are, a bool each; nothing if none is.
    """
    return _SINGLE if summed and summed[result] else dtype


def _forward(config, summed, x, *weight):
    """y."""
    scalings = config.recipe
    rows = _matrices(x, config.lead(x.ndim), config.depth)
    (lhs,) = quantized(config, (rows,), arguments.FORMAT, scalings.activation)
    rhs = _weight(config, weight, "transposed")
    y = multiplied(
        config,
        (lhs, scalings.activation),
        (rhs, scalings.weight),
        share_dtype(summed, 0, config.dtype),
        fast_accumulation=config.fast_accumulation,
    )
    lead = x.shape[: x.ndim - len(config.depth.axes)]
    return (y.reshape(*lead, *_sizes(config.width, y.shape[-1])),)


def _backward(config, summed, x, *weight_and_dy):
    """dx and dw."""
    *weight, dy = weight_and_dy
    scalings = config.recipe
    lead = config.lead(x.ndim)
    rows = _matrices(x, lead, config.depth), _matrices(dy, lead, config.width)
    (x_t,) = quantized(config, rows[:1], arguments.FORMAT, scalings.activation, "transposed")
    dy, dy_t = quantized(config, rows[1:], config.gradient_format, scalings.activation, "both")
    w = _weight(config, weight, "natural")
    dx = multiplied(
        config,
        (dy, scalings.activation),
        (w, scalings.weight),
        share_dtype(summed, 0, x.dtype),
    )
    dw = multiplied(
        config,
        (x_t, scalings.activation),
        (dy_t, scalings.activation),
        share_dtype(summed, 1, config.weight_dtype),
    )
    sizes = _sizes(config.depth, dw.shape[-2]) + _sizes(config.width, dw.shape[-1])
    return dx.reshape(x.shape), dw.reshape(*x.shape[:lead], *sizes)


def _weight(config, weight, orientation):
    """The weight [..., R, C] in this orientation: as given, or quantised here."""
    if not config.has_quantized:
        (w,) = quantized(config, weight, arguments.FORMAT, config.recipe.weight, orientation)
        return w
    values, scale = weight
    columns = config.width if orientation == "natural" else config.depth
    return QuantizedArray(_matrices(values, values.ndim - config.weight_rank, columns), scale)


def quantized(config, inputs, format, scaling, orientation="natural", op="quantize", epsilon=None):
    """What a quantiser gives for its inputs, [..., R, C], by config's implementation."""
    settings = quantization.Config(
        jnp.dtype(format), scaling, orientation, config.kernel, config.fallback, op, epsilon
    )
    return quantization.on_one_device(settings, *inputs)


def multiplied(config, lhs, rhs, dtype, *, fast_accumulation=False):
    """lhs rhs^T [..., M, N], of pairs of a QuantizedArray and its scaling."""
    (lhs, lhs_scaling), (rhs, rhs_scaling) = lhs, rhs
    settings = matmul.Config(
        lhs_scaling,
        rhs_scaling,
        depth=matmul.Names(("bdepth",)),
        width=matmul.Names(("bwidth",)),
        dtype=dtype,
        fast_accumulation=fast_accumulation,
        has_bias=False,
        kernel=config.kernel,
        fallback=config.fallback,
    )
    run = matmul.by_kernel if config.kernel else matmul.by_reference
    (out,) = run(settings, lhs.values, rhs.values, lhs.scale, rhs.scale)
    return out


def _matrices(x, lead, columns):
    """x as [..., R, C], of which `lead` axes stay; the last axes are those named by `columns`."""
    first = x.ndim - len(columns.axes)
    return x.reshape(*x.shape[:lead], math.prod(x.shape[lead:first]), math.prod(x.shape[first:]))


def _sizes(names, size):
    """The axes that an axis of this size is in the op."""
    return (size,) if len(names.axes) == 1 else (size // BLOCK, BLOCK)
