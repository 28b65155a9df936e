"""A transformer's gated MLP with FP8 products for Flax nnx."""

import jax
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init

from jaxkern import _flax, fp8_mlp


class Fp8MLP(nnx.Module):
    """RMSNorm, and `jaxkern.fp8_mlp` of its result: down(silu(gate(z)) * up(z)), without biases.

    The parameters are those of flax's layers: `norm.scale` [K], `gate.kernel` and `up.kernel`
    [K, F], `down.kernel` [F, K]. So a checkpoint of a bfloat16 model loads. Kernels are quantised
    from the dtype they are stored in: float32 ones have gradients that are not rounded, whatever
    the layer's dtype.

    Args:
        features: K, of the input and the output.
        hidden_features: F.
        use_norm: whether there is a norm.
        epsilon: of the norm, as for `flax.nnx.RMSNorm`.
        dtype: of the result and between products; default: what input and parameters promote to.
        param_dtype: as for `flax.nnx.Linear`, like kernel_init and rngs.
        kernel_init: of the three kernels.
        recipe: as in `jaxkern.fp8_matmul`, like the next.
        gradient_format: the FP8 format of gradients.
        implementation: default: the kernels where they support the call, else pure JAX.
        rngs: of the kernels.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int,
        *,
        use_norm: bool = True,
        epsilon: float = 1e-6,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jax.numpy.float32,
        kernel_init: jax.nn.initializers.Initializer = default_kernel_init,
        recipe: str = "row",
        gradient_format: jax.typing.DTypeLike | None = None,
        implementation: _flax.Implementation = None,
        rngs: nnx.Rngs,
    ):
        def linear(size, out_size):
            return nnx.Linear(
                size,
                out_size,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                kernel_init=kernel_init,
                rngs=rngs,
            )

        options = {"epsilon": epsilon, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = nnx.RMSNorm(features, **options) if use_norm else None
        self.gate = linear(features, hidden_features)
        self.up = linear(features, hidden_features)
        self.down = linear(hidden_features, features)
        self.dtype = dtype
        self.recipe = recipe
        self.gradient_format = gradient_format
        self.implementation = _flax.as_static(implementation)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """The layer's [..., K] for `inputs` [..., K].

        Args:
            inputs: [..., K], any real dtype.

        Returns:
            [..., K] in the constructor's dtype, by default in what inputs and parameters promote
            to.

        Raises:
            ValueError: arguments that `jaxkern.fp8_mlp` does not take.
        """
        kernels = [layer.kernel[...] for layer in (self.gate, self.up, self.down)]
        scale = None if self.norm is None else self.norm.scale[...]
        dtype = dtypes.canonicalize_dtype(inputs, scale, *kernels, dtype=self.dtype)
        if self.norm is None:
            x = inputs.astype(dtype)
        else:
            x = _flax.normalize(
                inputs,
                scale,
                dtype=dtype,
                epsilon=self.norm.epsilon,
                implementation=self.implementation,
            )
        return fp8_mlp(
            x,
            None,
            *kernels,
            recipe=self.recipe,
            gradient_format=self.gradient_format,
            implementation=self.implementation,
        )
