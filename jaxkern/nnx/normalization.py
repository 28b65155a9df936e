"""Root-mean-square normalisation for Flax nnx."""

import jax
from flax import nnx
from flax.nnx.nn import dtypes

from jaxkern import _flax


class RMSNorm(nnx.RMSNorm):
    """`flax.nnx.RMSNorm` on `jaxkern.rms_norm`.

    Constructor, parameters, promotion of dtypes and results are flax's. The kernel normalises the
    last axis. Other `reduction_axes` or `feature_axes`, an `axis_name` and a `mask` are answered
    by flax's own code.

    Args:
        num_features: width W of the last axis.
        implementation: as in `jaxkern.rms_norm`; default: the kernel where it supports the call,
            else pure JAX.
        **kwargs: as for flax: epsilon, dtype, param_dtype, use_scale, rngs, ...
    """

    def __init__(self, num_features: int, *, implementation: _flax.Implementation = None, **kwargs):
        super().__init__(num_features, **kwargs)
        self.implementation = _flax.as_static(implementation)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x` [..., W].

        Args:
            x: [..., W], any real dtype.
            mask: which elements count; broadcasts to `x`.

        Returns:
            [..., W] in the constructor's dtype, by default in what x and the scale promote to.

        Raises:
            NotImplementedError: `implementation` names the kernel alone and the layer's settings
                or the mask need flax's code.
            ValueError: `x` does not have W features.
        """
        lacks = _flax.beyond_rms_norm(self, x, mask)
        if _flax.leaves_to_flax("jaxkern.nnx.RMSNorm", lacks, self.implementation):
            return super().__call__(x, mask)
        scale = None if self.scale is None else self.scale[...]
        x, scale = self.promote_dtype((x, scale), dtype=self.dtype)
        return _flax.normalize(
            x,
            scale,
            dtype=dtypes.canonicalize_dtype(x, scale, dtype=self.dtype),
            epsilon=self.epsilon,
            implementation=self.implementation,
        )
