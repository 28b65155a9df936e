"""Linear layers whose weights are kept in four bits, for Flax nnx."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkern import PackedWeight, _flax, pack_weight, quantize, quantized_matmul


class QuantizedParam(nnx.Variable):
    """Part of a weight of four bits: a constant, which what asks for nnx.Param does not see."""


class QuantizedLinear(nnx.Module):
    """y = x w^T + bias for a weight that is kept in four bits, by `jaxkern.quantized_matmul`.

    `of` makes one of a linear layer, and `quantize_model` those of a whole model. The weight's
    arrays are QuantizedParam, the bias stays an nnx.Param.

    Args:
        weight: [N, K], of `jaxkern.pack_weight`.
        bias: [N], a variable, or None.
        dtype: of results. None is what inputs and `param_dtype` promote to.
        param_dtype: that the weight had before it was quantised.
        implementation: of `jaxkern.quantized_matmul`.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: nnx.Variable | None = None,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        implementation: _flax.Implementation = None,
    ):
        self.data, self.row_scale = QuantizedParam(weight.data), QuantizedParam(weight.row_scale)
        whole = weight.tensor_scale
        self.tensor_scale = None if whole is None else QuantizedParam(whole)
        self.bias = bias
        self.out_features, self.in_features = weight.shape
        self.format, self.block = weight.format, weight.block
        self.zero_points = weight.zero_points
        self.dtype, self.param_dtype = dtype, jnp.dtype(param_dtype)
        self.implementation = _flax.as_static(implementation)

    @classmethod
    def of(
        cls,
        linear: nnx.Linear,
        format: str = "nvfp4",
        *,
        implementation: _flax.Implementation = None,
        **options: Any,
    ) -> "QuantizedLinear":
        """The layer with its kernel quantised, and its own bias.

        Args:
            linear: whose in_features are a multiple of the format's block.
            format: of `jaxkern.quantize`: "nvfp4", "mxfp4" or "int4".
            implementation: of `jaxkern.quantized_matmul`.
            **options: of `jaxkern.quantize`: group_size, zero_point, search, key.
        """
        kernel = linear.kernel[...]
        weight = pack_weight(quantize(kernel.T, format, **options))
        return cls(
            weight,
            linear.bias,
            dtype=linear.dtype,
            param_dtype=kernel.dtype,
            implementation=implementation,
        )

    @property
    def weight(self) -> PackedWeight:
        """[N, K]."""
        whole = None if self.tensor_scale is None else self.tensor_scale[...]
        return PackedWeight(
            self.data[...],
            self.row_scale[...],
            whole,
            self.format,
            self.block,
            self.zero_points,
            self.out_features,
            self.in_features,
        )

    def __call__(
        self, inputs: jax.Array, *, preferred_element_type: jax.typing.DTypeLike | None = None
    ) -> jax.Array:
        """[..., N] for inputs [..., K], in preferred_element_type or by default as `dtype` says."""
        dtype = self.dtype or jnp.promote_types(inputs.dtype, self.param_dtype)
        wanted = dtype if preferred_element_type is None else preferred_element_type
        y = quantized_matmul(
            inputs.astype(dtype),
            self.weight,
            preferred_element_type=wanted,
            implementation=self.implementation,
        )
        return y if self.bias is None else y + self.bias[...].astype(wanted)


def quantize_model(
    model: nnx.Module,
    rules: _flax.QuantizationRules,
    *,
    implementation: _flax.Implementation = None,
) -> nnx.Module:
    """A copy of the model in which linear layers are `QuantizedLinear`, where rules say so.

    Args:
        model: any module. Its arrays are shared with the copy, but for the kernels.
        rules: from regular expressions to formats of `jaxkern.quantize`, to mappings of "format"
            and its options, or to None, which leaves a layer as it is. The first rule that matches
            the whole path of an nnx.Linear, like "blocks/3/qkv", is the one that counts.
        implementation: of `jaxkern.quantized_matmul`.

    Raises:
        ValueError: a rule that matches no linear layer, with a list of those there are; or what
            `jaxkern.quantize` raises, with the layer's path.
    """
    model = nnx.clone(model)
    linears = {
        "/".join(map(str, path)): (path, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear)
    }
    for name, options in _flax.quantization_options(linears, rules).items():
        path, linear = linears[name]
        try:
            quantized = QuantizedLinear.of(linear, implementation=implementation, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        _replace(model, path, quantized)
    return model


def _replace(module, path, new):
    *parents, last = path
    for part in parents:
        module = module[part] if isinstance(part, int) else getattr(module, part)
    if isinstance(last, int):
        module[last] = new
    else:
        setattr(module, last, new)
