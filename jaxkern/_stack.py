"""From an op's custom_vjp down to the kernel: vmap, sharding, and the platform."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jaxkern import _dispatch, _partitioning

_ONE_DERIVATIVE = (
    "the kernel can be differentiated once, in reverse mode; implementation='xla' has derivatives "
    "of any order"
)


class Shares(NamedTuple):
    """What an op is where results are sums over devices and cannot be added up as they are.

    kernel, reference: from which of the results are sums, a bool each, to functions of the op's
      operands; the devices add up those of their results.
    finish: from the results so far and the operands to the op's results.
    """

    kernel: Callable
    reference: Callable
    finish: Callable


def kernel_op(
    op: str,
    kernel: Callable,
    reference: Callable,
    axes: Callable[..., tuple[Sequence[tuple[str, ...]], Sequence[tuple[str, ...]]]],
    *,
    fallback: bool,
    vmap: Callable | None = None,
    shares: Shares | None = None,
    derivatives: str = _ONE_DERIVATIVE,
) -> Callable:
    """A function of arrays that calls `kernel` where it is lowered for CUDA.

    Elsewhere it calls `reference`, or raises without `fallback`. An operand with an empty axis goes
    to the reference everywhere.

    Args:
      op: name of the public function, for messages.
      kernel, reference: functions of the same arrays with the same results, a tuple of arrays. They
        take any number of leading batch axes, because vmap adds one.
      axes: from the ranks of the operands to the names of the axes of operands and results
        (see _partitioning).
      fallback: whether the reference is for other platforms.
      vmap: from (this function, axis_size, in_batched, operands) to the vmapped results. By default
        the function itself, of operands that all have the vmapped axis in front.
      shares: for results that must not be added up as `kernel` has them.
      derivatives: which there are, for the message where there is none.
    """

    def by_platform(kernel, reference):
        def local(*operands):
            if not fallback:
                return kernel(*operands)
            return jax.lax.platform_dependent(*operands, cuda=kernel, default=reference)

        return local

    local = by_platform(kernel, reference)
    local_shares = shares and _partitioning.LocalShares(
        lambda summed: by_platform(shares.kernel(summed), shares.reference(summed)), shares.finish
    )

    @jax.custom_jvp
    def once(*operands):
        return batched(*operands)

    @once.defjvp
    def _(primals, tangents):
        raise NotImplementedError(f"{op}: {derivatives}")

    @custom_vmap
    def batched(*operands):
        if any(0 in x.shape for x in operands):
            return reference(*operands)
        if not fallback:
            operands = (_dispatch.cuda_only(operands[0], op), *operands[1:])
        operand_axes, result_axes = axes(*(x.ndim for x in operands))
        sharded = _partitioning.sharded(local, operand_axes, result_axes, local_shares)
        return sharded(*operands)

    @batched.def_vmap
    def _(axis_size, in_batched, *operands):
        if vmap is None:
            results = once(*broadcast_unbatched(axis_size, in_batched, operands))
        else:
            results = vmap(once, axis_size, in_batched, operands)
        return results, (True,) * len(results)

    return once


def without_derivative(op: str, function: Callable) -> Callable:
    """`function`, of arrays, which raises where it is differentiated."""
    wrapped = jax.custom_jvp(function)

    @wrapped.defjvp
    def _(primals, tangents):
        raise NotImplementedError(f"{op} has no derivative")

    return wrapped


def broadcast_unbatched(axis_size, in_batched, operands):
    """The operands, those without the vmapped axis repeated along it."""
    return [
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip(operands, in_batched, strict=True)
    ]
