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
    wide = x.astype(_at_least_float32(x))
    mean = jnp.mean(jnp.square(wide), axis=-1)
    rstd = jax.lax.rsqrt(mean + jnp.asarray(epsilon, wide.dtype))
    return scaled(x, rstd, scale), rstd.astype(jnp.float32)


def scaled(x, rstd, scale):
    """x * rstd * scale, computed like rms_norm, in x's dtype.

    Args:
      x: [..., W], any floating-point dtype.
      rstd: [...].
      scale: [..., W]. The axes before the last are the first ones of x.
    """
    x_wide, rstd, scale = (a.astype(_at_least_float32(x)) for a in (x, rstd, scale))
    scale = jnp.expand_dims(scale, range(scale.ndim - 1, x.ndim - 1))
    return (x_wide * rstd[..., None] * scale).astype(x.dtype)


def _at_least_float32(x):
    return jnp.promote_types(x.dtype, jnp.float32)
