"""quantize_rms_norm: FP8 values of normalised rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxkern import _checks
from jaxkern.ops import norm
from jaxkern.ops import quantize as quantization
from jaxkern.ops.quantized_array import QuantizedArray

_OP = "quantize_rms_norm"


def quantize_rms_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    format: DTypeLike = jnp.float8_e4m3fn,
    *,
    epsilon: float = 1e-6,
    rstd: ArrayLike | None = None,
    scaling: str = "row",
    orientation: str = "natural",
    implementation: str | Sequence[str] | None = None,
) -> tuple[QuantizedArray | tuple[QuantizedArray, QuantizedArray], jax.Array]:
    """`quantize` of x * rstd * scale, which is `rms_norm` of x and is not stored, and rstd.

    The product is computed in float32, in this order, and rounded to x's dtype. Scales and values
    are exactly those that `quantize` has for it. rstd is a sum, whose order is the implementation's
    own: its last bits, and with them here and there a value, differ between implementations,
    orientations and scalings, and from rms_norm. Given rstd, all bits are the same.

    Args:
      x: [..., R, C], bfloat16, float16 or float32.
      scale: [C], floating point; ones when None. It is multiplied with as float32.
      format: as in `quantize`, like all the others.
      epsilon: a positive Python number, added to the mean square. Not used where rstd is given.
      rstd: float32 [..., R], say of an earlier call. None has 1 / sqrt(mean(x**2) + epsilon)
        computed.
      scaling: "tensor" makes the product in memory first, as its amax has to be known.

    Returns:
      What `quantize` returns for a matrix of x's shape, and rstd [..., R].

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError, ExceptionGroup: as `quantize`.
    """
    (x,) = quantization.matrices({"x": x})
    scale = norm.ones_if_none(norm.check_scale(scale, x), x).astype(jnp.float32)
    if rstd is not None:
        rstd = _checks.array("rstd", rstd)
        if (rstd.shape, rstd.dtype) != (x.shape[:-1], jnp.float32):
            raise ValueError(
                f"rstd has shape {rstd.shape} and dtype {rstd.dtype}, wanted {x.shape[:-1]}, one "
                "for each row of x, and float32"
            )
        given = quantization.of_source(
            _OP, (x, scale, rstd), format, scaling, orientation, implementation
        )
        return given[0], rstd
    norm.check_epsilon(epsilon)
    if isinstance(epsilon, jax.Array | np.ndarray):
        raise ValueError("epsilon is an array, wanted a Python number")
    return quantization.of_source(
        _OP, (x, scale), format, scaling, orientation, implementation, float(epsilon)
    )
