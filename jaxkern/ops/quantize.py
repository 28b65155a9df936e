"""quantize: a matrix in FP8 with power-of-two scales, or its transpose; or in four bits."""

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
from jaxkern.ops.quantize_four_bit import FORMATS as FOUR_BIT_FORMATS
from jaxkern.ops.quantize_four_bit import quantize_four_bit
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference import activation, norm
from jaxkern.reference import quantize as reference

_OP = "quantize"
_RMS_NORM = "quantize_rms_norm"
_DTYPES = ("bfloat16", "float16", "float32")
_ORIENTATIONS = ("natural", "transposed", "both")
_SINGLE = np.dtype(np.float32)


def quantize(
    x: ArrayLike,
    format: DTypeLike = jnp.float8_e4m3fn,
    *,
    scaling: str = "row",
    orientation: str = "natural",
    group_size: int | None = None,
    zero_point: bool = False,
    search: bool = False,
    key: jax.Array | None = None,
    implementation: str | Sequence[str] | None = None,
) -> QuantizedArray | tuple[QuantizedArray, QuantizedArray]:
    """x in a format of eight or of four bits, with a scale for each block.

    FP8 has powers of two as scales. Exactly: amax is the largest |x| of a block; its scale is the
    smallest 2^e, e >= -126, with amax / 2^e at most the largest number of the format, which is 448
    or 57344; the values are x / 2^e, saturated and rounded to the nearest, ties to even. A block
    that holds a NaN or an infinity has the scale NaN, and NaN as all its values. Subnormal numbers
    count like any other.

    Dividing by a power of two is exact: the values are rounded once, and the "128x128" values of
    x^T are those of x transposed. It moves the exponent only, so the values of a floating-point
    format are as precise as with any other scale.

    Formats of four bits are for weights [N, K], with blocks along K:

    - "nvfp4": e2m1 values, float8_e4m3fn scales of 16 of them, and a float32 scale of the matrix,
      amax / (448 * 6). A block's is its amax / 6 / that, to the nearest.
    - "mxfp4": e2m1 values, float8_e8m0fnu scales of 32: 2^(floor(log2(amax)) - 2), as in the OCP's
      Microscaling Formats (MX) 1.0. What is above 6 then becomes 6.
    - "int4": integers from -8 to 7, bfloat16 scales of groups: amax / 7. With zero points a group's
      range, zero included, is -8 to 7, and the integer that stands for zero is kept.

    Values are to the nearest, ties to even, and e2m1 keeps the sign of zero. A block with a NaN or
    an infinity has the scale NaN, and zeros as values.

    Args:
      x: [..., R, C], bfloat16, float16 or float32. For formats of four bits C is a multiple of the
        block.
      format: float8_e4m3fn or float8_e5m2, "nvfp4", "mxfp4" or "int4".
      scaling: of FP8: what has a scale of its own: "tensor", each matrix; "row", each row; "1x128",
        each 128 columns of a row; "128x128", each block of that size. The last blocks of a row or a
        column may be smaller.
      orientation: of FP8: "natural" quantises x, "transposed" x^T, of which `scaling` then speaks,
        and "both" each of them, which reads x no more often than "transposed" does.
      group_size: columns of a group of "int4": 32, 64 or 128. None is 128.
      zero_point: of "int4": whether groups have one.
      search: of four bits: take, for each block, the one of some scales around which has the least
        squared error. "xla" alone does that.
      key: of four bits: of jax.random, for rounding up or down at random, with the mean kept. None
        rounds to the nearest. "xla" alone rounds at random.
      implementation: "cuda", "xla", or a sequence of them to take the first that supports the
        call. None is ("cuda", "xla"). "cuda" is a kernel for compute capability 9.0, used where the
        computation is lowered for CUDA. "xla" is plain jax.numpy. Both give the same bits.

    Returns:
      A QuantizedArray [..., R, C] for "natural", [..., C, R] for "transposed", and both of them
      for "both". Its scale is float32, for a matrix [R, C] of the shape [..., 1, 1] ("tensor"),
      [..., R, 1] ("row"), [..., R, ceil(C / 128)] ("1x128") or
      [..., ceil(R / 128), ceil(C / 128)] ("128x128"); that of four bits is [..., R, C / block].

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: differentiation, which quantize has not; implementation "cuda" where the
        kernel cannot run the call, or when such a call is lowered for another platform.
      ExceptionGroup: no implementation of a sequence can.
    """
    inputs = matrices({"x": x})
    if isinstance(format, str) and format in FOUR_BIT_FORMATS:
        for name, got, wanted in (
            ("scaling", scaling, "row"),
            ("orientation", orientation, "natural"),
        ):
            if got != wanted:
                raise ValueError(f"{name} is {got!r}, wanted the default for {format!r}")
        options = group_size, zero_point, search, key, implementation
        return quantize_four_bit(*inputs, format, *options)
    for name, got in (
        ("group_size", group_size),
        ("zero_point", zero_point),
        ("search", search),
        ("key", key),
    ):
        if got is not None and got is not False:
            raise ValueError(f"{name} is {got!r}, wanted the default for FP8")
    (array,) = of_source(_OP, inputs, format, scaling, orientation, implementation)
    return array


def matrices(inputs):
    """Arrays to be quantised, by the names of arguments, after checks."""
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
    return tuple(inputs.values())


def of_source(op, inputs, format, scaling, orientation, implementation, epsilon=None):
    """What the public function `op` returns for each of its matrices, and then its further results.

    inputs: of the source, checked. epsilon: as in Config.
    """
    format = _checks.dtype("format", format, _checks.FP8)
    _checks.one_of("scaling", scaling, scales.SCALINGS)
    _checks.one_of("orientation", orientation, _ORIENTATIONS)
    choice = _dispatch.choose(op, implementation, None)
    config = Config(format, scaling, orientation, *choice, op, epsilon)
    run = _stack.without_derivative(op, functools.partial(_quantize, config))
    results = run(*inputs)
    if orientation != "both":
        return results
    count = 2 * config.source.matrices
    return *(results[i : i + 2] for i in range(0, count, 2)), *results[count:]


# What arrays have an element for: each of a matrix, or each of its rows or columns.
_MATRIX, _ROWS, _COLUMNS = "matrix", "rows", "columns"


class _Source(NamedTuple):
    """What a public function quantises: matrices of the shape of its first argument.

    make: from a Config and the inputs to the matrices, and then the further results.
    """

    make: Callable
    inputs: tuple[str, ...] = (_MATRIX,)
    matrices: int = 1
    further: tuple[str, ...] = ()


_SOURCES = {
    "quantize": _Source(lambda _, x: (x,)),
    "quantize_swiglu": _Source(
        lambda _, gate, up: (activation.swiglu(gate, up),), inputs=(_MATRIX,) * 2
    ),
    "quantize_swiglu_grad": _Source(
        lambda _, *inputs: activation.swiglu_grad(*inputs), inputs=(_MATRIX,) * 3, matrices=2
    ),
    _RMS_NORM: _Source(
        lambda _, x, scale, rstd: (norm.scaled(x, rstd, scale),), inputs=(_MATRIX, _COLUMNS, _ROWS)
    ),
}
_COMPUTES_RSTD = _Source(
    lambda config, x, scale: norm.rms_norm(x, scale, epsilon=config.epsilon),
    inputs=(_MATRIX, _COLUMNS),
    further=(_ROWS,),
)


class Config(NamedTuple):
    format: np.dtype
    scaling: str
    orientation: str
    kernel: bool
    fallback: bool  # to the reference, where the lowering is not for CUDA
    op: str = _OP  # of _SOURCES
    epsilon: float | None = None  # of quantize_rms_norm where rstd is not given

    @property
    def source(self):
        return _SOURCES[self.op] if self.epsilon is None else _COMPUTES_RSTD

    @property
    def of_matrix(self):
        """For the matrices of the source once they are in memory."""
        return self._replace(op=_OP, epsilon=None)

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
    """QuantizedArrays, for each matrix in each orientation, and then the further results."""
    source = config.source
    if config.scaling == "tensor" and config.op != _OP:
        # An amax of all has to be known first: the matrices are made in memory.
        names = _Names.of(config, inputs[0].ndim)
        make = _partitioning.on_auto_mesh(
            functools.partial(source.make, config),
            names.inputs(source, [x.ndim for x in inputs]),
            (names.matrix,) * source.matrices + names.further(source),
        )
        made = make(*inputs)
        arrays = (_quantize(config.of_matrix, x) for x in made[: source.matrices])
        return sum(arrays, ()) + made[source.matrices :]
    operands = inputs
    operand_axes, result_axes = _axes(config, *(x.ndim for x in inputs))
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
    return as_arrays(config, results, *operands[len(source.inputs) :])


def as_arrays(config, results, *scale):
    """QuantizedArrays of what by_kernel and by_reference give, and the scale they were given."""
    if config.scaling == "tensor":
        return tuple(QuantizedArray(values, *scale) for values in results)
    count = len(results) - len(config.source.further)
    arrays = (QuantizedArray(*results[i : i + 2]) for i in range(0, count, 2))
    return *arrays, *results[count:]


class _Names(NamedTuple):
    """Names of axes."""

    lead: tuple[str, ...]
    rows: str
    columns: str

    @classmethod
    def of(cls, config, rank):
        """Of a source whose matrices have this rank."""
        lead = tuple(f"b{i}" for i in range(rank - 2))
        if config.scaling == "tensor":
            return cls(lead, "brows", "bcolumns")
        return cls(lead, "brows" if config.rows_are_alone else "rows", "columns")

    @property
    def matrix(self):
        return (*self.lead, self.rows, self.columns)

    def inputs(self, source, ranks):
        """Columns may lack leading axes; those they have are the first ones of the matrices."""
        of_columns = (
            (*self.lead[: rank - 1], self.columns) for rank in ranks[: len(source.inputs)]
        )
        return tuple(
            {_MATRIX: self.matrix, _ROWS: self.matrix[:-1], _COLUMNS: columns}[kind]
            for kind, columns in zip(source.inputs, of_columns, strict=True)
        )

    def further(self, source):
        return (self.matrix[:-1],) * len(source.further)


def _axes(config, *ranks):
    """Names of the axes of the operands, the inputs and a tensor's scale, and of the results."""
    names = _Names.of(config, ranks[0])
    lead, rows, columns = names
    x, x_t = names.matrix, (*lead, columns, rows)
    if config.scaling == "tensor":
        results = (x,) * config.has_natural + (x_t,) * config.has_transposed
        return (x, (*lead, "i", "j")), results
    scale = (*lead, rows if config.rows_are_alone else "scale_rows", "scale_columns")
    scale_t = (*lead, "scale_t_rows", "scale_t_columns")
    results = (x, scale) * config.has_natural + (x_t, scale_t) * config.has_transposed
    source = config.source
    return names.inputs(source, ranks), results * source.matrices + names.further(source)


def by_reference(config, *operands):
    """The results by the reference: values and scale, or values alone of a given scale."""
    source = config.source
    inputs, scale = operands[: len(source.inputs)], operands[len(source.inputs) :]
    made = source.make(config, *inputs)
    results = []
    for x in made[: source.matrices]:
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
    return *results, *made[source.matrices :]


def on_one_device(config, *inputs):
    """What _quantize gives, of inputs without a sharding."""
    run = by_kernel if config.kernel else by_reference
    if config.scaling != "tensor":
        return as_arrays(config, run(config, *inputs))
    arrays, single = (), config.of_matrix
    made = config.source.make(config, *inputs)
    for x in made[: config.source.matrices]:
        scale = reference.scale_of(x, config.format, scaling="tensor")
        arrays += as_arrays(single, run(single, x, scale), scale)
    return arrays + made[config.source.matrices :]


# --- Kernel ---------------------------------------------------------------------------------------


@functools.cache
def _op(config):
    return _stack.kernel_op(
        config.op,
        functools.partial(by_kernel, config),
        functools.partial(by_reference, config),
        functools.partial(_axes, config),
        fallback=config.fallback,
        vmap=functools.partial(_vmapped, config),
    )


def _vmapped(config, op, axis_size, in_batched, operands):
    """vmap of the op: columns that are shared by everything stay one row."""
    whole = _stack.broadcast_unbatched(axis_size, in_batched, operands)
    for i, kind in enumerate(config.source.inputs):
        if kind == _COLUMNS and operands[i].ndim == 1:
            whole[i] = operands[i]
    return op(*whole)


def by_kernel(config, *operands):
    """The results by the kernel, as by_reference has them."""
    shape, kinds = operands[0].shape, config.source.inputs
    columns = [i for i, kind in enumerate(kinds) if kind == _COLUMNS]
    lead = shape[:-2]
    if config.rows_are_alone:  # all those that have the same columns are one matrix
        lead = lead[: max((operands[i].ndim - 1 for i in columns), default=0)]
    if not lead:
        return _of_one_matrix(config, *operands)
    flat = []
    for i, a in enumerate(operands):
        if i in columns:
            a = jnp.expand_dims(a, range(a.ndim - 1, len(lead)))
            a = jnp.broadcast_to(a, (*lead, a.shape[-1]))
        flat.append(a.reshape(math.prod(lead), *a.shape[len(lead) :]))
    results = jax.lax.map(lambda operands: _of_one_matrix(config, *operands), flat)
    return tuple(r.reshape(*lead, *r.shape[1:]) for r in results)


def _of_one_matrix(config, *operands):
    """The results where leading axes are more rows."""
    *lead, columns = operands[0].shape
    shapes = {_MATRIX: (-1, columns), _ROWS: (-1,), _COLUMNS: (columns,)}
    kinds = config.source.inputs
    inputs = (a.reshape(shapes[kind]) for a, kind in zip(operands, kinds, strict=False))
    results = _call(config, *inputs, *operands[len(kinds) :])
    return results if len(lead) == 1 else tuple(r.reshape(*lead, *r.shape[1:]) for r in results)


def _call(config, *operands):
    """The results for single matrices."""
    x = operands[0]
    rows, columns = x.shape
    attributes, further = {"scaling": scales.code(config.scaling)}, []
    absent = x.reshape(-1)[:0].astype(_SINGLE)
    if config.op == _OP:
        operands = x, operands[1].reshape(1) if operands[1:] else absent
    if config.op == _RMS_NORM:
        given = config.epsilon is None
        operands = *operands, *(() if given else (absent,))
        further = [((0 if given else rows,), _SINGLE)]
        attributes["epsilon"] = np.float32(0 if given else config.epsilon)
    words = 0
    if config.scaling == "row" and config.has_transposed:
        words = columns + rows * config.has_natural
    elif config.source.further and not config.rows_are_alone:
        words = 1 + reference.blocks(rows)
    of_one = [
        *_result_types(config, config.has_natural, rows, columns),
        *_result_types(config, config.has_transposed, columns, rows),
        ((words,), np.dtype(np.int32)),
    ]
    results = _ffi.call(
        f"jaxkern.{config.op}",
        of_one * config.source.matrices + further,
        *operands,
        **attributes,
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
    if config.source.further:
        wanted.append(results[-1])
    return tuple(wanted)


def _result_types(config, wanted, rows, columns):
    """Shapes and dtypes of values and scale of a matrix, with an empty axis if not wanted."""
    has_scale = wanted and config.scaling != "tensor"
    return (
        ((rows, columns) if wanted else (0,), config.format),
        (scales.kernel_shape(config.scaling, rows, columns) if has_scale else (0,), _SINGLE),
    )
