import common
import jax
import pytest
import quantize

import jaxkern
from jaxkern import benchmarking


def shape(scaling, orientation, rows=300, width=200, dtype="bf16"):
    return quantize.Shape("quantize", scaling, orientation, rows, width, dtype, "e4m3")


def test_spelling():
    large = shape("row", "both", 16384, 8192)
    assert large.case("fwd") == "quantize row both r16384 w8192 bf16 e4m3"
    assert large in quantize.QUICK
    for each in quantize.SHAPES:
        assert quantize.Shape.parse(each.case("fwd")) == ("fwd", each)
    message = "wanted the form 'quantize row both r16384 w8192 bf16 e4m3', got 'quantize row r1'"
    with pytest.raises(ValueError, match=message):
        quantize.Shape.parse("quantize row r1")


def test_spelling_of_four_bits():
    """With a block that the format has."""
    for case in (
        "quantize 1x64 natural r8 w128 bf16 e4m3",
        "quantize row natural r8 w128 bf16 nvfp4",
        "quantize 1x32 natural r8 w128 bf16 nvfp4",
        "quantize 1x16 both r8 w128 bf16 nvfp4",
        "quantize 1x128 natural r8 w64 bf16 int4",
        "quantize_swiglu 1x32 natural r8 w128 bf16 mxfp4",
    ):
        with pytest.raises(ValueError, match="wanted the form"):
            quantize.Shape.parse(case)


@pytest.mark.parametrize(
    "format, block",
    [(name, block) for name, (_, blocks) in quantize.FOUR_BIT.items() for block in blocks],
)
def test_bytes_of_four_bits_are_those_of_the_arrays(format, block):
    case = quantize.Shape("quantize", f"1x{block}", "natural", 6, 256, "bf16", format)
    assert case.is_known
    [(x,)] = common.normal_inputs([(6, 256)], ["bfloat16"]).arguments[:1]
    result = jaxkern.quantize(x, **case.options, implementation="xla")
    assert (result.zero_point is not None) == (format == "int4-zero")
    bits = {"int4": 4, "float4_e2m1fn": 4}
    written = sum(
        a.size * bits.get(a.dtype.name, 8 * a.dtype.itemsize) // 8 for a in jax.tree.leaves(result)
    )
    assert case.work("fwd") == (2 if format == "nvfp4" else 1) * x.nbytes + written


@pytest.mark.parametrize("scaling", quantize.SCALINGS)
@pytest.mark.parametrize("orientation", quantize.ORIENTATIONS)
def test_bytes_written_are_those_of_the_results(scaling, orientation):
    case = shape(scaling, orientation)
    [(x,)] = common.normal_inputs([(300, 200)], ["bfloat16"]).arguments[:1]
    results = jaxkern.quantize(x, scaling=scaling, orientation=orientation, implementation="xla")
    results = results if orientation == "both" else (results,)
    written = sum(r.values.nbytes + r.scale.nbytes for r in results)
    assert case.work("fwd") == case.reads * x.nbytes + written


@pytest.mark.parametrize("scaling", quantize.FUSED)
def test_bytes_of_a_norm_are_those_of_all_arrays(scaling):
    case = quantize.Shape("quantize_rms_norm", scaling, "natural", 300, 200, "bf16", "e4m3")
    x, scale = operands = quantize.inputs(case).arguments[0]
    results = jaxkern.quantize_rms_norm(*operands, scaling=scaling, implementation="xla")
    arrays = x, scale, results[0].values, results[0].scale, results[1]
    assert case.work("fwd") == sum(array.nbytes for array in arrays)


def test_what_is_read_twice():
    """Where a value's scale needs a whole tensor or column."""
    cases = [shape(s, o) for s in quantize.SCALINGS for o in quantize.ORIENTATIONS]
    twice = {(case.scaling, case.orientation) for case in cases if case.reads == 2}
    assert twice == {
        *(("tensor", orientation) for orientation in quantize.ORIENTATIONS),
        ("row", "transposed"),
        ("row", "both"),
    }


def test_measures_on_any_device(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "l2_cache_bytes", lambda: 1)
    cases = [f"quantize {scaling} both r48 w96 f32 e5m2" for scaling in ("row", "128x128")]
    arguments = ["--providers", "jaxkern xla,copy", "--seconds", "0.001", "--commit", "abc"]
    arguments += ["--repeats", "2", "--output", str(tmp_path), "--case", cases[0]]
    assert quantize.main([*arguments, "--case", cases[1]]) == 0
    [path] = tmp_path.iterdir()
    rows = benchmarking.read_rows(path)
    assert [(r.family, r.case, r.provider, r.metric) for r in rows] == [
        ("quantize", case, provider, metric)
        for case in cases
        for provider in ("jaxkern xla", "copy")
        for metric in ("us", "gbps")
    ]
    us, gbps = (r.value for r in rows[:2])
    assert us * gbps == pytest.approx((10 * 48 * 96 + 4 * (48 + 96)) / 1e3, rel=1e-3)
