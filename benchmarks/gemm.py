"""The GEMM that docs/tile.md builds, beside cuBLAS. Needs nvcc and cuBLAS' headers, for gemm.cu.

    python benchmarks/gemm.py
    python benchmarks/gemm.py --case 'm4096 n4096 k4096 bf16'
    python benchmarks/gemm.py --variants       other tile shapes too: printed, not recorded

FLOPs: 2*M*N*K. A row is the case, cuBLAS' time over the provider's, its time, TFLOP/s and name.
"""

from __future__ import annotations

import re
import sys

import cuda_program


def arguments(case: str) -> list[str]:
    """M, N and K of a case. Raises ValueError if it is spelled otherwise."""
    found = re.fullmatch(r"m(\d+) n(\d+) k(\d+) bf16", case)
    if not found:
        raise ValueError(f"wanted the form 'm4096 n4096 k4096 bf16', got {case!r}")
    if int(found[2]) % 8 or int(found[3]) % 8:
        raise ValueError(f"wanted multiples of 8 for n and k, got {case!r}")
    return list(found.groups())


PROGRAM = cuda_program.Program(
    name="gemm",
    description="The GEMM beside cuBLAS.",
    library="cublas",
    baseline="cublas",
    cases=(
        "m2048 n2048 k2048 bf16",
        "m4096 n4096 k4096 bf16",
        "m8192 n8192 k8192 bf16",
        "m8192 n28672 k4096 bf16",
    ),
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(cuda_program.main(PROGRAM, sys.argv[1:]))
