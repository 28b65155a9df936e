"""Training speed and loss of `examples/train_transformer.py` by attention implementation.

    python benchmarks/train.py                              the GPU preset, 200 steps of each
    python benchmarks/train.py --implementations cuda --steps 50
    python benchmarks/train.py --preset cpu --implementations xla --batch 16

What is not an option here goes to the example. Appends tokens/s to the results file and leaves
`train_loss.csv` and `train_loss.svg` beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

import common
import plot

from jaxkern import benchmarking

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "train_transformer.py"
PROVIDERS = {"cuda": "jaxkern", "cudnn": "jax.nn cudnn", "xla": "jaxkern xla"}
DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def case(result: Mapping, config: Mapping) -> str:
    """`train 104M b64 t2048 bf16`: parameters, sequences and tokens of each per step."""
    devices = f" d{result['devices']}" if result["devices"] > 1 else ""
    return (
        f"train {result['parameters'] / 1e6:.3g}M b{config['batch']} t{config['context']} "
        f"{DTYPES[config['dtype']]}{devices}"
    )


def train(
    example: pathlib.Path,
    implementation: str,
    arguments: Sequence[str],
    folder: pathlib.Path,
    environment: Mapping[str, str],
) -> tuple[dict, dict, list[dict[str, str]]]:
    """One run of the example: its result, its configuration and the rows of its losses.

    Raises RuntimeError with the end of its output if it fails.
    """
    command = [sys.executable, str(example), "--implementation", implementation]
    command += ["--output", str(folder), "--restart", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        end = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{implementation} exited with {done.returncode}:\n{end}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if not result["tokens_per_s"]:
        raise RuntimeError(f"{implementation} was too short to measure: give more --steps")
    config = json.loads((folder / "config.json").read_text())
    with (folder / "losses.csv").open(newline="") as file:
        return result, config, list(csv.DictReader(file))


def write_losses(path: pathlib.Path, losses: Mapping[str, Sequence[Mapping[str, str]]]) -> None:
    with path.open("w", newline="") as file:
        fields = ["provider", "step", "train", "held_out"]
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for provider, rows in losses.items():
            writer.writerows({"provider": provider, **row} for row in rows)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Training speed by attention implementation.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--implementations", default=",".join(PROVIDERS), help="some of %(default)s")
    add("--preset", default="gpu", help="of the example (%(default)s)")
    add("--steps", default="200", help="of each run (%(default)s)")
    common.add_destination(parser)
    chosen, others = parser.parse_known_args(argv)
    names = chosen.implementations.split(",")
    if unknown := [name for name in names if name not in PROVIDERS]:
        parser.error(
            f"--implementations: no {', '.join(unknown)}; there are {', '.join(PROVIDERS)}"
        )
    arguments = ["--preset", chosen.preset, "--steps", chosen.steps, *others]
    environment = dict(os.environ)
    common.share_memory()
    run = common.start_run(parser, "train.py", argv, ["flax", "optax"])
    chosen.output.mkdir(parents=True, exist_ok=True)

    losses, failed = {}, False
    print(f"{run.gpu} | commit {run.commit} | {run.versions}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            folder = pathlib.Path(work, name)
            try:
                result, config, steps = train(EXAMPLE, name, arguments, folder, environment)
            except RuntimeError as error:
                print(f"FAILED: {error}", flush=True)
                failed = True
                continue
            speed, held_out = result["tokens_per_s"], result["held_out_loss"]
            provider, what = PROVIDERS[name], case(result, config)
            print(
                f"{what}  {provider:<14}{speed:>12,.0f} tokens/s  held-out loss {held_out:.4f}",
                flush=True,
            )
            losses[provider] = steps
            row = run.row("train", what, provider, "tokens_per_s", speed)
            benchmarking.append_rows(chosen.output, [row])
            write_losses(chosen.output / "train_loss.csv", losses)
            plot.draw_losses(chosen.output / "train_loss.csv", chosen.output / "train_loss.svg")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
