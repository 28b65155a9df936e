"""What fp8_matmul's arguments mean: its recipes, quantised weights, and the checks of both."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkern import _checks
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference.quantize import blocks

DTYPES = ("bfloat16", "float16", "float32")

# The format of activations and weights.
FORMAT = jnp.dtype(jnp.float8_e4m3fn)


class Recipe(NamedTuple):
    """How the operands of the three products are quantised, in the words of `quantize`."""

    activation: str  # scaling of activations and gradients
    weight: str  # scaling of weights
    gradient_format: str  # unless the caller names one


RECIPES = {
    "tensor": Recipe("tensor", "tensor", "float8_e5m2"),
    "row": Recipe("row", "row", "float8_e5m2"),
    "block": Recipe("1x128", "128x128", "float8_e4m3fn"),
}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["forward", "backward"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight w [K, N] as both products that read it want it. Made by `quantize_weight`.

    Attributes:
      forward: w^T [N, K], float8_e4m3fn, for x w.
      backward: w [K, N], float8_e4m3fn, for the gradient of x.
    """

    forward: QuantizedArray
    backward: QuantizedArray


def recipe(name: str) -> Recipe:
    _checks.one_of("recipe", name, tuple(RECIPES))
    return RECIPES[name]


def operand(name: str, x) -> jax.Array:
    x = _checks.array(name, x)
    if x.dtype.name not in DTYPES:
        raise ValueError(f"{name} has dtype {x.dtype}, wanted one of {', '.join(DTYPES)}")
    return x


def operands(x, w, weight_name: str = "w") -> tuple[jax.Array, jax.Array]:
    """x [..., K] and w [K, N] as arrays."""
    x, w = operand("x", x), operand(weight_name, w)
    if x.ndim == 0:
        raise ValueError("x has shape (), wanted at least one axis")
    if w.ndim != 2 or w.shape[0] != x.shape[-1]:
        raise ValueError(
            f"{weight_name} has shape {w.shape}, wanted ({x.shape[-1]}, N) for x's {x.shape}"
        )
    return x, w


def quantized_weight(x, w: jax.Array, scaling: str) -> tuple[jax.Array, ...]:
    """The arrays of a QuantizedWeight of w: values and scale for forward, and for backward."""
    if x is None:
        return ()
    if not isinstance(x, QuantizedWeight):
        raise ValueError(f"quantized_weight is a {type(x).__name__}, wanted a QuantizedWeight")
    arrays = ()
    for name, rows, columns in (("forward", *w.shape[::-1]), ("backward", *w.shape)):
        name, side = f"quantized_weight.{name}", getattr(x, name)
        _is(f"{name}.values", side.values, (rows, columns), FORMAT, f"w's {w.shape}")
        wanted = _scale_shape(scaling, rows, columns)
        _is(f"{name}.scale", side.scale, wanted, jnp.dtype(jnp.float32), f"scaling {scaling!r}")
        arrays += (side.values, side.scale)
    return arrays


def _is(name, x, shape, dtype, reason):
    if x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}, wanted {shape} for {reason}")
    if x.dtype != dtype:
        raise ValueError(f"{name} has dtype {x.dtype}, wanted {dtype}")


def _scale_shape(scaling, rows, columns):
    return {
        "tensor": (1, 1),
        "row": (rows, 1),
        "128x128": (blocks(rows), blocks(columns)),
    }[scaling]
