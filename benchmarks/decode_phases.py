"""Where the time of a decode step goes: parts of its phases, and what waits for what.

    python benchmarks/decode_phases.py
    python benchmarks/decode_phases.py --case 'decode qwen2.5-1.5b fp8 b8 ctx256'

Compiles decode_kernel.cu with its probes, for which it needs nvcc, and runs it. Values are
microseconds a step, the means over the multiprocessors that have a part of attention, and over the
others; in all they are the time of the step, of which the probes themselves take about 1%.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import common
from decode_cases import Step, parse

from jaxkern import benchmarking

ROOT = pathlib.Path(__file__).parents[1]
CASES = (
    "decode llama-3.2-1b bf16 b1 ctx192",
    "decode llama-3.2-1b bf16 b8 ctx256",
    "decode qwen2.5-1.5b bf16 b1 ctx192",
)
WEIGHTS = {
    "bf16": ["-DJAXKERN_WEIGHT=bf16"],
    "fp8": ["-DJAXKERN_WEIGHT=e4m3"],
    "nvfp4": ["-DJAXKERN_WEIGHT=e2m1"],
    "mxfp4": ["-DJAXKERN_WEIGHT=e2m1", "-DJAXKERN_FORMAT=kMxfp4"],
    "int4": ["-DJAXKERN_WEIGHT=s4"],
}
TABLE = re.compile(r"(with attention|without it) +(.+)")
ROW = re.compile(r"  ([a-z_]+) +([\d. ]+)")


def run(*command: str | pathlib.Path) -> str:
    """What the command prints. RuntimeError with all of it if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def program(folder: str, weights: str, head_dim: int) -> pathlib.Path:
    """decode_kernel.cu for such weights and heads, compiled if it is not in the folder."""
    path = pathlib.Path(folder, f"decode_phases_{weights}_{head_dim}")
    if path.exists():
        return path
    defines = [*WEIGHTS[weights], f"-DJAXKERN_HEAD_DIM={head_dim}", "-DJAXKERN_PROBES"]
    run(sys.executable, "tools/nvcc.py", "benchmarks/decode_kernel.cu", path, *defines)
    return path


def parts_of(text: str) -> Iterator[tuple[str, float]]:
    """Names and microseconds of what decode_kernel.cu prints, but for parts that there are not."""
    where, names = "", []
    for line in text.splitlines():
        if found := TABLE.fullmatch(line):
            where, names = found[1], found[2].split()
        elif found := ROW.fullmatch(line):
            for name, value in zip(names, map(float, found[2].split()), strict=True):
                if value:
                    yield f"{where} {found[1]} {name}", value


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Microseconds of the parts of a decode step's phases.", allow_abbrev=False
    )
    parser.add_argument("--case", action="append", help="default: " + "; ".join(CASES))
    common.add_programs(parser)
    common.add_destination(parser)
    chosen = parser.parse_args(argv)
    try:
        shapes = [parse(case)[1] for case in chosen.case or CASES]
    except ValueError as error:
        parser.error(f"--case: {error}")
    if not all(isinstance(shape, Step) for shape in shapes):
        parser.error("--case: wanted steps, not generations")
    identity = common.start_run(parser, "decode_phases.py", argv)
    with tempfile.TemporaryDirectory() as temporary:
        for shape in shapes:
            case = shape.case("decode")
            kernel = program(chosen.programs or temporary, shape.weights, shape.config.head_dim)
            text = run(kernel, shape.model, str(shape.batch), str(shape.context), "greedy")
            print(text)
            rows = [
                identity.row("decode_phases", f"{case} {name}", "jaxkern", "us", value)
                for name, value in parts_of(text)
            ]
            benchmarking.append_rows(chosen.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
