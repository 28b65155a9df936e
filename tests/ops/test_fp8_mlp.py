"""fp8_mlp: the same as its parts one after the other."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8 import E4M3, RECIPES, assert_near, uneven
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import custom_calls, exchanges, sum_of

from jaxkern.ops.fp8 import fp8_matmul
from jaxkern.ops.fp8_mlp import fp8_mlp
from jaxkern.ops.norm import rms_norm
from jaxkern.reference.activation import swiglu
from jaxkern.testing import relative_error

pytestmark = pytest.mark.usefixtures("kernels")

recipes = pytest.mark.parametrize("recipe", RECIPES)

M, K, F, N = 24, 136, 260, 72


def arrays(m=M, k=K, f=F, n=N, dtype="bfloat16"):
    """x, scale, gate, up, down and dy. Products are of order 1, where SwiGLU is not linear."""
    rng = np.random.default_rng(m)
    x, scale = uneven(1, m, k), rng.uniform(0.5, 2, k).astype(np.float32)
    gate, up = (rng.standard_normal((k, f)).astype(np.float32) / k**0.5 for _ in range(2))
    down = rng.standard_normal((f, n)).astype(np.float32)
    return [jnp.asarray(x, dtype), scale, gate, up, down, jnp.asarray(uneven(2, m, n), dtype)]


def composition(x, scale, gate, up, down, **options):
    z = x if scale is None else rms_norm(x, scale)
    h = swiglu(*(fp8_matmul(z, w, **options) for w in (gate, up)))
    return fp8_matmul(h, down, **options)


def results(mlp, x, scale, gate, up, down, dy):
    """y and all gradients."""
    y, pull = jax.vjp(mlp, x, scale, gate, up, down)
    return y, pull(dy)


def check(got, wanted, limit=2e-3):
    """Equal, but for roundings that tip an FP8 value here and there."""
    assert_near(got, wanted, limit)


@functools.cache
def of_the_composition(recipe, dtype):
    parts = functools.partial(composition, recipe=recipe)
    return jax.jit(functools.partial(results, parts))(*arrays(dtype=dtype))


@recipes
@pytest.mark.parametrize(
    ("implementation", "dtype"), [(None, "bfloat16"), (None, "float32"), ("xla", "bfloat16")]
)
def test_is_the_composition(recipe, implementation, dtype):
    mlp = functools.partial(fp8_mlp, recipe=recipe, implementation=implementation)
    got = jax.jit(functools.partial(results, mlp))(*arrays(dtype=dtype))
    check(got, of_the_composition(recipe, dtype), 2e-3 if dtype == "float32" else 1e-2)
    assert got[1][2].dtype == jnp.float32


def test_without_the_norm_and_with_another_gradient_format():
    x, _, *rest = arrays(dtype="float32")
    options = {"gradient_format": E4M3}
    got, wanted = (
        jax.jit(functools.partial(results, functools.partial(f, **options)))(x, None, *rest)
        for f in (fp8_mlp, composition)
    )
    check(got, wanted)


def test_epsilon():
    x, scale, *weights, _ = arrays(dtype="float32")

    @jax.jit
    def run(x, scale, *weights):
        by_hand = fp8_mlp(rms_norm(x, scale, epsilon=10.0), None, *weights)
        other = fp8_mlp(x, scale, *weights)
        return fp8_mlp(x, scale, *weights, epsilon=10.0), by_hand, other

    got, by_hand, other = run(x, scale, *weights)
    check(got, by_hand)
    assert relative_error(got, other) > 0.1


@recipes
@pytest.mark.parametrize("shared", [True, False], ids=["shared weights", "own weights"])
def test_vmap(recipe, shared):
    many = [jnp.stack([a, 2 * a, a[..., ::-1]]) for a in arrays(dtype="float32")]
    axes = [0, None, *(None if shared else 0,) * 3, 0]
    operands = [a if axis == 0 else a[0] for a, axis in zip(many, axes, strict=True)]
    run = jax.jit(functools.partial(results, functools.partial(fp8_mlp, recipe=recipe)))
    got = jax.vmap(run, axes)(*operands)
    examples = [
        run(*(a[i] if axis == 0 else a for a, axis in zip(operands, axes, strict=True)))
        for i in range(3)
    ]
    check(got, jax.tree.map(lambda *leaves: jnp.stack(leaves), *examples), 1e-3)


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), (kind, kind), devices=jax.devices("cpu"))


SPECS = {  # of x, gate and down; which of y, dx and the gradients of scale and weights are sums
    "tokens": (P(("data", "model")), P(), P(), (False, False, True)),
    "F": (P(), P(None, "model"), P("model"), (True, True, False)),
    "tokens and F": (P("data"), P(None, "model"), P("model"), (True, True, True)),
}


@pytest.mark.parametrize(
    ("case", "kind"),
    [*((case, AxisType.Auto) for case in SPECS), ("tokens and F", AxisType.Explicit)],
    ids=[*SPECS, "explicit tokens and F"],
)
def test_devices_exchange_sums_only(case, kind):
    x_spec, gate_spec, down_spec, sums = SPECS[case]
    operands = arrays(32, 128, 512, 128, dtype="float32")
    specs = x_spec, P(), gate_spec, gate_spec, down_spec, x_spec
    mesh = make_mesh(kind)
    args = [
        jax.device_put(a, NamedSharding(mesh, spec))
        for a, spec in zip(operands, specs, strict=True)
    ]

    def run(*operands):
        y, gradients = results(fp8_mlp, *operands)
        return y, *gradients

    found, got = exchanges(run, *args)
    y_is_sum, dx_is_sum, dw_is_sum = sums
    are_sums = y_is_sum, dx_is_sum, *(dw_is_sum,) * 4
    assert found == Counter(sum_of(a) for a, is_sum in zip(got, are_sums, strict=True) if is_sum)
    # With F sharded each device quantises h with scales of its own.
    check(got, jax.jit(run)(*operands), 6e-2)


def test_shard_map_over_tokens():
    """The gradients of replicated weights are sums over the devices."""
    operands = arrays(dtype="float32")
    run = functools.partial(results, functools.partial(fp8_mlp, recipe="row"))
    tokens, whole = P("data"), P()
    mapped = jax.shard_map(
        run,
        mesh=make_mesh(),
        in_specs=(tokens, *(whole,) * 4, tokens),
        out_specs=(tokens, (tokens, *(whole,) * 4)),
    )
    check(jax.jit(mapped)(*operands), jax.jit(run)(*operands), 6e-2)


@recipes
def test_calls(recipe):
    operands = arrays()
    mlp = functools.partial(fp8_mlp, recipe=recipe)
    fused = {"quantize_rms_norm": 1, "quantize_swiglu": 1, "quantize": 3}
    forward = {"rms_norm_fwd": 1, "quantize": 5} if recipe == "tensor" else fused
    assert custom_calls(mlp, *operands[:-1]) == {"scaled_matmul": 3, **forward}
    found = custom_calls(functools.partial(results, mlp), *operands)
    assert found["scaled_matmul"] == 9
    assert found["rms_norm_bwd"] == 1
    if recipe != "tensor":
        names = "quantize_rms_norm", "quantize_swiglu", "quantize_swiglu_grad"
        assert [found[name] for name in names] == [2, 2, 1]
        assert "rms_norm_fwd" not in found


def test_a_policy_saves_what_is_kept():
    x, scale, *weights, _ = arrays()

    def loss(x):
        return jnp.sin(fp8_mlp(x, scale, *weights).astype(jnp.float32)).sum()

    names = [f"jaxkern_fp8_mlp_{name}" for name in ("out", "gate", "up")]
    names.append("jaxkern_rms_norm_rstd")
    for saved, products in ((names, 9), (names[:-1], 12), ([], 12)):
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        grad = jax.value_and_grad(jax.checkpoint(loss, policy=policy))
        assert custom_calls(grad, x)["scaled_matmul"] == products


def test_second_derivatives_raise():
    x, scale, *weights, _ = arrays()

    def loss(x):
        return jnp.sin(fp8_mlp(x, None, *weights).astype(jnp.float32)).sum()

    with pytest.raises(NotImplementedError, match="^fp8_mlp: it can be differentiated once"):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(x)


WRONG = {
    "x": ({"x": np.zeros((4, 8), int)}, "x has dtype int32, wanted one of bfloat16"),
    "gate": ({"gate": np.zeros((9, 16))}, r"gate has shape \(9, 16\), wanted \(8, N\) for x's"),
    "up": ({"up": np.zeros((8, 17))}, r"up has shape \(8, 17\), wanted gate's \(8, 16\)"),
    "down": ({"down": np.zeros((8, 16))}, r"down has shape \(8, 16\), wanted \(16, N\) for gate"),
    "scale": ({"scale": np.zeros(9)}, r"scale has shape \(9,\), wanted x's last axis \(8,\)"),
    "recipe": ({"recipe": "1x128"}, "recipe is '1x128', wanted one of 'tensor', 'row', 'block'"),
    "format": ({"gradient_format": "int8"}, "gradient_format is 'int8', wanted one of float8_e4m3"),
    "implementation": ({"implementation": "triton"}, "fp8_mlp: implementation is 'triton', wanted"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case):
    options, message = WRONG[case]
    shapes = {"x": (4, 8), "scale": (8,), "gate": (8, 16), "up": (8, 16), "down": (16, 8)}
    given = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()} | options
    with pytest.raises(ValueError, match=message):
        fp8_mlp(**given)
