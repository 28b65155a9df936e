"""What `quantize` does for formats of four bits."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import _checks, _dispatch, _ffi, _partitioning, _stack
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference import four_bit as reference

FORMATS = ("nvfp4", "mxfp4", "int4")  # the numbers of kernels' attributes

_OP = "quantize"
_BLOCKS = {"nvfp4": 16, "mxfp4": 32}
_GROUPS = (32, 64, 128)
_DTYPES = {
    "nvfp4": (reference.E2M1, reference.E4M3),
    "mxfp4": (reference.E2M1, reference.E8M0),
    "int4": (jnp.int4, jnp.bfloat16),
}
_SINGLE = np.dtype(np.float32)


class Config(NamedTuple):
    format: str
    block: int
    zero_point: bool
    search: bool
    kernel: bool
    fallback: bool  # to the reference, where the lowering is not for CUDA


def quantize_four_bit(
    x: jax.Array,
    format: str,
    group_size: Any,
    zero_point: Any,
    search: Any,
    key: jax.Array | None,
    implementation: Any,
) -> QuantizedArray:
    """x [..., R, C], of a dtype that `quantize` takes, in one of FORMATS. Raises what that does."""
    zero_point = _checks.flag("zero_point", zero_point)
    search = _checks.flag("search", search)
    if format != "int4" and group_size is not None:
        raise ValueError(f"group_size is {group_size!r}, wanted None for {format!r}")
    if format != "int4" and zero_point:
        raise ValueError(f"zero_point is True, wanted False for {format!r}")
    block = _BLOCKS.get(format) or (128 if group_size is None else group_size)
    if format == "int4" and block not in _GROUPS:
        raise ValueError(
            f"group_size is {group_size!r}, wanted one of {', '.join(map(str, _GROUPS))}"
        )
    if x.shape[-1] % block:
        raise ValueError(
            f"x has {x.shape[-1]} columns, wanted a multiple of {block} for {format!r}"
        )
    unsupported = None
    if search:
        unsupported = "search is True, wanted False"
    elif key is not None:
        unsupported = "key is given, wanted None"
    choice = _dispatch.choose(_OP, implementation, unsupported)
    config = Config(format, block, zero_point, search, *choice)
    run = _stack.without_derivative(_OP, functools.partial(_quantize, config))
    return run(x) if key is None else run(x, key)


@functools.partial(jax.jit, static_argnums=0)
def _quantize(config, x, *key):
    operand_axes, result_axes = _axes(config, x.ndim)
    of_matrix = operand_axes[1:]  # of tensor_scale
    if not config.kernel:

        def run(x, *key):
            noise = jax.random.uniform(*key, x.shape) if key else None
            found = _reference(config, x, noise=noise)
            return *_fields(found), *((found.tensor_scale,) if of_matrix else ())

        run = _partitioning.on_auto_mesh(run, operand_axes[:1], (*result_axes, *of_matrix))
        results = run(x, *key)
        fields, tensor_scale = results[: len(result_axes)], results[len(result_axes) :]
    else:
        tensor_scale = ()
        if of_matrix:
            amax = _row_amax_op(config.fallback)(*_partitioning.alike([x], operand_axes[:1]))
            # In jax.numpy, so that XLA partitions it.
            tensor_scale = _partitioning.on_auto_mesh(
                lambda amax: (reference.tensor_scale_of(amax),), [operand_axes[0][:-1]], of_matrix
            )(*amax)
        fields = _op(config)(*_partitioning.alike([x, *tensor_scale], operand_axes))
    values, scale, *zero_point = fields
    return QuantizedArray(values, scale, *(tensor_scale or (None,)), *zero_point)


def _axes(config, rank, *_):
    """Names of the axes of x, and of a tensor's scale; and of values, scale and zero points."""
    lead = tuple(f"b{i}" for i in range(rank - 2))
    x, blocks = (*lead, "brows", "columns"), (*lead, "brows", "blocks")
    operands = (x, (*lead, "i", "j")) if config.format == "nvfp4" else (x,)
    return operands, (x, blocks, blocks) if config.zero_point else (x, blocks)


def _reference(config, x, **options):
    options["search"] = config.search
    if config.format == "int4":
        options |= {"group": config.block, "zero_point": config.zero_point}
    return getattr(reference, config.format)(x.astype(jnp.float32), **options)


def _fields(found):
    """values, scale and, if there are any, zero points."""
    return tuple(x for x in (found.values, found.scale, found.zero_point) if x is not None)


def by_reference(config, x, *tensor_scale):
    """_fields by the reference, of a given tensor_scale, for NVFP4."""
    options = {"tensor_scale": tensor_scale[0]} if tensor_scale else {}
    return _fields(_reference(config, x, **options))


# --- Kernels --------------------------------------------------------------------------------------


@functools.cache
def _op(config):
    return _stack.kernel_op(
        _OP,
        functools.partial(by_kernel, config),
        functools.partial(by_reference, config),
        functools.partial(_axes, config),
        fallback=config.fallback,
    )


@functools.cache
def _row_amax_op(fallback):
    def axes(rank):
        rows = (*(f"b{i}" for i in range(rank - 2)), "brows")
        return [(*rows, "columns")], [rows]

    return _stack.kernel_op(
        _OP,
        row_amax_by_kernel,
        lambda x: (reference.row_amax(x),),
        axes,
        fallback=fallback,
    )


def by_kernel(config, x, *tensor_scale):
    """What by_reference gives."""
    *lead, rows, columns = x.shape
    # Rows of any matrices are those of one, where they do not have a tensor's scale in common.
    shape = (
        (math.prod(lead), rows, columns) if tensor_scale else (1, math.prod(lead) * rows, columns)
    )
    blocks = (*shape[:2], columns // config.block)
    values, scale = _DTYPES[config.format]
    results = _ffi.call(
        "jaxkern.quantize_four_bit",
        [
            (shape, np.dtype(values)),
            (blocks, np.dtype(scale)),
            (blocks if config.zero_point else (0,), np.dtype(jnp.int4)),
        ],
        x.reshape(shape),
        tensor_scale[0].reshape(-1) if tensor_scale else x.reshape(-1)[:0].astype(_SINGLE),
        format=np.int32(FORMATS.index(config.format)),
    )
    wanted = results if config.zero_point else results[:2]
    return tuple(r.reshape(*lead, rows, r.shape[-1]) for r in wanted)


def row_amax_by_kernel(x):
    """reference.row_amax, in a tuple."""
    rows = x.reshape(-1, x.shape[-1])
    (amax,) = _ffi.call("jaxkern.row_amax", [(rows.shape[:1], _SINGLE)], rows)
    return (amax.reshape(x.shape[:-1]),)
