"""Calls of the compiled kernels. The only file that uses jax.ffi."""

import functools
from collections.abc import Mapping, Sequence
from importlib import import_module

import jax
import numpy as np


@functools.cache
def missing() -> str | None:
    """Why the compiled kernels cannot be called, or None. Registers them when they can."""
    try:
        module = import_module("jaxkern._C")
    except ModuleNotFoundError:
        return (
            "this jaxkern was built without its CUDA kernels; reinstall it from source with "
            "`pip install .` where nvcc, or the CUDA wheels that bring it, can be found"
        )
    except ImportError as error:
        return f"the compiled kernels do not load: {error}"
    for name, target in module.registrations().items():
        jax.ffi.register_ffi_target(name, target, platform="CUDA")
    return None


def call(
    name: str,
    results: Sequence[tuple[tuple[int, ...], np.dtype]],
    *operands: jax.Array,
    aliases: Mapping[int, int] | None = None,
    **attributes: np.generic,
) -> tuple[jax.Array, ...]:
    """Call the target `name` and return its results.

    Operands and results are row-major. Results vary over the manual mesh axes of the first operand,
    which must be those of all. Attributes are numpy scalars of the type that the target declares:
    JAX compares them with ==, so one name must keep one type. Aliases are the numbers of operands
    in whose memory results are, and those of the results: XLA copies such an operand first where it
    is used again.
    """
    like = jax.typeof(operands[0])
    sharding = like.sharding.update(spec=jax.sharding.PartitionSpec())
    avals = [
        jax.ShapeDtypeStruct(
            shape, dtype, sharding=sharding, manual_axis_type=like.manual_axis_type
        )
        for shape, dtype in results
    ]
    call = jax.ffi.ffi_call(name, tuple(avals), input_output_aliases=aliases)
    return call(*operands, **attributes)
