"""quantized_matmul with activation_format "fp8", of many rows: x in e4m3 times the weight in e4m3.

A kernel expands the weight, and that of scaled_matmul multiplies. Both are one operation, so that
devices that share out K have factors of their own for their part of a row.
"""

import functools
import math
from typing import NamedTuple

import numpy as np

from jaxkern import _ffi, _partitioning, _stack
from jaxkern.ops import matmul, scales
from jaxkern.ops.packed_weight import COLUMNS, ROWS, PackedWeight
from jaxkern.ops.quantize_four_bit import FORMATS
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference import four_bit

_OP = "quantized_matmul"
_SINGLE, _E4M3 = np.dtype("float32"), np.dtype(four_bit.E4M3)


def product(x, w, *, dtype, fast_accumulation, kernel, fallback):
    """x [..., M, K] times w [N, K], [..., M, N] of dtype.

    x: a QuantizedArray of e4m3 with scales of rows. kernel, fallback: as _dispatch.Choice has them.
    """
    if not kernel:
        return _plain(x, w, dtype)
    columns = w.data.shape[-2] * COLUMNS
    operands = (
        _partitioning.split_axes(scales.pad(x.values, -1, columns), (x.ndim - 1,), COLUMNS),
        x.scale[..., 0],
        w.data,
        _partitioning.split_axes(w.row_scale, (w.row_scale.ndim - 1,), ROWS),
        *(() if w.tensor_scale is None else (w.tensor_scale,)),
    )
    config = TilesConfig(dtype, w.format, w.block, w.zero_points, fast_accumulation, fallback)
    operand_axes, _ = config.axes(*(a.ndim for a in operands))
    (out,) = _op(config)(*_partitioning.alike(operands, operand_axes))
    return out.reshape(*out.shape[:-2], -1)[..., : w.rows]


def weight_to_fp8(w):
    """The weight [..., N, K] as products of e4m3 take it, with a scale for each row."""
    w = w.unpack() if isinstance(w, PackedWeight) else w
    fields = w.values, w.scale, w.tensor_scale, w.zero_point
    return QuantizedArray(*four_bit.to_e4m3(four_bit.FourBit(*fields)))


def _plain(x, w, dtype):
    lead = tuple(f"b{i}" for i in range(x.ndim - 1))

    def run(values, scale, _, w):
        rhs = weight_to_fp8(w)
        return matmul.by_reference(_matmul_config(dtype), values, rhs.values, scale, rhs.scale)

    largest = w.data if isinstance(w, PackedWeight) else w.values
    of_weight = ("bn", "bk", "words")[: largest.ndim]
    axes = [(*lead, "bk"), (*lead, "one"), of_weight], [(*lead, "bn")]
    (out,) = _partitioning.on_auto_mesh(run, *axes)(x.values, x.scale, largest, w)
    return out


def _matmul_config(dtype, fast_accumulation=False):
    """Of scaled_matmul with scales of rows."""
    names = matmul.Names(("bk",)), matmul.Names(("bn",))
    return matmul.Config(
        "row", "row", *names, dtype, fast_accumulation, has_bias=False, kernel=True, fallback=True
    )


# --- Kernel ---------------------------------------------------------------------------------------


class TilesConfig(NamedTuple):
    dtype: np.dtype  # of the result
    format: str
    block: int
    zero_points: bool
    fast_accumulation: bool
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
    """The product by the kernels."""
    *lead, high, wide, words = data.shape
    batch, size = math.prod(lead), (high * ROWS, wide * COLUMNS)
    rhs, rhs_scale = _ffi.call(
        "jaxkern.weight_to_fp8",
        [((batch, *size), _E4M3), ((batch, size[0]), _SINGLE)],
        data.reshape(batch, high, wide, words),
        row_scale.reshape(batch, size[0]),
        format=np.int32(FORMATS.index(config.format)),
        block=np.int32(config.block),
        zero_points=np.bool_(config.zero_points),
    )
    return _multiplied(
        config, matmul.by_kernel, values, scale, rhs.reshape(*lead, *size), rhs_scale
    )


def by_reference(config, values, scale, data, row_scale, *tensor_scale):
    """The product by the reference."""
    *lead, high, wide, _ = data.shape
    row_scale = row_scale.reshape(*lead, high * ROWS)
    size = high * ROWS, wide * COLUMNS
    (tensor_scale,) = tensor_scale or (None,)
    weight = PackedWeight(
        data, row_scale, tensor_scale, config.format, config.block, config.zero_points, *size
    )
    rhs = weight_to_fp8(weight)
    return _multiplied(config, matmul.by_reference, values, scale, rhs.values, rhs.scale)


def _multiplied(config, by, values, scale, rhs, rhs_scale):
    (out,) = by(
        _matmul_config(config.dtype, config.fast_accumulation),
        values.reshape(*scale.shape, rhs.shape[-1]),
        rhs,
        scale[..., None],
        rhs_scale.reshape(*rhs.shape[:-1], 1),
    )
    return (out.reshape(*scale.shape, -1, ROWS),)
