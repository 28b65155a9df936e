"""quantize and scaled_matmul on sharded arrays, on eight CPU devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8 import (
    BLOCKS,
    E4M3,
    SCALES,
    assert_same_fp8,
    numpy_quantize,
    numpy_scaled_matmul,
    random_operands,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import collectives

from jaxkern import quantize, scaled_matmul
from jaxkern.testing import random_normal

pytestmark = pytest.mark.usefixtures("kernels")

GATHERS = {"all-gather", "all-to-all", "collective-permute", "reduce-scatter"}


def make_mesh(kind):
    return jax.make_mesh((2, 4), ("data", "model"), (kind, kind), devices=jax.devices("cpu"))


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def mesh(request):
    return make_mesh(request.param)


def put(mesh, arrays, specs):
    return [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs, strict=True)]


# --- quantize -------------------------------------------------------------------------------------


def check_quantized(got, x, scaling):
    values, scale = numpy_quantize(x, E4M3, scaling)
    assert_same_fp8(got.values, values)
    np.testing.assert_array_equal(got.scale, scale)


@pytest.mark.parametrize(
    ("scaling", "orientation", "spec", "expected"),
    [
        ("row", "natural", P("data", "model"), set()),
        ("row", "natural", P(None, ("data", "model")), set()),
        ("1x128", "natural", P("data", "model"), set()),
        ("row", "both", P("data"), set()),
        ("1x128", "transposed", P(("model",)), set()),
        ("128x128", "both", P(("data",)), set()),
        ("tensor", "natural", P("data"), set()),
        ("tensor", "both", P("data", "model"), {"all-reduce"}),
        ("tensor", "both", P(None, "data", "model"), {"all-reduce"}),
    ],
)
def test_quantize_moves_the_amax_of_a_tensor_only(mesh, scaling, orientation, spec, expected):
    x = random_normal(1, (4, 256, 256), dtype="float32")[0]
    run = functools.partial(quantize, scaling=scaling, orientation=orientation)
    args = put(mesh, [x], [spec])
    found, got = collectives(run, *args)
    assert found == expected
    natural, transposed = got if orientation == "both" else (got, got)
    if orientation != "transposed":
        check_quantized(natural, x, scaling)
        assert natural.values.sharding.is_equivalent_to(args[0].sharding, 3)
    if orientation != "natural":
        check_quantized(transposed, x.swapaxes(-1, -2), scaling)


@pytest.mark.parametrize("scaling", list(BLOCKS))
@pytest.mark.parametrize("spec", [P("data", "model"), P(None, ("data", "model")), P(None, None)])
def test_quantize_of_any_sharding_is_right(mesh, scaling, spec):
    x = random_normal(2, (64, 264), dtype="bfloat16")[0]
    run = functools.partial(quantize, scaling=scaling, orientation="both")
    natural, transposed = jax.jit(run)(*put(mesh, [x], [spec]))
    check_quantized(natural, x, scaling)
    check_quantized(transposed, x.T, scaling)


@pytest.mark.parametrize("scaling", list(BLOCKS))
def test_reference_of_quantize_on_a_mesh(mesh, scaling):
    x = random_normal(3, (64, 256), dtype="float32")[0]
    run = functools.partial(quantize, scaling=scaling, implementation="xla")
    check_quantized(jax.jit(run)(*put(mesh, [x], [P("data", "model")])), x, scaling)


@pytest.mark.parametrize("scaling", list(BLOCKS))
def test_quantize_in_shard_map(scaling):
    """A tensor is what a device has."""
    mesh = make_mesh(AxisType.Auto)
    x = random_normal(4, (8, 2, 140), dtype="float32")[0]
    run = jax.shard_map(
        lambda x: quantize(x[0], scaling=scaling, orientation="both"),
        mesh=mesh,
        in_specs=P(("data", "model")),
        out_specs=P(("data", "model")),
    )
    natural, transposed = jax.jit(run)(x)
    check = numpy_quantize(x, E4M3, scaling)[0], numpy_quantize(x.swapaxes(1, 2), E4M3, scaling)[0]
    assert_same_fp8(natural.values, check[0].reshape(-1, 140))
    assert_same_fp8(transposed.values, check[1].reshape(-1, 2))


# --- scaled_matmul --------------------------------------------------------------------------------


def scale_spec(spec, scale):
    """The operand's spec, without what axes of size 1 cannot have."""
    padded = (*spec, *(None,) * (scale.ndim - len(spec)))
    return P(*(name if size > 1 else None for name, size in zip(padded, scale.shape, strict=True)))


def shard(mesh, operands, lhs_spec, rhs_spec, *bias_spec):
    lhs, rhs, lhs_scale, rhs_scale, *_ = operands
    specs = (
        lhs_spec,
        rhs_spec,
        scale_spec(lhs_spec, lhs_scale),
        scale_spec(rhs_spec, rhs_scale),
        *bias_spec,
    )
    return put(mesh, operands, specs)


def check_product(got, operands, dtype):
    bias = operands[4] if len(operands) > 4 else None
    wanted, size = numpy_scaled_matmul(*operands[:4], bias)
    assert (got.dtype, got.shape) == (dtype, wanted.shape)
    eps = {"float32": 0, "bfloat16": 2.0**-8}[dtype]
    error = np.abs(np.asarray(got).astype(np.float64) - wanted)
    assert (error <= 1e-6 * size + eps * np.abs(wanted)).all()


SPECS = {  # of lhs, rhs and out; batch in front
    "batch": (P(("data", "model")), P(("data", "model")), P(("data", "model")), set()),
    "M": (P(None, ("data", "model")), P(), P(None, ("data", "model")), set()),
    "N": (P(), P(None, "model"), P(None, None, "model"), set()),
    "M and N": (P(None, "data"), P(None, "model"), P(None, "data", "model"), set()),
    "K": (P(None, None, "model"), P(None, None, "model"), P(), {"all-reduce"}),
    "batch and K": (
        P("data", None, "model"),
        P("data", None, "model"),
        P("data"),
        {"all-reduce"},
    ),
    "M and K": (P(None, "data", "model"), P(None, None, "model"), P(None, "data"), {"all-reduce"}),
    "N and K": (
        P(None, None, "model"),
        P(None, "data", "model"),
        P(None, None, "data"),
        {"all-reduce"},
    ),
}


@pytest.mark.parametrize("scalings", [SCALES[1], *SCALES[3:]], ids="-".join)
@pytest.mark.parametrize("case", SPECS)
def test_scaled_matmul_moves_sums_over_k_only(mesh, scalings, case):
    lhs_spec, rhs_spec, out_spec, expected = SPECS[case]
    operands = random_operands(5, 16, 512, 512, *scalings, batch=(8,))
    args = shard(mesh, operands, lhs_spec, rhs_spec)
    found, got = collectives(scaled_matmul, *args)
    assert found == expected
    check_product(got, operands, "float32")
    assert got.sharding.is_equivalent_to(NamedSharding(mesh, out_spec), 3)


@pytest.mark.parametrize("scalings", [SCALES[1], SCALES[4]], ids="-".join)
@pytest.mark.parametrize("case", ["M and N", "M and K", "N and K"])
def test_bias_is_added_once_and_before_rounding(mesh, scalings, case):
    """With K sharded, to the sum of float32 shares: the result is as precise as on one device."""
    lhs_spec, rhs_spec, _, expected = SPECS[case]
    operands = random_operands(6, 16, 512, 512, *scalings)
    bias = 1000 * np.random.default_rng(7).standard_normal(512).astype(np.float32)
    operands = *operands, bias
    width = rhs_spec[1] if len(rhs_spec) > 1 else None
    args = shard(mesh, operands, P(*lhs_spec[1:]), P(*rhs_spec[1:]), P(width))

    def matmul(*operands):
        return scaled_matmul(*operands[:4], "bfloat16", bias=operands[4])

    found, got = collectives(matmul, *args)
    assert found == expected
    check_product(got, operands, "bfloat16")


def test_shares_are_summed_in_float32():
    """Shares that cancel: 256 + 1 on one device and -256 on another are 1, which sums of bfloat16
    shares miss."""
    mesh = make_mesh(AxisType.Auto)
    lhs, rhs = np.zeros((8, 128), np.float32), np.zeros((8, 128), np.float32)
    lhs[:, 0], lhs[:, 1], lhs[:, 64], rhs[:] = 256, 1, -256, 1
    scale = jnp.ones((1, 1))
    spec = P(None, "model")
    args = put(mesh, [lhs.astype(E4M3), rhs.astype(E4M3)], [spec, spec])
    matmul = jax.jit(functools.partial(scaled_matmul, preferred_element_type="bfloat16"))
    assert (matmul(*args, scale, scale) == 1).all()


@pytest.mark.parametrize("scalings", [SCALES[1], *SCALES[4:]], ids="-".join)
@pytest.mark.parametrize(
    ("lhs_spec", "rhs_spec"),
    [
        (P("data", "model"), P("model", "data")),
        (P("model"), P("model", None)),
        (P(None, ("data", "model")), P()),
        (P(), P(None, ("model", "data"))),
        (P(None, "data"), P(None, "model")),
    ],
)
@pytest.mark.parametrize("shape", [(8, 256, 512), (8, 136, 208)])
def test_any_sharding_is_right(mesh, scalings, lhs_spec, rhs_spec, shape):
    """At odds with one another, and over blocks that the devices do not divide."""
    operands = random_operands(8, *shape, *scalings)
    lhs, rhs, *scales = operands
    matmul = jax.jit(scaled_matmul)
    got = matmul(*put(mesh, (lhs, rhs), (lhs_spec, rhs_spec)), *put(mesh, scales, (P(), P())))
    check_product(got, operands, "float32")


@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", "model")])
def test_vmap_over_sharded_examples(mesh, spec):
    """The examples and their rows stay where they are."""
    lhs, _, lhs_scale, _ = random_operands(9, 8, 64, 256, "row", "row", batch=(4,))
    _, rhs, _, rhs_scale = random_operands(9, 8, 64, 256, "row", "row")
    args = put(mesh, (lhs, rhs, lhs_scale, rhs_scale), (spec, P(), spec, P()))
    with jax.set_mesh(mesh):
        found, got = collectives(jax.vmap(scaled_matmul, (0, None, 0, None)), *args)
    assert found == set()
    check_product(got, (lhs, np.stack([rhs] * 4), lhs_scale, np.stack([rhs_scale] * 4)), "float32")


@pytest.mark.parametrize("scalings", [SCALES[0], SCALES[4]], ids="-".join)
def test_reference_of_scaled_matmul_on_a_mesh(mesh, scalings):
    operands = random_operands(10, 16, 512, 512, *scalings)
    args = shard(mesh, operands, P("data", "model"), P(None, "model"))
    matmul = jax.jit(functools.partial(scaled_matmul, implementation="xla"))
    check_product(matmul(*args), operands, "float32")


@pytest.mark.parametrize("scalings", SCALES, ids="-".join)
@pytest.mark.parametrize("manual", [{"model"}, {"data", "model"}], ids=["partly", "wholly"])
def test_shard_map_over_k(scalings, manual):
    """Where the caller adds up."""
    mesh = make_mesh(AxisType.Auto)
    operands = random_operands(11, 16, 512, 512, *scalings)
    spec = P(None, "model")
    specs = (spec, spec, *(scale_spec(spec, scale) for scale in operands[2:]))
    summed = jax.shard_map(
        lambda *shards: jax.lax.psum(scaled_matmul(*shards), "model"),
        mesh=mesh,
        in_specs=specs,
        out_specs=P(),
        axis_names=manual,
    )
    check_product(jax.jit(summed)(*put(mesh, operands, specs)), operands, "float32")


def test_k_left_to_the_compiler_in_a_partly_manual_shard_map():
    mesh = make_mesh(AxisType.Auto)
    operands = random_operands(12, 16, 512, 512, "1x128", "128x128", batch=(2,))
    spec = P("data", None, "model")
    matmul = jax.shard_map(
        lambda *shards: scaled_matmul(*shards, "bfloat16"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
    )
    found, got = collectives(matmul, *put(mesh, operands, [spec] * 4))
    assert not found & GATHERS
    check_product(got, operands, "bfloat16")
