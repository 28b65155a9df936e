"""A dense layer with FP8 products for Flax linen, and the product alone for flax's layer."""

import jax
from flax import linen as nn
from flax.linen import dtypes

from jaxkern import _flax


class Fp8DotGeneral(nn.Module):
    """The product of a dense layer by `jaxkern.fp8_matmul`: a `dot_general_cls` of flax's.

        nn.Dense(features, dot_general_cls=functools.partial(Fp8DotGeneral, recipe="block"))

    It has no variables. flax casts the kernel to the layer's dtype first, and so its gradient;
    `Fp8Dense` does not.

    Attributes:
        recipe: as in `jaxkern.fp8_matmul`, like the others.
        gradient_format: the FP8 format of gradients.
        fast_accumulation: sums of the forward product with fewer bits.
        implementation: default: the kernels where they support the call, else pure JAX.
    """

    recipe: str = "row"
    gradient_format: jax.typing.DTypeLike | None = None
    fast_accumulation: bool = False
    implementation: _flax.Implementation = None

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: jax.lax.DotDimensionNumbers,
        precision: None = None,
        preferred_element_type: jax.typing.DTypeLike | None = None,
    ) -> jax.Array:
        """[..., N] of lhs [..., K] and rhs [K, N], with the arguments of `jax.lax.dot_general`.

        Raises:
            NotImplementedError: `dimension_numbers` of another product.
            ValueError: a precision, or arguments that `jaxkern.fp8_matmul` does not take.
        """
        return _flax.fp8_dot_general(
            lhs,
            rhs,
            dimension_numbers,
            precision,
            preferred_element_type,
            recipe=self.recipe,
            gradient_format=self.gradient_format,
            fast_accumulation=self.fast_accumulation,
            implementation=self.implementation,
        )


class Fp8Dense(nn.Dense):
    """`flax.linen.Dense` on `jaxkern.fp8_matmul`.

    Attributes, parameters and the dtypes of results are flax's: a checkpoint of its layer loads
    unchanged. The kernel is quantised from the dtype it is stored in, so a float32 kernel has
    gradients that are not rounded, whatever the layer's dtype; a `promote_dtype` of the caller's
    is applied to it first. The bias is added after the product. `precision`, `dot_general` and
    `dot_general_cls` have no meaning here.

    Attributes:
        recipe: as in `jaxkern.fp8_matmul`, like the others.
        gradient_format: the FP8 format of gradients.
        fast_accumulation: sums of the forward product with fewer bits.
        implementation: default: the kernels where they support the call, else pure JAX.
    """

    recipe: str = "row"
    gradient_format: jax.typing.DTypeLike | None = None
    fast_accumulation: bool = False
    implementation: _flax.Implementation = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The layer's [..., N] for `inputs` [..., K].

        Args:
            inputs: [..., K], any real dtype.

        Returns:
            [..., N] in the layer's dtype, by default in what inputs and parameters promote to.

        Raises:
            ValueError: a `precision`, `dot_general` or `dot_general_cls`, or arguments that
                `jaxkern.fp8_matmul` does not take.
        """
        product = self.dot_general if self.dot_general_cls is None else self.dot_general_cls
        _flax.reject_precision("jaxkern.linen.Fp8Dense", self.precision, product)
        shape = (inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        x, promoted, bias = self.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        if self.promote_dtype is not dtypes.promote_dtype:
            kernel = promoted
        return _flax.fp8_linear(
            x,
            kernel,
            bias,
            recipe=self.recipe,
            gradient_format=self.gradient_format,
            fast_accumulation=self.fast_accumulation,
            implementation=self.implementation,
        )
