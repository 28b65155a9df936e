"""Rotary position embedding, with Llama 3's scaling of its frequencies."""

import math

import jax.numpy as jnp
import numpy as np


def frequencies(config):
    """Radians per position of each pair of a head's elements, computed in float64.

    Source: https://arxiv.org/abs/2104.09864, section 3.2.2; scaled as Hugging Face's transformers
    does for rope_type "llama3".

    Args:
      config: of the model, like jaxkern.models.Config.

    Returns:
      float32 [head_dim / 2], falling from 1.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    plain = config.rope_theta**-exponent
    if (scaling := config.rope_scaling) is None:
        return plain.astype(np.float32)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_context * plain / (2 * math.pi)  # in the original context
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (kept * plain + (1 - kept) * plain / scaling.factor).astype(np.float32)


def rotate(x, positions, frequencies):
    """Turns the pairs (i, i + H / 2) of each head by its position times their frequency.

    In float32, rounded once. The pairs are Hugging Face's, not those (2 i, 2 i + 1) of the paper.

    Args:
      x: [..., N, H].
      positions: integers [...].
      frequencies: float32 [H / 2].

    Returns:
      [..., N, H] in x's dtype.
    """
    angle = positions[..., None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)
