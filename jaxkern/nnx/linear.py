"""A linear layer with FP8 products for Flax nnx."""

from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from jaxkern import _flax


class Fp8Linear(nnx.Linear):
    """`flax.nnx.Linear` on `jaxkern.fp8_matmul`.

    Constructor, parameters and the dtypes of results are flax's: a checkpoint of its layer loads
    unchanged. The kernel is quantised from the dtype it is stored in, so a float32 kernel has
    gradients that are not rounded, whatever the layer's dtype; a `promote_dtype` of the caller's
    is applied to it first. The bias is added after the product.

    Args:
        in_features: K, the number of input features.
        out_features: N, the number of output features.
        recipe: as in `jaxkern.fp8_matmul`, like the next three.
        gradient_format: the FP8 format of gradients.
        fast_accumulation: sums of the forward product with fewer bits.
        implementation: default: the kernels where they support the call, else pure JAX.
        **kwargs: as for flax: use_bias, dtype, param_dtype, kernel_init, rngs, ... `precision` and
            `dot_general` have no meaning here.

    Raises:
        ValueError: a `precision` or a `dot_general`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        recipe: str = "row",
        gradient_format: jax.typing.DTypeLike | None = None,
        fast_accumulation: bool = False,
        implementation: _flax.Implementation = None,
        **kwargs,
    ):
        super().__init__(in_features, out_features, **kwargs)
        _flax.reject_precision("jaxkern.nnx.Fp8Linear", self.precision, self.dot_general)
        self.recipe = recipe
        self.gradient_format = gradient_format
        self.fast_accumulation = fast_accumulation
        self.implementation = _flax.as_static(implementation)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """The layer's [..., N] for `inputs` [..., K].

        Args:
            inputs: [..., K], any real dtype.
            out_sharding: None, or the result's on a mesh with Explicit axes.

        Returns:
            [..., N] in `preferred_element_type`, by default in the constructor's dtype or what
            inputs and parameters promote to.

        Raises:
            ValueError: arguments that `jaxkern.fp8_matmul` does not take.
        """
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        x, promoted, bias = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        if self.promote_dtype is not dtypes.promote_dtype:
            kernel = promoted
        y = _flax.fp8_linear(
            x,
            kernel,
            bias,
            preferred_element_type=self.preferred_element_type,
            recipe=self.recipe,
            gradient_format=self.gradient_format,
            fast_accumulation=self.fast_accumulation,
            implementation=self.implementation,
        )
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)
