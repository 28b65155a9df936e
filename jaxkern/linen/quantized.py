"""Dense layers whose weights are kept in four bits, for Flax linen."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from jaxkern import PackedWeight, _flax, pack_weight, quantize, quantized_matmul

_COLLECTION, _NAME = "quantized", "weight"


class QuantizedDense(nn.Dense):
    """`flax.linen.Dense` for a kernel that is kept in four bits, by `jaxkern.quantized_matmul`.

    Attributes and the dtypes of results are flax's. The weight is a `jaxkern.PackedWeight`
    [features, K] in the collection "quantized", a constant, and the bias a parameter, so that
    training leaves the weight as it is. `init` quantises what `kernel_init` gives, and
    `quantize_variables` the kernels of a checkpoint. `precision`, `dot_general` and
    `dot_general_cls` have no meaning here.

    Attributes:
        format: of `jaxkern.quantize`: "nvfp4", "mxfp4" or "int4".
        options: of `jaxkern.quantize`: group_size, zero_point, search; for `init`.
        implementation: of `jaxkern.quantized_matmul`.
    """

    format: str = "nvfp4"
    options: Mapping[str, Any] | None = None
    implementation: _flax.Implementation = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The layer's [..., features] for inputs [..., K].

        Raises:
            ValueError: a `precision`, `dot_general` or `dot_general_cls`, or what
                `jaxkern.quantize` and `jaxkern.quantized_matmul` raise.
        """
        product = self.dot_general if self.dot_general_cls is None else self.dot_general_cls
        _flax.reject_precision("jaxkern.linen.QuantizedDense", self.precision, product)

        def initial():
            shape = (inputs.shape[-1], self.features)
            kernel = self.kernel_init(self.make_rng("params"), shape, self.param_dtype)
            return _packed(kernel, format=self.format, **(self.options or {}))

        weight = self.variable(_COLLECTION, _NAME, initial).value
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return _dense(self, inputs, weight, bias, self.implementation)


def quantize_variables(
    variables: Mapping[str, Any], rules: _flax.QuantizationRules
) -> dict[str, Any]:
    """Variables of a model whose dense layers are `QuantizedDense`, where rules say so.

    They are also those of the model as it is, inside of `flax.linen.intercept_methods` with
    `quantized_dense`:

        variables = quantize_variables(variables, {".*/(q|k|v)": "nvfp4"})
        with flax.linen.intercept_methods(quantized_dense()):
            y = model.apply(variables, x)

    Args:
        variables: of a model, with "params".
        rules: from regular expressions to formats of `jaxkern.quantize`, to mappings of "format"
            and its options, or to None, which leaves a layer as it is. The first rule that matches
            the whole path of a layer with a kernel [K, N], like "blocks_3/mlp/up", is the one that
            counts.

    Returns:
        The variables without those kernels, which "quantized" has packed. Others are shared.

    Raises:
        ValueError: a rule that matches no layer, with a list of those there are; or what
            `jaxkern.quantize` raises, with the layer's path.
    """
    params = traverse_util.flatten_dict(variables["params"])
    kernels = {
        "/".join(path[:-1]): path
        for path, x in params.items()
        if path[-1] == "kernel" and x.ndim == 2
    }
    quantized = traverse_util.flatten_dict(dict(variables.get(_COLLECTION, {})))
    for name, options in _flax.quantization_options(kernels, rules).items():
        path = kernels[name]
        try:
            quantized[(*path[:-1], _NAME)] = _packed(params.pop(path), **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return {
        **variables,
        "params": traverse_util.unflatten_dict(params),
        _COLLECTION: traverse_util.unflatten_dict(quantized),
    }


def quantized_dense(implementation: _flax.Implementation = None) -> Callable:
    """An interceptor for `flax.linen.intercept_methods`: dense layers whose variables
    `quantize_variables` has packed multiply by `jaxkern.quantized_matmul`, all else runs as it is.
    """

    def intercept(call, arguments, options, context):
        layer = context.module
        packed = isinstance(layer, nn.Dense) and not isinstance(layer, QuantizedDense)
        if not (packed and context.method_name == "__call__"):
            return call(*arguments, **options)
        if not layer.has_variable(_COLLECTION, _NAME):
            return call(*arguments, **options)
        weight = layer.get_variable(_COLLECTION, _NAME)
        bias = layer.get_variable("params", "bias") if layer.use_bias else None
        return _dense(layer, *arguments, weight, bias, implementation, **options)

    return intercept


def _packed(kernel, **options):
    return pack_weight(quantize(kernel.T, **options))


def _dense(layer, inputs, weight: PackedWeight, bias, implementation):
    """[..., N] in the dtype that flax's layer has, by default what inputs and parameters have."""
    x, bias = layer.promote_dtype(inputs, bias, dtype=layer.dtype)
    if layer.dtype is None:
        x = x.astype(jax.numpy.promote_types(x.dtype, layer.param_dtype))
    y = quantized_matmul(x, weight, implementation=implementation)
    return y if bias is None else y + bias
