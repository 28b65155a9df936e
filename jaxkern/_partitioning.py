"""How a kernel's operands and results may be sharded, and the call on one shard.

Every axis of an array has a name. Those that begin with b, as "b0", "b1", ... of the leading axes,
are batch axes. "k" are key heads; "n" are query heads, which are the key heads times a group size.
Batch axes and heads may be sharded: each device calls the kernel on its own. All other axes are
made whole first. A result that lacks a sharded axis of the operands is a sum over it, so the
devices add up their shares, unless its axes are `Repeated`.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

Axes = tuple[str, ...]


class Repeated(tuple):
    """Axes of a result that all devices compute alike, along the axes that it lacks."""


class LocalShares(NamedTuple):
    """What is called in the place of a local function where the devices add up its results.

    share: from which of the results are sums, a bool each, to a function of the shards of the
      operands; the devices add up those of its results.
    finish: from the results so far and the shards of the operands to the results.
    """

    share: Callable
    finish: Callable


def sharded(
    local: Callable,
    operand_axes: Sequence[Axes],
    result_axes: Sequence[Axes],
    shares: LocalShares | None = None,
) -> Callable:
    """`local`, called on each device with its shards when it is partitioned.

    `shares` is for results that cannot be added up as they are, say because they are rounded.
    """
    call = custom_partitioning(local)
    context = jax.sharding.get_abstract_mesh()

    def rule(mesh, operand_types, result_types):
        return _rule(operand_axes, result_axes, [t.shape for t in operand_types])

    def partition(mesh, operands, results):
        if manual := context.manual_axes:
            # In a shard_map that leaves some axes to the compiler, JAX has no mesh to pass.
            mesh = context
        automatic = _without_axes(mesh, manual)
        shapes = [x.shape for x in operands]
        entries = [_entries(automatic, x.sharding, len(x.shape)) for x in operands]
        split = _split(mesh.shape, operand_axes, shapes, entries)
        if manual:
            split = _with_whole_sums(split, result_axes)

        summed = [_summed(split, axes) for axes in result_axes]
        share, finish = local, lambda results, *_: results
        if shares and any(summed):
            share, finish = shares.share(tuple(map(bool, summed))), shares.finish

        def lower(*shards):
            sums = tuple(
                _add_shares(automatic, manual, names, x)
                for x, names in zip(share(*shards), summed, strict=True)
            )
            return finish(sums, *shards)

        def shardings(arrays):
            return tuple(NamedSharding(automatic, _spec(split, axes)) for axes in arrays)

        return mesh, _without_mesh(lower), shardings(result_axes), shardings(operand_axes)

    # JAX cannot decode all shardings, so _entries does.
    call.def_partition(partition, sharding_rule=rule, decode_shardings=False)
    return on_auto_mesh(call, operand_axes, result_axes)


def on_auto_mesh(
    function: Callable, operand_axes: Sequence[Axes], result_axes: Sequence[Axes]
) -> Callable:
    """`function`, in which mesh axes of type Explicit are of type Auto.

    `operand_axes` may name the axes of the first operands only. Batch axes and heads of the results
    are typed as those of the operands.
    """

    @functools.wraps(function)
    def wrapped(*operands):
        mesh, split = _explicit_split(operands[: len(operand_axes)], operand_axes)
        if mesh is None:
            return function(*operands)
        shardings = tuple(NamedSharding(mesh, _spec(split, axes)) for axes in result_axes)
        explicit = tuple(mesh.explicit_axes)
        auto = jax.sharding.auto_axes(function, axes=explicit, out_sharding=shardings)
        return auto(*operands)

    return wrapped


def alike(operands: Sequence[jax.Array], operand_axes: Sequence[Axes]) -> list[jax.Array]:
    """The operands, typed as the kernel takes them. To be done outside of the custom_vjp.

    Inside shard_map they vary over the same manual axes, which sums the gradient of a replicated
    operand over the devices. On a mesh with Explicit axes they are sharded as `sharded` wants.
    """
    mesh, split = _explicit_split(operands, operand_axes)
    if mesh is not None:
        operands = [
            jax.sharding.reshard(x, NamedSharding(mesh, _spec(split, axes)))
            for x, axes in zip(operands, operand_axes, strict=True)
        ]
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(sorted(union - own)), to="varying") if union - own else x
        for x, own in zip(operands, varying, strict=True)
    ]


def split_axes(x: jax.Array, axes: Sequence[int], block: int) -> jax.Array:
    """x with each of these axes, of a size n * block, as two: [..., n, block, ...].

    On a mesh with Explicit axes the first stays sharded, if each device gets whole blocks.
    """
    sharding = jax.typeof(x).sharding
    shape, spec = [], []
    for axis, (size, entry) in enumerate(zip(x.shape, sharding.spec, strict=True)):
        if axis not in axes:
            shape.append(size)
            spec.append(entry)
            continue
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        whole = (size // block) % math.prod(sharding.mesh.shape[name] for name in names) == 0
        shape += [size // block, block]
        spec += [entry if whole else None, None]
    explicit = bool(sharding.mesh.explicit_axes)
    return jax.lax.reshape(
        x, shape, out_sharding=sharding.update(spec=P(*spec)) if explicit else None
    )


def _explicit_split(operands, operand_axes):
    """The mesh that has Explicit axes, and _split on it; or None and an empty split."""
    types = [jax.typeof(x) for x in operands]
    mesh = next((t.sharding.mesh for t in types if t.sharding.mesh.explicit_axes), None)
    if mesh is None:
        return None, {}
    return mesh, _split(
        mesh.shape, operand_axes, [t.shape for t in types], [t.sharding.spec for t in types]
    )


def _without_axes(mesh, names):
    """The mesh that the compiler partitions over, inside a shard_map over the named axes."""
    if not names:
        return mesh
    kept = tuple(name for name in mesh.axis_names if name not in names)
    return jax.sharding.AbstractMesh(tuple(mesh.shape[name] for name in kept), kept)


def _sizes(operand_axes, shapes):
    return {
        axis: size
        for axes, shape in zip(operand_axes, shapes, strict=True)
        for axis, size in zip(axes, shape, strict=True)
    }


def _rule(operand_axes, result_axes, shapes):
    """Shardy's sharding rule: an einsum-like string, and what it says of its factors."""
    sizes = _sizes(operand_axes, shapes)
    factors = {axis: axis for axis in sizes}
    shardable = {axis for axis in sizes if axis[0] == "b"}
    groups = {}
    if "n" in sizes and sizes["n"] == sizes["k"]:
        factors["n"] = "k"
        shardable |= {"k"}
    elif "n" in sizes and sizes["k"] == 1:  # a factor of size 1 must not be part of a compound
        shardable |= {"n"}
    elif "n" in sizes:
        factors["n"] = "(k g)"
        groups = {"g": sizes["n"] // sizes["k"]}
        shardable |= {"k"}

    def text(arrays):
        return ", ".join(" ".join(factors.get(axis, axis) for axis in axes) for axes in arrays)

    rule = f"{text(operand_axes)} -> {text(result_axes)}"
    in_order = dict.fromkeys(re.findall(r"\w+", rule))
    whole = tuple(factor for factor in in_order if factor not in shardable)
    return rule, {"need_replication_factors": whole, **groups}


def _split(mesh_shape, operand_axes, shapes, entries):
    """The mesh axes over which each array axis stays sharded: those of the first operand that is.

    `entries` has for each operand what a PartitionSpec has. A mesh axis is used once, and divides
    evenly. The heads of the query decide for those of the key, and stay sharded if each device gets
    whole groups.
    """
    sizes = _sizes(operand_axes, shapes)
    split, used = {}, set()
    for axes, spec in zip(operand_axes, entries, strict=True):
        for axis, entry in zip(axes, spec, strict=True):
            names = (entry,) if isinstance(entry, str) else tuple(entry or ())
            evenly = sizes[axis] % math.prod(mesh_shape[name] for name in names) == 0
            if names and evenly and (axis[0] == "b" or axis == "n") and axis not in split:
                if not used.intersection(names):
                    split[axis] = names
                    used.update(names)
    if "n" in split and sizes["k"] > 1:
        heads = split.pop("n")
        if sizes["k"] % math.prod(mesh_shape[name] for name in heads) == 0:
            split["n"] = split["k"] = heads
    return split


def _summed(split, axes):
    """The mesh axes over which the devices have shares of a result with these axes."""
    if isinstance(axes, Repeated):
        return ()
    own = {name for axis in axes for name in split.get(axis, ())}
    return tuple(name for name in _names(split) if name not in own)


def _names(split):
    """The mesh axes in use. Key heads have those of the query heads."""
    return dict.fromkeys(name for names in split.values() for name in names)


def _add_shares(mesh, manual, summed, share):
    if not summed:
        return share
    if not manual:
        return jax.lax.psum(share, summed)
    # NOTE: inside a partly manual shard_map the compiler renumbers the devices, so what it says of
    # one axis may be true of another. All of them together are the same under any numbering.
    repeats = mesh.size // math.prod(mesh.shape[name] for name in summed)
    return jax.lax.psum(share, mesh.axis_names) / repeats


def _with_whole_sums(split, result_axes):
    """`split` without the axes whose sum _add_shares cannot take: next to others that stay."""
    for axes in result_axes:
        summed = _summed(split, axes)
        if summed and len(summed) < len(_names(split)):
            split = {axis: names for axis, names in split.items() if not set(names) & set(summed)}
    return split


def _entries(mesh, sharding, rank):
    """The mesh axes over which each axis of an array is sharded, from the compiler's sharding.

    A part of a mesh axis, which the compiler also uses, counts as all of it.
    """
    tiles = sharding._to_xla_hlo_sharding(rank)
    if mesh.empty or not tiles.is_tiled():
        return ((),) * rank
    counts = tiles.tile_assignment_dimensions()
    devices = np.reshape(tiles.tile_assignment_devices(), counts)
    entries = []
    for axis in range(rank):
        # Along the tiles of this axis, a mesh axis has changed from the tile `first` on.
        line = devices[tuple(slice(None) if i == axis else 0 for i in range(len(counts)))]
        firsts = {}
        for name, place in zip(
            mesh.axis_names, np.unravel_index(line, mesh.axis_sizes), strict=True
        ):
            changed = np.flatnonzero(place != place[0])
            if changed.size:
                firsts[name] = changed[0]
        entries.append(tuple(sorted(firsts, key=firsts.get, reverse=True)))
    return tuple(entries)


def _spec(split, axes):
    return P(*(split.get(axis) for axis in axes))


_NO_MESH = jax.sharding.AbstractMesh((), ())


def _without_mesh(function):
    """`function`, traced as if no mesh were set: shards are whole arrays to it."""

    @functools.wraps(function)
    def wrapped(*args):
        with jax.sharding.use_abstract_mesh(_NO_MESH):
            return function(*args)

    return wrapped
