"""quantized_matmul: x times a weight that is kept in four bits."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxkern import _checks, _dispatch, _partitioning
from jaxkern.ops import four_bit_weight
from jaxkern.ops.packed_weight import PackedWeight
from jaxkern.ops.quantized_array import QuantizedArray

_OP = "quantized_matmul"
_DTYPES = ("bfloat16", "float16", "float32")


def quantized_matmul(
    x: ArrayLike,
    w: QuantizedArray | PackedWeight,
    *,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """x w^T, for a weight that `jaxkern.quantize` keeps in four bits.

    w counts exactly as what it stands for, and sums are float32. It is a constant: the gradient is
    x's alone, and the weight that x is multiplied by is made anew for it, not kept.

    Args:
      x: [..., K], bfloat16, float16 or float32.
      w: [N, K], of the format "nvfp4", "mxfp4" or "int4"; or what `jaxkern.pack_weight` makes of
        it, which is the same weight.
      preferred_element_type: of the result: bfloat16, float16 or float32. None is x's.
      implementation: "cuda", "xla", or a sequence of them to take the first that supports the
        call. None is ("cuda", "xla"). There is no kernel yet; "xla" is plain jax.numpy.

    Returns:
      [..., N].

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: implementation "cuda".
      ExceptionGroup: no implementation of a sequence can.
    """
    x = _checks.array("x", x)
    if x.dtype.name not in _DTYPES:
        raise ValueError(f"x has dtype {x.dtype}, wanted one of {', '.join(_DTYPES)}")
    four_bit_weight.check("w", w)
    if w.ndim != 2:
        raise ValueError(f"w has shape {w.shape}, wanted (N, K)")
    if x.ndim == 0 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has shape {x.shape}, wanted (..., {w.shape[-1]}) for w's {w.shape}")
    wanted = x.dtype if preferred_element_type is None else preferred_element_type
    dtype = _checks.dtype("preferred_element_type", wanted, _DTYPES)
    _dispatch.choose(_OP, implementation, "there is no kernel for it yet")
    return _quantized_matmul(Config(dtype, x.dtype), x, w)


class Config(NamedTuple):
    dtype: np.dtype  # of the result
    input_dtype: np.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _quantized_matmul(config, x, w):
    return _product(config.dtype, x, "k", w, "n")


def _forward(config, x, w):
    return _quantized_matmul(config, x, w), w


def _backward(config, w, dy):
    return _product(config.input_dtype, dy, "n", w, "k"), None


_quantized_matmul.defvjp(_forward, _backward)


def _product(dtype, x, over, w, to):
    """x [..., over] times w [n, k], [..., to]."""
    lead = tuple(f"b{i}" for i in range(x.ndim - 1))

    def run(x, _, w):
        axes = f"...{over},nk->...{to}"
        out = jnp.einsum(
            axes, x.astype(jnp.float32), w.dequantize(), precision=jax.lax.Precision.HIGHEST
        )
        return (out.astype(dtype),)

    largest = w.data if isinstance(w, PackedWeight) else w.values
    of_weight = ("bn", "bk", "words")[: largest.ndim]
    axes = [(*lead, f"b{over}"), of_weight], [(*lead, f"b{to}")]
    (out,) = _partitioning.on_auto_mesh(run, *axes)(x, largest, w)
    return out
