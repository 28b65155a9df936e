"""What the nnx and the linen layers share. Imports no Flax."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkern import dot_product_attention, rms_norm

Implementation = str | Sequence[str] | None


class Hook(functools.partial):
    """A function with its options fixed, for a module to hold.

    Two hooks are equal when functions and options are: jit and nnx compare modules by their
    attributes, and `functools.partial` alone compares by identity.
    """

    def __eq__(self, other):
        return isinstance(other, Hook) and (self.func, self.keywords) == (
            other.func,
            other.keywords,
        )

    def __hash__(self):
        return hash((self.func, *self.keywords.items()))


def as_static(implementation: Implementation) -> str | tuple[str, ...] | None:
    """`implementation` as a hashable value."""
    if implementation is None or isinstance(implementation, str):
        return implementation
    return tuple(implementation)


def allows_reference(implementation: Implementation) -> bool:
    """Whether pure JAX may answer the call."""
    return implementation is None or "xla" in as_static(implementation)


def reject_dropout(ours: str, theirs: str, dropout_rate: float, deterministic: bool) -> None:
    """Raises NotImplementedError when attention weights would be dropped."""
    if dropout_rate > 0.0 and not deterministic:
        raise NotImplementedError(
            f"{ours}.attention_fn does not drop attention weights, got dropout_rate="
            f"{dropout_rate}; wanted 0 or deterministic=True. To train with dropout, give the "
            f"layer attention_fn={theirs}.dot_product_attention."
        )


def reject_sowing(ours: str, implementation: Implementation) -> None:
    """Raises NotImplementedError where Flax's own function may not stand in for the kernel."""
    if not allows_reference(implementation):
        raise NotImplementedError(
            f"{ours}.attention_fn with implementation={implementation!r} never has the attention "
            "weights in memory, got sow_weights=True; wanted implementation=None"
        )


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    dtype: jax.typing.DTypeLike | None,
    is_causal: bool,
    implementation: Implementation,
) -> jax.Array:
    """`jaxkern.dot_product_attention` with the shapes and dtypes that Flax's layers pass.

    Any number of batch axes, operands of different dtypes, masks of any dtype.
    """
    batches = {(x.ndim, x.shape[:-3]) for x in (query, key, value)}
    if len(batches) > 1 or query.ndim < 3:
        raise ValueError(
            f"query, key and value have shapes {query.shape}, {key.shape} and {value.shape}, "
            "wanted [..., length, heads, head dim] of one rank with the same batch axes"
        )
    if dtype is None:
        dtype = jnp.result_type(query, key, value)
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)

    def operand(x):
        return x.astype(dtype).reshape(math.prod(x.shape[:-3]), *x.shape[-3:])

    def weights(x):
        x = x.reshape((1,) * (query.ndim - x.ndim) + x.shape)
        if math.prod(x.shape[:-3]) != 1:
            x = jnp.broadcast_to(x, (*query.shape[:-3], *x.shape[-3:]))
        return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])

    out = dot_product_attention(
        operand(query),
        operand(key),
        operand(value),
        None if bias is None else weights(bias),
        None if mask is None else weights(mask).astype(bool),
        is_causal=is_causal,
        implementation=implementation,
    )
    return out.reshape(query.shape)


def beyond_rms_norm(layer: Any, x: jax.Array, mask: jax.Array | None) -> str | None:
    """Which option of Flax's RMSNorm `jaxkern.rms_norm` lacks, or None."""
    for name in ("reduction_axes", "feature_axes"):
        given = getattr(layer, name)
        axes = (given,) if isinstance(given, int) else tuple(given)
        if axes not in ((-1,), (x.ndim - 1,)):
            return f"{name}={given!r}"
    if layer.axis_name is not None:
        return f"axis_name={layer.axis_name!r}"
    if mask is not None:
        return "a mask"
    return f"{x.dtype} x" if jnp.iscomplexobj(x) else None


def leaves_to_flax(layer: str, lacks: str | None, implementation: Implementation) -> bool:
    """Whether Flax's own code answers. Raises NotImplementedError where it may not."""
    if lacks is not None and not allows_reference(implementation):
        raise NotImplementedError(
            f"{layer} with implementation={implementation!r} got {lacks}; wanted the last axis "
            "alone, or implementation=None, which falls back to Flax"
        )
    return lacks is not None


def normalize(
    x: jax.Array,
    scale: jax.Array | None,
    *,
    dtype: jax.typing.DTypeLike,
    epsilon: float,
    implementation: Implementation,
) -> jax.Array:
    """`jaxkern.rms_norm` in the wider of x's dtype and `dtype`, rounded to `dtype` once."""
    x = x.astype(jnp.promote_types(x.dtype, dtype))
    return rms_norm(x, scale, epsilon=epsilon, implementation=implementation).astype(dtype)


def bind(function: Callable, given: Callable | None, **options: object) -> Callable:
    """The attention function of a layer: `function` with `options`, or the one the caller gave.

    A hook of `function`, which is what a clone of a layer is given, takes the options anew.
    Raises ValueError for options next to a function that would not see them.
    """
    ours = given is None or given is function
    if ours or (isinstance(given, Hook) and given.func is function):
        return Hook(function, **options)
    unused = {name: value for name, value in options.items() if value}
    if unused:
        raise ValueError(
            f"attention_fn={given!r} does not see {unused}; wanted these options or attention_fn"
        )
    return given
