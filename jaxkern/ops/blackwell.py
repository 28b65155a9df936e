"""Scales of blocks in the order in which Blackwell's tensor cores read them."""

import jax
import jax.numpy as jnp

from jaxkern.ops.quantized_array import QuantizedArray

_ROWS, _BLOCKS = 128, 4  # of an atom of 512 bytes
_FORMATS = ("float8_e4m3fn", "float8_e8m0fnu")


def blackwell_scales(x: QuantizedArray) -> jax.Array:
    """The scales of NVFP4 or MXFP4 as `tcgen05.mma` and cuBLAS have them on compute capability 10.

    A run of 512 bytes has those of 128 rows and 4 blocks, that of row r and block k at 16 (r % 32)
    + 4 (r / 32) + k, and runs go along the rows' blocks first: what CUTLASS calls the layout of
    scale factors. It can be compiled. `jax.nn.scaled_matmul` takes scales as they are; this is for
    kernels of your own.

    Args:
      x: [..., R, C], of `jaxkern.quantize`'s format "nvfp4" or "mxfp4".

    Returns:
      [..., ceil(R / 128), ceil(blocks / 4), 512], of the scales' dtype; zeros where there is no
      row or block.

    Raises:
      ValueError: x has other scales.
    """
    scale = x.scale
    if scale.dtype.name not in _FORMATS or x.values.dtype != jnp.float4_e2m1fn:
        raise ValueError(
            f"x has values of {x.values.dtype} and scales of {scale.dtype}, wanted float4_e2m1fn "
            f"and {' or '.join(_FORMATS)}"
        )
    *lead, rows, blocks = scale.shape
    high, wide = -(-rows // _ROWS), -(-blocks // _BLOCKS)
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint8)
    pads = [(0, 0)] * len(lead) + [(0, high * _ROWS - rows), (0, wide * _BLOCKS - blocks)]
    bits = jnp.pad(bits, pads).reshape(*lead, high, 4, 32, wide, _BLOCKS)
    n = len(lead)
    bits = bits.transpose(*range(n), n, n + 3, n + 2, n + 1, n + 4)
    bits = bits.reshape(*lead, high, wide, _ROWS * _BLOCKS)
    return jax.lax.bitcast_convert_type(bits, scale.dtype)
