"""What fp8_matmul becomes for CUDA, seen from a machine without a GPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from fp8 import E4M3, E5M2, RECIPES
from lowering import attributes, cuda_text, custom_calls, types

from jaxkern import _ffi, fp8_matmul, quantize_weight

pytestmark = pytest.mark.usefixtures("kernels")

recipes = pytest.mark.parametrize("recipe", RECIPES)

M, K, N = 24, 256, 384
NAMES = {E4M3: "f8E4M3FN", E5M2: "f8E5M2"}
CODES = {"tensor": 0, "row": 1, "1x128": 2, "128x128": 3}


def operands(*lead):
    return jnp.zeros((*lead, M, K), "bfloat16"), jnp.zeros((K, N))


def gradient(function):
    return jax.grad(lambda *args: jnp.sin(function(*args).astype(jnp.float32)).sum(), (0, 1))


def products(function, *args):
    """The custom calls of scaled_matmul, in order."""
    lines = cuda_text(function, *args).splitlines()
    return [line for line in lines if "custom_call @jaxkern.scaled_matmul" in line]


@recipes
def test_calls(recipe):
    matmul = functools.partial(fp8_matmul, recipe=recipe)
    assert custom_calls(matmul, *operands()) == {"quantize": 2, "scaled_matmul": 1}
    # Backward: x^T, w, and dy in both orientations at once.
    assert custom_calls(gradient(matmul), *operands()) == {"quantize": 5, "scaled_matmul": 3}
    pullback = jax.vjp(matmul, *operands())[1]
    dy = jnp.zeros((M, N), "bfloat16")
    assert custom_calls(pullback, dy) == {"quantize": 3, "scaled_matmul": 2}


@recipes
def test_calls_with_a_quantised_weight(recipe):
    x, w = operands()
    weight = quantize_weight(w, recipe)
    matmul = functools.partial(fp8_matmul, recipe=recipe, quantized_weight=weight)
    assert custom_calls(matmul, x, w) == {"quantize": 1, "scaled_matmul": 1}
    assert custom_calls(gradient(matmul), x, w) == {"quantize": 3, "scaled_matmul": 3}
    made = functools.partial(quantize_weight, recipe=recipe)
    assert custom_calls(made, w) == {"quantize": 1}


@recipes
@pytest.mark.parametrize("gradient_format", [None, E4M3, E5M2])
def test_operands_of_the_products(recipe, gradient_format):
    """Formats, scalings and results of y, dx and dw."""
    fast = recipe != "block"
    options = {"recipe": recipe, "gradient_format": gradient_format, "fast_accumulation": fast}
    lines = products(gradient(functools.partial(fp8_matmul, **options)), *operands())
    activation, weight, default = RECIPES[recipe]
    e4m3, dy = NAMES[E4M3], NAMES[gradient_format or default]
    wanted = [
        (f"{M}x{K}x{e4m3}", f"{N}x{K}x{e4m3}", f"{M}x{N}xbf16", weight, fast),
        (f"{M}x{N}x{dy}", f"{K}x{N}x{e4m3}", f"{M}x{K}xbf16", weight, False),
        (f"{K}x32x{e4m3}", f"{N}x32x{dy}", f"{K}x{N}xf32", activation, False),
    ]
    for line, (lhs, rhs, out, rhs_scaling, is_fast) in zip(lines, wanted, strict=True):
        (found_lhs, found_rhs, *_), results = types(line)
        assert (found_lhs, found_rhs, results) == (f"1x{lhs}", f"1x{rhs}", [f"1x{out}"])
        assert attributes(line) == {
            "lhs_scaling": f"{CODES[activation]} : i32",
            "rhs_scaling": f"{CODES[rhs_scaling]} : i32",
            "fast_accumulation": str(is_fast).lower(),
        }


@recipes
def test_vmap_over_x_is_one_product(recipe):
    """The weight is quantised once and not repeated; dw is one product for each example."""
    matmul = functools.partial(fp8_matmul, recipe=recipe)
    forward, dx, dw = products(jax.vmap(gradient(matmul), (0, None)), *operands(5))
    assert types(forward)[0][:2] == [f"1x{5 * M}x{K}xf8E4M3FN", f"1x{N}x{K}xf8E4M3FN"]
    assert types(dx)[0][1] == f"1x{K}x{N}xf8E4M3FN"
    assert types(dw)[1] == [f"5x{K}x{N}xf32"]


@recipes
def test_a_policy_saves_the_result_by_name(recipe):
    def loss(x, w):
        y = fp8_matmul(x, w, recipe=recipe)
        return jnp.sin(jnp.sin(y).astype(jnp.float32)).sum()

    for names, forward_calls in (("jaxkern_fp8_matmul_out",), 1), ((), 2):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        grad = jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1))
        found = custom_calls(grad, *operands())
        assert found["scaled_matmul"] == forward_calls + 2


def test_the_reference_on_other_platforms_and_by_name(monkeypatch):
    args = operands()
    by_name = functools.partial(fp8_matmul, implementation="xla")
    assert custom_calls(gradient(by_name), *args) == {}
    assert "jaxkern." not in jax.jit(gradient(fp8_matmul)).lower(*args).as_text()
    monkeypatch.setattr(_ffi, "missing", lambda: "not built")
    assert custom_calls(gradient(lambda *args: fp8_matmul(*args)), *args) == {}


def test_empty_operands_call_nothing():
    assert custom_calls(gradient(fp8_matmul), jnp.zeros((0, K)), jnp.zeros((K, N))) == {}
