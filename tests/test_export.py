"""jax.export of the ops, for the CPU, for CUDA, and for both."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from four_bit import FORMATS

import jaxkern
from jaxkern.testing import random_normal

pytestmark = pytest.mark.usefixtures("kernels")


def allowed(*targets):
    return [jax.export.DisabledSafetyCheck.custom_call(f"jaxkern.{name}") for name in targets]


CHECKS = allowed("attention_fwd", "attention_bwd", "rms_norm_fwd", "rms_norm_bwd")


def block(query, key, value, scale):
    out = jaxkern.dot_product_attention(query, key, value, is_causal=True)
    return jaxkern.rms_norm(out, scale)


def operands(batch):
    arrays = random_normal(1, *[(batch, 6, 2, 64)] * 3, dtype="bfloat16")
    return *arrays, *random_normal(2, (64,), dtype="float32")


def loss(*args):
    return block(*args).astype(jnp.float32).sum()


@pytest.mark.parametrize("platforms", [["cpu"], ["cuda"], ["cpu", "cuda"]], ids="+".join)
def test_export(platforms):
    """Serialised, read back and differentiated."""
    args = operands(2)
    exported = jax.export.export(jax.jit(block), platforms=platforms, disabled_checks=CHECKS)(*args)
    calls = exported.mlir_module().count("custom_call @jaxkern.")
    assert calls == (2 if "cuda" in platforms else 0)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert again.platforms == tuple(platforms)
    if "cpu" not in platforms:
        return
    np.testing.assert_array_equal(
        again.call(*args).astype("float32"), jax.jit(block)(*args).astype("float32")
    )
    got = jax.grad(lambda *a: again.call(*a).astype(jnp.float32).sum(), (0, 1, 2, 3))(*args)
    for g, w in zip(got, jax.grad(loss, (0, 1, 2, 3))(*args), strict=True):
        np.testing.assert_allclose(g.astype("float32"), w.astype("float32"), rtol=2e-2, atol=2e-2)


def test_symbolic_batch():
    """One exported function for every batch size."""
    (batch,) = jax.export.symbolic_shape("batch")
    specs = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in operands(1)[:3]]
    specs.append(jax.ShapeDtypeStruct((64,), jnp.float32))
    exported = jax.export.export(
        jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))),
        platforms=["cpu", "cuda"],
        disabled_checks=CHECKS,
    )(*specs)
    assert exported.mlir_module().count("custom_call @jaxkern.") == 4
    for size in (1, 3):
        args = operands(size)
        got = exported.call(*args)
        wanted = jax.value_and_grad(loss, (0, 1, 2, 3))(*args)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(
                g.astype("float32"), w.astype("float32"), rtol=2e-2, atol=2e-2
            )


def fp8(x, scale, w, down):
    """A product, an MLP, their gradients, and quantised values."""

    def loss(x, scale, w, down):
        y = jaxkern.fp8_matmul(x, w) + jaxkern.fp8_mlp(x, scale, w, w, down, recipe="block")
        return y.astype(jnp.float32).sum()

    quantized = jaxkern.quantize(x, scaling="1x128")
    return quantized.values, quantized.scale, jax.grad(loss, (0, 1, 2, 3))(x, scale, w, down)


@pytest.mark.parametrize("platforms", [["cuda"], ["cpu", "cuda"]], ids="+".join)
def test_export_of_fp8(platforms):
    targets = {"quantize", "quantize_rms_norm", "quantize_swiglu", "quantize_swiglu_grad"}
    targets |= {"scaled_matmul", "rms_norm_bwd"}
    shapes = (32, 128), (128,), (128, 128), (128, 128)
    args = random_normal(3, *shapes, dtype="float32")
    exported = jax.export.export(
        jax.jit(fp8), platforms=platforms, disabled_checks=allowed(*targets)
    )(*args)
    assert set(re.findall(r"custom_call @jaxkern\.(\w+)", exported.mlir_module())) == targets
    again = jax.export.deserialize(exported.serialize())
    if "cpu" in platforms:
        got, wanted = jax.tree.leaves(again.call(*args)), jax.tree.leaves(jax.jit(fp8)(*args))
        for g, w in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("activation_format", [None, "fp8"])
@pytest.mark.parametrize("name", FORMATS)
def test_export_of_four_bits(name, activation_format):
    """For any number of rows of x, with its gradient; the weight's arrays are arguments. With FP8
    the weight is rounded whatever that number becomes."""
    quantized_matmul = functools.partial(
        jaxkern.quantized_matmul, activation_format=activation_format
    )
    (w,) = random_normal(4, (80, 256), dtype="float32")
    w = jaxkern.quantize(w, name.split()[0], **FORMATS[name])
    leaves, tree = jax.tree.flatten(jaxkern.pack_weight(w))

    def run(x, *leaves):
        y, pullback = jax.vjp(lambda x: quantized_matmul(x, jax.tree.unflatten(tree, leaves)), x)
        return y, pullback(y)[0]

    of_fp8 = ["quantize", "scaled_matmul", "weight_to_fp8"]
    (rows,) = jax.export.symbolic_shape("rows")
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves]
    exported = jax.export.export(
        jax.jit(run),
        platforms=["cpu", "cuda"],
        disabled_checks=allowed(
            "quantize",
            "quantized_matmul",
            "quantized_matmul_grad",
            "scaled_matmul",
            "weight_to_fp8",
        ),
    )(jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16), *specs)
    targets = re.findall(r"custom_call @jaxkern\.(\w+)", exported.mlir_module())
    forward = of_fp8 if activation_format else ["quantized_matmul"]
    assert sorted(targets) == sorted([*forward, "quantized_matmul_grad"])
    again = jax.export.deserialize(exported.serialize())
    for size in (260, 300) if activation_format else (1, 40):
        (x,) = random_normal(5, (size, 256), dtype="bfloat16")
        got, wanted = again.call(x, *leaves), jax.jit(run)(x, *leaves)
        for g, w in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(g.astype("float32"), w.astype("float32"))
