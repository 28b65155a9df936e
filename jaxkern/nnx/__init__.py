"""Layers for Flax nnx on jaxkern's kernels: same names, parameters and results as `flax.nnx`'s."""

from jaxkern.nnx.attention import MultiHeadAttention, attention_fn
from jaxkern.nnx.linear import Fp8Linear
from jaxkern.nnx.mlp import Fp8MLP
from jaxkern.nnx.normalization import RMSNorm
from jaxkern.nnx.quantized import QuantizedLinear, QuantizedParam, quantize_model

__all__ = [
    "Fp8Linear",
    "Fp8MLP",
    "MultiHeadAttention",
    "QuantizedLinear",
    "QuantizedParam",
    "RMSNorm",
    "attention_fn",
    "quantize_model",
]
