import common
import numpy as np
import pytest
import quantized_matmul

from jaxkern import benchmarking


def test_spelling():
    shape = quantized_matmul.Shape(16, 28672, 8192, "nvfp4")
    assert shape.case("fwd") == "m16 n28672 k8192 nvfp4"
    for shape in quantized_matmul.SHAPES:
        assert quantized_matmul.Shape.parse(shape.case("fwd")) == ("fwd", shape)
    with pytest.raises(ValueError, match="wanted the form 'm16 n28672 k8192 nvfp4', got 'm16'"):
        quantized_matmul.Shape.parse("m16")


@pytest.mark.parametrize("format, bits", [("nvfp4", 4.5), ("mxfp4", 4.25), ("int4", 4.125)])
def test_bytes_that_must_move(format, bits):
    shape = quantized_matmul.Shape(3, 160, 256, format)
    assert shape.work("fwd") == 160 * 256 * bits / 8 + 2 * 3 * (160 + 256)
    [one] = quantized_matmul.inputs(quantized_matmul.Shape(3, 160, 256, format)).arguments[:1]
    assert one[2].data.nbytes == shape.weight_bytes


def test_measures_on_any_device(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "l2_cache_bytes", lambda: 1)
    arguments = ["--case", "m4 n32 k128 int4", "--repeats", "2", "--seconds", "0.001"]
    arguments += ["--providers", "jax bf16,jax dequantize", "--commit", "abc"]
    assert quantized_matmul.main([*arguments, "--output", str(tmp_path)]) == 0
    [path] = tmp_path.iterdir()
    rows = benchmarking.read_rows(path)
    assert [(r.case, r.provider, r.metric) for r in rows] == [
        ("m4 n32 k128 int4", provider, metric)
        for provider in ("jax bf16", "jax dequantize")
        for metric in ("us", "gbps")
    ]


def test_providers_agree_with_the_plain_product():
    """Each takes the weight in a form of its own, in the order of the providers."""
    shape = quantized_matmul.Shape(4, 48, 128, "nvfp4")
    x, *weights = quantized_matmul.inputs(shape).arguments[0]
    plain, packed, quantized = weights
    assert list(quantized_matmul.JAX_PROVIDERS) == ["jax bf16", "jaxkern", "jax dequantize"]
    np.testing.assert_array_equal(packed.dequantize("bfloat16"), plain)
    assert (
        common.relative_error(
            quantized_matmul.by_dequantized(x, quantized), quantized_matmul.by_plain(x, plain)
        )
        < 1e-2
    )
