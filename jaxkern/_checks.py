"""Checks of arguments that every op shares."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

FLOATS = ("bfloat16", "float16", "float32", "float64")

FP8 = ("float8_e4m3fn", "float8_e5m2")

FLOAT32 = np.finfo(np.float32)


def float_array(name: str, x: Any) -> jax.Array:
    """x as an array, or ValueError if it is not one of a floating-point dtype."""
    x = array(name, x)
    if x.dtype.name not in FLOATS:
        raise ValueError(f"{name} has dtype {x.dtype}, wanted one of {', '.join(FLOATS)}")
    return x


def array(name: str, x: Any) -> jax.Array:
    """x as an array, or ValueError if it cannot be one."""
    wrong = f"{name} is a {type(x).__name__}, wanted an array of numbers"
    if isinstance(x, str | bytes):
        raise ValueError(wrong)
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise ValueError(wrong) from error


def flag(name: str, x: Any) -> bool:
    """x as a bool, or ValueError if it is not one."""
    if not isinstance(x, bool | np.bool_):
        raise ValueError(f"{name} is {x!r}, wanted True or False")
    return bool(x)


def positive_int(name: str, x: Any) -> int:
    """x as an int, or ValueError if it is not a positive one."""
    if isinstance(x, bool | np.bool_) or not isinstance(x, int | np.integer) or x < 1:
        raise ValueError(f"{name} is {x!r}, wanted a positive integer")
    return int(x)


def int32(name: str, x: Any, shape: tuple[int | str, ...]) -> jax.Array:
    """x as an int32 array of this shape, in which a str is any size, or ValueError."""
    x = array(name, x)
    if x.dtype != jnp.int32:
        raise ValueError(f"{name} has dtype {x.dtype}, wanted int32")
    fits = len(x.shape) == len(shape) and all(
        isinstance(wanted, str) or size == wanted
        for size, wanted in zip(x.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {x.shape}, wanted ({', '.join(map(str, shape))})")
    return x


def dtype(name: str, x: Any, wanted: Sequence[str]) -> np.dtype:
    """x as a dtype, or ValueError if it is none of the wanted ones."""
    try:
        found = jnp.dtype(x)
    except TypeError:
        found = None
    if x is None or found is None or found.name not in wanted:
        raise ValueError(f"{name} is {x!r}, wanted one of {', '.join(wanted)}")
    return found


def one_of(name: str, x: Any, wanted: Sequence[str]) -> None:
    """ValueError if x is none of these strings."""
    if not isinstance(x, str) or x not in wanted:
        raise ValueError(f"{name} is {x!r}, wanted one of {', '.join(map(repr, wanted))}")
