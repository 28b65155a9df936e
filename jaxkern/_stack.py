"""From an op's custom_vjp down to the kernel: vmap, sharding, and the platform."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jaxkern import _dispatch, _partitioning


def kernel_op(
    op: str,
    kernel: Callable,
    reference: Callable | None,
    axes: Callable[..., tuple[Sequence[tuple[str, ...]], Sequence[tuple[str, ...]]]],
    vmap: Callable | None = None,
) -> Callable:
    """A function of arrays that calls `kernel` where it is lowered for CUDA, else `reference`.

    Both take the same arrays and return the same ones; they must accept any number of leading
    batch axes, because vmap adds one. Without a reference, lowering for another platform raises.

    Args:
      op: name of the public function, for messages.
      kernel, reference: functions of arrays, of which there is any number of leading axes.
      axes: from the ranks of the operands to the names of the axes of operands and results
        (see _partitioning).
      vmap: from (this function, axis_size, in_batched, operands) to the vmapped results. By default
        the function itself, of operands that all have the vmapped axis in front.
    """

    def local(*operands):
        if reference is None:
            return kernel(*operands)
        return jax.lax.platform_dependent(*operands, cuda=kernel, default=reference)

    @jax.custom_jvp
    def once(*operands):
        return batched(*operands)

    @once.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            f"{op}: the kernel can be differentiated once, in reverse mode; implementation='xla' "
            "has derivatives of any order"
        )

    @custom_vmap
    def batched(*operands):
        if reference is None:
            operands = (_dispatch.cuda_only(operands[0], op), *operands[1:])
        operand_axes, result_axes = axes(*(x.ndim for x in operands))
        return _partitioning.sharded(local, operand_axes, result_axes)(*operands)

    @batched.def_vmap
    def _(axis_size, in_batched, *operands):
        if vmap is None:
            results = once(*broadcast_unbatched(axis_size, in_batched, operands))
        else:
            results = vmap(once, axis_size, in_batched, operands)
        return results, (True,) * len(results)

    return once


def broadcast_unbatched(axis_size, in_batched, operands):
    """The operands, those without the vmapped axis repeated along it."""
    return [
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip(operands, in_batched, strict=True)
    ]
