"""Benchmarks that are CUDA programs: compiled here, run once for each case, their rows recorded.

A program takes a case's arguments, repeats and seconds per sample, perhaps --variants, and prints a
line per provider: its name, a tab, microseconds per call.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

import common

from jaxkern import benchmarking

ROOT = pathlib.Path(__file__).parents[1]
SUBJECT = "jaxkern"


@dataclasses.dataclass(frozen=True)
class Program:
    """A family of products m x n x k. `arguments` raises ValueError if a case is misspelled."""

    name: str  # of the family, the source file and the script
    description: str
    library: str
    baseline: str
    cases: Sequence[str]
    arguments: Callable[[str], list[str]]

    def compile(self, folder: pathlib.Path) -> pathlib.Path:
        """If it is not in the folder yet. Raises CalledProcessError where that fails."""
        program = folder / self.name
        if program.exists():
            return program
        source = ROOT / "benchmarks" / f"{self.name}.cu"
        script = [sys.executable, str(ROOT / "tools" / "nvcc.py"), str(source), str(program)]
        # The loader need not know where the toolkit keeps its libraries.
        library = [f"-l{self.library}", "-Xlinker", "-rpath=/usr/local/cuda/lib64"]
        subprocess.run([*script, *library], check=True, stdout=subprocess.DEVNULL)
        return program


def measure(arguments: list[str], chosen: argparse.Namespace) -> dict[str, float]:
    """Microseconds by provider. Raises CalledProcessError where the program fails."""
    repeats = 3 if chosen.quick else chosen.repeats
    command = [*arguments, str(repeats), str(chosen.seconds)]
    command += ["--variants"] if chosen.variants else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {provider: float(us) for provider, us in lines}


def tflops(case: str, us: float) -> float:
    """2*M*N*K by the time."""
    sizes = (int(re.search(rf"\b{name}(\d+)", case)[1]) for name in "mnk")
    return 2 * math.prod(sizes) / us / 1e6


def rows(
    run: benchmarking.Run, program: Program, case: str, us: dict[str, float]
) -> list[benchmarking.Row]:
    found = []
    for provider in (SUBJECT, program.baseline):
        found.append(run.row(program.name, case, provider, "us", us[provider]))
        found.append(run.row(program.name, case, provider, "tflops", tflops(case, us[provider])))
    ratio = us[program.baseline] / us[SUBJECT]
    provider = f"{SUBJECT} / {program.baseline}"
    return [*found, run.row(program.name, case, provider, "ratio", ratio)]


def main(program: Program, argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=program.description, allow_abbrev=False)
    add = parser.add_argument
    add("--case", action="append", metavar="CASE", help=f"as {program.cases[0]!r}")
    add("--filter", default="", metavar="REGEX", help="only the cases in which it is found")
    add("--quick", action="store_true", help="three repeats")
    add("--repeats", type=int, default=11, help="samples per case and provider (%(default)s)")
    add("--seconds", type=float, default=0.02, help="length of a sample (%(default)s)")
    add("--variants", action="store_true", help="other tile shapes too: printed, not recorded")
    common.add_programs(parser)
    common.add_destination(parser)
    chosen = parser.parse_args(argv)
    cases = [c for c in chosen.case or program.cases if re.search(chosen.filter, c)]
    if not cases:
        parser.error(f"--filter {chosen.filter!r} leaves no case")
    try:
        arguments = {case: program.arguments(case) for case in cases}
    except ValueError as error:
        parser.error(f"--case: {error}")
    common.share_memory()
    run = common.start_run(parser, f"{program.name}.py", argv)
    print(f"{run.gpu} | commit {run.commit} | {run.versions}")
    width = max(map(len, cases))
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        binary = program.compile(pathlib.Path(chosen.programs or temporary))
        for case in cases:
            try:
                us = measure([str(binary), *arguments[case]], chosen)
            except subprocess.CalledProcessError as error:
                failed.append(f"{case}: exit status {error.returncode}")
                continue
            for provider, value in us.items():
                ratio = f"{us[program.baseline] / value:5.3f}"
                figures = f"{value:9.1f} us {tflops(case, value):7.1f}"
                print(f"{case:<{width}} {ratio} {figures}  {provider}", flush=True)
            benchmarking.append_rows(chosen.output, rows(run, program, case, us))
    for line in failed:
        print(f"FAILED: {line}")
    return 1 if failed else 0
