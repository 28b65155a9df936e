"""The GEMM that docs/tile.md builds, beside cuBLAS. Needs nvcc and cuBLAS' headers, for gemm.cu.

    python benchmarks/gemm.py
    python benchmarks/gemm.py --case 'm4096 n4096 k4096 bf16'
    python benchmarks/gemm.py --variants       other tile shapes too: printed, not recorded

FLOPs: 2*M*N*K. A row is the case, cuBLAS' time over the provider's, its time, TFLOP/s and name.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
import subprocess
import sys
import tempfile

import common

from jaxkern import benchmarking

ROOT = pathlib.Path(__file__).parents[1]
SOURCE = ROOT / "benchmarks" / "gemm.cu"
SUBJECT, BASELINE = "jaxkern", "cublas"

CASES = (
    "m2048 n2048 k2048 bf16",
    "m4096 n4096 k4096 bf16",
    "m8192 n8192 k8192 bf16",
    "m8192 n28672 k4096 bf16",
)


def sizes(case: str) -> tuple[int, int, int]:
    """M, N and K of a case. Raises ValueError if it is spelled otherwise."""
    found = re.fullmatch(r"m(\d+) n(\d+) k(\d+) bf16", case)
    if not found:
        raise ValueError(f"wanted the form 'm4096 n4096 k4096 bf16', got {case!r}")
    M, N, K = map(int, found.groups())
    if N % 8 or K % 8:
        raise ValueError(f"wanted multiples of 8 for n and k, got {case!r}")
    return M, N, K


def compile_program(folder: pathlib.Path) -> pathlib.Path:
    """Compiles gemm.cu. Raises CalledProcessError where that fails."""
    program = folder / "gemm"
    script = [sys.executable, str(ROOT / "tools" / "nvcc.py"), str(SOURCE), str(program)]
    # The loader need not know where the toolkit keeps its libraries.
    cublas = ["-lcublas", "-Xlinker", "-rpath=/usr/local/cuda/lib64"]
    subprocess.run([*script, *cublas], check=True, stdout=subprocess.DEVNULL)
    return program


def measure(program: pathlib.Path, case: str, chosen: argparse.Namespace) -> dict[str, float]:
    """Microseconds by provider. Raises CalledProcessError where the program fails."""
    repeats = 3 if chosen.quick else chosen.repeats
    command = [str(program), *map(str, sizes(case)), str(repeats), str(chosen.seconds)]
    command += ["--variants"] if chosen.variants else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {provider: float(us) for provider, us in lines}


def rows(run: benchmarking.Run, case: str, us: dict[str, float]) -> list[benchmarking.Row]:
    found = []
    for provider in (SUBJECT, BASELINE):
        found.append(run.row("gemm", case, provider, "us", us[provider]))
        found.append(run.row("gemm", case, provider, "tflops", tflops(case, us[provider])))
    ratio = us[BASELINE] / us[SUBJECT]
    return [*found, run.row("gemm", case, f"{SUBJECT} / {BASELINE}", "ratio", ratio)]


def tflops(case: str, us: float) -> float:
    return 2 * math.prod(sizes(case)) / us / 1e6


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="The GEMM beside cuBLAS.", allow_abbrev=False)
    add = parser.add_argument
    add("--case", action="append", metavar="CASE", help=f"as {CASES[0]!r}; instead of the usual")
    add("--quick", action="store_true", help="three repeats")
    add("--repeats", type=int, default=11, help="samples per case and provider (%(default)s)")
    add("--seconds", type=float, default=0.02, help="length of a sample (%(default)s)")
    add("--variants", action="store_true", help="other tile shapes too: printed, not recorded")
    common.add_destination(parser)
    chosen = parser.parse_args(argv)
    try:
        cases = {case: sizes(case) for case in chosen.case or CASES}
    except ValueError as error:
        parser.error(f"--case: {error}")
    common.share_memory()
    run = common.start_run(parser, "gemm.py", argv)
    print(f"{run.gpu} | commit {run.commit} | {run.versions}")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(pathlib.Path(folder))
        for case in cases:
            try:
                us = measure(program, case, chosen)
            except subprocess.CalledProcessError as error:
                failed.append(f"{case}: exit status {error.returncode}")
                continue
            for provider, value in us.items():
                ratio = f"{us[BASELINE] / value:5.3f}"
                print(f"{case:<26} {ratio} {value:9.1f} us {tflops(case, value):7.1f}  {provider}")
            benchmarking.append_rows(chosen.output, rows(run, case, us))
    for line in failed:
        print(f"FAILED: {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
