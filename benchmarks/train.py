"""Training speed and loss of `examples/train_transformer.py` by implementation and precision.

    python benchmarks/train.py                              the GPU preset, 200 steps of each
    python benchmarks/train.py --implementations cuda --steps 50
    python benchmarks/train.py --preset cpu --implementations xla --batch 16
    python benchmarks/train.py --implementations cuda,cuda,cudnn,xla --seeds 0,1 --losses
    python benchmarks/train.py --implementations cuda --precisions bf16,bf16,fp8-row --losses

What is not an option here goes to the example. Every implementation runs in every precision: of
attention the first, of the blocks' products the second. Appends tokens/s to the results file; with
--losses the held-out losses instead, and leaves `train_loss.csv` and `train_loss.svg` beside it, or
`fp8_loss` where a precision is FP8. What is named more than once runs more than once, which shows
how far rounding alone drives two runs apart.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import csv
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence

import common
import plot

from jaxkern import benchmarking

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "train_transformer.py"
PROVIDERS = {"cuda": "jaxkern", "cudnn": "jax.nn cudnn", "xla": "jaxkern xla"}
DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
PRECISIONS = {  # and the options of the example that they are
    "preset": (),
    "bf16": ("--dtype", "bfloat16"),
    "fp8-row": ("--dtype", "bfloat16", "--precision", "fp8-row"),
    "fp8-block": ("--dtype", "bfloat16", "--precision", "fp8-block"),
    "fp8-tensor": ("--dtype", "bfloat16", "--precision", "fp8-tensor"),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the example; `number` counts those that differ in nothing else."""

    implementation: str
    precision: str
    seed: int
    number: int = 0

    @property
    def provider(self) -> str:
        fp8 = f" {self.precision}" if self.precision.startswith("fp8") else ""
        return PROVIDERS[self.implementation] + fp8

    @property
    def name(self) -> str:
        return f"{self.implementation}-{self.precision}-seed{self.seed}-run{self.number}"


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run left: its result, its configuration and the rows of its losses."""

    result: Mapping
    config: Mapping
    losses: list[dict[str, str]]


def case(result: Mapping, config: Mapping) -> str:
    """`train 104M b64 t2048 bf16`: parameters, sequences and tokens of each per step."""
    devices = f" d{result['devices']}" if result["devices"] > 1 else ""
    return (
        f"train {result['parameters'] / 1e6:.3g}M b{config['batch']} t{config['context']} "
        f"{DTYPES[config['dtype']]}{devices}"
    )


def train(
    run: Run, arguments: Sequence[str], work: pathlib.Path, environment: Mapping[str, str]
) -> Trained:
    """Runs the example. Raises RuntimeError with the end of its output if it fails."""
    folder = work / run.name
    command = [sys.executable, str(EXAMPLE), "--implementation", run.implementation]
    command += ["--seed", str(run.seed), "--output", str(folder), "--restart"]
    command += [*PRECISIONS[run.precision], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes, for each run
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{run.name} exited with {done.returncode}:\n{end}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if not result["tokens_per_s"]:
        raise RuntimeError(f"{run.name} was too short to measure: give more --steps")
    config = json.loads((folder / "config.json").read_text())
    with (folder / "losses.csv").open(newline="") as file:
        return Trained(result, config, list(csv.DictReader(file)))


def numbered(runs: Iterable[Run]) -> list[Run]:
    """The runs of a provider and a seed, counted from 0."""
    seen = collections.Counter()
    result = []
    for run in runs:
        key = run.provider, run.seed
        result.append(dataclasses.replace(run, number=seen[key]))
        seen[key] += 1
    return result


def write_losses(path: pathlib.Path, trained: Mapping[Run, Trained]) -> None:
    with path.open("w", newline="") as file:
        fields = ["provider", "seed", "run", "step", "train", "held_out"]
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for run, done in trained.items():
            same = {"provider": run.provider, "seed": run.seed, "run": run.number}
            writer.writerows({**same, **row} for row in done.losses)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Training speed by implementation and precision.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--implementations", default=",".join(PROVIDERS), help="some of %(default)s")
    add("--precisions", default="preset", help=f"some of {','.join(PRECISIONS)} (%(default)s)")
    add("--preset", default="gpu", help="of the example (%(default)s)")
    add("--steps", default="200", help="of each run (%(default)s)")
    add("--seeds", default="0", help="of the example, separated by commas (%(default)s)")
    add("--losses", action="store_true", help="all runs at once, for their losses only")
    common.add_destination(parser)
    chosen, others = parser.parse_known_args(argv)
    for option, known in (("implementations", PROVIDERS), ("precisions", PRECISIONS)):
        names = getattr(chosen, option).split(",")
        if unknown := [name for name in names if name not in known]:
            parser.error(f"--{option}: no {', '.join(unknown)}; there are {', '.join(known)}")
    arguments = ["--preset", chosen.preset, "--steps", chosen.steps, *others]
    alone = dict(os.environ)
    common.share_memory()
    environment = dict(os.environ) if chosen.losses else alone
    measured = common.start_run(parser, "train.py", argv, ["flax", "optax"])
    chosen.output.mkdir(parents=True, exist_ok=True)

    runs = numbered(
        Run(implementation, precision, int(seed))
        for seed in chosen.seeds.split(",")
        for implementation in chosen.implementations.split(",")
        for precision in chosen.precisions.split(",")
    )
    trained, failed = {}, False
    print(f"{measured.gpu} | commit {measured.commit} | {measured.versions}", flush=True)
    with (
        tempfile.TemporaryDirectory() as work,
        concurrent.futures.ThreadPoolExecutor(len(runs) if chosen.losses else 1) as pool,
    ):
        started = {
            run: pool.submit(train, run, arguments, pathlib.Path(work), environment) for run in runs
        }
        for run, future in started.items():
            try:
                done = trained[run] = future.result()
            except RuntimeError as error:
                print(f"FAILED: {error}", flush=True)
                failed = True
                continue
            what, metric = case(done.result, done.config), "tokens_per_s"
            if chosen.losses:
                what, metric = f"{what} seed {run.seed}", "held_out_loss"
            value, held_out = done.result[metric], done.result["held_out_loss"]
            speed = "" if chosen.losses else f"{value:>12,.0f} tokens/s"
            print(f"{what}  {run.provider:<22}{speed}  held-out loss {held_out:.4f}", flush=True)
            row = measured.row("train", what, run.provider, metric, value)
            benchmarking.append_rows(chosen.output, [row])
    if chosen.losses and trained:
        stem = "fp8_loss" if "fp8" in chosen.precisions else "train_loss"
        write_losses(chosen.output / f"{stem}.csv", trained)
        plot.draw_losses(chosen.output / f"{stem}.csv", chosen.output / f"{stem}.svg")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
