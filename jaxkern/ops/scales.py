"""Scales of a matrix [R, C]: the shapes that users see, and those that the kernels have in memory.

                 users                             kernels
    "tensor"     [..., 1, 1]                       [..., 1]
    "row"        [..., R, 1]                       [..., R]
    "1x128"      [..., R, ceil(C / 128)]           [..., ceil(C / 128), R rounded up to 4]
    "128x128"    [..., ceil(R / 128), ceil(C / 128)], both

The rows that "1x128" has beyond R are not defined. Their number makes the rows of a scale start at
multiples of 16 bytes, as the Tensor Memory Accelerator wants them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern.reference.quantize import blocks

_CODES = {"tensor": 0, "row": 1, "1x128": 2, "128x128": 3}

SCALINGS = tuple(_CODES)


def code(scaling: str) -> np.int32:
    """The attribute that says it to a kernel."""
    return np.int32(_CODES[scaling])


def kernel_shape(scaling: str, rows: int, columns: int) -> tuple[int, ...]:
    """The kernels' shape of the scale of one matrix, for scalings other than "tensor"."""
    return {
        "row": (rows,),
        "1x128": (blocks(columns), round_up(rows, 4)),
        "128x128": (blocks(rows), blocks(columns)),
    }[scaling]


def to_kernel(scale: jax.Array, scaling: str) -> jax.Array:
    """From the users' shape to the kernels'."""
    if scaling == "128x128":
        return scale
    if scaling == "1x128":
        return pad(scale.swapaxes(-1, -2), -1, round_up(scale.shape[-2], 4))
    return scale[..., 0]


def from_kernel(scale: jax.Array, scaling: str, rows: int) -> jax.Array:
    """From the kernels' shape to the users'."""
    if scaling == "128x128":
        return scale
    if scaling == "1x128":
        return scale[..., :rows].swapaxes(-1, -2)
    return scale[..., None]


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is not below size."""
    return -(-size // multiple) * multiple


def pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    """x with zeros at the end of `axis`, up to this size."""
    missing = size - x.shape[axis]
    axis %= x.ndim
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
