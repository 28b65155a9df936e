"""Layers for Flax nnx on jaxkern's kernels: same names, parameters and results as `flax.nnx`'s."""

from jaxkern.nnx.attention import MultiHeadAttention, attention_fn
from jaxkern.nnx.normalization import RMSNorm

__all__ = ["MultiHeadAttention", "RMSNorm", "attention_fn"]
