"""quantize: FP8 values of a matrix, or of its transpose, with power-of-two scales."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxkern import _checks, _dispatch, _ffi, _partitioning, _stack
from jaxkern.ops import scales
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference import quantize as reference

_OP = "quantize"
_DTYPES = ("bfloat16", "float16", "float32")
_ORIENTATIONS = ("natural", "transposed", "both")
_SINGLE = np.dtype(np.float32)


def quantize(
    x: ArrayLike,
    format: DTypeLike = jnp.float8_e4m3fn,
    *,
    scaling: str = "row",
    orientation: str = "natural",
    implementation: str | Sequence[str] | None = None,
) -> QuantizedArray | tuple[QuantizedArray, QuantizedArray]:
    """x in an FP8 format, with a power of two as the scale of each block.

    Exactly: amax is the largest |x| of a block; its scale is the smallest 2^e, e >= -126, with
    amax / 2^e at most the largest number of the format, which is 448 or 57344; the values are
    x / 2^e, saturated and rounded to the nearest, ties to even. A block that holds a NaN or an
    infinity has the scale NaN, and NaN as all its values. Subnormal numbers count like any other.

    Dividing by a power of two is exact: the values are rounded once, and the "128x128" values of
    x^T are those of x transposed. It moves the exponent only, so the values of a floating-point
    format are as precise as with any other scale.

    Args:
      x: [..., R, C], bfloat16, float16 or float32.
      format: float8_e4m3fn or float8_e5m2.
      scaling: what has a scale of its own: "tensor", each matrix; "row", each row; "1x128", each
        128 columns of a row; "128x128", each block of that size. The last blocks of a row or a
        column may be smaller.
      orientation: "natural" quantises x, "transposed" x^T, of which `scaling` then speaks, and
        "both" each of them, which reads x no more often than "transposed" does.
      implementation: "cuda", "xla", or a sequence of them to take the first that supports the
        call. None is ("cuda", "xla"). "cuda" is a kernel for compute capability 9.0, used where the
        computation is lowered for CUDA. "xla" is plain jax.numpy. Both give the same bits.

    Returns:
      A QuantizedArray [..., R, C] for "natural", [..., C, R] for "transposed", and both of them
      for "both". Its scale is float32, for a matrix [R, C] of the shape [..., 1, 1] ("tensor"),
      [..., R, 1] ("row"), [..., R, ceil(C / 128)] ("1x128") or
      [..., ceil(R / 128), ceil(C / 128)] ("128x128").

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: differentiation, which quantize has not; implementation "cuda" where the
        kernel cannot run the call, or when such a call is lowered for another platform.
      ExceptionGroup: no implementation of a sequence can.
    """
    x = _checks.array("x", x)
    if x.dtype.name not in _DTYPES:
        raise ValueError(f"x has dtype {x.dtype}, wanted one of {', '.join(_DTYPES)}")
    if x.ndim < 2:
        raise ValueError(f"x has shape {x.shape}, wanted at least two axes")
    format = _checks.dtype("format", format, _checks.FP8)
    _checks.one_of("scaling", scaling, scales.SCALINGS)
    _checks.one_of("orientation", orientation, _ORIENTATIONS)
    choice = _dispatch.choose(_OP, implementation, None)
    config = Config(format, scaling, orientation, *choice)
    return _stack.without_derivative(_OP, functools.partial(_quantize, config))(x)


class Config(NamedTuple):
    format: np.dtype
    scaling: str
    orientation: str
    kernel: bool
    fallback: bool  # to the reference, where the lowering is not for CUDA

    @property
    def has_natural(self):
        return self.orientation != "transposed"

    @property
    def has_transposed(self):
        return self.orientation != "natural"

    @property
    def rows_are_alone(self):
        """Whether any rows, of one matrix or of several, can be quantised on their own."""
        return self.orientation == "natural" and self.scaling in ("row", "1x128")


@functools.partial(jax.jit, static_argnums=0)
def _quantize(config, x):
    operands, (operand_axes, result_axes) = (x,), _axes(config, x.ndim)
    if config.scaling == "tensor":
        # In jax.numpy, so that XLA fuses it with what x comes from and partitions it.
        scale_of = _partitioning.on_auto_mesh(
            lambda x: (reference.scale_of(x, config.format, scaling="tensor"),),
            operand_axes[:1],
            operand_axes[1:],
        )
        operands = x, *scale_of(x)
    if config.kernel:
        results = _op(config)(*_partitioning.alike(operands, operand_axes))
    else:
        plain = functools.partial(by_reference, config)
        results = _partitioning.on_auto_mesh(plain, operand_axes, result_axes)(*operands)
    arrays = as_arrays(config, results, *operands[1:])
    return arrays if config.orientation == "both" else arrays[0]


def as_arrays(config, results, *scale):
    """QuantizedArrays of what by_kernel and by_reference give, and the scale they were given."""
    if config.scaling == "tensor":
        return tuple(QuantizedArray(values, *scale) for values in results)
    return tuple(QuantizedArray(*results[i : i + 2]) for i in range(0, len(results), 2))


def _axes(config, rank):
    """Names of the axes of x and of the tensor's scale, and of values and scale of each result."""
    lead = tuple(f"b{i}" for i in range(rank - 2))
    if config.scaling == "tensor":
        rows, columns = "brows", "bcolumns"
    else:
        rows, columns = "brows" if config.rows_are_alone else "rows", "columns"
    x, x_t = (*lead, rows, columns), (*lead, columns, rows)
    if config.scaling == "tensor":
        results = (x,) * config.has_natural + (x_t,) * config.has_transposed
        return (x, (*lead, "i", "j")), results
    scale = (*lead, rows if config.rows_are_alone else "scale_rows", "scale_columns")
    scale_t = (*lead, "scale_t_rows", "scale_t_columns")
    return (x,), (x, scale) * config.has_natural + (x_t, scale_t) * config.has_transposed


def by_reference(config, x, *scale):
    """The results by the reference: values and scale, or values alone of a given scale."""
    if config.has_transposed:
        # NOTE: XLA's CPU compiler folds bits of a constant that is transposed into wrong ones.
        x = jax.lax.optimization_barrier(x)
    results = []
    for wanted, matrix in (
        (config.has_natural, x),
        (config.has_transposed, x.swapaxes(-1, -2)),
    ):
        if wanted and scale:
            results.append(reference.cast(matrix, *scale, config.format))
        elif wanted:
            results.extend(reference.quantize(matrix, config.format, scaling=config.scaling))
    return tuple(results)


# --- Kernel ---------------------------------------------------------------------------------------


@functools.cache
def _op(config):
    return _stack.kernel_op(
        _OP,
        functools.partial(by_kernel, config),
        functools.partial(by_reference, config),
        lambda rank, *_: _axes(config, rank),
        fallback=config.fallback,
    )


def by_kernel(config, x, *scale):
    """The results by the kernel, as by_reference has them."""
    lead = x.shape[:-2]
    if config.rows_are_alone:
        results = _call(config, x.reshape(-1, x.shape[-1]))
        return tuple(r.reshape(*x.shape[:-1], r.shape[-1]) for r in results)
    if not lead:
        return _call(config, x, *scale)
    flat = [a.reshape(math.prod(lead), *a.shape[-2:]) for a in (x, *scale)]
    results = jax.lax.map(lambda operands: _call(config, *operands), flat)
    return tuple(r.reshape(*lead, *r.shape[1:]) for r in results)


def _call(config, x, *scale):
    """The results for one matrix."""
    rows, columns = x.shape
    scale = scale[0].reshape(1) if scale else x.reshape(-1)[:0].astype(_SINGLE)
    needs_workspace = config.scaling == "row" and config.has_transposed
    results = [
        *_result_types(config, config.has_natural, rows, columns),
        *_result_types(config, config.has_transposed, columns, rows),
        ((rows + columns if needs_workspace else 0,), np.dtype(np.int32)),
    ]
    values, scale, values_t, scale_t, _ = _ffi.call(
        "jaxkern.quantize", results, x, scale, scaling=scales.code(config.scaling)
    )
    wanted = []
    for has, *result, length in (
        (config.has_natural, values, scale, rows),
        (config.has_transposed, values_t, scale_t, columns),
    ):
        if has and config.scaling == "tensor":
            wanted.append(result[0])
        elif has:
            wanted += [result[0], scales.from_kernel(result[1], config.scaling, length)]
    return tuple(wanted)


def _result_types(config, wanted, rows, columns):
    """Shapes and dtypes of values and scale of a matrix, with an empty axis if not wanted."""
    has_scale = wanted and config.scaling != "tensor"
    return (
        ((rows, columns) if wanted else (0,), config.format),
        (scales.kernel_shape(config.scaling, rows, columns) if has_scale else (0,), _SINGLE),
    )
