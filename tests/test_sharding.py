"""The ops on sharded arrays, on eight CPU devices: right values, and no needless communication."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import collectives

import jaxkern
from jaxkern.testing import random_normal

pytestmark = pytest.mark.usefixtures("kernels")

B, T, S, H = 4, 8, 12, 64
HEADS = {"mha": (4, 4), "gqa": (8, 4), "mqa": (4, 1)}


def make_mesh(kind):
    types = (kind, kind)
    return jax.make_mesh((2, 4), ("data", "model"), types, devices=jax.devices("cpu"))


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return make_mesh(request.param)


def attention_operands(heads, lead=(B,)):
    n, k = HEADS[heads]
    query, key = (*lead, T, n, H), (*lead, S, k, H)
    return random_normal(1, query, key, key, query, dtype="bfloat16")


def attend(*operands, implementation=None):
    return jaxkern.dot_product_attention(*operands, is_causal=True, implementation=implementation)


def norm(x, scale, implementation=None):
    return jaxkern.rms_norm(x, scale, implementation=implementation)


def with_gradients(function, *args, **options):
    """function(*args[:-1]) and its gradients for the cotangent args[-1]."""
    out, pullback = jax.vjp(functools.partial(function, **options), *args[:-1])
    cotangent, sharding = args[-1], jax.typeof(out).sharding
    if sharding.mesh.explicit_axes:
        cotangent = jax.sharding.reshard(cotangent, sharding)
    return out, *pullback(cotangent)


def put(mesh, arrays, specs):
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]


def assert_equal(got, wanted):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert g.dtype == w.dtype
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        np.testing.assert_allclose(g, w, rtol=2e-2, atol=2e-2 * np.abs(w).max())


BATCH, MODEL = P("data"), P(None, None, "model")
BOTH = P("data", None, "model")


@pytest.mark.parametrize(
    ("heads", "spec", "key_spec", "expected"),
    [
        ("mha", P(("data", "model")), None, set()),
        ("mha", MODEL, None, set()),
        ("gqa", BATCH, None, set()),
        ("gqa", BOTH, None, set()),
        ("mqa", BATCH, None, set()),
        ("mqa", BOTH, BATCH, {"all-reduce"}),  # of the gradients of the one key head
    ],
    ids=["mha all batch", "mha heads", "gqa batch", "gqa both", "mqa batch", "mqa both"],
)
def test_attention_moves_nothing(mesh, heads, spec, key_spec, expected):
    """Batch and heads sharded, forward and backward."""
    arrays = attention_operands(heads, (8,))
    args = put(mesh, arrays, [spec, key_spec or spec, key_spec or spec, spec])
    found, got = collectives(functools.partial(with_gradients, attend), *args)
    assert found == expected
    assert_equal(got, with_gradients(attend, *arrays, implementation="xla"))
    for result, operand in zip(got, [args[0], *args[:3]], strict=True):
        assert result.sharding.is_equivalent_to(operand.sharding, 4)


@pytest.mark.parametrize(
    "specs",
    [
        [P(None, "data")] * 4,
        [P(None, None, None, "model")] * 4,
        [P("data", "model"), P("data"), P("data"), P("data", "model")],
        [P("data"), P(), P(None, "model"), P()],
        [P("data"), P("model"), P(None, None, "data"), P("model")],
        [P(None, None, ("data", "model")), P(), P(), P()],
    ],
    ids=["length", "head dim", "query length", "query batch", "at odds", "heads on all"],
)
def test_attention_with_any_sharding_is_right(mesh, specs):
    """Including 8 devices for the 4 key heads that the 8 query heads share."""
    arrays = attention_operands("gqa")
    function = functools.partial(with_gradients, attend)
    got = jax.jit(function)(*put(mesh, arrays, specs))
    assert_equal(got, with_gradients(attend, *arrays, implementation="xla"))


@pytest.mark.parametrize(
    "spec", [BATCH, P(None, "model"), P("data", "model"), P(("data", "model"))]
)
def test_norm_moves_the_gradient_of_scale_only(mesh, spec):
    arrays = random_normal(1, (8, 8, 32), (32,), (8, 8, 32), dtype="bfloat16")
    args = put(mesh, arrays, [spec, P(), spec])
    found, got = collectives(functools.partial(with_gradients, norm), *args)
    assert found == {"all-reduce"}
    assert_equal(got, with_gradients(norm, *arrays, implementation="xla"))
    assert collectives(norm, *args[:2])[0] == set()


@pytest.mark.parametrize("specs", [[P(None, None, "model"), P()], [BATCH, P("model")]])
def test_norm_with_a_sharded_width_is_right(mesh, specs):
    arrays = random_normal(1, (8, 8, 32), (32,), (8, 8, 32), dtype="float32")
    function = functools.partial(with_gradients, norm)
    got = jax.jit(function)(*put(mesh, arrays, [*specs, BATCH]))
    assert_equal(got, with_gradients(norm, *arrays, implementation="xla"))


@pytest.mark.parametrize("spec", [P("data"), P(None, "data"), P("data", "model")])
def test_vmap_moves_nothing(mesh, spec):
    """With the mapped axis sharded, the batch axis, or both."""
    arrays = attention_operands("mha", (2, B))
    args = put(mesh, arrays, [spec] * 4)
    function = jax.vmap(functools.partial(with_gradients, attend))
    with jax.set_mesh(mesh):
        found, got = collectives(function, *args)
    assert found == set()
    assert_equal(got, jax.vmap(functools.partial(with_gradients, attend))(*arrays))


def test_vmap_with_an_operand_that_is_not_mapped(mesh):
    query, key, value, dout = attention_operands("mha", (2, B))
    function = jax.vmap(functools.partial(with_gradients, attend), (0, None, 0, 0))
    arrays = query, key[0], value, dout
    with jax.set_mesh(mesh):
        got = jax.jit(function)(*put(mesh, arrays, [BATCH, P(), BATCH, BATCH]))
    assert_equal(got, function(*arrays))


def test_reference_moves_nothing(mesh):
    """implementation="xla", with options that only it has."""
    arrays = attention_operands("gqa")
    lengths = jnp.array([1, 5, 8, 0])
    bias = random_normal(2, (B, 8, T, S), dtype="float32")[0]

    def attend(query, key, value, bias, lengths):
        return jaxkern.dot_product_attention(
            query, key, value, bias, query_seq_lengths=lengths, key_value_seq_lengths=lengths
        )

    args = (*arrays[:3], bias, lengths)
    specs = [BOTH, BOTH, BOTH, P("data", "model"), BATCH]
    found, got = collectives(attend, *put(mesh, args, specs))
    assert found == set()
    assert_equal(got, attend(*args))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("explicit", [False, True])
def test_shard_map(check_vma, explicit):
    """Replicated operands too, whose gradients are sums over the devices."""
    mesh = make_mesh(AxisType.Explicit if explicit else AxisType.Auto)
    query, key, *rest = attention_operands("mha")
    x, scale = random_normal(1, (8, 4, 32), (32,), dtype="float32")

    def attention_loss(query, key, value, weights):
        key = jnp.broadcast_to(key, (query.shape[0], *key.shape[1:]))
        return (attend(query, key, value) * weights).astype(jnp.float32).sum()

    def norm_loss(x, scale):
        return jnp.sin(norm(x, scale)).sum()

    for loss, args, specs in (
        (attention_loss, (query, key[:1], *rest), (BOTH, MODEL, BOTH, BOTH)),
        (norm_loss, (x, scale), (P("data", "model"), P())),
    ):

        def total(*shards, loss=loss):
            return jax.lax.psum(loss(*shards), ("data", "model"))

        mapped = jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
        argnums = tuple(range(len(args)))
        got = jax.jit(jax.value_and_grad(mapped, argnums))(*put(mesh, args, specs))
        assert_equal(got, jax.value_and_grad(loss, argnums)(*args))


def check_partly_manual(mesh, manual, function, arrays, specs):
    """function(*arrays) in a shard_map over the axis `manual` of their leading axes."""
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P(manual), out_specs=P(manual), axis_names={manual}
    )
    found, got = collectives(mapped, *put(mesh, arrays, specs))
    assert_equal(got, function(*arrays))
    return found


@pytest.mark.parametrize("manual", ["data", "model"])
@pytest.mark.parametrize(
    ("heads", "spec", "key_spec", "expected"),
    [
        ("gqa", BATCH, BATCH, set()),
        ("gqa", BOTH, BOTH, set()),
        ("mqa", BOTH, BATCH, {"all-reduce"}),
        ("mha", P(("data", "model")), P(("data", "model")), set()),
        ("mha", P("data", "model"), P("data", "model"), {"all-gather"}),
    ],
    ids=["batch", "both", "mqa both", "all batch", "length"],
)
def test_attention_in_a_partly_manual_shard_map(manual, heads, spec, key_spec, expected):
    """One mesh axis is manual, and the compiler has the other one."""
    mesh = make_mesh(AxisType.Auto)
    if manual == "model":  # the roles of the axes exchanged
        exchanged = {
            "data": "model",
            "model": "data",
            None: None,
            ("data", "model"): ("model", "data"),
        }
        spec, key_spec = (P(*(exchanged[e] for e in s)) for s in (spec, key_spec))
    arrays = attention_operands(heads, (8,))
    function = functools.partial(with_gradients, attend)
    specs = [spec, key_spec, key_spec, spec]
    assert check_partly_manual(mesh, manual, function, arrays, specs) == expected


@pytest.mark.parametrize(
    ("heads", "spec", "key_spec"),
    [
        ("mqa", P("b", None, "c"), P("b")),
        ("mqa", P("b", None, "a"), P("b")),
        ("mqa", P(("b", "a"), None, "c"), P(("b", "a"))),
        ("mqa", P(("b", "c"), None, "a"), P(("b", "c"))),
        ("gqa", P(("b", "c"), None, "a"), P(("b", "c"), None, "a")),
        ("gqa", P("b", None, ("c", "a")), P("b", None, ("c", "a"))),
    ],
)
def test_attention_with_two_axes_left_to_the_compiler(heads, spec, key_spec):
    types = (AxisType.Auto,) * 3
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"), types, devices=jax.devices("cpu"))
    arrays = attention_operands(heads, (8,))
    function = functools.partial(with_gradients, attend)
    check_partly_manual(mesh, "b", function, arrays, [spec, key_spec, key_spec, spec])


@pytest.mark.parametrize("spec", [P("data"), P("data", None, "model"), P(("data", "model"))])
def test_attention_in_a_partly_manual_shard_map_of_an_explicit_mesh(spec):
    mesh = make_mesh(AxisType.Explicit)
    arrays = attention_operands("gqa", (8,))
    function = functools.partial(with_gradients, attend)
    check_partly_manual(mesh, "data", function, arrays, [spec] * 4)


@pytest.mark.parametrize(
    ("mesh_shape", "spec"),
    [
        ((2, 4, 1), P("b")),
        ((4, 2, 1), P("b", "a")),
        ((2, 2, 2), P("b", "a")),
        ((2, 2, 2), P("b", "c")),
        ((2, 2, 2), P(("b", "c"), "a")),
        ((2, 2, 2), P("b", None, "a")),
    ],
)
def test_norm_in_a_partly_manual_shard_map(mesh_shape, spec):
    """The gradient of the scale is a sum over the axes that the compiler has, and over "b"."""
    types = (AxisType.Auto,) * 3
    mesh = jax.make_mesh(mesh_shape, ("a", "b", "c"), types, devices=jax.devices("cpu"))
    arrays = random_normal(1, (8, 8, 32), (32,), dtype="float32")

    def loss(x, scale):
        return jnp.sin(norm(x, scale)).sum()

    def total(x, scale):
        return jax.lax.psum(loss(x, scale), "b")

    mapped = jax.shard_map(
        total, mesh=mesh, in_specs=(P("b"), P()), out_specs=P(), axis_names={"b"}
    )
    found, got = collectives(jax.grad(mapped, (0, 1)), *put(mesh, arrays, [spec, P()]))
    assert_equal(got, jax.grad(loss, (0, 1))(*arrays))
    assert found == ({"all-reduce"} if len(spec) < 3 else {"all-reduce", "all-gather"})


def test_batch_that_the_devices_do_not_divide():
    mesh = make_mesh(AxisType.Auto)
    arrays = random_normal(1, (3, 8, 32), (32,), (3, 8, 32), dtype="float32")

    def constrained(x, scale, dy):
        x, dy = (jax.lax.with_sharding_constraint(a, NamedSharding(mesh, BATCH)) for a in (x, dy))
        return with_gradients(norm, x, scale, dy)

    assert_equal(jax.jit(constrained)(*arrays), with_gradients(norm, *arrays))


def test_eager_calls_on_sharded_arrays(mesh):
    arrays = attention_operands("gqa")
    got = attend(*put(mesh, arrays, [BOTH] * 4)[:3])
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, BOTH), 4)
    assert_equal(got, attend(*arrays[:3], implementation="xla"))
