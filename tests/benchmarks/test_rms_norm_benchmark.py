import common
import pytest
import rms_norm

from jaxkern import benchmarking


def test_spelling():
    shape = rms_norm.Shape(16384, 4096, "bf16")
    assert shape.case("bwd") == "bwd r16384 w4096 bf16"
    for shape in rms_norm.SHAPES:
        assert rms_norm.Shape.parse(shape.case("fwd")) == ("fwd", shape)
    with pytest.raises(ValueError, match="wanted the form 'fwd r16384 w4096 bf16', got 'fwd r1'"):
        rms_norm.Shape.parse("fwd r1")


def test_bytes_that_must_move():
    shape = rms_norm.Shape(rows=10, width=100, dtype="bf16")
    assert shape.work("fwd") == 2 * (2 * 1000 + 100)
    assert shape.work("bwd") == 2 * (3 * 1000 + 2 * 100) + 4 * 10
    assert rms_norm.Shape(10, 100, "f32").work("fwd") == 4 * (2 * 1000 + 100)


def test_measures_on_any_device(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "l2_cache_bytes", lambda: 1)
    arguments = ["--case", "fwd r16 w96 f32", "--case", "bwd r16 w96 f32", "--repeats", "2"]
    arguments += ["--providers", "jnp,jaxkern xla", "--seconds", "0.001", "--commit", "abc"]
    assert rms_norm.main([*arguments, "--output", str(tmp_path)]) == 0
    [path] = tmp_path.iterdir()
    rows = benchmarking.read_rows(path)
    assert [(r.case, r.provider, r.metric) for r in rows] == [
        (f"{direction} r16 w96 f32", provider, metric)
        for direction in common.DIRECTIONS
        for provider in ("jnp", "jaxkern xla")
        for metric in ("us", "gbps")
    ]
    us, gbps = (r.value for r in rows[:2])
    assert us * gbps == pytest.approx(4 * (2 * 16 * 96 + 96) / 1e3, rel=1e-3)
