"""The benchmark around the training example, with a stand-in for the example."""

import csv
import importlib.util

import pytest
import train

from jaxkern import benchmarking

STAND_IN = """
import argparse, json, pathlib, sys
parser = argparse.ArgumentParser()
names = ("implementation", "output", "preset", "steps", "batch", "seed", "precision", "dtype")
for name in names:
    parser.add_argument(f"--{name}")
parser.add_argument("--restart", action="store_true")
a = parser.parse_args()
if a.implementation == "cudnn":
    sys.exit("cuDNN is not there")
out = pathlib.Path(a.output)
out.mkdir(parents=True)
(out / "checkpoints").mkdir()
config = {"batch": int(a.batch), "context": 2048, "dtype": a.dtype or "bfloat16"}
(out / "config.json").write_text(json.dumps(config))
lines = ["step,train,held_out", f"1,{5.5 + int(a.seed)},", f"{a.steps},4.5,4.75"]
(out / "losses.csv").write_text("\\n".join(lines) + "\\n")
print("some progress")
speed = {"cuda": 1000.0, "xla": 100.0}[a.implementation]
speed *= {None: 1, "fp8-row": 1.5, "fp8-block": 1.25}[a.precision]
result = {"held_out_loss": 4.75, "tokens_per_s": speed, "steps": int(a.steps)}
print(json.dumps(result | {"parameters": 104123456, "devices": 1}))
"""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    example = tmp_path / "example.py"
    example.write_text(STAND_IN)
    monkeypatch.setattr(train, "EXAMPLE", example)
    output = tmp_path / "results"

    def measure(*arguments):
        destination = ["--output", str(output), "--commit", "abc"]
        return train.main([*arguments, "--batch", "8", *destination]), output

    return measure


def test_rows(measure, capsys):
    status, output = measure("--implementations", "cuda,xla", "--steps", "7")
    assert status == 0
    [path] = output.iterdir()
    rows = benchmarking.read_rows(path)
    assert [(r.family, r.case, r.provider, r.metric, r.value) for r in rows] == [
        ("train", "train 104M b8 t2048 bf16", "jaxkern", "tokens_per_s", 1000.0),
        ("train", "train 104M b8 t2048 bf16", "jaxkern xla", "tokens_per_s", 100.0),
    ]
    command = "python benchmarks/train.py --implementations cuda,xla --steps 7 --batch 8"
    assert {r.command for r in rows} == {command}
    assert "1,000 tokens/s  held-out loss 4.7500" in capsys.readouterr().out


def test_precisions_cross_implementations(measure):
    arguments = ["--implementations", "cuda,xla", "--precisions", "bf16,fp8-row", "--steps", "7"]
    status, output = measure(*arguments)
    assert status == 0
    [path] = output.iterdir()
    assert [(r.case, r.provider, r.value) for r in benchmarking.read_rows(path)] == [
        ("train 104M b8 t2048 bf16", "jaxkern", 1000.0),
        ("train 104M b8 t2048 bf16", "jaxkern fp8-row", 1500.0),
        ("train 104M b8 t2048 bf16", "jaxkern xla", 100.0),
        ("train 104M b8 t2048 bf16", "jaxkern xla fp8-row", 150.0),
    ]


def test_losses_of_precisions(measure):
    arguments = ["--implementations", "cuda", "--precisions", "bf16,bf16,fp8-row,fp8-block"]
    status, output = measure(*arguments, "--steps", "7", "--losses")
    assert status == 0
    with (output / "fp8_loss.csv").open(newline="") as file:
        found = {(row["provider"], row["run"]) for row in csv.DictReader(file)}
    fp8 = {("jaxkern fp8-row", "0"), ("jaxkern fp8-block", "0")}
    assert found == {("jaxkern", "0"), ("jaxkern", "1")} | fp8
    drawn = (output / "fp8_loss.svg").read_text()
    for name in ("jaxkern", "jaxkern fp8-row", "jaxkern fp8-block"):
        assert f">{name}</text>" in drawn
    assert not (output / "train_loss.csv").exists()


def test_precisions_are_the_example_s():
    spec = importlib.util.spec_from_file_location("train_transformer", train.EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for name, options in train.PRECISIONS.items():
        _, config = example.parse(list(options))
        precision = name if name.startswith("fp8") else "dtype"
        dtype = "float32" if name == "preset" else "bfloat16"
        assert (config.precision, config.dtype) == (precision, dtype)


def test_checkpoints_are_not_kept(measure, tmp_path):
    run = train.Run("cuda", "bf16", 0)
    train.train(run, ["--batch", "8", "--steps", "7"], tmp_path, {})
    assert (tmp_path / run.name / "losses.csv").exists()
    assert not (tmp_path / run.name / "checkpoints").exists()


def test_losses_and_plot(measure):
    status, output = measure(
        "--implementations", "cuda,xla,cuda", "--steps", "7", "--seeds", "0,3", "--losses"
    )
    assert status == 0
    [path] = set(output.glob("*.csv")) - {output / "train_loss.csv"}
    rows = benchmarking.read_rows(path)
    assert len(rows) == 6
    assert {(r.provider, r.metric, r.value) for r in rows if r.case.endswith("bf16 seed 3")} == {
        (provider, "held_out_loss", 4.75) for provider in ("jaxkern", "jaxkern xla")
    }
    with (output / "train_loss.csv").open(newline="") as file:
        losses = [tuple(row.values()) for row in csv.DictReader(file)]
    runs = [("jaxkern", "0"), ("jaxkern xla", "0"), ("jaxkern", "1")]
    assert losses == [
        (provider, seed, run, *row)
        for seed, first in (("0", "5.5"), ("3", "8.5"))
        for provider, run in runs
        for row in (
            ("1", first, ""),
            ("7", "4.5", "4.75"),
        )
    ]
    assert ">jaxkern xla</text>" in (output / "train_loss.svg").read_text()


def test_failure_is_reported_and_leaves_the_others(measure, capsys):
    status, output = measure()
    assert status == 1
    [path] = output.iterdir()
    assert [r.provider for r in benchmarking.read_rows(path)] == ["jaxkern", "jaxkern xla"]
    assert (
        "FAILED: cudnn-preset-seed0-run0 exited with 1:\ncuDNN is not there"
        in capsys.readouterr().out
    )


def test_unknown_implementation(measure, capsys):
    with pytest.raises(SystemExit):
        measure("--implementations", "cuda,triton")
    message = "--implementations: no triton; there are cuda, cudnn, xla"
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        measure("--precisions", "bf16,int8")
    assert "--precisions: no int8; there are preset, bf16, fp8-row" in capsys.readouterr().err


def test_case_names_more_than_one_device():
    config = {"batch": 8, "context": 128, "dtype": "float32"}
    assert train.case({"parameters": 1_234_567, "devices": 2}, config) == (
        "train 1.23M b8 t128 f32 d2"
    )
