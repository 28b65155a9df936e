"""How a kernel's operands and results may be sharded, and the call on one shard.

Every axis of an array has a name. Leading axes "b0", "b1", ... are batch axes. "k" are key heads;
"n" are query heads, which are the key heads times a group size. Batch axes and heads may be
sharded: each device calls the kernel on its own. All other axes are made whole first. A result that
lacks a sharded batch axis of its operands is a sum over it, so the devices add up their shares.
"""

import functools
from collections.abc import Callable, Sequence

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Axes = tuple[str, ...]


def sharded(local: Callable, operand_axes: Sequence[Axes], result_axes: Sequence[Axes]) -> Callable:
    """`local`, called on each device with its shards when it is partitioned."""
    call = custom_partitioning(local)

    def rule(mesh, operand_types, result_types):
        return _rule(operand_axes, result_axes, [t.shape for t in operand_types])

    def partition(mesh, operands, results):
        shardings = [x.sharding for x in operands]
        if getattr(shardings[0], "spec", None) is None:
            return mesh, _without_mesh(local), [r.sharding for r in results], tuple(shardings)
        split = _split(mesh, operand_axes, operands)

        def named(axes):
            return NamedSharding(mesh, P(*(split.get(axis) for axis in axes)))

        def lower(*shards):
            outputs = list(local(*shards))
            for i, axes in enumerate(result_axes):
                summed = [split[a] for a in split if a.startswith("b") and a not in axes]
                if summed:
                    outputs[i] = jax.lax.psum(outputs[i], tuple(jax.tree.leaves(summed)))
            return outputs

        operand_shardings = tuple(named(axes) for axes in operand_axes)
        return mesh, _without_mesh(lower), [named(a) for a in result_axes], operand_shardings

    call.def_partition(partition, sharding_rule=rule)
    return call


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, made to vary over the same manual mesh axes inside shard_map.

    Done outside of a custom_vjp, it sums the gradient of a replicated operand over the devices.
    """
    axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*axes)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(arrays, axes, strict=True)
    )


def _rule(operand_axes, result_axes, operand_shapes):
    """Shardy's sharding rule, as an einsum-like string with its special factors."""
    sizes = {
        axis: size
        for axes, shape in zip(operand_axes, operand_shapes, strict=True)
        for axis, size in zip(axes, shape, strict=True)
    }
    # A factor of size 1 must not be part of a compound.
    factors = {axis: axis for axis in sizes}
    group = {}
    if "n" in sizes and sizes["n"] != sizes["k"]:
        if sizes["k"] > 1:
            factors["n"] = "(k g)"
            group = {"g": sizes["n"] // sizes["k"]}
    elif "n" in sizes:
        factors["n"] = "k"

    def text(arrays):
        return ", ".join(" ".join(factors[axis] for axis in axes) for axes in arrays)

    rule = f"{text(operand_axes)} -> {text(result_axes)}"
    whole = []
    for factor in (
        rule.replace("->", " ").replace(",", " ").replace("(", " ").replace(")", " ").split()
    ):
        multi_query = factor == "k" and sizes.get("n") != 1 and sizes["k"] == 1
        may_split = factor[0] == "b" or (factor in "nk" and not multi_query)
        if not may_split and factor not in whole:
            whole.append(factor)
    return rule, {"need_replication_factors": tuple(whole), **group}


def _split(mesh, operand_axes, operands):
    """Mesh axes of each array axis that stays sharded, as the first operand that has it says."""
    split, sizes = {}, {}
    for axes, operand in zip(operand_axes, operands, strict=True):
        for axis, size, names in zip(axes, operand.shape, operand.sharding.spec, strict=True):
            sizes.setdefault(axis, size)
            if names is not None and (axis.startswith("b") or axis in ("n", "k")):
                split.setdefault(axis, names)
    if "n" in sizes:
        heads = split.pop("n", None)
        split.pop("k", None)
        names = (heads,) if isinstance(heads, str) else heads or ()
        devices = 1
        for name in names:
            devices *= mesh.shape[name]
        if heads is not None and sizes["k"] == 1:
            split["n"] = heads
        elif heads is not None and sizes["k"] % devices == 0:
            split["n"] = split["k"] = heads
    return split


_NO_MESH = jax.sharding.AbstractMesh((), ())


def _without_mesh(function):
    """`function`, traced as if no mesh were set: shards are whole arrays to it."""

    @functools.wraps(function)
    def wrapped(*args):
        with jax.sharding.use_abstract_mesh(_NO_MESH):
            return function(*args)

    return wrapped
