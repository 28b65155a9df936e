"""quantize_swiglu, quantize_swiglu_grad: FP8 values of what SwiGLU and its gradient compute."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxkern.ops import quantize as quantization
from jaxkern.ops.quantized_array import QuantizedArray

Quantized = QuantizedArray | tuple[QuantizedArray, QuantizedArray]


def quantize_swiglu(
    gate: ArrayLike,
    up: ArrayLike,
    format: DTypeLike = jnp.float8_e4m3fn,
    *,
    scaling: str = "row",
    orientation: str = "natural",
    implementation: str | Sequence[str] | None = None,
) -> Quantized:
    """`quantize` of silu(gate) * up (Shazeer 2020, arXiv:2002.05202), which is not stored.

    The product is computed in float32 and rounded to the arguments' dtype. Scales and values are
    exactly those that `quantize` has for it. The kernel's exponential function differs from XLA's
    by a few units of float32's last place, so that here and there a product that lies between two
    numbers becomes the other one; where sigmoid(gate) is 0, 0.5 or 1, the bits are the same.

    Args:
      gate, up: [..., R, C], both bfloat16, float16 or float32.
      format: as in `quantize`, like all the others.
      scaling: "tensor" makes the product in memory first, as its amax has to be known.
      orientation: "both" reads gate and up no more often than "transposed" does.
      implementation: but for the exponential, both give the same bits.

    Returns:
      What `quantize` returns for a matrix of this shape.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError, ExceptionGroup: as `quantize`.
    """
    inputs = quantization.matrices({"gate": gate, "up": up})
    (h,) = quantization.of_source(
        "quantize_swiglu", inputs, format, scaling, orientation, implementation
    )
    return h


def quantize_swiglu_grad(
    gate: ArrayLike,
    up: ArrayLike,
    dh: ArrayLike,
    format: DTypeLike = jnp.float8_e4m3fn,
    *,
    scaling: str = "row",
    orientation: str = "natural",
    implementation: str | Sequence[str] | None = None,
) -> tuple[Quantized, Quantized]:
    """`quantize` of the gradients of gate and up, given that of h = silu(gate) * up.

    With s = sigmoid(gate), dh * up * s * (1 + gate * (1 - s)) and dh * gate * s, computed in
    float32 and rounded to the arguments' dtype. Both come from one read of the arguments. They are
    as exact as quantize_swiglu's.

    Args:
      gate, up, dh: [..., R, C], all bfloat16, float16 or float32.
      format, scaling, orientation, implementation: as in quantize_swiglu.

    Returns:
      What `quantize` returns for the gradient of gate, and for that of up.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError, ExceptionGroup: as `quantize`.
    """
    inputs = quantization.matrices({"gate": gate, "up": up, "dh": dh})
    return quantization.of_source(
        "quantize_swiglu_grad", inputs, format, scaling, orientation, implementation
    )
