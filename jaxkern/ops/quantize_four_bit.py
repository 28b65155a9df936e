"""What `quantize` does for formats of four bits."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxkern import _checks, _dispatch, _partitioning, _stack
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference import four_bit as reference

FORMATS = ("nvfp4", "mxfp4", "int4")

_OP = "quantize"
_BLOCKS = {"nvfp4": 16, "mxfp4": 32}
_GROUPS = (32, 64, 128)


class Config(NamedTuple):
    format: str
    block: int
    zero_point: bool
    search: bool


def quantize_four_bit(
    x: jax.Array,
    format: str,
    group_size: Any,
    zero_point: Any,
    search: Any,
    key: jax.Array | None,
    implementation: Any,
) -> QuantizedArray:
    """x [..., R, C], of a dtype that `quantize` takes, in one of FORMATS. Raises what that does."""
    zero_point = _checks.flag("zero_point", zero_point)
    search = _checks.flag("search", search)
    if format != "int4" and group_size is not None:
        raise ValueError(f"group_size is {group_size!r}, wanted None for {format!r}")
    if format != "int4" and zero_point:
        raise ValueError(f"zero_point is True, wanted False for {format!r}")
    block = _BLOCKS.get(format) or (128 if group_size is None else group_size)
    if format == "int4" and block not in _GROUPS:
        raise ValueError(
            f"group_size is {group_size!r}, wanted one of {', '.join(map(str, _GROUPS))}"
        )
    if x.shape[-1] % block:
        raise ValueError(
            f"x has {x.shape[-1]} columns, wanted a multiple of {block} for {format!r}"
        )
    _dispatch.choose(_OP, implementation, f"{format!r} has no kernel")
    config = Config(format, block, zero_point, search)
    run = _stack.without_derivative(_OP, functools.partial(_quantize, config))
    return run(x) if key is None else run(x, key)


@functools.partial(jax.jit, static_argnums=0)
def _quantize(config, x, *key):
    lead = tuple(f"b{i}" for i in range(x.ndim - 2))
    axes = {"values": (*lead, "brows", "columns"), "scale": (*lead, "brows", "blocks")}
    options = {"search": config.search}
    if config.format == "nvfp4":
        axes["tensor_scale"] = (*lead, "one", "one")
    if config.format == "int4":
        options |= {"group": config.block, "zero_point": config.zero_point}
        axes |= {"zero_point": axes["scale"]} if config.zero_point else {}

    def run(x, *key):
        noise = jax.random.uniform(*key, x.shape) if key else None
        found = getattr(reference, config.format)(x.astype(jnp.float32), noise=noise, **options)
        return tuple(getattr(found, name) for name in axes)

    run = _partitioning.on_auto_mesh(run, [axes["values"]], list(axes.values()))
    return QuantizedArray(**dict(zip(axes, run(x, *key), strict=True)))
