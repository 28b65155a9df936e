"""Weights of four bits: what makes one, and pack_weight."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxkern.ops.packed_weight import COLUMNS, ROWS, PackedWeight, pack, words_of_tile
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference import four_bit

_GROUPS = (32, 64, 128)

# Of e2m1 values, by the dtype of their scale: elements of a block, and whether a float32 scale of
# all belongs to them.
_E2M1_SCALES = {np.dtype(four_bit.E4M3): (16, True), np.dtype(four_bit.E8M0): (32, False)}


def pack_weight(w: QuantizedArray) -> PackedWeight:
    """A weight of four bits in the order in which the kernels read it; `unpack` undoes it.

    It can be compiled, and rows and columns may be sharded by whole tiles of 16 x 128.

    Args:
      w: [..., N, K], of the format "nvfp4", "mxfp4" or "int4" of `jaxkern.quantize`. A value of
        NVFP4 whose scale is zero becomes zero.

    Raises:
      ValueError: w is no such array, or its parts do not fit together.
    """
    if not isinstance(w, QuantizedArray):
        raise ValueError(f"w is a {type(w).__name__}, wanted a QuantizedArray")
    check("w", w)
    return pack(w)


def check(name: str, w: Any) -> None:
    """ValueError unless w [..., N, K] is of four bits as `quantize` or `pack_weight` gives it."""
    if isinstance(w, PackedWeight):
        _check_packed(name, w)
    elif isinstance(w, QuantizedArray):
        _check_quantized(name, w)
    else:
        wanted = "a QuantizedArray or a PackedWeight"
        raise ValueError(f"{name} is a {type(w).__name__}, wanted {wanted}")


def _check_packed(name, w):
    *lead, rows, columns = w.shape
    high, wide = -(-rows // ROWS), -(-columns // COLUMNS)
    words = words_of_tile(w.format, w.block, w.zero_points)
    _check_array(f"{name}.data", w.data, (*lead, high, wide, words), jnp.uint32)
    _check_array(f"{name}.row_scale", w.row_scale, (*lead, high * ROWS), jnp.float32)
    if w.format == "nvfp4":
        _check_array(f"{name}.tensor_scale", w.tensor_scale, (*lead, 1, 1), jnp.float32)


def _check_array(name, x, shape, dtype):
    if (x.shape, x.dtype) != (shape, dtype):
        wanted = f"{jnp.dtype(dtype)}{list(shape)}"
        raise ValueError(f"{name} is {x.dtype}{list(x.shape)}, wanted {wanted}")


def _check_quantized(name, w):
    values, scale = w.values, w.scale
    if values.ndim < 2:
        raise ValueError(f"{name}.values has shape {values.shape}, wanted two axes at least")
    *lead, rows, columns = values.shape
    integers = values.dtype == jnp.int4
    if values.dtype == four_bit.E2M1:
        found = _E2M1_SCALES.get(np.dtype(scale.dtype))
        if found is None:
            raise ValueError(
                f"{name}.scale has dtype {scale.dtype}, wanted float8_e4m3fn or float8_e8m0fnu for "
                f"values of {values.dtype}"
            )
        block, whole = found
        blocks = {columns / block}
    elif integers:
        if scale.dtype != jnp.bfloat16:
            raise ValueError(f"{name}.scale has dtype {scale.dtype}, wanted bfloat16 for int4")
        blocks, whole = {columns / group for group in _GROUPS}, False
    else:
        raise ValueError(f"{name}.values has dtype {values.dtype}, wanted float4_e2m1fn or int4")
    if scale.shape[:-1] != values.shape[:-1] or scale.shape[-1] not in blocks:
        sizes = " or ".join(f"{size:g}" for size in sorted(blocks))
        wanted = ", ".join(map(str, (*lead, rows, sizes)))
        raise ValueError(f"{name}.scale has shape {scale.shape}, wanted ({wanted})")
    for field, shape, dtype, wanted in (
        ("tensor_scale", (*lead, 1, 1), jnp.float32, whole),
        ("zero_point", scale.shape, jnp.int4, integers and w.zero_point is not None),
    ):
        given = getattr(w, field)
        if given is None and not wanted:
            continue
        if given is None or not wanted:
            got, need = ("None", "one") if wanted else ("given", "None")
            raise ValueError(f"{name}.{field} is {got}, wanted {need} for {values.dtype}")
        _check_array(f"{name}.{field}", given, shape, dtype)
