"""fp8_matmul on sharded arrays, on eight CPU devices: who exchanges what, and whose scales."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8 import (
    E4M3,
    RECIPES,
    assert_products,
    numpy_fp8_products,
    numpy_quantize,
    numpy_spread,
    uneven,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import COLLECTIVES, collectives

from jaxkern import fp8_matmul, quantize_weight
from jaxkern.ops import matmul

pytestmark = pytest.mark.usefixtures("kernels")

GATHERS = set(COLLECTIVES) - {"all-reduce"}
SUMS = {"all-reduce"}
M, K, N = 32, 512, 512

recipes = pytest.mark.parametrize("recipe", RECIPES)
recipes_on_meshes = pytest.mark.parametrize(
    ("mesh", "recipe"),
    [*((AxisType.Auto, recipe) for recipe in RECIPES), (AxisType.Explicit, "block")],
    indirect=["mesh"],
    ids=[*RECIPES, "explicit block"],
)


def make_mesh(kind):
    return jax.make_mesh((2, 4), ("data", "model"), (kind, kind), devices=jax.devices("cpu"))


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return make_mesh(request.param)


def put(mesh, x, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


def arrays():
    return uneven(1, M, K), uneven(2, K, N), uneven(3, M, N)


def forward(recipe, **options):
    return lambda x, w: fp8_matmul(x, w, recipe=recipe, **options)


def backward(recipe, wrt, **options):
    """The gradient of x (0) or of w (1)."""

    def run(x, w, dy):
        _, pull = jax.vjp(forward(recipe, **options), x, w)
        return pull(dy)[wrt]

    return run


SPECS = {  # of x and w; shards of M, K and N; which of y, dx and dw are sums over devices
    "tokens": (P(("data", "model")), P(), (8, 1, 1), (False, False, True)),
    "N": (P(), P(None, "model"), (1, 1, 4), (False, True, False)),
    "K": (P(None, "model"), P("model"), (1, 4, 1), (True, False, False)),
    "tokens and N": (P("data"), P(None, "model"), (2, 1, 4), (False, True, True)),
    "tokens and K": (P("data", "model"), P("model"), (2, 4, 1), (True, False, True)),
    "K and N": (P(None, "data"), P("data", "model"), (1, 2, 4), (True, True, False)),
    "nothing": (P(), P(), (1, 1, 1), (False, False, False)),
}


@recipes_on_meshes
@pytest.mark.parametrize("case", SPECS)
def test_devices_exchange_sums_only(mesh, recipe, case):
    """And quantise the shards that they have."""
    x_spec, w_spec, shards, sums = SPECS[case]
    x, w, dy = arrays()
    rows, width = (*x_spec, None)[0], (*w_spec, None, None)[1]
    args = put(mesh, x, x_spec), put(mesh, w, w_spec)
    dy_arg = put(mesh, dy, P(rows, width))
    runs = (
        (forward(recipe), args),
        (backward(recipe, 0), (*args, dy_arg)),
        (backward(recipe, 1), (*args, dy_arg)),
    )
    got = []
    for (run, operands), is_sum, like in zip(runs, sums, (dy_arg, *args), strict=True):
        found, array = collectives(run, *operands)
        assert found == (SUMS if is_sum else set())
        assert array.sharding.is_equivalent_to(like.sharding, 2)
        got.append(array)
    assert_products(got, numpy_fp8_products(x, w, dy, recipe, shards=shards))


@pytest.mark.parametrize("case", ["tokens and K", "K and N"])
def test_the_reference_by_name_has_the_same_scales(case):
    x_spec, w_spec, shards, _ = SPECS[case]
    mesh = make_mesh(AxisType.Auto)
    x, w, dy = arrays()
    args = put(mesh, x, x_spec), put(mesh, w, w_spec), dy
    run = jax.jit(lambda *args: [backward("row", i, implementation="xla")(*args) for i in (0, 1)])
    wanted = numpy_fp8_products(x, w, dy, "row", shards=shards)
    assert_products(run(*args), wanted[1:])


@recipes
def test_batch_and_sequence_are_tokens(mesh, recipe):
    """Both stay sharded next to N."""
    x, w, dy = arrays()
    x, dy = x.reshape(8, 4, K), dy.reshape(8, 4, N)
    spec = P("data", "model")
    found, y = collectives(forward(recipe), put(mesh, x, spec), put(mesh, w, P()))
    assert found == set()
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    found, dw = collectives(
        backward(recipe, 1), put(mesh, x, spec), put(mesh, w, P()), put(mesh, dy, spec)
    )
    assert found == SUMS
    shares = [
        numpy_fp8_products(
            *(a[i : i + 4, j].reshape(4, -1) if a.ndim == 3 else a for a in (x, w, dy)),
            recipe,
        )[2]
        for i in (0, 4)
        for j in range(4)
    ]
    assert_products([dw], [[sum(parts) for parts in zip(*shares, strict=True)]])


@pytest.mark.parametrize("result", ["y", "dx", "dw"])
def test_sums_are_float32_before_they_are_rounded(result):
    """Shares that cancel: 256 + 1 on one device and -256 on another are 1, which sums of bfloat16
    shares miss."""
    mesh = make_mesh(AxisType.Auto)
    lhs = np.zeros((8, 128), np.float32)
    lhs[:, 0], lhs[:, 1], lhs[:, 64] = 256, 1, -256
    ones = np.ones((8, 128), np.float32)
    over = "model"
    if result == "y":
        run, operands = forward("tensor"), (lhs, ones.T)
        specs = P(None, over), P(over)
    elif result == "dx":
        run, operands = backward("tensor", 0), (np.zeros((8, 8)), ones, lhs)
        specs = P(), P(None, over), P(None, over)
    else:
        run, operands = backward("tensor", 1), (lhs.T, np.zeros((8, 8)), ones.T)
        specs = P(over), P(), P(over)
    args = [put(mesh, jnp.asarray(a, "bfloat16"), s) for a, s in zip(operands, specs, strict=True)]
    got = jax.jit(run)(*args)
    assert got.dtype == jnp.bfloat16
    assert (got == 1).all()


@pytest.mark.parametrize("case", ["tokens", "N"])
def test_the_gradient_of_x_is_float32_only_where_it_is_a_sum(case, monkeypatch):
    """Data parallelism, where dw is one, writes dx once in its own dtype."""
    mesh = make_mesh(AxisType.Auto)
    x_spec, w_spec, *_ = SPECS[case]
    x, w, dy = (jnp.asarray(a, "bfloat16") for a in arrays())
    dy_spec = P(x_spec[0]) if x_spec else P(None, w_spec[1])
    args = put(mesh, x, x_spec), put(mesh, w, w_spec), put(mesh, dy, dy_spec)
    lowered = jax.jit(lambda *args: [backward("row", i)(*args) for i in (0, 1)]).lower(*args)
    dtypes, reference = [], matmul.by_reference

    def recorded(config, *operands):
        dtypes.append(config.dtype.name)
        return reference(config, *operands)

    monkeypatch.setattr(matmul, "by_reference", recorded)
    lowered.compile()  # which partitions
    assert ("bfloat16" in dtypes) == (case == "tokens") and "float32" in dtypes


# --- Quantised weights ----------------------------------------------------------------------------


QUANTISED = {  # of x and w; which of y, dx and dw are sums over devices
    "tokens": (P(("data", "model")), P(), (False, False, True)),
    "N": (P(), P(None, "model"), (False, True, False)),
    "K": (P(None, "model"), P("model"), (True, False, False)),
    "tokens and N": (P("data"), P(None, "model"), (False, True, True)),
    "K and N": (P(None, "data"), P("data", "model"), (True, True, False)),
}


def put_weight(mesh, weight, spec):
    """A quantised weight sharded like w, and its scales with it where they have such an axis."""
    depth, width = (*spec, None, None)[:2]

    def side(array, spec):
        def own(a):
            return P(*(name if size > 1 else None for name, size in zip(spec, a.shape)))  # noqa: B905

        return jax.tree.map(lambda a: put(mesh, a, own(a)), array)

    return type(weight)(side(weight.forward, (width, depth)), side(weight.backward, (depth, width)))


@recipes_on_meshes
@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_weights_stay_sharded(mesh, recipe, case):
    x_spec, w_spec, sums = QUANTISED[case]
    x, w, dy = arrays()
    rows, width = (*x_spec, None)[0], (*w_spec, None, None)[1]
    args = put(mesh, x, x_spec), put(mesh, w, w_spec), put(mesh, dy, P(rows, width))
    weight = put_weight(mesh, quantize_weight(w, recipe), w_spec)
    got = []
    for wrt, is_sum, like in zip((None, 0, 1), sums, (args[2], *args[:2]), strict=True):

        def run(weight, x, w, dy, wrt=wrt):
            options = {"quantized_weight": weight}
            if wrt is None:
                return forward(recipe, **options)(x, w)
            return backward(recipe, wrt, **options)(x, w, dy)

        found, array = collectives(run, weight, *args)
        assert found == (SUMS if is_sum else set())
        assert array.sharding.is_equivalent_to(like.sharding, 2)
        got.append(array)
    assert_products(got, numpy_with_whole_weight(x, w, dy, recipe, SPECS[case][2]))


def numpy_with_whole_weight(x, w, dy, recipe, shards):
    """numpy_fp8_products with scales of all of w. Values that are quantised, e4m3 times a power of
    two, stay as they are when a part of them is quantised again."""

    def quantised(w):
        values, scale = numpy_quantize(w, E4M3, RECIPES[recipe][1])
        return values.astype(np.float64) * numpy_spread(scale, w.shape)

    y, _, dw = numpy_fp8_products(x, quantised(w.T).T, dy, recipe, shards=shards)
    return y, numpy_fp8_products(x, quantised(w), dy, recipe, shards=shards)[1], dw


@pytest.mark.parametrize(
    ("k", "n", "shards"), [(512, 384, (2, 4, 1)), (200, 512, (2, 1, 1)), (384, 200, (2, 1, 1))]
)
def test_quantised_blocks_that_devices_do_not_divide(mesh, k, n, shards):
    """Are made whole, and right."""
    x, w, dy = uneven(1, M, k), uneven(2, k, n), uneven(3, M, n)
    args = put(mesh, x, P("data", "model")), put(mesh, w, P("model", "data"))
    weight = quantize_weight(w, "block")

    @jax.jit
    def run(weight, x, w, dy):
        y, pull = jax.vjp(forward("block", quantized_weight=weight), x, w)
        return y, *pull(dy)

    got = run(put_weight(mesh, weight, P()), *args, put(mesh, dy, P("data")))
    assert_products(got, numpy_with_whole_weight(x, w, dy, "block", shards))


# --- shard_map and vmap ---------------------------------------------------------------------------


@recipes
@pytest.mark.parametrize("manual", [{"data"}, {"data", "model"}], ids=["partly", "wholly"])
@pytest.mark.parametrize("quantized", [False, True], ids=["w", "quantized"])
def test_shard_map_over_tokens(recipe, manual, quantized):
    """The gradient of a replicated weight is the sum over the devices."""
    mesh = make_mesh(AxisType.Auto)
    x, w, dy = arrays()
    weight = quantize_weight(w, recipe) if quantized else None

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P(), P("data"), P()),
        out_specs=(P("data"), P("data"), P()),
        axis_names=manual,
    )
    def run(x, w, dy, weight):
        y, pull = jax.vjp(forward(recipe, quantized_weight=weight), x, w)
        return y, *pull(dy)

    got = jax.jit(run)(x, w, dy, weight)
    numpy = numpy_with_whole_weight if quantized else numpy_fp8_products
    assert_products(got, numpy(x, w, dy, recipe, shards=(2, 1, 1)))


@recipes
def test_vmap_over_sharded_examples(mesh, recipe):
    """The examples and their tokens stay where they are."""
    xs, w, dys = uneven(1, 4, M, K), uneven(2, K, N), uneven(3, 4, M, N)
    args = put(mesh, xs, P("data")), put(mesh, w, P()), put(mesh, dys, P("data"))
    with jax.set_mesh(mesh):
        found, y = collectives(jax.vmap(forward(recipe), (0, None)), *args[:2])
        found_dx, dx = collectives(jax.vmap(backward(recipe, 0), (0, None, 0)), *args)
    assert found == found_dx == set()
    y, dx = np.asarray(y), np.asarray(dx)
    for i in range(4):
        assert_products((y[i], dx[i]), numpy_fp8_products(xs[i], w, dys[i], recipe)[:2])
