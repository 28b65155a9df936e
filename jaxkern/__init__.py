"""CUDA kernels for JAX, each with a plain JAX reference behind the same function."""

from jaxkern.ops.attention import dot_product_attention as dot_product_attention
from jaxkern.ops.blackwell import blackwell_scales as blackwell_scales
from jaxkern.ops.four_bit_weight import pack_weight as pack_weight
from jaxkern.ops.fp8 import fp8_matmul as fp8_matmul
from jaxkern.ops.fp8 import quantize_weight as quantize_weight
from jaxkern.ops.fp8_arguments import QuantizedWeight as QuantizedWeight
from jaxkern.ops.fp8_mlp import fp8_mlp as fp8_mlp
from jaxkern.ops.matmul import scaled_matmul as scaled_matmul
from jaxkern.ops.norm import rms_norm as rms_norm
from jaxkern.ops.packed_weight import PackedWeight as PackedWeight
from jaxkern.ops.quantize import quantize as quantize
from jaxkern.ops.quantize_rms_norm import quantize_rms_norm as quantize_rms_norm
from jaxkern.ops.quantize_swiglu import quantize_swiglu as quantize_swiglu
from jaxkern.ops.quantize_swiglu import quantize_swiglu_grad as quantize_swiglu_grad
from jaxkern.ops.quantized_array import QuantizedArray as QuantizedArray
from jaxkern.ops.quantized_matmul import quantized_matmul as quantized_matmul
