"""Everything that needs a GPU, in one call on a machine that has one and need not have a network.

    python benchmarks/gpu.py --wheel dist --output results --commit $(git rev-parse --short=10 HEAD)
    python benchmarks/gpu.py --wheel dist --output results --steps install,bench --attention=--quick

Steps, in the order given: `install` puts the wheel (and those of --wheels) in a folder of its own,
`test` runs the GPU tests, `sanitize` runs small cases under compute-sanitizer, `bench` and `train`
measure. A failing step does not stop the next. All output goes to <output>/gpu.log too, rows to
<output>/<gpu>.csv, and a table of the steps is printed last.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

ROOT = pathlib.Path(__file__).parents[1]
WORK = pathlib.Path(tempfile.gettempdir()) / "jaxkern-gpu"
LIMITS = {"install": 120, "test": 300, "sanitize": 300, "bench": 420, "train": 480}
BENCHMARKS = ("attention", "rms_norm", "quantize", "gemm", "scaled_matmul")
BENCHMARKS += ("quantized_matmul_kernel", "quantized_matmul_fp8", "quantized_matmul")
BENCHMARKS += ("fp8_linear", "decode")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_FOUND = 99

# pytest-benchmark, where it is installed, warns under xdist; our warnings are errors.
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark"]
PYTEST += ["--maxfail", "10"]  # where much is broken, the rest of the time is better kept

GPU_ENVIRONMENT = {"JAX_PLATFORMS": "cuda,cpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

# One cudaMalloc per buffer, so that a stray access meets no neighbour; launches outside graphs.
SANITIZE_ENVIRONMENT = {
    **GPU_ENVIRONMENT,
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_FLAGS": "--xla_gpu_enable_command_buffer=",
}


@dataclasses.dataclass(frozen=True)
class Command:
    title: str
    argv: Sequence[str]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    title: str
    result: str
    seconds: float
    last_line: str = ""

    @property
    def passed(self) -> bool:
        return self.result == "passed"


class Runner:
    """Runs commands in `folder`, printing what they print and keeping it in `log`."""

    def __init__(self, folder: pathlib.Path, environment: Mapping[str, str], log: TextIO):
        self.folder, self.environment, self.log = folder, environment, log

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def run(self, command: Command, limit: float) -> Outcome:
        """Ends the command's whole process group when `limit` seconds have passed."""
        self.say(f"\n=== {command.title}: {shlex.join(command.argv)}")
        start, last_line = time.monotonic(), ""
        try:
            process = subprocess.Popen(
                command.argv,
                cwd=self.folder,
                env={**self.environment, **command.environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,
            )
        except OSError as error:
            self.say(str(error))
            return Outcome(command.title, "not started", 0.0, str(error))
        expired = threading.Event()

        def end():
            expired.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(max(limit, 0.01), end)
        timer.start()
        with process:
            for line in process.stdout:
                self.say(line.rstrip("\n"))
                last_line = line.strip() or last_line
            process.wait()
        timer.cancel()
        result = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
        if expired.is_set():
            result = f"stopped after {limit:.0f} s"
        return Outcome(command.title, result, time.monotonic() - start, last_line)


def copy_tree(destination: pathlib.Path) -> None:
    """The repository without its `jaxkern` folder, so that the wheel is what gets imported."""
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    left_out = {"jaxkern", "build", "dist", "wheelhouse", "runs", "shared"}
    for entry in ROOT.iterdir():
        if entry.name in left_out or entry.name.startswith("."):
            continue
        if entry.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(entry, destination / entry.name, ignore=ignore)
        else:
            shutil.copy2(entry, destination)


def find_wheels(wheel: pathlib.Path | None, others: pathlib.Path | None) -> list[pathlib.Path]:
    """The jaxkern wheel, a file or the only one in a folder, and every wheel of `others`.

    Raises ValueError unless there is exactly one.
    """
    if wheel is None:
        raise ValueError("--wheel: the step install needs it")
    found = sorted(wheel.glob("jaxkern-*.whl")) if wheel.is_dir() else [wheel]
    if len(found) != 1 or not found[0].is_file():
        names = ", ".join(path.name for path in found) or "none"
        raise ValueError(f"--wheel: wanted one jaxkern wheel at {wheel}, got {names}")
    further = sorted(others.glob("*.whl")) if others else []
    return found + [path for path in further if path not in found]


def install_commands(chosen: argparse.Namespace, site: pathlib.Path) -> list[Command]:
    wheels = [str(path.resolve()) for path in find_wheels(chosen.wheel, chosen.wheels)]
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--upgrade"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *wheels]
    return [Command("install", pip), Command("jaxkern", [sys.executable, "-m", "jaxkern"])]


def test_commands(chosen: argparse.Namespace) -> list[Command]:
    pytest = PYTEST
    if importlib.util.find_spec("xdist"):
        pytest = [*PYTEST, "-n", str(chosen.jobs), "--dist", "worksteal"]
    arguments = shlex.split(chosen.pytest)
    if chosen.whole_suite:
        return [Command("test", [*pytest, *arguments])]
    alone = [*PYTEST, "-p", "no:xdist", "-m", "gpu", "tests/test_large_attention.py"]
    return [
        Command("test", [*pytest, "-m", "gpu", *arguments], GPU_ENVIRONMENT),
        Command("large", alone, GPU_ENVIRONMENT),
    ]


def sanitize_commands() -> list[Command]:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    pytest = [*PYTEST, "-p", "no:xdist"]
    options = ["--target-processes", "application-only", "--report-api-errors", "no"]
    options += ["--print-limit", "20", "--error-exitcode", str(SANITIZER_FOUND)]
    # racecheck takes the decode step's bulk copies and what waits for their barriers for races.
    left_out = {"racecheck": ["-k", "not decode"]}
    return [
        Command(
            tool,
            [program, "--tool", tool, *options, *pytest, "tests/test_sanitize.py"]
            + left_out.get(tool, []),
            SANITIZE_ENVIRONMENT,
        )
        for tool in SANITIZERS
    ]


def measure_commands(
    chosen: argparse.Namespace, names: Sequence[str], output: pathlib.Path
) -> list[Command]:
    destination = ["--output", str(output), "--commit", chosen.commit]
    return [
        Command(
            name,
            [
                sys.executable,
                f"benchmarks/{name}.py",
                *destination,
                *shlex.split(getattr(chosen, name)),
            ],
        )
        for name in names
    ]


def run_step(runner: Runner, step: str, commands: Sequence[Command], limit: float) -> list[Outcome]:
    """The commands of a step share its time limit."""
    ends = time.monotonic() + limit
    outcomes = []
    for command in commands:
        left = ends - time.monotonic()
        if left > 0:
            outcomes.append(runner.run(command, left))
        else:
            outcomes.append(Outcome(command.title, f"not run: {step} had {limit:.0f} s", 0.0))
    return outcomes


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="GPU tests and benchmarks from a wheel.")
    add = parser.add_argument
    add("--wheel", type=pathlib.Path, metavar="FILE_OR_FOLDER", help="jaxkern's wheel")
    add("--wheels", type=pathlib.Path, metavar="FOLDER", help="further wheels to install")
    add("--output", type=pathlib.Path, required=True, help="folder of rows, figures and the log")
    add("--commit", help="the commit that the wheel was built from, for the rows")
    add("--steps", default=",".join(LIMITS), help="some of %(default)s, in any order")
    add("--limit", type=float, default=570, help="seconds for all steps (%(default)s)")
    add("--step-limit", action="append", default=[], metavar="STEP=SECONDS")
    add("--jobs", type=int, default=4, help="test processes (%(default)s)")
    add("--whole-suite", action="store_true", help="run all tests, not only those for the GPU")
    for name in ("pytest", *BENCHMARKS, "train"):
        add(f"--{name.replace('_', '-')}", default="", metavar="ARGS", help=f"passed to {name}")
    chosen = parser.parse_args(argv)
    chosen.steps = chosen.steps.split(",")
    if unknown := [step for step in chosen.steps if step not in LIMITS]:
        parser.error(f"--steps: no {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    try:
        named = dict(item.split("=") for item in chosen.step_limit)
        chosen.limits = {**LIMITS, **{step: float(seconds) for step, seconds in named.items()}}
        if "install" in chosen.steps:
            find_wheels(chosen.wheel, chosen.wheels)
        if not chosen.commit and {"bench", "train"} & {*chosen.steps}:
            raise ValueError("--commit: the steps bench and train need it")
    except ValueError as error:
        parser.error(str(error))
    return chosen


def main(argv: Sequence[str]) -> int:
    chosen = parse(argv)
    output = chosen.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    tree, site = WORK / "tree", WORK / "site"
    copy_tree(tree)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
    }
    commands = {
        "install": lambda: install_commands(chosen, site),
        "test": lambda: test_commands(chosen),
        "sanitize": sanitize_commands,
        "bench": lambda: measure_commands(chosen, BENCHMARKS, output),
        "train": lambda: measure_commands(chosen, ("train",), output),
    }
    ends = time.monotonic() + chosen.limit
    outcomes: list[Outcome] = []
    with (output / "gpu.log").open("a") as log:
        runner = Runner(tree, environment, log)
        for step in chosen.steps:
            limit = max(0.0, min(chosen.limits[step], ends - time.monotonic()))
            outcomes += run_step(runner, step, commands[step](), limit)
            if step == "install" and not outcomes[0].passed:
                break
        runner.say("\n=== steps")
        for outcome in outcomes:
            line = f"{outcome.title:<10} {outcome.result:<22} {outcome.seconds:6.1f} s"
            runner.say(f"{line}  {outcome.last_line[:80]}")
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
