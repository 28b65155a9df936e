"""QuantizedArray: low-precision values with their scales."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxkern.reference import quantize as reference


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array whose element (i, j) is values[i, j] * scale[block of i, block of j].

    A pytree of both arrays. qwix's QArray has qvalue, scale, zero_point and qtype too, and what
    reads those reads this.

    Attributes:
      values: [..., R, C], float8_e4m3fn or float8_e5m2.
      scale: float32 [..., r, c], where r is 1, ceil(R / 128) or R, and c is 1 or ceil(C / 128).
    """

    values: jax.Array
    scale: jax.Array

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """values * scale, computed in float32 and rounded to dtype, [..., R, C]."""
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

    @property
    def zero_point(self) -> None:
        """None: zero stands for zero."""
        return None
