"""Layers for Flax linen on jaxkern's kernels: same names, parameters and results as linen's."""

from jaxkern.linen.attention import (
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    SelfAttention,
    attention_fn,
)
from jaxkern.linen.linear import Fp8Dense, Fp8DotGeneral
from jaxkern.linen.normalization import RMSNorm
from jaxkern.linen.quantized import QuantizedDense, quantize_variables, quantized_dense

__all__ = [
    "Fp8Dense",
    "Fp8DotGeneral",
    "MultiHeadAttention",
    "MultiHeadDotProductAttention",
    "QuantizedDense",
    "RMSNorm",
    "SelfAttention",
    "attention_fn",
    "quantize_variables",
    "quantized_dense",
]
