"""What quantize to four bits becomes for CUDA, and on CPU devices by the kernels' path."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_bit import FORMATS
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import attributes, custom_call_lines, custom_calls, exchanges, types

from jaxkern import _ffi, quantize

pytestmark = pytest.mark.usefixtures("kernels")

formats = pytest.mark.parametrize("name", FORMATS)
NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
DTYPES = {"nvfp4": ("f4E2M1FN", "f8E4M3FN"), "mxfp4": ("f4E2M1FN", "f8E8M0FNU")}


def run(name, x, **options):
    return quantize(x, name.split()[0], **FORMATS[name], **options)


def calls(name):
    return {"quantize_four_bit": 1} | ({"row_amax": 1} if name == "nvfp4" else {})


def block_of(name):
    return {"nvfp4": 16, "mxfp4": 32}.get(name) or FORMATS[name]["group_size"]


def normal(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)


def assert_same(got, wanted):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


@formats
@pytest.mark.parametrize("dtype", NAMES)
def test_calls(name, dtype):
    x, quantized = jnp.zeros((6, 256), dtype), functools.partial(run, name)
    assert custom_calls(quantized, x) == calls(name)
    lines = custom_call_lines(quantized, x)
    line = lines["quantize_four_bit"]
    number = ("nvfp4", "mxfp4", "int4").index(name.split()[0])
    assert attributes(line) == {"format": f"{number} : i32"}
    values, scale = DTYPES.get(name, ("i4", "bf16"))
    blocks = f"1x6x{256 // block_of(name)}x"
    assert types(line) == (
        [f"1x6x256x{NAMES[dtype]}", f"{int(name == 'nvfp4')}xf32"],
        [f"1x6x256x{values}", blocks + scale, blocks + "i4" if "zero" in name else "0xi4"],
    )
    if name == "nvfp4":
        assert types(lines["row_amax"]) == ([f"6x256x{NAMES[dtype]}"], ["6xf32"])


@formats
def test_of_a_batch(name):
    """All rows are in one call; the matrices are told apart for their tensor_scale alone."""
    x = jnp.zeros((2, 3, 5, 128), "bfloat16")
    quantized = functools.partial(run, name)
    for function in (quantized, jax.vmap(jax.vmap(quantized))):
        assert custom_calls(function, x) == calls(name)
        operands, _ = types(custom_call_lines(function, x)["quantize_four_bit"])
        matrices = ["6x5x128xbf16", "6xf32"] if name == "nvfp4" else ["1x30x128xbf16", "0xf32"]
        assert operands == matrices


@formats
def test_what_the_kernel_does_not_do(name, monkeypatch):
    x, key = normal(4, 128), jax.random.key(0)
    for options, reason in (
        ({"search": True}, "search is True, wanted False"),
        ({"key": key}, "key is given, wanted None"),
    ):
        assert custom_calls(functools.partial(run, name, **options), x) == {}
        with pytest.raises(NotImplementedError, match=f"'cuda': {reason}"):
            run(name, x, implementation="cuda", **options)
    assert custom_calls(functools.partial(run, name, implementation="xla"), x) == {}
    with pytest.raises(NotImplementedError, match="lowered for cpu, wanted cuda only"):
        run(name, x, implementation="cuda")
    monkeypatch.setattr(_ffi, "missing", lambda: "not built")
    assert custom_calls(lambda x: run(name, x), x) == {}


@formats
@pytest.mark.parametrize("shape", [(6, 128), (2, 3, 4, 128), (2, 0, 128), (0, 4, 128)])
def test_on_other_platforms(name, shape):
    """The path of the kernels ends in the reference, and gives what it does."""
    x = normal(*shape)
    wanted = run(name, x, implementation="xla")
    assert_same(run(name, x), wanted)
    if 0 not in shape:
        assert_same(
            jax.vmap(functools.partial(run, name))(x[None]), jax.tree.map(lambda a: a[None], wanted)
        )
    with pytest.raises(NotImplementedError, match="quantize has no derivative"):
        jax.grad(lambda x: run(name, x).dequantize().sum())(x)


@formats
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P(("x", "y")), P("x", "y")])
def test_sharded(name, kind, spec):
    """Rows stay where they are: devices exchange the largest magnitude of a matrix alone."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), (kind,) * 2, devices=jax.devices("cpu"))
    x = normal(8, 16, 128)
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        found, got = exchanges(functools.partial(run, name), sharded)
    across = name == "nvfp4" and len(spec) == 2
    assert found == ({f"all-reduce f32 {2 if spec[0] else 8}": 1} if across else {})
    assert_same(got, run(name, x))
    assert got.values.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


def test_in_shard_map():
    """Each device has matrices of its own."""
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Auto,), devices=jax.devices("cpu")[:4])
    x = normal(8, 16, 128)
    got = jax.shard_map(
        functools.partial(run, "nvfp4"), mesh=mesh, in_specs=P("x"), out_specs=P("x")
    )(x)
    assert_same(got, run("nvfp4", x))


@formats
def test_export(name):
    """Of any number of rows, for both platforms."""
    (rows,) = jax.export.symbolic_shape("rows")
    targets = [jax.export.DisabledSafetyCheck.custom_call(f"jaxkern.{t}") for t in calls(name)]

    def leaves(x):
        return jax.tree.leaves(run(name, x))

    exported = jax.export.export(
        jax.jit(leaves), platforms=["cpu", "cuda"], disabled_checks=targets
    )(jax.ShapeDtypeStruct((2, rows, 128), "bfloat16"))
    assert exported.mlir_module().count("custom_call @jaxkern.") == len(targets)
    x = normal(2, 6, 128, dtype="bfloat16")
    assert_same(jax.export.deserialize(exported.serialize()).call(x), leaves(x))
