"""quantize: FP8 values of a matrix, or of its transpose, with power-of-two scales."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxkern import _checks, _dispatch, _ffi, _partitioning, _stack
from jaxkern.ops import scales
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference import activation
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
    (array,) = of_source(_OP, {"x": x}, format, scaling, orientation, implementation)
    return array


def of_source(op, inputs, format, scaling, orientation, implementation):
    """What the public function `op` returns for each of its matrices, after checks.

    inputs: arrays by the names of arguments.
    """
    inputs = {name: _checks.array(name, x) for name, x in inputs.items()}
    (first_name, first), *others = inputs.items()
    if first.dtype.name not in _DTYPES:
        raise ValueError(
            f"{first_name} has dtype {first.dtype}, wanted one of {', '.join(_DTYPES)}"
        )
    if first.ndim < 2:
        raise ValueError(f"{first_name} has shape {first.shape}, wanted at least two axes")
    for name, x in others:
        if (x.shape, x.dtype) != (first.shape, first.dtype):
            raise ValueError(
                f"{name} has shape {x.shape} and dtype {x.dtype}, wanted {first_name}'s "
                f"{first.shape} and {first.dtype}"
            )
    format = _checks.dtype("format", format, _checks.FP8)
    _checks.one_of("scaling", scaling, scales.SCALINGS)
    _checks.one_of("orientation", orientation, _ORIENTATIONS)
    choice = _dispatch.choose(op, implementation, None)
    config = Config(format, scaling, orientation, *choice, op)
    run = _stack.without_derivative(op, functools.partial(_quantize, config))
    arrays = run(*inputs.values())
    if orientation != "both":
        return arrays
    return tuple(arrays[i : i + 2] for i in range(0, len(arrays), 2))


class _Source(NamedTuple):
    """What a public function quantises: matrices of the shape of its arguments."""

    make: Callable
    inputs: int = 1
    matrices: int = 1


_SOURCES = {
    "quantize": _Source(lambda x: (x,)),
    "quantize_swiglu": _Source(lambda gate, up: (activation.swiglu(gate, up),), inputs=2),
    "quantize_swiglu_grad": _Source(activation.swiglu_grad, inputs=3, matrices=2),
}


class Config(NamedTuple):
    format: np.dtype
    scaling: str
    orientation: str
    kernel: bool
    fallback: bool  # to the reference, where the lowering is not for CUDA
    op: str = _OP  # of _SOURCES

    @property
    def source(self):
        return _SOURCES[self.op]

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
def _quantize(config, *inputs):
    """QuantizedArrays, for each matrix in each orientation."""
    if config.scaling == "tensor" and config.op != _OP:
        # An amax of all has to be known first: the matrices are made in memory.
        operand_axes = (_axes(config, inputs[0].ndim)[0][0],)
        make = _partitioning.on_auto_mesh(
            config.source.make,
            operand_axes * config.source.inputs,
            operand_axes * config.source.matrices,
        )
        return sum((_quantize(config._replace(op=_OP), x) for x in make(*inputs)), ())
    operands, (operand_axes, result_axes) = inputs, _axes(config, inputs[0].ndim)
    if config.scaling == "tensor":
        # In jax.numpy, so that XLA fuses it with what x comes from and partitions it.
        scale_of = _partitioning.on_auto_mesh(
            lambda x: (reference.scale_of(x, config.format, scaling="tensor"),),
            operand_axes[:1],
            operand_axes[1:],
        )
        operands += scale_of(*inputs)
    if config.kernel:
        results = _op(config)(*_partitioning.alike(operands, operand_axes))
    else:
        plain = functools.partial(by_reference, config)
        results = _partitioning.on_auto_mesh(plain, operand_axes, result_axes)(*operands)
    return as_arrays(config, results, *operands[config.source.inputs :])


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
    results = (x, scale) * config.has_natural + (x_t, scale_t) * config.has_transposed
    return (x,) * config.source.inputs, results * config.source.matrices


def by_reference(config, *operands):
    """The results by the reference: values and scale, or values alone of a given scale."""
    inputs, scale = operands[: config.source.inputs], operands[config.source.inputs :]
    results = []
    for x in config.source.make(*inputs):
        if config.has_transposed:
            # NOTE: XLA's CPU compiler folds bits of a constant that is transposed into wrong ones.
            x = jax.lax.optimization_barrier(x)
        for wanted, matrix in (
            (config.has_natural, x),
            (config.has_transposed, x.swapaxes(-1, -2)),
        ):
            if wanted and scale:
                results.append(reference.cast(matrix, *scale, config.format))
            elif wanted:
                results.extend(reference.quantize(matrix, config.format, scaling=config.scaling))
    return tuple(results)


def on_one_device(config, *inputs):
    """QuantizedArrays of inputs without a sharding, for each matrix in each orientation."""
    run = by_kernel if config.kernel else by_reference
    if config.scaling != "tensor":
        return as_arrays(config, run(config, *inputs))
    arrays = ()
    for x in config.source.make(*inputs):
        single, scale = (
            config._replace(op=_OP),
            reference.scale_of(x, config.format, scaling="tensor"),
        )
        arrays += as_arrays(single, run(single, x, scale), scale)
    return arrays


# --- Kernel ---------------------------------------------------------------------------------------


@functools.cache
def _op(config):
    return _stack.kernel_op(
        config.op,
        functools.partial(by_kernel, config),
        functools.partial(by_reference, config),
        lambda rank, *_: _axes(config, rank),
        fallback=config.fallback,
    )


def by_kernel(config, *operands):
    """The results by the kernel, as by_reference has them."""
    x = operands[0]
    lead = x.shape[:-2]
    if config.rows_are_alone:
        results = _call(config, *(a.reshape(-1, x.shape[-1]) for a in operands))
        return tuple(r.reshape(*x.shape[:-1], r.shape[-1]) for r in results)
    if not lead:
        return _call(config, *operands)
    flat = [a.reshape(math.prod(lead), *a.shape[-2:]) for a in operands]
    results = jax.lax.map(lambda operands: _call(config, *operands), flat)
    return tuple(r.reshape(*lead, *r.shape[1:]) for r in results)


def _call(config, *operands):
    """The results for single matrices."""
    x = operands[0]
    rows, columns = x.shape
    if config.op == _OP:
        scale = operands[1].reshape(1) if operands[1:] else x.reshape(-1)[:0].astype(_SINGLE)
        operands = x, scale
    needs_workspace = config.scaling == "row" and config.has_transposed
    of_one = [
        *_result_types(config, config.has_natural, rows, columns),
        *_result_types(config, config.has_transposed, columns, rows),
        ((rows + columns if needs_workspace else 0,), np.dtype(np.int32)),
    ]
    results = _ffi.call(
        f"jaxkern.{config.op}",
        of_one * config.source.matrices,
        *operands,
        scaling=scales.code(config.scaling),
    )
    wanted = []
    for i in range(config.source.matrices):
        values, scale, values_t, scale_t, _ = results[5 * i : 5 * i + 5]
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
