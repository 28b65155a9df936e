"""quantized_matmul: x times a weight that is kept in four bits."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxkern import _checks, _dispatch, _partitioning
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference import four_bit

_OP = "quantized_matmul"
_DTYPES = ("bfloat16", "float16", "float32")
_GROUPS = (32, 64, 128)

# Of e2m1 values, by the dtype of their scale: elements of a block, and whether a float32 scale of
# all belongs to them.
_E2M1_SCALES = {np.dtype(four_bit.E4M3): (16, True), np.dtype(four_bit.E8M0): (32, False)}


def quantized_matmul(
    x: ArrayLike,
    w: QuantizedArray,
    *,
    preferred_element_type: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """x w^T, for a weight that `jaxkern.quantize` keeps in four bits.

    w counts exactly as what it stands for, and sums are float32. It is a constant: the gradient is
    x's alone, and the weight that x is multiplied by is made anew for it, not kept.

    Args:
      x: [..., K], bfloat16, float16 or float32.
      w: [N, K], of the format "nvfp4", "mxfp4" or "int4".
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
    check_weight("w", w)
    if x.ndim == 0 or x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has shape {x.shape}, wanted (..., {w.shape[-1]}) for w's {w.shape}")
    wanted = x.dtype if preferred_element_type is None else preferred_element_type
    dtype = _checks.dtype("preferred_element_type", wanted, _DTYPES)
    _dispatch.choose(_OP, implementation, "there is no kernel for it yet")
    return _quantized_matmul(Config(dtype, x.dtype), x, w)


def check_weight(name: str, w: Any) -> None:
    """ValueError unless w is a matrix of four bits as `quantize` gives it."""
    if not isinstance(w, QuantizedArray):
        raise ValueError(f"{name} is a {type(w).__name__}, wanted a QuantizedArray")
    values, scale = w.values, w.scale
    if values.ndim != 2 or scale.ndim != 2:
        shapes = f"values of shape {values.shape} and scale of {scale.shape}"
        raise ValueError(f"{name} has {shapes}, wanted two axes each")
    rows, columns = values.shape
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
    if scale.shape[0] != rows or scale.shape[1] not in blocks:
        sizes = " or ".join(f"{size:g}" for size in sorted(blocks))
        raise ValueError(f"{name}.scale has shape {scale.shape}, wanted ({rows}, {sizes})")
    for field, shape, dtype, wanted in (
        ("tensor_scale", (1, 1), jnp.float32, whole),
        ("zero_point", scale.shape, jnp.int4, integers and w.zero_point is not None),
    ):
        given = getattr(w, field)
        if given is None and not wanted:
            continue
        if given is None or not wanted:
            got, need = ("None", "one") if wanted else ("given", "None")
            raise ValueError(f"{name}.{field} is {got}, wanted {need} for {values.dtype}")
        if (given.shape, given.dtype) != (shape, dtype):
            raise ValueError(
                f"{name}.{field} is {given.dtype}{list(given.shape)}, wanted "
                f"{jnp.dtype(dtype)}{list(shape)}"
            )


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

    axes = [(*lead, f"b{over}"), ("bn", "bk")], [(*lead, f"b{to}")]
    (out,) = _partitioning.on_auto_mesh(run, *axes)(x, w.values, w)
    return out
