"""Layers for Flax linen on jaxkern's kernels: same names, parameters and results as linen's."""

from jaxkern.linen.attention import (
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    SelfAttention,
    attention_fn,
)
from jaxkern.linen.linear import Fp8Dense, Fp8DotGeneral
from jaxkern.linen.normalization import RMSNorm

__all__ = [
    "Fp8Dense",
    "Fp8DotGeneral",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "RMSNorm",
    "SelfAttention",
    "attention_fn",
]
