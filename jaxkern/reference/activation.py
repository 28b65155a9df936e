"""Activations in plain jax.numpy: what the fused quantisers compute before they quantise."""

import jax
import jax.numpy as jnp


def swiglu(gate, up):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202), computed in float32.

    Args:
      gate, up: [...], of one floating-point dtype, which is the result's.
    """
    gate_32, up_32 = (x.astype(jnp.float32) for x in (gate, up))
    return (gate_32 * jax.nn.sigmoid(gate_32) * up_32).astype(gate.dtype)


def swiglu_grad(gate, up, dh):
    """The gradients of gate and up, from that of swiglu's result, computed in float32.

    Args:
      gate, up, dh: [...], of one floating-point dtype, which is the results'.
    """
    gate_32, up_32, dh_32 = (x.astype(jnp.float32) for x in (gate, up, dh))
    s = jax.nn.sigmoid(gate_32)
    dgate = dh_32 * up_32 * (s * (1 + gate_32 * (1 - s)))
    return dgate.astype(gate.dtype), (dh_32 * (gate_32 * s)).astype(gate.dtype)
