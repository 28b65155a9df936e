"""CUDA kernels for JAX, each with a plain JAX reference behind the same function."""

from jaxkern.ops.attention import dot_product_attention as dot_product_attention
from jaxkern.ops.norm import rms_norm as rms_norm
