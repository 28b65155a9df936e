"""Lengths and segment ids, the integer operands of attention, under each transform of JAX."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import collectives, custom_calls

import jaxkern
from jaxkern.testing import random_normal

pytestmark = pytest.mark.usefixtures("kernels")

B, T, S, N, K, H = 4, 6, 7, 4, 2, 64


def operands(*lead):
    """query, key and value, and of masks: both lengths [B] and both ids [B, length]."""
    arrays = random_normal(1, (*lead, T, N, H), *[(*lead, S, K, H)] * 2, dtype="bfloat16")
    rng = np.random.default_rng(2)
    lengths = (jnp.array(rng.integers(0, n + 1, lead)) for n in (T, S))
    ids = (jnp.array(rng.integers(0, 3, (*lead, n))) for n in (T, S))
    return *arrays, *lengths, *ids


def attend(query, key, value, query_ends, key_ends, query_ids, key_ids, implementation=None):
    return jaxkern.dot_product_attention(
        query,
        key,
        value,
        query_seq_lengths=query_ends,
        key_value_seq_lengths=key_ends,
        segment_ids=(query_ids, key_ids),
        is_causal=True,
        local_window_size=3,
        alignment="bottom_right",
        logits_soft_cap=2.0,
        implementation=implementation,
    )


def gradient(*args, implementation=None):
    """A loss and its gradients of query, key and value."""

    def loss(*args):
        return jnp.sin(attend(*args, implementation=implementation).astype(jnp.float32)).sum()

    return jax.value_and_grad(loss, (0, 1, 2))(*args)


def assert_equal(got, wanted):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        np.testing.assert_allclose(g, w, rtol=2e-2, atol=2e-2)


wanted_gradient = functools.partial(gradient, implementation="xla")


def test_path_of_the_kernel_is_the_one_tested():
    assert custom_calls(gradient, *operands(B)) == {"attention_fwd": 1, "attention_bwd": 1}


def test_masks_have_no_gradient():
    args = operands(B)
    out, pullback = jax.vjp(attend, *args)
    *gradients, a, b, c, d = pullback(jnp.ones_like(out))
    _, pullback = jax.vjp(lambda *x: attend(*x, *args[3:], implementation="xla"), *args[:3])
    assert_equal(gradients, pullback(jnp.ones_like(out)))
    assert all(g.dtype == jax.dtypes.float0 for g in (a, b, c, d))


AXES = [
    (query, None, None, None, *masks)
    for query, *masks in itertools.product([None, 0], repeat=4)
    if (query, *masks) != (None,) * 4
]


@pytest.mark.parametrize("axes", AXES)
def test_vmap(axes):
    """Any of query, key lengths, query ids and key ids has the mapped axis."""
    single, many = operands(B), operands(3, B)
    args = [m if axis == 0 else s for s, m, axis in zip(single, many, axes, strict=True)]
    got = jax.vmap(gradient, axes)(*args)
    wanted = [
        wanted_gradient(*(x if a is None else x[i] for x, a in zip(args, axes, strict=True)))
        for i in range(3)
    ]
    assert_equal(got, jax.tree.map(lambda *x: jnp.stack(x), *wanted))


def test_vmap_of_vmap():
    args = operands(2, 3, B)
    outer, inner = (0, 0, 0, None, 0, 0, None), (0, 0, 0, 0, None, 0, 0)
    args = [
        x[0] if o is None else x[:, 0] if i is None else x
        for x, o, i in zip(args, outer, inner, strict=True)
    ]
    got, wanted = (
        jax.vmap(jax.vmap(function, inner), outer)(*args)
        for function in (gradient, wanted_gradient)
    )
    assert_equal(got, wanted)


def test_scan_over_masks():
    """Every layer has its own masks, and remat runs them again."""
    query, key, value, *_ = operands(B)
    masks = tuple(jnp.stack([m, m[::-1]]) for m in operands(B)[3:])

    def loss(implementation, query, key, value):
        @jax.checkpoint
        def layer(x, masks):
            return x + attend(x, key, value, *masks, implementation), None

        return jax.lax.scan(layer, query, masks)[0].astype(jnp.float32).sum()

    got, wanted = (jax.grad(loss, (1, 2, 3))(i, query, key, value) for i in (None, "xla"))
    assert_equal(got, wanted)


def test_pmap():
    args = operands(B, 2)
    got = jax.pmap(gradient, devices=jax.devices("cpu")[:B])(*args)
    assert_equal(jax.device_get(got), jax.vmap(wanted_gradient)(*args))


def make_mesh(kind):
    return jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2, devices=jax.devices("cpu"))


def put(mesh, arrays, specs):
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]


BATCH, BOTH = P("data"), P("data", None, "model")
WHERE = {
    "batch": ([P(("data", "model"))] * 7, set()),
    "batch and heads": ([BOTH] * 3 + [BATCH] * 4, set()),
    "heads, masks whole": ([P(None, None, "model")] * 3 + [P()] * 4, set()),
    "batch, masks whole": ([BATCH] * 3 + [P()] * 4, set()),
    "lengths of masks sharded": ([BATCH] * 5 + [P("data", "model")] * 2, {"all-gather"}),
}


def with_gradients(*args, implementation=None):
    """attend(*args) and its gradients for a cotangent that is sharded as the result."""
    run = functools.partial(attend, implementation=implementation)
    out, pullback = jax.vjp(lambda *x: run(*x, *args[3:]), *args[:3])
    return out, *pullback(jnp.cos(out))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("where", WHERE)
def test_sharded_masks_move_no_operand(kind, where):
    specs, expected = WHERE[where]
    arrays = list(random_normal(1, (8, T, 8, H), (8, S, 4, H), (8, S, 4, H), dtype="bfloat16"))
    arrays += [jnp.tile(m, (2,) + (1,) * (m.ndim - 1)) for m in operands(B)[3:]]
    if where == "lengths of masks sharded":
        # Lengths that 4 devices divide, so that ids can be sharded along them.
        arrays = [jnp.repeat(x, 4, axis=1) if x.ndim > 1 else 4 * x for x in arrays]
    args = put(make_mesh(kind), arrays, specs)
    found, got = collectives(with_gradients, *args)
    assert found == expected
    assert_equal(got, with_gradients(*arrays, implementation="xla"))
    for result, operand in zip(got, [args[0], *args[:3]], strict=True):
        assert result.sharding.is_equivalent_to(operand.sharding, 4)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_shard_map_with_masks_on_some_axes_only(check_vma, kind):
    """Queries vary over both axes of the mesh, lengths over one, query ids over none."""
    mesh = make_mesh(kind)
    arrays = list(random_normal(1, (B, T, 8, H), (B, S, 4, H), (B, S, 4, H), dtype="bfloat16"))
    arrays += operands(B)[3:]
    arrays[5] = arrays[5][:1]
    specs = (*[BOTH] * 3, BATCH, BATCH, P(), BATCH)

    def loss(*args):
        query_ids = jnp.broadcast_to(args[5], (args[0].shape[0], T))
        return jnp.sin(attend(*args[:5], query_ids, args[6]).astype(jnp.float32)).sum()

    def total(*shards):
        return jax.lax.psum(loss(*shards), ("data", "model"))

    mapped = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    got = jax.jit(jax.value_and_grad(mapped, (0, 1, 2)))(*put(mesh, arrays, specs))
    assert_equal(got, jax.value_and_grad(loss, (0, 1, 2))(*arrays))


@pytest.mark.parametrize("platforms", [["cpu"], ["cpu", "cuda"]], ids="+".join)
def test_export_with_a_symbolic_batch(platforms):
    (batch,) = jax.export.symbolic_shape("batch")
    specs = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in operands(1)]
    checks = [
        jax.export.DisabledSafetyCheck.custom_call(f"jaxkern.attention_{direction}")
        for direction in ("fwd", "bwd")
    ]
    exported = jax.export.export(jax.jit(gradient), platforms=platforms, disabled_checks=checks)(
        *specs
    )
    calls = exported.mlir_module().count("custom_call @jaxkern.")
    assert calls == (2 if "cuda" in platforms else 0)
    for size in (1, 3):
        assert_equal(exported.call(*operands(size)), wanted_gradient(*operands(size)))
