"""Rotary position embedding in plain jax.numpy (Su et al. 2021, arXiv:2104.09864)."""

import math

import jax.numpy as jnp


def frequencies(head_dim, theta, scaling=None):
    """The angle that each pair of dimensions is rotated by at position 1, float32 [head_dim / 2].

    theta^(-2 i / head_dim) for pair i. With scaling (factor, low_frequency_factor,
    high_frequency_factor, original_context) as for Llama 3: those with a wavelength below
    original_context / high_frequency_factor stay, those with one above original_context /
    low_frequency_factor are divided by factor, and in between it is a mix.
    """
    pairs = jnp.arange(0, head_dim, 2, dtype=jnp.float32)
    plain = jnp.float32(theta) ** (-pairs / head_dim)
    if scaling is None:
        return plain
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_context * plain / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def rotate(x, positions, frequencies):
    """x with its dimensions i and i + H / 2 rotated by positions * frequencies[i], in float32.

    Args:
      x: [..., heads, H], any floating-point dtype.
      positions: integers [...].
      frequencies: float32 [H / 2].
    """
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
