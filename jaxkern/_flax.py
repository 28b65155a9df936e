"""What the nnx and the linen layers share. Imports no Flax."""

import contextlib
import contextvars
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxkern import dot_product_attention, fp8_matmul, rms_norm
from jaxkern._dispatch import as_static as as_static

Implementation = str | Sequence[str] | None
Window = int | tuple[int, int] | None
SegmentIds = jax.Array | tuple[jax.Array, jax.Array] | None

_of_this_call = contextvars.ContextVar[Mapping[str, Any]]("of_this_call")


class Hook(functools.partial):
    """A function with its options fixed, for a module to hold.

    Two hooks are equal when functions and options are: jit and nnx compare modules by their
    attributes, and `functools.partial` alone compares by identity. Within `call_options` it takes
    those too: what a layer's call is given, and flax does not hand on.
    """

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs, **_of_this_call.get({}))

    def __eq__(self, other):
        return isinstance(other, Hook) and (self.func, self.keywords) == (
            other.func,
            other.keywords,
        )

    def __hash__(self):
        return hash((self.func, *self.keywords.items()))


@contextlib.contextmanager
def call_options(function: Callable, segment_ids: SegmentIds, cache_index: Any) -> Iterator[None]:
    """Hands a layer's segment ids and, when decoding, its place in the cache to its `function`.

    Raises ValueError for segment ids next to a function of the caller, which would not see them.
    """
    options = {}
    if segment_ids is not None:
        if not isinstance(function, Hook):
            raise ValueError(f"attention_fn={function!r} does not see segment_ids; wanted None")
        options["segment_ids"] = segment_ids
    if cache_index is not None and isinstance(function, Hook):
        # The one query is the last of the keys so far, and its window is around that place.
        options |= {"key_value_seq_lengths": cache_index + 1, "alignment": "bottom_right"}
    token = _of_this_call.set(options)
    try:
        yield
    finally:
        _of_this_call.reset(token)


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


def reject_sowing(ours: str, implementation: Implementation, options: Mapping[str, Any]) -> None:
    """Raises NotImplementedError where Flax's own function may not stand in for the kernel.

    `options` are those that it lacks.
    """
    if not allows_reference(implementation):
        raise NotImplementedError(
            f"{ours}.attention_fn with implementation={implementation!r} never has the attention "
            "weights in memory, got sow_weights=True; wanted implementation=None"
        )
    given = [
        name
        for name, x in options.items()
        if x is not None and not (isinstance(x, str) and x == "top_left")
    ]
    if given:
        raise NotImplementedError(
            f"{ours}.attention_fn records weights by Flax's own function, which has no "
            f"{', '.join(given)}; wanted sow_weights=False"
        )


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    dtype: jax.typing.DTypeLike | None,
    segment_ids: SegmentIds = None,
    key_value_seq_lengths: jax.typing.ArrayLike | None = None,
    **options: Any,
) -> jax.Array:
    """`jaxkern.dot_product_attention` with the shapes and dtypes that Flax's layers pass.

    Any number of batch axes, operands of different dtypes, masks of any dtype, lengths that
    broadcast.
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

    def ids(x):
        x = jnp.asarray(x)
        if x.shape[:-1] != query.shape[:-3]:
            raise ValueError(
                f"segment_ids has shape {x.shape}, wanted [..., length] with query's batch axes "
                f"{query.shape[:-3]}"
            )
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    if segment_ids is not None:
        is_pair = isinstance(segment_ids, tuple)
        segment_ids = tuple(map(ids, segment_ids)) if is_pair else ids(segment_ids)
    if key_value_seq_lengths is not None:
        lengths = jnp.broadcast_to(key_value_seq_lengths, query.shape[:-3])
        key_value_seq_lengths = lengths.reshape(math.prod(lengths.shape))
    out = dot_product_attention(
        operand(query),
        operand(key),
        operand(value),
        None if bias is None else weights(bias),
        None if mask is None else weights(mask).astype(bool),
        segment_ids=segment_ids,
        key_value_seq_lengths=key_value_seq_lengths,
        **options,
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


def reject_precision(layer: str, precision: Any, dot_general: Callable | None) -> None:
    """Raises ValueError for options of a product that an FP8 layer does not compute."""
    for name, given in (("precision", precision), ("dot_general", dot_general)):
        if given is not None and given is not jax.lax.dot_general:
            raise ValueError(f"{layer} multiplies in FP8, got {name}={given!r}; wanted None")


def fp8_linear(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, **options: Any
) -> jax.Array:
    """`jaxkern.fp8_matmul` of x [..., K] and kernel [K, N], and bias [N] added to its result."""
    y = fp8_matmul(x, kernel, **options)
    return y if bias is None else y + bias


def fp8_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: jax.typing.DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    **options: Any,
) -> jax.Array:
    """`jaxkern.fp8_matmul` with `jax.lax.dot_general`'s arguments, for a dense layer's product.

    Args:
      lhs: [..., K], bfloat16, float16 or float32.
      rhs: [K, N], of these dtypes.
      dimension_numbers: lhs's last axis with rhs's first one, and no batch.
      precision: None.
      preferred_element_type: of the result; None is what lhs and rhs promote to.
      out_sharding: None, or the result's on a mesh with Explicit axes.
      **options: of fp8_matmul.

    Raises:
      NotImplementedError: another product.
      ValueError: a precision, or as fp8_matmul.
    """
    (contracted, batch) = (tuple(map(tuple, pair)) for pair in dimension_numbers)
    wanted = ((lhs.ndim - 1,), (0,))
    if contracted != wanted or batch != ((), ()) or rhs.ndim != 2:
        raise NotImplementedError(
            f"fp8_dot_general has dimension_numbers {dimension_numbers} for shapes {lhs.shape} and "
            f"{rhs.shape}, wanted {(wanted, ((), ()))} with a matrix as the second operand"
        )
    reject_precision("fp8_dot_general", precision, None)
    dtype = preferred_element_type
    if dtype is None:
        dtype = jnp.promote_types(lhs.dtype, rhs.dtype)
    y = fp8_matmul(lhs, rhs, preferred_element_type=dtype, **options)
    return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


QuantizationRules = Mapping[str, str | Mapping[str, Any] | None]


def quantization_options(
    names: Iterable[str], rules: QuantizationRules
) -> dict[str, dict[str, Any]]:
    """Options of `jaxkern.quantize`, its format too, by the names of layers that rules change.

    Rules go from regular expressions to formats, to mappings of "format" and options, or to None,
    which leaves a layer as it is. The first rule that matches a whole name is the one that counts.

    Raises ValueError for a rule that is the first of no layer, with a list of the names.
    """
    names, options, matched = list(names), {}, set()
    for name in names:
        rule = next((rule for rule in rules if re.fullmatch(rule, name)), None)
        matched.add(rule)
        own = None if rule is None else rules[rule]
        if own is not None:
            options[name] = {"format": own} if isinstance(own, str) else dict(own)
    if unused := [rule for rule in rules if rule not in matched]:
        raise ValueError(
            f"rules {', '.join(map(repr, unused))} match none of the linear layers "
            f"{', '.join(names) or '(there are none)'}, or others do before them"
        )
    return options


def bind(function: Callable, given: Callable | None, **options: object) -> Callable:
    """The attention function of a layer: `function` with `options`, or the one the caller gave.

    A hook of `function`, which is what a clone of a layer is given, takes the options anew.
    Raises ValueError for options next to a function that would not see them.
    """
    options = {name: as_static(value) for name, value in options.items()}
    ours = given is None or given is function
    if ours or (isinstance(given, Hook) and given.func is function):
        return Hook(function, **options)
    defaults = inspect.signature(function).parameters
    unused = {name: x for name, x in options.items() if x != defaults[name].default}
    if unused:
        raise ValueError(
            f"attention_fn={given!r} does not see {unused}; wanted these options or attention_fn"
        )
    return given


def window_of(function: Callable) -> Window:
    """The local_window_size that `function` was bound with."""
    return function.keywords["local_window_size"] if isinstance(function, Hook) else None
