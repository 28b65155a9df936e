"""fp8_matmul and quantize_weight: what they refuse, and how they say so."""

import jax.numpy as jnp
import numpy as np
import pytest
from fp8 import E4M3, E5M2

from jaxkern import QuantizedWeight, fp8_matmul, quantize_weight

pytestmark = pytest.mark.usefixtures("kernels")


def call(k=256, n=384, recipe="row", **options):
    given = {"x": jnp.zeros((4, k)), "w": jnp.zeros((k, n)), "recipe": recipe, **options}
    return fp8_matmul(**given)


def weight(recipe="row", k=256, n=384):
    return quantize_weight(jnp.zeros((k, n)), recipe)


def other_format():
    made = weight()
    forward = type(made.forward)(made.forward.values.astype(E5M2), made.forward.scale)
    return QuantizedWeight(forward, made.backward)


WRONG = {
    "x of integers": ({"x": np.zeros((4, 256), int)}, "x has dtype int32, wanted one of bfloat16"),
    "x a scalar": ({"x": np.float32(1)}, r"x has shape \(\), wanted at least one axis"),
    "w of float8": ({"w": jnp.zeros((256, 384), E4M3)}, "w has dtype float8_e4m3fn, wanted one"),
    "w of rank 3": (
        {"w": jnp.zeros((1, 256, 384))},
        r"w has shape \(1, 256, 384\), wanted \(256, N\) for x's \(4, 256\)",
    ),
    "w transposed": ({"w": jnp.zeros((384, 256))}, r"w has shape \(384, 256\), wanted \(256, N\)"),
    "unknown recipe": ({"recipe": "1x128"}, "recipe is '1x128', wanted one of 'tensor', 'row', "),
    "gradient_format": (
        {"gradient_format": "bfloat16"},
        "gradient_format is 'bfloat16', wanted one of float8_e4m3fn, float8_e5m2",
    ),
    "fast_accumulation is a number": (
        {"fast_accumulation": 1},
        "fast_accumulation is 1, wanted True or False",
    ),
    "fast_accumulation of blocks": (
        {"fast_accumulation": True, "recipe": "block"},
        "fast_accumulation is True, wanted False with recipe 'block'",
    ),
    "result of float64": (
        {"preferred_element_type": "float64"},
        "preferred_element_type is 'float64', wanted one of bfloat16, float16, float32",
    ),
    "quantized_weight an array": (
        {"quantized_weight": np.zeros((256, 384))},
        "quantized_weight is a ndarray, wanted a QuantizedWeight",
    ),
    "quantized_weight of another w": (
        {"quantized_weight": weight(k=128)},
        r"quantized_weight.forward.values has shape \(384, 128\), wanted \(384, 256\) for w's",
    ),
    "quantized_weight of another recipe": (
        {"quantized_weight": weight("block")},
        r"quantized_weight.forward.scale has shape \(3, 2\), wanted \(384, 1\) for scaling 'row'",
    ),
    "quantized_weight for another recipe": (
        {"quantized_weight": weight("tensor"), "recipe": "block"},
        r"quantized_weight.forward.scale has shape \(1, 1\), wanted \(3, 2\) for scaling '128x128'",
    ),
    "quantized_weight of another format": (
        {"quantized_weight": other_format()},
        "quantized_weight.forward.values has dtype float8_e5m2, wanted float8_e4m3fn",
    ),
    "quantized_weight swapped": (
        {"quantized_weight": QuantizedWeight(weight().backward, weight().forward)},
        r"quantized_weight.forward.values has shape \(256, 384\), wanted \(384, 256\)",
    ),
    "unknown implementation": (
        {"implementation": "cublas"},
        "fp8_matmul: implementation is 'cublas', wanted",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        call(**options)


@pytest.mark.parametrize(
    ("w", "recipe", "message"),
    [
        (np.zeros((2, 8, 8)), "row", "w has dtype|w has shape"),
        (np.zeros((8, 8), int), "row", "w has dtype int32, wanted one of bfloat16"),
        (np.zeros((8, 8), np.float32), "1x128", "recipe is '1x128', wanted one of 'tensor'"),
    ],
)
def test_wrong_argument_of_quantize_weight(w, recipe, message):
    with pytest.raises(ValueError, match=message):
        quantize_weight(w, recipe)


def test_right_arguments():
    """What the cases above start from."""
    assert call(fast_accumulation=True, quantized_weight=weight()).shape == (4, 384)


def test_the_kernel_is_not_for_a_cpu():
    with pytest.raises(NotImplementedError, match="fp8_matmul with implementation 'cuda'"):
        call(implementation="cuda")
