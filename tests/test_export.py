"""jax.export of the ops, for the CPU, for CUDA, and for both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from jaxkern.testing import random_normal

pytestmark = pytest.mark.usefixtures("kernels")

CHECKS = [
    jax.export.DisabledSafetyCheck.custom_call(f"jaxkern.{name}")
    for name in ("attention_fwd", "attention_bwd", "rms_norm_fwd", "rms_norm_bwd")
]


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
