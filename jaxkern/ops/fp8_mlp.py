"""fp8_mlp: a transformer's gated MLP of FP8 products, norm and SwiGLU inside its quantisers."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike, DTypeLike

from jaxkern import _checks, _dispatch, _partitioning
from jaxkern.ops import fp8, norm
from jaxkern.ops import fp8_arguments as arguments

_OP = "fp8_mlp"
_SINGLE = np.dtype(np.float32)


def fp8_mlp(
    x: ArrayLike,
    scale: ArrayLike | None,
    gate: ArrayLike,
    up: ArrayLike,
    down: ArrayLike,
    *,
    epsilon: ArrayLike = 1e-6,
    recipe: str = "row",
    gradient_format: DTypeLike | None = None,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """(silu(z gate) * (z up)) down for z = rms_norm(x, scale), with the products of fp8_matmul.

    Its values and gradients are those of rms_norm, fp8_matmul and SwiGLU one after the other: the
    same operands are quantised. The products with gate and up share one quantised z. The norm,
    SwiGLU and its gradient are computed while they are quantised, in float32, and are never in
    memory. What is kept for the gradients is x, rstd of its rows, the products with gate and up,
    and the weights. With recipe "tensor", which has to know an amax of all first, z is in memory,
    and kept too.

    Arrays stay sharded along tokens and F. K and N are made whole. Each device quantises the shards
    it has, as in fp8_matmul. Devices exchange only sums, in float32: y and the gradient of z over
    shards of F, those of the weights over shards of tokens.

    Args:
      x: [..., K], bfloat16, float16 or float32.
      scale: [K], of rms_norm, floating point; None leaves the norm out: z is x.
      gate, up: [K, F], bfloat16, float16 or float32.
      down: [F, N], of these dtypes.
      epsilon: of rms_norm. z is in memory too where it is an array.
      recipe, gradient_format: of fp8_matmul, for all the products.
      implementation: "cuda", "xla", or a sequence of them to take the first that supports the
        call. None is ("cuda", "xla"). "cuda" is kernels for compute capability 9.0, used where the
        computation is lowered for CUDA. "xla" is plain jax.numpy.

    Returns:
      [..., N] in x's dtype. To be differentiated once, in reverse mode; the gradients of weights
      are float32 up to their cast to the weights' dtypes. A remat policy knows the result, the
      products with gate and up, and rstd by the names "jaxkern_fp8_mlp_out",
      "jaxkern_fp8_mlp_gate", "jaxkern_fp8_mlp_up" and "jaxkern_rms_norm_rstd". One that saves not
      all of the last three has the products computed again.

    Raises:
      ValueError: arguments that do not fit together, or an unknown implementation.
      NotImplementedError: second derivatives; implementation "cuda" where the kernels cannot run
        the call, or when such a call is lowered for another platform.
      ExceptionGroup: no implementation of a sequence can.
    """
    x, weights = _operands(x, gate, up, down)
    scalings = arguments.recipe(recipe)
    format = scalings.gradient_format if gradient_format is None else gradient_format
    format = _checks.dtype("gradient_format", format, _checks.FP8)
    choice = _dispatch.choose(_OP, implementation, None)
    scales = ()
    if scale is not None and (
        scalings.activation == "tensor" or isinstance(epsilon, jax.Array | np.ndarray)
    ):
        x = norm.rms_norm(x, scale, epsilon=epsilon, implementation=implementation)
    elif scale is not None:
        norm.check_epsilon(epsilon)
        scales = (norm.check_scale(scale, x).astype(jnp.float32),)
    config = _Config(
        scalings,
        format,
        weight_dtypes=tuple(w.dtype for w in weights),
        tokens=x.ndim - 1,
        epsilon=float(epsilon) if scales else None,
        kernel=choice.kernel,
        fallback=choice.fallback,
    )
    return _of_any_sharding(config, x, *weights, *scales)


def _operands(x, gate, up, down):
    """x and the weights as arrays."""
    x, gate = arguments.operands(x, gate, "gate")
    up, down = arguments.operand("up", up), arguments.operand("down", down)
    if up.shape != gate.shape:
        raise ValueError(f"up has shape {up.shape}, wanted gate's {gate.shape}")
    if down.ndim != 2 or down.shape[0] != gate.shape[1]:
        raise ValueError(
            f"down has shape {down.shape}, wanted ({gate.shape[1]}, N) for gate's {gate.shape}"
        )
    return x, (gate, up, down)


class _Config(NamedTuple):
    recipe: arguments.Recipe
    gradient_format: np.dtype
    weight_dtypes: tuple[np.dtype, ...]
    tokens: int  # how many axes of x are M
    epsilon: float | None  # of the norm in the quantisers; None where there is none
    kernel: bool
    fallback: bool  # to the reference, where the lowering is not for CUDA

    @property
    def weight_rank(self):
        """The number of axes of a single weight."""
        return 2

    @property
    def weights(self):
        """Where the operands have the weights, and the norm's."""
        return slice(1, 4 if self.epsilon is None else 5)

    def lead(self, x_rank):
        """The number of axes that vmap has put in front of x."""
        return x_rank - self.tokens - 1


@functools.partial(jax.jit, static_argnums=0)
def _of_any_sharding(config, *operands):
    axes = _axes(config, operands[0].ndim, 2)
    return _fp8_mlp(config, *_partitioning.alike(operands, (axes.x, *axes.weights, *axes.scale)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fp8_mlp(config, *operands):
    return _forward_op(config, False)(*operands)[0]


def _fp8_mlp_fwd(config, *operands):
    y, *kept = _forward_op(config, True)(*operands)
    names = "jaxkern_fp8_mlp_gate", "jaxkern_fp8_mlp_up", "jaxkern_rms_norm_rstd"
    kept = [checkpoint_name(a, name) for a, name in zip(kept, names, strict=False)]
    return checkpoint_name(y, "jaxkern_fp8_mlp_out"), (*operands, *kept)


def _fp8_mlp_bwd(config, residuals, dy):
    dz, *dweights = _backward_op(config)(*residuals, dy)
    if config.epsilon is None:
        return dz, *dweights
    # Not on each device alone: where F is sharded, dz is a sum over the devices.
    x, *_, scale, _, _, rstd = residuals
    settings = norm.Config(config.epsilon, config.fallback, config.kernel)
    dx, dscale = norm.gradients(settings, x, scale, rstd, dz)
    return dx, *dweights, dscale


_fp8_mlp.defvjp(_fp8_mlp_fwd, _fp8_mlp_bwd)


# --- Operations -----------------------------------------------------------------------------------
# The operands are x, the weights, and with a norm its scale. vmap puts axes in front; those of the
# weights are the first ones of x.


class _Axes(NamedTuple):
    """Names of the axes of every array."""

    x: tuple[str, ...]
    weights: tuple[tuple[str, ...], ...]
    scale: tuple[tuple[str, ...], ...]  # of the norm, if there is one, like rstd
    rstd: tuple[tuple[str, ...], ...]
    hidden: tuple[str, ...]  # of the products with gate and up
    y: tuple[str, ...]
    dweights: tuple[tuple[str, ...], ...]


def _axes(config, x_rank, weight_rank):
    lead = tuple(f"b{i}" for i in range(config.lead(x_rank)))
    rows = (*lead, *(f"btoken{i}" for i in range(config.tokens)))

    def weights(lead):
        first = (*lead, "depth", "bhidden")
        return first, first, (*lead, "bhidden", "width")

    weight_lead, norms = lead[: weight_rank - 2], config.epsilon is not None
    return _Axes(
        x=(*rows, "depth"),
        weights=weights(weight_lead),
        scale=((*weight_lead, "depth"),) * norms,
        rstd=(rows,) * norms,
        hidden=(*rows, "bhidden"),
        y=(*rows, "width"),
        dweights=weights(lead),
    )


@functools.cache
def _forward_op(config, has_residuals):
    """y, and with residuals the products with gate and up, and rstd."""

    def axes(*ranks):
        axes = _axes(config, *ranks[:2])
        rstd = map(_partitioning.Repeated, axes.rstd)  # alike for all shards of F
        kept = (axes.hidden, axes.hidden, *rstd) if has_residuals else ()
        return (axes.x, *axes.weights, *axes.scale), (axes.y, *kept)

    def function(config, summed, *operands):
        results = _forward(config, summed, *operands)
        return results if has_residuals else results[:1]

    def finish(sums, x, *_):
        return sums[0].astype(x.dtype), *sums[1:]

    return fp8.kernel_op(_OP, config, function, axes, finish, weight=config.weights)


@functools.cache
def _backward_op(config):
    def axes(*ranks):
        axes = _axes(config, *ranks[:2])
        kept = axes.hidden, axes.hidden, *axes.rstd
        return (axes.x, *axes.weights, *axes.scale, *kept, axes.y), (axes.x, *axes.dweights)

    def finish(sums, x, *_):
        dtypes = x.dtype, *config.weight_dtypes
        return tuple(s.astype(dtype) for s, dtype in zip(sums, dtypes, strict=True))

    return fp8.kernel_op(_OP, config, _backward, axes, finish, weight=config.weights)


# --- One device -----------------------------------------------------------------------------------


def _forward(config, summed, x, gate, up, down, *scale):
    """y, the products with gate and up, and with a norm rstd."""
    z, *rstd = _normalised(config, x, *scale)
    products = [_product(config, z, w, "transposed", x.dtype) for w in (gate, up)]
    h = _activation(config, *products, op="quantize_swiglu")
    y = _product(config, h, down, "transposed", fp8.share_dtype(summed, 0, x.dtype))
    wide = (a.reshape(*x.shape[:-1], a.shape[-1]) for a in (y, *products))
    return *wide, *(r.reshape(x.shape[:-1]) for r in rstd)


def _backward(config, summed, x, gate, up, down, *others):
    """The gradients of z and the weights."""
    *kept, dy = others
    scale, rstd = ((), ()) if config.epsilon is None else (kept[:1], kept[-1:])
    hidden = kept[len(scale) : len(scale) + 2]
    *hidden, dy = (_matrices(config, a) for a in (*hidden, dy))
    scaling, format = config.recipe.activation, config.gradient_format
    dy, dy_t = fp8.quantized(config, (dy,), format, scaling, "both")
    dh = _product(config, dy, down, "natural", x.dtype)
    dgate, dgate_t, dup, dup_t = fp8.quantized(
        config, (*hidden, dh), format, scaling, "both", "quantize_swiglu_grad"
    )
    dtype = fp8.share_dtype(summed, 0, x.dtype)
    shares = [
        _product(config, d, w, "natural", dtype).astype(_SINGLE)
        for d, w in ((dgate, gate), (dup, up))
    ]
    dz = (shares[0] + shares[1]).astype(dtype)
    (z_t,) = _normalised(config, x, *scale, *rstd, orientation="transposed")
    h_t = _activation(config, *hidden, orientation="transposed", op="quantize_swiglu")
    pairs = (z_t, dgate_t), (z_t, dup_t), (h_t, dy_t)
    return dz.reshape(x.shape), *(
        fp8.multiplied(config, (lhs, scaling), (rhs, scaling), fp8.share_dtype(summed, i, dtype))
        for i, (lhs, rhs), dtype in zip((1, 2, 3), pairs, config.weight_dtypes, strict=True)
    )


def _normalised(config, x, *norms, orientation="natural"):
    """z quantised, and rstd where it is computed.

    norms: the norm's scale, and rstd if there is one already; nothing without a norm.
    """
    x = _matrices(config, x)
    if not norms:
        return (_activation(config, x, orientation=orientation),)
    scale, *rstd = norms
    inputs = x, scale, *(r.reshape(x.shape[:-1]) for r in rstd)
    epsilon = None if rstd else config.epsilon
    scaling, op = config.recipe.activation, "quantize_rms_norm"
    return fp8.quantized(config, inputs, arguments.FORMAT, scaling, orientation, op, epsilon)


def _activation(config, *inputs, orientation="natural", op="quantize"):
    """What a quantiser makes of activations."""
    scaling = config.recipe.activation
    (array,) = fp8.quantized(config, inputs, arguments.FORMAT, scaling, orientation, op)
    return array


def _product(config, lhs, w, orientation, dtype):
    """lhs of a weight, or for "natural" of its transpose, [..., M, N]."""
    (rhs,) = fp8.quantized(config, (w,), arguments.FORMAT, config.recipe.weight, orientation)
    scaling = config.recipe.activation
    return fp8.multiplied(config, (lhs, scaling), (rhs, config.recipe.weight), dtype)


def _matrices(config, x):
    """x [..., R, C], with the axes in front that vmap has put there."""
    lead = x.shape[: config.lead(x.ndim)]
    return x.reshape(*lead, math.prod(x.shape[len(lead) : -1]), x.shape[-1])
