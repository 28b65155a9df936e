"""quantized_matmul: x times a weight that is kept in four bits."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxkern import _checks, _dispatch, _ffi, _partitioning, _stack
from jaxkern.ops import four_bit_weight, quantized_matmul_fp8
from jaxkern.ops.packed_weight import (
    COLUMNS,
    ROWS,
    PackedWeight,
    format_of,
    relative_row_scale,
)
from jaxkern.ops.quantize import quantize
from jaxkern.ops.quantize_four_bit import FORMATS
from jaxkern.ops.quantized_array import QuantizedArray

_OP = "quantized_matmul"
_DTYPES = ("bfloat16", "float16", "float32")
_SINGLE = np.dtype("float32")

# NOTE: up to here an H200 takes less time to multiply by a weight as it is than to expand it for
# FP8 tensor cores.
_FEW_ROWS = 256


def quantized_matmul(
    x: ArrayLike,
    w: QuantizedArray | PackedWeight,
    *,
    activation_format: str | None = None,
    fast_accumulation: bool = False,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """x w^T, for a weight that `jaxkern.quantize` keeps in four bits.

    w counts exactly as what it stands for, and sums are float32. But kernels round integers times
    their scale to x's dtype, which must have the scale in its range; and blocks of MXFP4 below
    2^-100 of the largest of their row, in float16 2^-24, lose bits or are zero; as do, where x is a
    single row in bfloat16, its products with values of e2m1 below 2^-62.

    w is a constant: the gradient is x's alone, dx = dy w. Kernels that make it do as above, but
    blocks of MXFP4 count from the largest of w. They take dy in x's dtype: where the result has
    another one, dy is rounded to bfloat16 for an x of that; for an x of float16, whose range dy may
    leave, the gradient is plain jax.numpy.

    With an activation_format x is quantised too, and counts as what that stands for; its gradient
    is as without.

    "fp8" is float8_e4m3fn with a float32 scale for each row of x, as `jaxkern.quantize` makes it,
    for a w of any format. Up to 256 rows, and for integers in groups of 128, w counts as above, and
    kernels round integers times their scale to bfloat16. Of more, or where tracing does not know
    how many there are, FP8 tensor cores multiply by others (`jaxkern.scaled_matmul`), and w is
    expanded for them: rounded to float8_e4m3fn, with a float32 scale for each row, a power of two
    (times the scale of all of "nvfp4"). Such numbers hold "mxfp4" exactly down to 2^-14 of the
    row's largest scale, "nvfp4" but for some of its 1.5, 3 and 6, and integers not: docs/matmul.md
    has the errors. Over a sharded K each device has scales of its own.

    "nvfp4" has a float32 scale for each matrix [rows, K]. On GPUs of compute capability 10 and 12
    (Blackwell) `jax.nn.scaled_matmul` multiplies, which takes both as they are; this has run on
    none of them. Elsewhere it costs more than without.

    Args:
      x: [..., K], bfloat16, float16 or float32.
      w: [N, K], of the format "nvfp4", "mxfp4" or "int4"; or what `jaxkern.pack_weight` makes of
        it, which is the same weight.
      activation_format: None, "fp8" or, for a w of "nvfp4", "nvfp4".
      fast_accumulation: of "fp8", where FP8 tensor cores multiply: that they sum over all of K, as
        `jaxkern.scaled_matmul` has it.
      preferred_element_type: of the result: bfloat16, float16 or float32. None is x's.
      implementation: "cuda" (kernels: a packed w, and x in bfloat16 or float16; with "fp8" in any
        dtype), "xla" (plain jax.numpy), or a sequence of them to take the first that supports the
        call. None is ("cuda", "xla"). Gradients are made by the same, but for those that no kernel
        takes (see above).

    Returns:
      [..., N].

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: implementation "cuda" where the kernel cannot run the call, or when such
        a call is lowered for another platform.
      ExceptionGroup: no implementation of a sequence can.
    """
    x = _checks.array("x", x)
    if x.dtype.name not in _DTYPES:
        raise ValueError(f"x has dtype {x.dtype}, wanted one of {', '.join(_DTYPES)}")
    four_bit_weight.check("w", w)
    if w.ndim != 2:
        raise ValueError(f"w has shape {w.shape}, wanted (N, K)")
    if x.ndim == 0 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has shape {x.shape}, wanted (..., {w.shape[-1]}) for w's {w.shape}")
    wanted = x.dtype if preferred_element_type is None else preferred_element_type
    dtype = _checks.dtype("preferred_element_type", wanted, _DTYPES)
    _check_activation_format(activation_format, w)
    fast_accumulation = _checks.flag("fast_accumulation", fast_accumulation)
    if fast_accumulation and activation_format != "fp8":
        raise ValueError(
            f"fast_accumulation is True, wanted False for activation_format {activation_format!r}"
        )
    choice = _dispatch.choose(_OP, implementation, _unsupported(x, w, activation_format))
    config = Config(
        dtype, x.dtype, choice.kernel, choice.fallback, activation_format, fast_accumulation
    )
    return _quantized_matmul(config, x, w)


def _check_activation_format(name, w):
    if name not in (None, "fp8", "nvfp4"):
        raise ValueError(f"activation_format is {name!r}, wanted None, 'fp8' or 'nvfp4'")
    found = w.format if isinstance(w, PackedWeight) else format_of(w)
    if name == "nvfp4" and found != name:
        raise ValueError(
            f"activation_format is {name!r}, wanted None or 'fp8' for a w of {found!r}"
        )


def _unsupported(x, w, activation_format):
    """Why the kernel cannot take these arguments, or None."""
    if not isinstance(w, PackedWeight):
        return "w is a QuantizedArray, wanted what pack_weight makes of it"
    if x.dtype == _SINGLE and activation_format != "fp8":
        return "x has dtype float32, wanted bfloat16 or float16"
    return None


class Config(NamedTuple):
    dtype: np.dtype  # of the result
    input_dtype: np.dtype
    kernel: bool
    fallback: bool  # to the reference, where the lowering is not for CUDA
    activation_format: str | None
    fast_accumulation: bool = False


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _quantized_matmul(config, x, w):
    if config.activation_format == "fp8":
        return _of_fp8(config, x, w)
    if config.activation_format == "nvfp4":
        return _of_nvfp4(config, x, w)
    if config.kernel:
        return _by_tiles(config, x, w)
    return _product(config.dtype, x, "k", w, "n")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Placed:
    """Where an array is, which its gradient must be too on a mesh with Explicit axes."""

    sharding: jax.sharding.NamedSharding

    def put(self, gradient):
        explicit = self.sharding.mesh.explicit_axes
        return jax.sharding.reshard(gradient, self.sharding) if explicit else gradient


def _forward(config, x, w):
    return _quantized_matmul(config, x, w), (_Placed(jax.typeof(x).sharding), w)


def _backward(config, kept, dy):
    x, w = kept
    return x.put(_gradient(config, dy, w)), None


_quantized_matmul.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _gradient(config, dy, w):
    """dy w, whose gradient is the product again."""
    to = config.input_dtype
    if config.kernel and (to == jnp.bfloat16 or to == dy.dtype == jnp.float16):
        return _by_tiles(config, dy.astype(to), w, gradient=True)
    return _product(config.input_dtype, dy, "n", w, "k")


def _gradient_forward(config, dy, w):
    return _gradient(config, dy, w), (_Placed(jax.typeof(dy).sharding), w)


def _gradient_backward(config, kept, ddx):
    dy, w = kept
    return dy.put(_quantized_matmul(config._replace(activation_format=None), ddx, w)), None


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _of_fp8(config, x, w):
    """The product with x in e4m3, whose values are exact in bfloat16 too."""
    names = ("cuda", "xla") if config.fallback else ("cuda",)
    quantized = quantize(jnp.atleast_2d(x), implementation=names if config.kernel else "xla")
    rows = math.prod(x.shape[:-1])
    if (isinstance(rows, int) and rows <= _FEW_ROWS) or _has_integers_of_a_tile(w):
        single = config._replace(dtype=_SINGLE, activation_format=None)
        values = quantized.values.astype(jnp.bfloat16)
        out = _quantized_matmul(single, values, w) * quantized.scale
    else:
        out = quantized_matmul_fp8.product(
            quantized,
            w,
            dtype=config.dtype,
            fast_accumulation=config.fast_accumulation,
            kernel=config.kernel,
            fallback=config.fallback,
        )
    return out.astype(config.dtype).reshape(*x.shape[:-1], -1)


def _has_integers_of_a_tile(w):
    """Whether w has integers in groups as wide as tiles: one scale a row would round them."""
    if isinstance(w, PackedWeight):
        return (w.format, w.block) == ("int4", COLUMNS)
    return format_of(w) == "int4" and w.shape[-1] == COLUMNS * w.scale.shape[-1]


def _of_nvfp4(config, x, w):
    """The product with x in NVFP4, whose float32 scale counts at the end: without it x is exact in
    its own dtype."""

    def elsewhere(quantized, w):
        plain = dataclasses.replace(quantized, tensor_scale=None).dequantize(x.dtype)
        single = config._replace(dtype=_SINGLE, activation_format=None)
        return _quantized_matmul(single, plain, w) * quantized.tensor_scale

    quantized = quantize(jnp.atleast_2d(x), "nvfp4")
    if _dispatch.has_blackwell():
        out = jax.lax.platform_dependent(quantized, w, cuda=_native, default=elsewhere)
    else:
        out = elsewhere(quantized, w)
    return out.astype(config.dtype).reshape(*x.shape[:-1], -1)


def _native(x, w):
    """Of x and w in NVFP4, float32."""
    w = w.unpack() if isinstance(w, PackedWeight) else w

    def flat(a):
        return a.reshape(1, -1, a.shape[-1])

    out = jax.nn.scaled_matmul(
        flat(x.values), flat(w.values), flat(x.scale), flat(w.scale), preferred_element_type=_SINGLE
    )
    return out.reshape(*x.shape[:-1], -1) * (x.tensor_scale * w.tensor_scale)


def _product(dtype, x, over, w, to):
    """x [..., over] times w [n, k], [..., to]."""
    lead = tuple(f"b{i}" for i in range(x.ndim - 1))

    def run(x, _, w):
        axes = f"...{over},nk->...{to}"
        out = jnp.einsum(
            axes, x.astype(jnp.float32), w.dequantize(), precision=jax.lax.Precision.HIGHEST
        )
        return (out.astype(dtype),)

    largest = w.data if isinstance(w, PackedWeight) else w.values
    of_weight = ("bn", "bk", "words")[: largest.ndim]
    axes = [(*lead, f"b{over}"), of_weight], [(*lead, f"b{to}")]
    (out,) = _partitioning.on_auto_mesh(run, *axes)(x, largest, w)
    return out


# --- Kernel ---------------------------------------------------------------------------------------


class TilesConfig(NamedTuple):
    dtype: np.dtype  # of the result
    format: str
    block: int
    zero_points: bool
    fallback: bool
    gradient: bool  # x w, not x w^T

    def axes(self, x_rank, data_rank, *others):
        """Names of the axes of the operands, and of the result.

        The leading axes of a weight are the first ones of x.
        """
        lead = tuple(f"b{i}" for i in range(x_rank - 2))
        of_weight = lead[: data_rank - 3]
        of_x, of_out = (*lead, "bk", "columns"), (*lead, "bn", "rows")
        if self.gradient:
            of_x, of_out = of_out, of_x
        operands = (
            of_x,
            (*of_weight, "bn", "bk", "words"),
            (*of_weight, "bn", "rows"),
            (*of_weight, "one", "another"),
        )
        return operands[: 2 + len(others)], (of_out,)

    def sides(self, data):
        """Columns of x and of the result."""
        *_, high, wide, _ = data.shape
        sides = (wide, COLUMNS), (high, ROWS)
        return sides[::-1] if self.gradient else sides


def _by_tiles(config, x, w, gradient=False):
    """The product by an op of whole tiles, whose rows and columns are axes of their own."""
    dtype = config.input_dtype if gradient else config.dtype
    tiles = TilesConfig(dtype, w.format, w.block, w.zero_points, config.fallback, gradient)
    (count, block), _ = tiles.sides(w.data)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * block - x.shape[-1])])
    operands = (
        _partitioning.split_axes(x, (x.ndim - 1,), block),
        w.data,
        _partitioning.split_axes(w.row_scale, (w.row_scale.ndim - 1,), ROWS),
        *(() if w.tensor_scale is None else (w.tensor_scale,)),
    )
    operand_axes, _ = tiles.axes(*(a.ndim for a in operands))
    (out,) = _op(tiles)(*_partitioning.alike(operands, operand_axes))
    return out.reshape(*x.shape[:-1], -1)[..., : w.columns if gradient else w.rows]


@functools.cache
def _op(config):
    # Sums over a sharded axis are float32 up to their end, where the rounding belongs.
    shares = config._replace(dtype=_SINGLE)

    def vmapped(op, axis_size, in_batched, operands):
        if not any(in_batched[1:]) and operands[1].ndim == 3:
            return op(*operands)  # examples are more rows of one product
        return op(*_stack.broadcast_unbatched(axis_size, in_batched, operands))

    return _stack.kernel_op(
        _OP,
        functools.partial(by_kernel, config),
        functools.partial(by_reference, config),
        config.axes,
        fallback=config.fallback,
        vmap=vmapped,
        shares=_stack.Shares(
            lambda _: functools.partial(by_kernel, shares),
            lambda _: functools.partial(by_reference, shares),
            lambda results, *_: tuple(x.astype(config.dtype) for x in results),
        ),
    )


def by_kernel(config, x, data, row_scale, *tensor_scale):
    """The product by the kernel, whose results are of x's dtype or float32."""
    *lead, high, wide, words = data.shape
    batch, rows = math.prod(lead), math.prod(x.shape[len(lead) : -2])
    (count, block), side = config.sides(data)
    scales = (row_scale.reshape(batch, high * ROWS),)
    if config.gradient:
        scales = _gradient_scales(
            config, x.dtype, *scales, *(a.reshape(batch) for a in tensor_scale)
        )
    (out,) = _ffi.call(
        "jaxkern.quantized_matmul_grad" if config.gradient else "jaxkern.quantized_matmul",
        [((batch, rows, math.prod(side)), x.dtype if config.dtype == x.dtype else _SINGLE)],
        x.reshape(batch, rows, count * block),
        data.reshape(batch, high, wide, words),
        *scales,
        format=np.int32(FORMATS.index(config.format)),
        block=np.int32(config.block),
        zero_points=np.bool_(config.zero_points),
    )
    return (out.astype(config.dtype).reshape(*x.shape[:-2], *side),)


def _gradient_scales(config, dtype, row_scale, *tensor_scale):
    """What sums, and rows of the weight, are multiplied by in the gradient.

    A scale of a row belongs to what is summed. Of MXFP4 it becomes a power of two times the
    largest of them; of other formats all rows have the same, or NaN, which tiles have too, and
    where it belongs: in the scale of a block.
    """
    if config.format == "mxfp4":
        factor, largest = relative_row_scale(row_scale)
        return largest, factor.astype(dtype)
    ones = jnp.ones(row_scale.shape[:1], jnp.float32)
    return *(tensor_scale or (ones,)), row_scale[:, :0].astype(dtype)


def by_reference(config, x, data, row_scale, *tensor_scale):
    """The product by the reference."""
    *lead, high, wide, _ = data.shape
    (count, block), side = config.sides(data)
    row_scale = row_scale.reshape(*lead, high * ROWS)
    size = high * ROWS, wide * COLUMNS
    (tensor_scale,) = tensor_scale or (None,)
    weight = PackedWeight(
        data, row_scale, tensor_scale, config.format, config.block, config.zero_points, *size
    )
    rows = x.shape[len(lead) : -2]
    out = jnp.einsum(
        "...mn,...nk->...mk" if config.gradient else "...mk,...nk->...mn",
        x.reshape(*lead, math.prod(rows), count * block).astype(jnp.float32),
        weight.dequantize(),
        precision=jax.lax.Precision.HIGHEST,
    )
    return (out.astype(config.dtype).reshape(*x.shape[:-2], *side),)
