"""The kernels on several GPUs: sharded under jit, in shard_map and pmap; needs two GPUs."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import collectives

import jaxkern
from jaxkern.testing import random_normal

pytestmark = pytest.mark.gpu

QUERY, KEY = (4, 384, 8, 128), (4, 384, 4, 128)
BATCH, HEADS = P("gpus"), P(None, None, "gpus")


@pytest.fixture
def gpus():
    devices = jax.devices("cuda")
    if len(devices) < 2:
        pytest.skip(f"needs two GPUs, found {len(devices)}")
    return devices[:2]


def make_mesh(devices, kind):
    return jax.make_mesh((2,), ("gpus",), (kind,), devices=devices)


def attend(query, key, value):
    return jaxkern.dot_product_attention(
        query, key, value, is_causal=True, implementation="cuda", return_residual=True
    )


def norm(x, scale):
    return jaxkern.rms_norm(x, scale, implementation="cuda")


def with_gradients(function, operands, cotangents):
    out, pullback = jax.vjp(function, *operands)
    return out, pullback(cotangents)


def attention_arrays():
    operands = random_normal(1, QUERY, KEY, KEY, dtype="bfloat16")
    dout, dlse = random_normal(2, QUERY, QUERY[:3], dtype="bfloat16")
    return tuple(operands), (dout, dlse.astype("float32"))


def assert_same(got, wanted):
    """Equal but for dquery, which the kernel sums in no fixed order."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        np.testing.assert_allclose(g, w, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("spec", [BATCH, HEADS], ids=["batch", "heads"])
def test_sharded_attention_moves_nothing(gpus, kind, spec):
    arrays = attention_arrays()
    sharded = jax.device_put(arrays, NamedSharding(make_mesh(gpus, kind), spec))
    found, got = collectives(functools.partial(with_gradients, attend), *sharded)
    assert found == set()
    assert got[0][0].sharding.is_equivalent_to(sharded[0][0].sharding, 4)
    assert_same(got, jax.jit(functools.partial(with_gradients, attend))(*arrays))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_norm_sums_the_gradient_of_scale(gpus, kind):
    x, scale, dy = random_normal(3, (64, 512), (512,), (64, 512), dtype="float32")
    mesh = make_mesh(gpus, kind)
    args = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in ((x, BATCH), (scale, P()))]
    dy_args = jax.device_put(dy, NamedSharding(mesh, BATCH))
    found, got = collectives(functools.partial(with_gradients, norm), tuple(args), dy_args)
    assert found == {"all-reduce"}
    assert_same(got, jax.jit(functools.partial(with_gradients, norm))((x, scale), dy))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(gpus, check_vma):
    arrays = attention_arrays()
    mapped = jax.shard_map(
        functools.partial(with_gradients, attend),
        mesh=make_mesh(gpus, AxisType.Auto),
        in_specs=BATCH,
        out_specs=BATCH,
        check_vma=check_vma,
    )
    got = jax.jit(mapped)(*arrays)
    assert_same(got, jax.jit(functools.partial(with_gradients, attend))(*arrays))


def test_pmap(gpus):
    arrays = attention_arrays()
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), arrays)
    got = jax.pmap(functools.partial(with_gradients, attend), devices=gpus)(*halves)
    got = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), got)
    assert_same(got, jax.jit(functools.partial(with_gradients, attend))(*arrays))
