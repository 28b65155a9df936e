"""QuantizedArray: low-precision values with their scales."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkern.reference import four_bit
from jaxkern.reference import quantize as reference


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "tensor_scale", "zero_point"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array [..., R, C] of blocks, with a scale for each.

    Element (i, j) is (values[i, j] - zero_point) * scale * tensor_scale, of its block. A pytree of
    the arrays. qwix's QArray has qvalue, scale, zero_point and qtype too, and what reads those
    reads this, but for tensor_scale.

    Attributes:
      values: [..., R, C], float8_e4m3fn or float8_e5m2; float4_e2m1fn or int4.
      scale: of 8-bit values float32 [..., r, c], where r is 1, ceil(R / 128) or R, and c is 1 or
        ceil(C / 128). Of 4-bit ones [..., R, c]: float8_e4m3fn for C / 16 blocks (NVFP4),
        float8_e8m0fnu for C / 32 (MXFP4), bfloat16 for groups (integers).
      tensor_scale: float32 [..., 1, 1], of NVFP4, or None.
      zero_point: int4 [..., R, c], the integers that stand for zero, or None: zero does.
    """

    values: jax.Array
    scale: jax.Array
    tensor_scale: jax.Array | None = None
    zero_point: jax.Array | None = None

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """What the values stand for, computed in float32 and rounded to dtype, [..., R, C]."""
        if self.values.dtype in (four_bit.E2M1, jnp.int4):
            fields = self.values, self.scale, self.tensor_scale, self.zero_point
            return four_bit.dequantize(four_bit.FourBit(*fields)).astype(dtype)
        return reference.dequantize(self.values, self.scale).astype(dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def qvalue(self) -> jax.Array:
        """values, by qwix's name."""
        return self.values

    @property
    def qtype(self) -> jnp.dtype:
        """The dtype of values, by qwix's name."""
        return self.values.dtype
