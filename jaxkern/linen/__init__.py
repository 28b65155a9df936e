"""Layers for Flax linen on jaxkern's kernels: same names, parameters and results as linen's."""

from jaxkern.linen.attention import (
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    SelfAttention,
    attention_fn,
)
from jaxkern.linen.normalization import RMSNorm

__all__ = [
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "RMSNorm",
    "SelfAttention",
    "attention_fn",
]
