"""What scaled_matmul's arguments mean: the checks of its operands, and the kinds of its scales."""

import jax
import jax.numpy as jnp

from jaxkern import _checks
from jaxkern.reference.quantize import BLOCK, blocks

_SCALES = {
    "lhs_scales": "{lead}1, 1), {lead}M, 1) or {lead}M, ceil(K / 128))",
    "rhs_scales": (
        "{lead}1, 1), {lead}N, 1), {lead}N, ceil(K / 128)) or {lead}ceil(N / 128), ceil(K / 128))"
    ),
}


def operands(lhs, rhs):
    """lhs and rhs as FP8 arrays of one rank, 2 or 3, and of one batch and depth."""
    lhs, rhs = _fp8("lhs", lhs), _fp8("rhs", rhs)
    if lhs.ndim not in (2, 3):
        raise ValueError(f"lhs has shape {lhs.shape}, wanted rank 2 (M, K) or 3 (B, M, K)")
    if rhs.ndim != lhs.ndim or rhs.shape[-1] != lhs.shape[-1] or rhs.shape[:-2] != lhs.shape[:-2]:
        wanted = ", ".join(map(str, (*lhs.shape[:-2], "N", lhs.shape[-1])))
        raise ValueError(f"rhs has shape {rhs.shape}, wanted ({wanted}) for lhs's {lhs.shape}")
    return lhs, rhs


def scales(lhs, rhs, lhs_scales, rhs_scales):
    """Both scales with their scaling: (lhs_scales, "row"), (rhs_scales, "tensor").

    Several readings of a shape mean the same, and the first of "tensor", "row", "1x128" and
    "128x128" that it allows is taken. Blocks of rows without blocks of K become rows.
    """
    lhs_scales, lhs_scaling = _scaling("lhs_scales", lhs_scales, lhs)
    rhs_scales, rhs_scaling = _scaling("rhs_scales", rhs_scales, rhs)
    lhs_blocks, rhs_blocks = lhs_scales.shape[-1], rhs_scales.shape[-1]
    if lhs_blocks != rhs_blocks:
        raise ValueError(
            f"lhs_scales has {lhs_blocks} blocks along K and rhs_scales {rhs_blocks}, wanted the "
            "same number"
        )
    return (lhs_scales, lhs_scaling), (rhs_scales, rhs_scaling)


def bias(x, n):
    """bias as float32 [N], or None."""
    if x is None:
        return None
    x = _checks.float_array("bias", x)
    if x.shape != (n,):
        raise ValueError(f"bias has shape {x.shape}, wanted ({n},), one per row of rhs")
    return x.astype(jnp.float32)


def _fp8(name: str, x) -> jax.Array:
    x = _checks.array(name, x)
    if x.dtype.name not in _checks.FP8:
        raise ValueError(f"{name} has dtype {x.dtype}, wanted one of {', '.join(_checks.FP8)}")
    return x


def _scaling(name, scale, matrix):
    scale = _checks.array(name, scale)
    if scale.dtype.name != "float32":
        raise ValueError(f"{name} has dtype {scale.dtype}, wanted float32")
    rows, depth = matrix.shape[-2:]
    if scale.ndim == matrix.ndim and scale.shape[:-2] == matrix.shape[:-2]:
        high, wide = scale.shape[-2:]
        if wide == 1 and high in (1, rows):
            return scale, "tensor" if high == 1 else "row"
        if wide == blocks(depth) and high == rows:
            return scale, "1x128"
        if wide == blocks(depth) and high == blocks(rows) and name == "rhs_scales":
            if wide > 1:
                return scale, "128x128"
            return jnp.repeat(scale, BLOCK, -2)[..., :rows, :], "row"
    raise ValueError(_wrong_shape(name, scale, matrix))


def _wrong_shape(name, scale, matrix):
    rows, depth = matrix.shape[-2:]
    letter = "M" if name == "lhs_scales" else "N"
    lead = "(B, " if matrix.ndim == 3 else "("
    sizes = f"{letter} {rows}, K {depth}"
    if matrix.ndim == 3:
        sizes = f"B {matrix.shape[0]}, {sizes}"
    message = (
        f"{name} has shape {scale.shape}, wanted {_SCALES[name].format(lead=lead)} with {sizes}"
    )
    if scale.shape[:-1] == matrix.shape[:-1] and depth % max(scale.shape[-1], 1) == 0:
        message += "; blocks along K have 128 here, jax.nn.scaled_matmul takes other sizes"
    return message
