"""Scaled FP8 products in plain jax.numpy: the kernels' oracle, implementation="xla"."""

import jax
import jax.numpy as jnp

from jaxkern.reference.quantize import dequantize


def scaled_matmul(lhs, rhs, lhs_scales, rhs_scales, bias=None, *, dtype):
    """(lhs * lhs_scales) (rhs * rhs_scales)^T + bias, computed in float32.

    Args:
      lhs: [..., M, K], any floating-point dtype.
      rhs: [..., N, K].
      lhs_scales, rhs_scales: float32, for the blocks that quantize.dequantize knows.
      bias: [N] or None.
      dtype: of the result, [..., M, N].
    """
    out = jnp.einsum(
        "...mk,...nk->...mn",
        dequantize(lhs, lhs_scales),
        dequantize(rhs, rhs_scales),
        precision=jax.lax.Precision.HIGHEST,
    )
    if bias is not None:
        out += bias.astype(jnp.float32)
    return out.astype(dtype)
