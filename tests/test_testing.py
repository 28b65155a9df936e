"""The helpers of jaxkern.testing find what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern.testing import (
    FP8_PRODUCT_LIMITS,
    assert_close_to_reference,
    poison_beyond,
    poison_memory,
    random_normal,
    relative_error,
)

REF = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
SAME = REF.at[0, 0].add(0.01)  # an error of 0.01 allows one of 0.02


def test_accepts_twice_the_error_of_the_same_dtype():
    assert_close_to_reference(REF.at[2, 1].add(0.0199), REF, SAME, atol=0)
    assert_close_to_reference(REF.at[2, 1].add(0.0249), REF, SAME, atol=0.005)
    assert_close_to_reference(jnp.zeros((0, 4)), jnp.zeros((0, 4)), jnp.zeros((0, 4)), atol=0)


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (REF.at[2, 1].add(0.0201), r"error 0.0201 at \(2, 1\) .* 1 of 12 elements are off"),
        (REF.at[1, 3].set(jnp.nan), r"error inf at \(1, 3\) \(got nan"),
        (REF.at[1, 3].set(jnp.inf), r"error inf at \(1, 3\) \(got inf"),
        (REF.astype("bfloat16"), "got dtype bfloat16, wanted float32"),
        (REF[:2], r"got shape \(2, 4\), wanted \(3, 4\)"),
    ],
    ids=["error", "nan", "inf", "dtype", "shape"],
)
def test_refuses(ours, message):
    with pytest.raises(AssertionError, match=message):
        assert_close_to_reference(ours, REF, SAME, atol=0)


def test_refuses_a_reference_that_is_not_finite():
    for ref32, same in ((REF.at[0, 0].set(jnp.nan), SAME), (REF, SAME.at[0, 0].set(jnp.inf))):
        with pytest.raises(AssertionError, match="a reference is not finite"):
            assert_close_to_reference(REF, ref32, same, atol=1)


def test_random_normal():
    a, b = random_normal(3, (400, 50), (7,), dtype="float32")
    assert (a.shape, b.shape, a.dtype) == ((400, 50), (7,), "float32")
    assert abs(a.mean()) < 0.03 and abs(a.std() - 1) < 0.03
    again = random_normal(3, (400, 50), dtype="bfloat16")[0]
    assert again.dtype == "bfloat16"
    assert (again == a.astype("bfloat16")).all()


def test_poison_beyond():
    x = jnp.ones((2, 4, 3))
    got = poison_beyond(x, jnp.array([0, 3]))
    wanted = np.ones((2, 4, 3))
    wanted[0] = wanted[1, 3:] = np.nan
    np.testing.assert_array_equal(got, wanted)
    assert np.isnan(poison_beyond(x, jnp.array([1, 3]), axis=2)[0, :, 1:]).all()


def test_poison_memory_holds_on_to_nothing():
    before = len(jax.live_arrays())
    poison_memory(3 << 24)
    assert len(jax.live_arrays()) == before


def test_relative_error():
    wanted = np.full((2, 2), 3.0)
    assert relative_error(wanted, wanted) == 0
    np.testing.assert_allclose(relative_error(wanted + [[0, 0], [0, 0.6]], wanted), 0.1)
    assert np.isnan(relative_error([[np.nan, 1.0]], [[1.0, 1.0]]))


def test_limits_of_fp8_products():
    """Each is the expected error, from the distances of FP8 numbers, and a tenth."""
    numbers = np.random.default_rng(1).standard_normal(1 << 20)
    for formats, limit in FP8_PRODUCT_LIMITS.items():
        bits = [jnp.finfo(format).nmant for format in formats]
        distances = [np.ldexp(1.0, np.frexp(numbers)[1] - 1 - m) for m in bits]
        expected = np.sqrt(sum((distance**2).mean() / 12 for distance in distances))
        assert 1.07 * expected < limit < 1.12 * expected
