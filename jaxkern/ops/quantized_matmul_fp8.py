"""quantized_matmul with activation_format "fp8": x in e4m3 times a weight of four bits."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _ffi, _partitioning, _stack
from jaxkern.ops.packed_weight import COLUMNS, ROWS, PackedWeight
from jaxkern.ops.quantize import quantize
from jaxkern.ops.quantize_four_bit import FORMATS
from jaxkern.reference import four_bit
from jaxkern.reference import quantize as reference

_OP = "quantized_matmul"
_SINGLE, _E4M3 = np.dtype("float32"), np.dtype(four_bit.E4M3)


def product(x, w, *, dtype, kernel, fallback):
    """x [..., K] times w [N, K], [..., N] of dtype. kernel, fallback: as _dispatch.Choice has them.

    Each row of x is quantised to float8_e4m3fn, and the weight rounded as reference.four_bit does.
    """
    rows = jnp.atleast_2d(x)
    if kernel:
        out = _by_tiles(rows, w, dtype, fallback)
    else:
        quantized = quantize(rows, _E4M3, implementation="xla")
        out = _plain(quantized.values, quantized.scale[..., 0], w, dtype)
    return out if x.ndim > 1 else out[0]


def rounded(w):
    """What products of e4m3 take for w, float32 [..., N, K]."""
    w = w.unpack() if isinstance(w, PackedWeight) else w
    fields = w.values, w.scale, w.tensor_scale, w.zero_point
    return four_bit.rounded_to_e4m3(four_bit.FourBit(*fields))


def _plain(values, scale, w, dtype):
    lead = tuple(f"b{i}" for i in range(scale.ndim))

    def run(values, scale, _, w):
        out = jnp.einsum(
            "...k,nk->...n",
            values.astype(jnp.float32),
            rounded(w),
            precision=jax.lax.Precision.HIGHEST,
        )
        return ((out * scale[..., None]).astype(dtype),)

    largest = w.data if isinstance(w, PackedWeight) else w.values
    of_weight = ("bn", "bk", "words")[: largest.ndim]
    axes = [(*lead, "bk"), lead, of_weight], [(*lead, "bn")]
    (out,) = _partitioning.on_auto_mesh(run, *axes)(values, scale, largest, w)
    return out


# --- Kernel ---------------------------------------------------------------------------------------


def _quantizer_axes(rank):
    """Names of the axes of x, and of its values and scale."""
    lead = tuple(f"b{i}" for i in range(rank - 1))
    return ((*lead, "columns"),), ((*lead, "wide"), lead)


@functools.cache
def _quantizer(wide, fallback):
    """Of rows, to float8_e4m3fn [..., wide] in the kernel's order and a scale for each."""

    def by_kernel(x):
        *lead, columns = x.shape
        rows = math.prod(lead)
        values, scale = _ffi.call(
            "jaxkern.quantize_permuted",
            [((rows, wide), _E4M3), ((rows,), _SINGLE)],
            x.reshape(rows, columns),
        )
        return values.reshape(*lead, wide), scale.reshape(lead)

    def by_reference(x):
        values, scale = reference.quantize(x, _E4M3, scaling="row")
        pad = [(0, 0)] * (x.ndim - 1) + [(0, wide - x.shape[-1])]
        return in_kernel_order(jnp.pad(values, pad)), scale[..., 0]

    return _stack.kernel_op(_OP, by_kernel, by_reference, _quantizer_axes, fallback=fallback)


def in_kernel_order(x):
    """Of each 16 columns 0, 1, 8, 9, 2, 3, 10, 11, ...: those of a lane side by side."""
    split = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 2, 4, 2)
    return split.swapaxes(-3, -2).reshape(x.shape)


class TilesConfig(NamedTuple):
    dtype: np.dtype  # of the result
    format: str
    block: int
    zero_points: bool
    fallback: bool

    @staticmethod
    def axes(x_rank, _, data_rank, *others):
        """Names of the axes of the operands, and of the result.

        The leading axes of a weight are the first ones of x.
        """
        lead = tuple(f"b{i}" for i in range(x_rank - 2))
        of_weight = lead[: data_rank - 3]
        operands = (
            (*lead, "bk", "columns"),
            lead,
            (*of_weight, "bn", "bk", "words"),
            (*of_weight, "bn", "rows"),
            (*of_weight, "one", "another"),
        )
        return operands[: 3 + len(others)], ((*lead, "bn", "rows"),)


def _by_tiles(x, w, dtype, fallback):
    """The product by an op of whole tiles, whose rows and columns are axes of their own."""
    quantizer = _quantizer(w.data.shape[-2] * COLUMNS, fallback)
    values, scale = quantizer(*_partitioning.alike((x,), _quantizer_axes(x.ndim)[0]))
    operands = (
        _partitioning.split_axes(values, (values.ndim - 1,), COLUMNS),
        scale,
        w.data,
        _partitioning.split_axes(w.row_scale, (w.row_scale.ndim - 1,), ROWS),
        *(() if w.tensor_scale is None else (w.tensor_scale,)),
    )
    config = TilesConfig(dtype, w.format, w.block, w.zero_points, fallback)
    operand_axes, _ = config.axes(*(a.ndim for a in operands))
    (out,) = _op(config)(*_partitioning.alike(operands, operand_axes))
    return out.reshape(*scale.shape, -1)[..., : w.rows]


@functools.cache
def _op(config):
    # Sums over a sharded K are float32 up to their end, where the rounding belongs.
    shares = config._replace(dtype=_SINGLE)

    def vmapped(op, axis_size, in_batched, operands):
        if not any(in_batched[2:]) and operands[2].ndim == 3:
            of_x = _stack.broadcast_unbatched(axis_size, in_batched[:2], operands[:2])
            return op(*of_x, *operands[2:])  # examples are more rows of one product
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


def by_kernel(config, values, scale, data, row_scale, *_):
    """The product by the kernel."""
    *lead, high, wide, words = data.shape
    batch, rows = math.prod(lead), math.prod(scale.shape[len(lead) :])
    (out,) = _ffi.call(
        "jaxkern.quantized_matmul_fp8",
        [((batch, rows, high * ROWS), config.dtype)],
        values.reshape(batch, rows, wide * COLUMNS),
        scale.reshape(batch, rows),
        data.reshape(batch, high, wide, words),
        row_scale.reshape(batch, high * ROWS),
        format=np.int32(FORMATS.index(config.format)),
        block=np.int32(config.block),
        zero_points=np.bool_(config.zero_points),
    )
    return (out.reshape(*scale.shape, high, ROWS),)


def by_reference(config, values, scale, data, row_scale, *tensor_scale):
    """The product by the reference."""
    *lead, high, wide, _ = data.shape
    row_scale = row_scale.reshape(*lead, high * ROWS)
    size = high * ROWS, wide * COLUMNS
    (tensor_scale,) = tensor_scale or (None,)
    weight = PackedWeight(
        data, row_scale, tensor_scale, config.format, config.block, config.zero_points, *size
    )
    rows = math.prod(scale.shape[len(lead) :])
    out = jnp.einsum(
        "...mk,...nk->...mn",
        values.reshape(*lead, rows, size[1]).astype(jnp.float32),
        in_kernel_order(rounded(weight)),
        precision=jax.lax.Precision.HIGHEST,
    )
    out *= scale.reshape(*lead, rows, 1)
    return (out.astype(config.dtype).reshape(*scale.shape, high, ROWS),)
