"""Products of scaled 8-bit matrices beside cuBLASLt. Needs nvcc and cuBLAS' headers, for
scaled_matmul.cu.

    python benchmarks/scaled_matmul.py
    python benchmarks/scaled_matmul.py --case 'm4096 n4096 k4096 row-fast'
    python benchmarks/scaled_matmul.py --filter block --variants

Recipes: scales of a tensor or of rows, with sums promoted to float32 every 128 of K or, -fast, not;
block, of 1x128 by 128x128; block-wgrad, of 1x128 by 1x128 and with a float32 result. e4m3 by e4m3,
else bfloat16 results. FLOPs: 2*M*N*K. A row is the case, cuBLASLt's time over the provider's, its
time, TFLOP/s and name.
"""

from __future__ import annotations

import re
import sys

import cuda_program

RECIPES = ("tensor", "tensor-fast", "row", "row-fast", "block", "block-wgrad")

LARGE = (
    (2048, 2048, 2048),
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (8192, 28672, 4096),
    (4096, 7168, 16384),
    (4096, 24576, 1536),
    (8192, 28672, 8192),
    # Llama-3 8B's and 70B's qkv, o, gate and up, down
    *((2048, n, k) for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))),
    *((16384, n, k) for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))),
    *((4096, n, k) for n, k in ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672))),
)
SMALL = tuple(
    (m, n, k)
    for m in (1, 16, 64, 128)
    for n, k in ((4096, 4096), (28672, 4096), (14336, 4096), (7168, 16384), (28672, 8192))
)


def arguments(case: str) -> list[str]:
    """Recipe, M, N and K of a case. Raises ValueError if it is spelled otherwise."""
    found = re.fullmatch(r"m(\d+) n(\d+) k(\d+) (\S+)", case)
    if not found or found[4] not in RECIPES:
        recipes = ", ".join(RECIPES)
        raise ValueError(f"wanted the form 'm4096 n4096 k4096 R', R of {recipes}, got {case!r}")
    if int(found[2]) % 8 or int(found[3]) % 16:
        raise ValueError(f"wanted multiples of 8 for n and of 16 for k, got {case!r}")
    return [found[4], *found.groups()[:3]]


PROGRAM = cuda_program.Program(
    name="scaled_matmul",
    description="Products of scaled 8-bit matrices beside cuBLASLt.",
    library="cublasLt",
    baseline="cublaslt",
    cases=(
        *(f"m{m} n{n} k{k} {recipe}" for recipe in RECIPES for m, n, k in LARGE),
        *(f"m{m} n{n} k{k} {recipe}" for recipe in ("tensor", "row") for m, n, k in SMALL),
    ),
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(cuda_program.main(PROGRAM, sys.argv[1:]))
