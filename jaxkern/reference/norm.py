"""Root-mean-square normalisation in plain jax.numpy: the kernels' oracle, implementation="xla"."""

import jax
import jax.numpy as jnp


def rms_norm(x, scale, *, epsilon):
    """x / sqrt(mean(x**2) + epsilon) * scale over the last axis (Zhang and Sennrich 2019).

    Computed in float32 (float64 for float64 operands).

    Args:
      x: [..., W], any floating-point dtype.
      scale: [W].
      epsilon: added to the mean square.

    Returns:
      The result [..., W] in x's dtype, and 1 / sqrt(mean(x**2) + epsilon), float32 [...].
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(dtype)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1) + jnp.asarray(epsilon, dtype))
    normal = wide * rstd[..., None] * scale.astype(dtype)
    return normal.astype(x.dtype), rstd.astype(jnp.float32)
