"""Helpers to test kernels with: inputs, comparison with a reference, and memory full of NaN."""

import jax
import jax.numpy as jnp
import numpy as np

# Relative errors, in the Frobenius norm, that products of two quantised matrices stay below, by the
# formats of the operands. For matrices of normal numbers.
#
# With m bits of mantissa, the numbers in [2^e, 2^(e + 1)) are 2^(e - m) apart, and rounding errors
# that are uniform between them have the root mean square 2^(e - m) / sqrt(12). Weighted with how
# often a standard normal number falls into each binade, sqrt(E[4^e]) = 0.735, that is 0.0265 for
# float8_e4m3fn (m = 3) and 0.0530 for float8_e5m2 (m = 2). A scale that is a power of two changes
# e alone, so all scalings are alike. Independent errors of both operands add up in squares, to
# 0.0375, 0.0593 and 0.0750. A tenth is added for small matrices, and for rounding to bfloat16.
FP8_PRODUCT_LIMITS = {
    ("float8_e4m3fn", "float8_e4m3fn"): 0.041,
    ("float8_e4m3fn", "float8_e5m2"): 0.065,
    ("float8_e5m2", "float8_e4m3fn"): 0.065,
    ("float8_e5m2", "float8_e5m2"): 0.083,
}

# The same for products of float8_e4m3fn and a weight of four bits, beside what that stands for, by
# its format and the columns that share a scale. Where the weight is exact, or not rounded to e4m3,
# the error is that of x, 0.0265. Where integers are rounded it is as for two matrices of e4m3. Of
# NVFP4 1.5, 3 and 6 are, with scales of odd mantissa and of 14/8: by 0.029 of them on average, and
# these are more than half of the sum of squares.
FOUR_BIT_TIMES_FP8_LIMITS = {
    ("nvfp4", 16): 0.0375,
    ("mxfp4", 32): 0.029,
    ("int4", 128): 0.029,
    ("int4", 64): 0.041,
    ("int4", 32): 0.041,
}


def relative_error(got, wanted) -> float:
    """|got - wanted| / |wanted| in the Frobenius norm, computed in float64."""
    got, wanted = (np.asarray(x).astype(np.float64) for x in (got, wanted))
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def assert_close_to_reference(ours, ref32, ref_same_dtype, atol: float) -> None:
    """Raise AssertionError unless `ours` is about as accurate as the plain same-dtype computation.

    The rule, in the maximum norm: |ours - ref32| <= 2 * |ref_same_dtype - ref32| + atol.

    Args:
      ours: the array to test.
      ref32: the same computed in float32 from the same inputs.
      ref_same_dtype: the same computed plainly in the dtype of `ours`.
      atol: what is allowed beyond twice the error of `ref_same_dtype`.
    """
    if ours.dtype != ref_same_dtype.dtype:
        raise AssertionError(f"got dtype {ours.dtype}, wanted {ref_same_dtype.dtype}")
    ours, ref32, same = (np.asarray(x, np.float64) for x in (ours, ref32, ref_same_dtype))
    if not ours.shape == ref32.shape == same.shape:
        raise AssertionError(f"got shape {ours.shape}, wanted {ref32.shape} and {same.shape}")
    if not (np.isfinite(ref32).all() and np.isfinite(same).all()):
        raise AssertionError("a reference is not finite, so nothing can be compared with it")
    if not ours.size:
        return
    error = np.abs(ours - ref32)
    error = np.where(np.isnan(error), np.inf, error)
    allowed = 2 * np.abs(same - ref32).max() + atol
    if error.max() > allowed:
        where = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"error {error.max():.3g} at {where} (got {ours[where]:.6g}, wanted "
            f"{ref32[where]:.6g}), allowed {allowed:.3g}; {(error > allowed).sum()} of "
            f"{error.size} elements are off"
        )


def random_normal(seed: int, *shapes: tuple[int, ...], dtype) -> list[jax.Array]:
    """An array of standard normal numbers for each shape."""
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.standard_normal(s, np.float32), dtype) for s in shapes]


def poison_memory(n_bytes: int, device: jax.Device | None = None) -> None:
    """Fill free device memory with NaN, for what is allocated next to start with.

    A kernel that reads a result or workspace that it has not written then shows.
    """
    block = 1 << 24
    poison = [
        jnp.full(block // 4, jnp.nan, jnp.float32, device=device)
        for _ in range(-(-n_bytes // block))
    ]
    jax.block_until_ready(poison)
    for array in poison:
        array.delete()


def poison_beyond(x: jax.Array, lengths: jax.Array, axis: int = 1) -> jax.Array:
    """x [B, ...] with NaN at positions lengths[b] and up of `axis`, which nothing should read."""
    position = jnp.arange(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    ends = lengths.reshape([-1] + [1] * (x.ndim - 1))
    return jnp.where(position < ends, x, jnp.asarray(jnp.nan, x.dtype))
