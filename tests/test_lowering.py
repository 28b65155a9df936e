"""What the ops become for CUDA, seen from a machine without a GPU: the calls of the kernels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import cuda_text, custom_call_lines, custom_calls

import jaxkern
from jaxkern import _ffi
from jaxkern.testing import random_normal

pytestmark = pytest.mark.usefixtures("kernels")

B, T, S, N, K, H = 2, 130, 70, 4, 2, 64


def attention_gradient(query, key, value, **options):
    def loss(*operands):
        out, lse = jaxkern.dot_product_attention(*operands, return_residual=True, **options)
        return out.astype(jnp.float32).sum() + lse.sum()

    return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)


def norm_gradient(x, scale, **options):
    def loss(*operands):
        return jaxkern.rms_norm(*operands, **options).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1))(x, scale)


def types(line):
    """Operand and result types of a custom call, as ["2x130x4x64xbf16", ...]."""
    operands, results = re.search(r": \(([^)]*)\) -> \(([^)]*)\)", line).groups()
    return re.findall(r"tensor<(\S+)>", operands), re.findall(r"tensor<(\S+)>", results)


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "bf16"), ("float16", "f16")])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_calls(dtype, name, is_causal):
    operands = random_normal(1, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype=dtype)
    lines = custom_call_lines(
        functools.partial(attention_gradient, scale=0.25, is_causal=is_causal), *operands
    )
    assert set(lines) == {"attention_fwd", "attention_bwd"}
    flag = str(is_causal).lower()
    for line in lines.values():
        assert f"mhlo.backend_config = {{is_causal = {flag}, scale = 2.500000e-01 : f32}}" in line
        assert "has_side_effect" not in line
    query, key = f"{B}x{T}x{N}x{H}x{name}", f"{B}x{S}x{K}x{H}x{name}"
    lse = f"{B}x{N}x{T}xf32"
    counter = "1xi32"  # from which the blocks draw their tiles
    assert types(lines["attention_fwd"]) == ([query, key, key], [query, lse, counter])
    padded = f"{B}x{N}x256"  # the length in whole tiles of 128
    assert types(lines["attention_bwd"]) == (
        [query, key, key, query, lse, query, lse],
        [query, key, key, f"{padded}xf32", f"{padded}xf32", f"{padded}x{H}xf32"],
    )


@pytest.mark.parametrize(
    ("scale", "text"),
    [(None, "1.250000e-01"), (1, "1.000000e+00"), (np.float32(2), "2.000000e+00")],
)
def test_scale_attribute(scale, text):
    """One type, whatever number the caller gave: attributes are compared with ==."""
    operands = random_normal(1, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype="bfloat16")
    attend = functools.partial(jaxkern.dot_product_attention, scale=scale)
    assert f"scale = {text} : f32" in custom_call_lines(attend, *operands)["attention_fwd"]


@pytest.mark.parametrize(("dtype", "name"), [("float32", "f32"), ("bfloat16", "bf16")])
@pytest.mark.parametrize(
    ("scale_dtype", "scale_name"),
    [("float32", "f32"), ("bfloat16", None), ("float16", "f32")],
)
def test_norm_calls(dtype, name, scale_dtype, scale_name):
    """A scale that is neither float32 nor of x's dtype is widened."""
    if scale_name is None:
        scale_name = "bf16" if dtype == "bfloat16" else "f32"
    x, scale = random_normal(1, (3, 5, 33), (33,), dtype=dtype)
    lines = custom_call_lines(
        functools.partial(norm_gradient, epsilon=0.5), x, scale.astype(scale_dtype)
    )
    assert set(lines) == {"rms_norm_fwd", "rms_norm_bwd"}
    assert "mhlo.backend_config = {epsilon = 5.000000e-01 : f32}" in lines["rms_norm_fwd"]
    assert "mhlo.backend_config = {}" in lines["rms_norm_bwd"]
    rows, scale = f"15x33x{name}", f"33x{scale_name}"
    assert types(lines["rms_norm_fwd"]) == ([rows, scale], [rows, "15xf32"])
    assert types(lines["rms_norm_bwd"]) == (
        [rows, scale, "15xf32", rows],
        [rows, "33xf32", "256x33xf32"],
    )


@pytest.mark.parametrize("shape", [(33,), (1, 1), (2, 3, 4, 5)])
def test_norm_of_any_rank(shape):
    lines = custom_call_lines(
        jaxkern.rms_norm, *random_normal(1, shape, shape[-1:], dtype="float32")
    )
    rows = int(np.prod(shape[:-1], dtype=int))
    assert types(lines["rms_norm_fwd"])[0][0] == f"{rows}x{shape[-1]}xf32"


def test_vmap_folds_into_the_batch():
    operands = random_normal(1, (3, B, T, N, H), (B, S, K, H), (3, B, S, K, H), dtype="bfloat16")
    attend = jax.vmap(jaxkern.dot_product_attention, (0, None, 0))
    line = custom_call_lines(attend, *operands)["attention_fwd"]
    key = f"{3 * B}x{S}x{K}x{H}xbf16"
    assert types(line)[0] == [f"{3 * B}x{T}x{N}x{H}xbf16", key, key]


def test_vmap_of_the_gradient_of_norm_is_one_call():
    """Of all rows, where the examples share the scale."""
    x, scale = random_normal(1, (4, 3, 33), (33,), dtype="float32")
    lines = custom_call_lines(jax.vmap(norm_gradient, (0, None)), x, scale)
    assert set(lines) == {"rms_norm_fwd", "rms_norm_bwd"}
    assert all(types(line)[0][:2] == ["12x33xf32", "33xf32"] for line in lines.values())


def test_reference_multiplies_in_float32():
    """Not in the TF32 that a GPU takes by default."""
    operands = random_normal(1, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype="float32")
    text = cuda_text(attention_gradient, *operands)
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) >= 6
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_shards_in_shard_map():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), auto, devices=jax.devices("cpu"))
    spec = jax.P("data", None, "model")
    attend = jax.shard_map(jaxkern.dot_product_attention, mesh=mesh, in_specs=spec, out_specs=spec)
    operands = random_normal(1, (4, T, 8, H), (4, S, 4, H), (4, S, 4, H), dtype="bfloat16")
    query, key, _ = types(custom_call_lines(attend, *operands)["attention_fwd"])[0]
    assert (query, key) == (f"2x{T}x2x{H}xbf16", f"2x{S}x1x{H}xbf16")


@pytest.mark.parametrize(
    "options",
    [
        {"implementation": "xla"},
        {"local_window_size": 3},
        {"scale": -1.0},
        {"key_value_seq_lengths": jnp.array([3, 4])},
        {"bias": jnp.zeros((1, 1, 1, 1))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_calls_that_the_kernel_does_not_support_go_to_the_reference(options):
    operands = random_normal(1, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype="bfloat16")
    attend = functools.partial(jaxkern.dot_product_attention, **options)
    assert custom_calls(attend, *operands) == {}


@pytest.mark.parametrize("implementation", [None, "cuda", ("cuda",), ("cuda", "xla")])
def test_implementations_that_call_the_kernel(implementation):
    x, scale = random_normal(1, (3, 33), (33,), dtype="float32")
    norm = functools.partial(jaxkern.rms_norm, implementation=implementation)
    assert custom_calls(norm, x, scale) == {"rms_norm_fwd": 1}


def test_lowering_for_cpu_has_no_custom_call():
    operands = random_normal(1, (B, T, N, H), (B, S, K, H), (B, S, K, H), dtype="bfloat16")
    assert "jaxkern." not in jax.jit(attention_gradient).lower(*operands).as_text()
    assert "jaxkern." in cuda_text(attention_gradient, *operands)


def test_without_the_kernels_lowering_for_cuda_is_the_reference(monkeypatch):
    monkeypatch.setattr(_ffi, "missing", lambda: "not built")
    x, scale = random_normal(1, (3, 33), (33,), dtype="float32")
    assert custom_calls(jaxkern.rms_norm, x, scale) == {}


def test_operands_are_row_major():
    """A transposed operand is copied, not passed with another layout."""
    query, key, value = random_normal(1, (B, N, T, H), (B, K, S, H), (B, K, S, H), dtype="bfloat16")

    def attend(*operands):
        return jaxkern.dot_product_attention(*(x.swapaxes(1, 2) for x in operands))

    line = custom_call_lines(attend, query, key, value)["attention_fwd"]
    layouts = re.search(r"operand_layouts = \[(.*?)\], ", line)[1]
    assert layouts.count("dense<[3, 2, 1, 0]>") == 3
