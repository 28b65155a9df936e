import attention
import common
import plot
import pytest
import rms_norm

from jaxkern import benchmarking

CASE = "fwd b8 n16/16 t2048 s2048 h128 causal bf16"


def run(date, commit="abc"):
    return benchmarking.Run(date, commit, "NVIDIA H200", "jax=1 driver=2", "python x.py")


def rows(date, case=CASE, family="attention", metric="tflops", **values):
    names = {"ours": "jaxkern", "cudnn": "jax.nn cudnn", "xla": "jaxkern xla", "jnp": "jnp"}
    names |= {"separate": "jaxkern separate", "fp8": "jaxkern fp8-row", "copy": "copy"}
    names |= {"row": "jaxkern row", "bf16": "xla bf16"}
    return [run(date).row(family, case, names[n], metric, v) for n, v in values.items()]


@pytest.fixture
def results(tmp_path):
    """All attention shapes of head dim 64 and 128: jaxkern at half the baseline's speed."""
    everything = []
    for shape in attention.SHAPES:
        if shape.head_dim <= 128:
            for direction in common.DIRECTIONS:
                everything += rows("2026-01-02", shape.case(direction), ours=210.4, cudnn=420.0)
    for shape in attention.MASKED[::-1]:
        values = {"ours": 300.0, "cudnn": 100.0} | ({"separate": 310.0} if shape.documents else {})
        everything += rows("2026-01-02", shape.case("fwd"), **values)
    for shape in rms_norm.SHAPES[::-1]:
        everything += rows(
            "2026-01-03", shape.case("fwd"), "rms_norm", "gbps", ours=4000.0, jnp=3000.0
        )
    speeds = {"ours": 500_000.0, "xla": 50_000.0}
    everything += rows("2026-01-04", "train 104M b64", "train", "tokens_per_s", **speeds)
    speeds = {"ours": 400_000.0, "fp8": 600_000.0}
    everything += rows("2026-01-05", "train 104M b64", "train", "tokens_per_s", **speeds)
    rates = {"ours": 4000.0, "xla": 2000.0, "copy": 4100.0}
    everything += rows("2026-01-06", "quantize row both", "quantize", "gbps", **rates)
    everything += rows("2026-01-07", "fwd m1", "fp8_linear", "tflops", bf16=600.0, row=1100.0)
    benchmarking.append_rows(tmp_path, everything)
    return tmp_path / "nvidia-h200.csv"


class TestLatest:
    def test_providers_of_a_case_come_from_its_last_run(self):
        history = rows("2026-01-02T10", ours=2.0, cudnn=3.0, xla=1.0)
        history += rows("2026-01-01T10", ours=1.0, cudnn=9.0)
        history += rows("2026-01-02T11", case="fwd other", ours=5.0, cudnn=6.0)
        assert plot.latest(history, "attention", "tflops") == {
            CASE: {"jaxkern": 2.0, "jax.nn cudnn": 3.0, "jaxkern xla": 1.0},
            "fwd other": {"jaxkern": 5.0, "jax.nn cudnn": 6.0},
        }

    def test_a_run_that_compares_nothing_does_not_count(self):
        history = rows("2026-01-01", ours=1.0, cudnn=2.0)
        history += rows("2026-01-02", ours=7.0) + rows("2026-01-03", cudnn=8.0, xla=1.0)
        history += rows("2026-01-04", metric="us", ours=7.0, cudnn=8.0)
        figures = plot.latest(history, "attention", "tflops")
        assert figures == {CASE: {"jaxkern": 1.0, "jax.nn cudnn": 2.0}}


def test_figures(results, tmp_path):
    (tmp_path / "train_loss.csv").write_text(
        "provider,seed,run,step,train,held_out\n"
        "jaxkern,0,0,1,5.0,\njaxkern,0,0,2,4.0,4.5\njaxkern xla,0,0,1,5.1,\n"
    )
    arguments = ["--results", str(results), "--output", str(tmp_path / "docs")]
    assert plot.main(arguments) == 0
    drawn = (tmp_path / "docs" / "attention.svg").read_text()
    for text in ("Forward, causal", "Backward, no mask", "jax.nn cudnn", "16k", "B2 N32/8", "H64"):
        assert f">{text}</text>" in drawn or f">{text}</tspan>" in drawn, text
    assert "NVIDIA H200, jax=1 driver=2, commit abc, 2026-01-02" in drawn
    assert "jaxkern separate" not in drawn  # windows and documents have a table only
    losses = (tmp_path / "docs" / "train_loss.svg").read_text()
    assert ">jaxkern xla</text>" in losses
    assert not (tmp_path / "docs" / "fp8_loss.svg").exists()
    (tmp_path / "fp8_loss.csv").write_text(
        "provider,seed,run,step,train,held_out\njaxkern fp8-row,0,0,1,5.0,5.1\n"
    )
    assert plot.main(arguments) == 0
    assert ">jaxkern fp8-row</text>" in (tmp_path / "docs" / "fp8_loss.svg").read_text()
    assert plot.main(arguments) == 0
    assert (tmp_path / "docs" / "attention.svg").read_text() == drawn


def test_drift():
    """Runs of a seed are compared at the steps that all of them have."""
    runs = {
        ("jaxkern", 0, 0): {1: 5.0, 2: 4.0, 3: 3.0},
        ("jaxkern", 0, 1): {1: 5.0, 2: 4.5, 3: 3.5},
        ("jaxkern xla", 0, 0): {1: 5.0, 2: 4.7},
        ("jaxkern", 1, 0): {1: 9.0},
    }
    assert plot.drift(runs, window=2) == {
        ("jaxkern", 0, 0): {2: pytest.approx(-0.2)},
        ("jaxkern", 0, 1): {2: pytest.approx(0.05)},
        ("jaxkern xla", 0, 0): {2: pytest.approx(0.15)},
        ("jaxkern", 1, 0): {},
    }


def test_long_runs_are_thinned():
    assert plot.thinned({1: 5.0, 2: 4.0}) == {1: 5.0, 2: 4.0}
    assert plot.thinned({}) == {}
    points = {step: float(step) for step in range(1, 8)}
    assert plot.thinned(points, most=3) == {3: 2.0, 6: 5.0, 7: 7.0}


def test_figure_of_a_few_cases(tmp_path):
    figures = {CASE: {"jaxkern": 400.0, "jax.nn cudnn": 500.0}}
    plot.draw_attention(figures, "note", tmp_path / "attention.svg")
    assert ">jax.nn cudnn</text>" in (tmp_path / "attention.svg").read_text()


def test_nothing_to_draw(tmp_path, capsys):
    benchmarking.append_rows(tmp_path, rows("2026-01-01", ours=1.0))
    with pytest.raises(SystemExit):
        plot.main(["--results", str(tmp_path / "nvidia-h200.csv"), "--output", str(tmp_path)])
    assert "no attention case with jaxkern and another provider" in capsys.readouterr().err


def test_markdown(results, capsys):
    assert plot.main(["--results", str(results), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| TFLOP/s, forward / backward | causal | jaxkern | jax.nn cudnn | jaxkern / jax.nn cudnn |"
    )
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    first = "| b32 n16/16 t512 s512 h128 bf16 | no | 210 / 210 | 420 / 420 | 0.50 / 0.50 |"
    assert lines[2] == first
    assert lines[3] == first.replace("no", "yes")
    assert lines[22] == "| geometric mean |  |  |  | 0.50 / 0.50 |"
    assert lines[24] == "NVIDIA H200, jax=1 driver=2, commit abc, 2026-01-02"
    assert lines[26] == (
        "| TFLOP/s, forward / backward | causal | jaxkern | jax.nn cudnn | jaxkern separate | "
        "jaxkern / jax.nn cudnn |"
    )
    windows = "| b1 n32/32 t16384 s16384 h64 window1024 bf16 | yes | 300 / - | 100 / - | - / - "
    assert lines[28] == windows + "| 3.00 / - |"
    assert "documents8 bf16 | yes | 300 / - | 100 / - | 310 / - |" in lines[31]
    assert "| fwd r65536 w1024 bf16 | 4000 | - | 3000 |" in lines
    assert "| tokens/s | jaxkern | jaxkern fp8-row |" in lines
    fp8 = lines.index("| train 104M b64 | 400,000 | 600,000 |")
    assert lines[fp8 + 2].endswith("2026-01-05")
    assert lines[lines.index("| train 104M b64 | 500,000 | 50,000 |") + 2].endswith("2026-01-04")
    quantize = lines.index("| GB/s | jaxkern | jaxkern xla | copy |")
    assert lines[quantize + 2] == "| quantize row both | 4000 | 2000 | 4100 |"
    linear = lines.index("| TFLOP/s | xla bf16 | jaxkern row |")
    assert lines[linear + 2] == "| fwd m1 | 600 | 1100 |"
