import common
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
