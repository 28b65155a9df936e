"""fp8_matmul on sharded arrays, on eight CPU devices: who exchanges what, and whose scales."""

import functools
from collections import Counter

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
from lowering import exchanges, sum_of

from jaxkern import fp8_matmul, quantize_weight
from jaxkern.ops import matmul

pytestmark = pytest.mark.usefixtures("kernels")

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


def products(recipe, **options):
    """y, dx and dw."""

    def run(x, w, dy):
        y, pull = jax.vjp(forward(recipe, **options), x, w)
        return y, *pull(dy)

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


def sharded(mesh, case):
    """x, w and dy."""
    x_spec, w_spec, *_ = SPECS[case]
    rows, width = (*x_spec, None)[0], (*w_spec, None, None)[1]
    specs = x_spec, w_spec, P(rows, width)
    return [put(mesh, a, spec) for a, spec in zip(arrays(), specs, strict=True)]


def check_exchanges(run, case, x, w, dy, *more):
    """The results: sharded like their operands, and one exchange for each that is a sum."""
    found, got = exchanges(run, x, w, dy, *more)
    for array, like in zip(got, (dy, x, w), strict=True):
        assert array.sharding.is_equivalent_to(like.sharding, 2)
    assert found == Counter(
        sum_of(a) for a, is_sum in zip(got, SPECS[case][3], strict=True) if is_sum
    )
    return got


@recipes_on_meshes
@pytest.mark.parametrize("case", SPECS)
def test_devices_exchange_sums_only(mesh, recipe, case):
    """And quantise the shards that they have."""
    got = check_exchanges(products(recipe), case, *sharded(mesh, case))
    assert_products(got, numpy_fp8_products(*arrays(), recipe, shards=SPECS[case][2]))


@pytest.mark.parametrize("case", ["tokens and K", "K and N"])
def test_the_reference_by_name_has_the_same_scales(case):
    run = jax.jit(products("row", implementation="xla"))
    wanted = numpy_fp8_products(*arrays(), "row", shards=SPECS[case][2])
    assert_products(run(*sharded(make_mesh(AxisType.Auto), case)), wanted)


@recipes_on_meshes
def test_batch_and_sequence_are_tokens(mesh, recipe):
    """Both stay sharded next to N."""
    x, w, dy = arrays()
    x, dy = x.reshape(8, 4, K), dy.reshape(8, 4, N)
    spec = P("data", "model")
    args = put(mesh, x, spec), put(mesh, w, P()), put(mesh, dy, spec)
    found, (y, dx, dw) = exchanges(products(recipe), *args)
    assert found == {sum_of(dw): 1}
    for array in (y, dx):
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
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
    zeros, over = np.zeros((8, 8)), P(None, "model")
    operands, specs = {
        "y": ((lhs, ones.T, zeros), (over, P("model"), P())),
        "dx": ((zeros, ones, lhs), (P(), over, over)),
        "dw": ((lhs.T, zeros, ones.T), (P("model"), P(), P("model"))),
    }[result]
    args = [put(mesh, jnp.asarray(a, "bfloat16"), s) for a, s in zip(operands, specs, strict=True)]
    got = jax.jit(products("tensor"))(*args)[("y", "dx", "dw").index(result)]
    assert got.dtype == jnp.bfloat16
    assert (got == 1).all()


@pytest.mark.parametrize("case", ["tokens", "N"])
def test_gradients_are_float32_only_where_they_are_sums(case, monkeypatch):
    """Data parallelism, where dw is one, writes dx once in its own dtype. With N it is dw."""
    mesh = make_mesh(AxisType.Auto)
    args = [a.astype("bfloat16") for a in sharded(mesh, case)]
    lowered = jax.jit(lambda *args: products("row")(*args)[1:]).lower(*args)
    dtypes, reference = [], matmul.by_reference

    def recorded(config, *operands):
        dtypes.append(config.dtype.name)
        return reference(config, *operands)

    monkeypatch.setattr(matmul, "by_reference", recorded)
    lowered.compile()  # which partitions
    wanted = {"tokens": ("bfloat16", "float32"), "N": ("float32", "bfloat16")}
    assert set(zip(dtypes[::2], dtypes[1::2], strict=True)) == {wanted[case]}  # of dx and dw


# --- Quantised weights ----------------------------------------------------------------------------


def put_weight(mesh, weight, spec):
    """A quantised weight sharded like w, and its scales with it where they have such an axis."""
    depth, width = (*spec, None, None)[:2]

    def side(array, spec):
        def own(a):
            return P(*(name if size > 1 else None for name, size in zip(spec, a.shape)))  # noqa: B905

        return jax.tree.map(lambda a: put(mesh, a, own(a)), array)

    return type(weight)(side(weight.forward, (width, depth)), side(weight.backward, (depth, width)))


@recipes_on_meshes
@pytest.mark.parametrize("case", ["tokens", "N", "K", "tokens and N", "K and N"])
def test_quantised_weights_stay_sharded(mesh, recipe, case):
    x, w, dy = arrays()
    weight = put_weight(mesh, quantize_weight(w, recipe), SPECS[case][1])

    def run(x, w, dy, weight):
        return products(recipe, quantized_weight=weight)(x, w, dy)

    got = check_exchanges(run, case, *sharded(mesh, case), weight)
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
    def run(weight, *args):
        return products("block", quantized_weight=weight)(*args)

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
        return products(recipe, quantized_weight=weight)(x, w, dy)

    got = jax.jit(run)(x, w, dy, weight)
    numpy = numpy_with_whole_weight if quantized else numpy_fp8_products
    assert_products(got, numpy(x, w, dy, recipe, shards=(2, 1, 1)))


@recipes_on_meshes
def test_vmap_over_sharded_examples(mesh, recipe):
    """The examples and their tokens stay where they are."""
    xs, w, dys = uneven(1, 4, M, K), uneven(2, K, N), uneven(3, 4, M, N)
    args = put(mesh, xs, P("data")), put(mesh, w, P()), put(mesh, dys, P("data"))

    def run(*args):
        return jax.vmap(products(recipe), (0, None, 0))(*args)[:2]

    with jax.set_mesh(mesh):
        found, (y, dx) = exchanges(run, *args)
    assert not found
    y, dx = np.asarray(y), np.asarray(dx)
    for i in range(4):
        assert_products((y[i], dx[i]), numpy_fp8_products(xs[i], w, dys[i], recipe)[:2])
