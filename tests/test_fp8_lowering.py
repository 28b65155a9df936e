"""What quantize and scaled_matmul become for CUDA, seen from a machine without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fp8 import E4M3, E5M2, SCALES, random_operands
from lowering import attributes, cuda_text, custom_call_lines, custom_calls, types

from jaxkern import _ffi, quantize, scaled_matmul

pytestmark = pytest.mark.usefixtures("kernels")

CODES = {"tensor": 0, "row": 1, "1x128": 2, "128x128": 3}
NAMES = {E4M3: "f8E4M3FN", E5M2: "f8E5M2", "bfloat16": "bf16", "float32": "f32", "float16": "f16"}

R, C = 130, 300
# Of scale and scale_t; for "tensor" neither is there.
QUANTIZE_SCALES = {
    "tensor": ("0xf32", "0xf32"),
    "row": ("130xf32", "300xf32"),
    "1x128": ("3x132xf32", "2x300xf32"),
    "128x128": ("2x3xf32", "3x2xf32"),
}


def one_call(function, *args):
    """The only custom call, whose target is also the function's name in `jaxkern.`."""
    (count,) = custom_calls(function, *args).values()
    assert count == 1
    return next(iter(custom_call_lines(function, *args).items()))


@pytest.mark.parametrize("scaling", CODES)
@pytest.mark.parametrize("orientation", ["natural", "transposed", "both"])
@pytest.mark.parametrize(("dtype", "format"), [("bfloat16", E4M3), ("float16", E5M2)])
def test_quantize(scaling, orientation, dtype, format):
    run = functools.partial(quantize, format=format, scaling=scaling, orientation=orientation)
    target, line = one_call(run, jnp.zeros((R, C), dtype))
    assert target == "quantize"
    assert attributes(line) == {"scaling": f"{CODES[scaling]} : i32"}
    x, scale_in = f"{R}x{C}x{NAMES[dtype]}", "1xf32" if scaling == "tensor" else "0xf32"
    name, (scale, scale_t) = NAMES[format], QUANTIZE_SCALES[scaling]
    natural = [f"{R}x{C}x{name}", scale]
    transposed = [f"{C}x{R}x{name}", scale_t]
    absent = [f"0x{name}", "0xf32"]
    words = 0  # maxima of columns and rows
    if scaling == "row" and orientation != "natural":
        words = C + R * (orientation == "both")
    wanted = [
        *(absent if orientation == "transposed" else natural),
        *(absent if orientation == "natural" else transposed),
        f"{words}xi32",
    ]
    assert types(line) == ([x, scale_in], wanted)


@pytest.mark.parametrize("scaling", CODES)
def test_quantize_of_a_batch(scaling):
    """Rows of any matrix are in one call; else there is one for each matrix, in a loop."""
    x = jnp.zeros((2, 3, 5, 256), "bfloat16")
    for run in (quantize, lambda x, **options: jax.vmap(functools.partial(quantize, **options))(x)):
        _, line = one_call(functools.partial(run, scaling=scaling), x)
        rows = 30 if scaling in ("row", "1x128") else 5
        assert types(line)[0][0] == f"{rows}x256xbf16"
        _, line = one_call(functools.partial(run, scaling=scaling, orientation="both"), x)
        assert types(line)[0][0] == "5x256xbf16"


def matmul_line(operands, *args, **options):
    function = functools.partial(scaled_matmul, **options)
    target, line = one_call(lambda *arrays: function(*arrays, *args), *operands)
    assert target == "scaled_matmul"
    return line


def scale_type(scaling, batch, rows, k):
    blocks = -(-k // 128)
    return {
        "tensor": f"{batch}x1xf32",
        "row": f"{batch}x{rows}xf32",
        "1x128": f"{batch}x{blocks}x{-(-rows // 4) * 4}xf32",
        "128x128": f"{batch}x{-(-rows // 128)}x{blocks}xf32",
    }[scaling]


@pytest.mark.parametrize("scalings", SCALES, ids="-".join)
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("n", [256, 136])  # blocks of N that fill it and that do not
@pytest.mark.parametrize("k", [512, 208])
def test_scaled_matmul(scalings, batch, n, k):
    line = matmul_line(random_operands(1, 130, n, k, *scalings, batch=batch), "bfloat16")
    assert attributes(line) == {
        "lhs_scaling": f"{CODES[scalings[0]]} : i32",
        "rhs_scaling": f"{CODES[scalings[1]]} : i32",
        "fast_accumulation": "false",
    }
    b = 2 if batch else 1
    wanted = [
        f"{b}x130x{k}xf8E4M3FN",
        f"{b}x{n}x{k}xf8E5M2",
        scale_type(scalings[0], b, 130, k),
        scale_type(scalings[1], b, n, k),
        "0xf32",
    ]
    assert types(line) == (wanted, [f"{b}x130x{n}xbf16"])


@pytest.mark.parametrize("scalings", SCALES, ids="-".join)
def test_scaled_matmul_of_sizes_that_the_kernel_wants_padded(scalings):
    """K to a multiple of 16, N to one of 8: also its scales and the bias."""
    operands = random_operands(1, 3, 131, 300, *scalings)
    bias = np.ones(131, np.float16)
    line = matmul_line(operands, jnp.float32, bias=bias)
    wanted = [
        "1x3x304xf8E4M3FN",
        "1x136x304xf8E5M2",
        scale_type(scalings[0], 1, 3, 304),
        scale_type(scalings[1], 1, 136, 304),
        "136xf32",
    ]
    assert types(line) == (wanted, ["1x3x136xf32"])


@pytest.mark.parametrize("lhs_format", [E4M3, E5M2])
@pytest.mark.parametrize("rhs_format", [E4M3, E5M2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_of_scaled_matmul(lhs_format, rhs_format, dtype):
    formats = lhs_format, rhs_format
    operands = random_operands(1, 4, 8, 16, "row", "row", formats=formats)
    line = matmul_line(operands, dtype, fast_accumulation=True)
    assert attributes(line)["fast_accumulation"] == "true"
    found, results = types(line)
    assert found[:2] == [f"1x4x16x{NAMES[lhs_format]}", f"1x8x16x{NAMES[rhs_format]}"]
    assert results == [f"1x4x8x{NAMES[dtype]}"]


@pytest.mark.parametrize(
    ("scalings", "code", "scale"),
    [
        (("tensor", "tensor"), 1, "1x15xf32"),
        (("row", "tensor"), 1, "1x15xf32"),
        (("1x128", "128x128"), 2, "1x2x16xf32"),
    ],
    ids=["tensor", "row", "1x128"],
)
def test_vmap_over_lhs_is_one_product(scalings, code, scale):
    """Of all rows: rhs is not repeated, and one scale per example is one per row."""
    lhs, _, lhs_scale, _ = random_operands(1, 5, 128, 256, *scalings, batch=(3,))
    _, rhs, _, rhs_scale = random_operands(1, 5, 128, 256, *scalings)
    matmul = jax.vmap(scaled_matmul, (0, None, 0, None))
    _, line = one_call(matmul, lhs, rhs, lhs_scale, rhs_scale)
    assert types(line)[0][:3] == ["1x15x256xf8E4M3FN", "1x128x256xf8E5M2", scale]
    assert attributes(line)["lhs_scaling"] == f"{code} : i32"


def test_vmap_over_both_is_a_batch():
    operands = random_operands(1, 5, 128, 256, "tensor", "row", batch=(3,))
    _, line = one_call(jax.vmap(scaled_matmul), *operands)
    wanted = ["3x5x256xf8E4M3FN", "3x128x256xf8E5M2", "3x1xf32", "3x128xf32", "0xf32"]
    assert types(line)[0] == wanted


def test_vmap_over_the_bias_adds_it_to_float32():
    operands = random_operands(1, 5, 128, 256, "tensor", "row")

    def matmul(bias):
        return scaled_matmul(*operands, "bfloat16", bias=bias)

    _, line = one_call(jax.vmap(matmul), jnp.zeros((3, 128)))
    assert (types(line)[0][4], types(line)[1]) == ("0xf32", ["1x15x128xf32"])


@pytest.mark.parametrize("run", [quantize, scaled_matmul], ids=lambda run: run.__name__)
def test_the_reference_on_other_platforms_and_by_name(run, monkeypatch):
    args = random_operands(1, 4, 8, 16, "row", "row")
    args = (jnp.zeros((4, 8)),) if run is quantize else args
    assert custom_calls(run, *args) == {run.__name__: 1}
    assert custom_calls(functools.partial(run, implementation="xla"), *args) == {}
    assert "jaxkern." not in jax.jit(run).lower(*args).as_text()
    monkeypatch.setattr(_ffi, "missing", lambda: "not built")
    assert custom_calls(lambda *args: run(*args), *args) == {}


def test_the_product_of_the_reference_is_in_float32():
    """Not in the TF32 that a GPU takes by default."""
    operands = random_operands(1, 4, 8, 16, "row", "row")
    text = cuda_text(functools.partial(scaled_matmul, implementation="xla"), *operands)
    (line,) = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert "precision = [HIGHEST, HIGHEST]" in line and "tensor<1x4x16xf32>" in line
