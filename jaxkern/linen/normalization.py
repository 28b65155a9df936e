"""Root-mean-square normalisation for Flax linen."""

import jax
from flax import linen as nn
from flax.linen import dtypes

from jaxkern import _flax


class RMSNorm(nn.RMSNorm):
    """`flax.linen.RMSNorm` on `jaxkern.rms_norm`.

    Attributes, parameters, promotion of dtypes and results are flax's. The kernel normalises the
    last axis. Other `reduction_axes` or `feature_axes`, an `axis_name`, a `mask` and
    `force_float32_reductions=False` are answered by flax's own code.

    Attributes:
        implementation: as in `jaxkern.rms_norm`; default: the kernel where it supports the call,
            else pure JAX.
    """

    implementation: _flax.Implementation = None

    @nn.compact
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """Normalises `x` [..., W].

        Args:
            x: [..., W], any real dtype.
            mask: which elements count; broadcasts to `x`.

        Returns:
            [..., W] in the layer's dtype, by default in what x and the scale promote to.

        Raises:
            NotImplementedError: `implementation` names the kernel alone and the layer's settings
                or the mask need flax's code.
        """
        lacks = _flax.beyond_rms_norm(self, x, mask)
        if not self.force_float32_reductions:
            lacks = "force_float32_reductions=False"
        if _flax.leaves_to_flax("jaxkern.linen.RMSNorm", lacks, self.implementation):
            return super().__call__(x, mask=mask)
        scale = None
        if self.use_scale:
            scale = self.param("scale", self.scale_init, (x.shape[-1],), self.param_dtype)
        return _flax.normalize(
            x,
            scale,
            dtype=dtypes.canonicalize_dtype(x, scale, dtype=self.dtype),
            epsilon=self.epsilon,
            implementation=self.implementation,
        )
