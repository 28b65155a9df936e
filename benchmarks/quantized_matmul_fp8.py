"""Products of FP8 activations with weights of four bits beside cuBLASLt's with the same weights in
FP8. Needs nvcc and cuBLAS' headers, for quantized_matmul_fp8.cu.

    python benchmarks/quantized_matmul_fp8.py
    python benchmarks/quantized_matmul_fp8.py --case 'm512 n8192 k8192 nvfp4'
    python benchmarks/quantized_matmul_fp8.py --filter 'm512 ' --variants

Activations are e4m3, with scales of rows, as both take them; ours expands the weight in each call.
Sums are promoted to float32 every 128 of K or, -fast, not; results are bfloat16. --variants has the
parts too, and a copy of as many bytes as expanding reads and writes. FLOPs: 2*M*N*K. A row is the
case, cuBLASLt's time over the provider's, its time, TFLOP/s and name.
"""

from __future__ import annotations

import re
import sys

import cuda_program

FORMATS = ("nvfp4", "mxfp4", "int4", "nvfp4-fast")
SIZES = ((14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672), (8192, 8192))


def arguments(case: str) -> list[str]:
    """Recipe, M, N and K of a case. Raises ValueError if it is spelled otherwise."""
    found = re.fullmatch(r"m(\d+) n(\d+) k(\d+) ((?:nvfp4|mxfp4|int4)(?:-fast)?)", case)
    if not found:
        raise ValueError(f"wanted the form 'm512 n8192 k8192 nvfp4', got {case!r}")
    m, n, k = map(int, found.groups()[:3])
    if m <= 128 or n % 16 or k % 128:
        wanted = "m above 128, multiples of 16 for n and of 128 for k"
        raise ValueError(f"wanted {wanted}, got {case!r}")
    return [found[4], *found.groups()[:3]]


PROGRAM = cuda_program.Program(
    name="quantized_matmul_fp8",
    description="Products of FP8 with weights of four bits beside cuBLASLt.",
    library="cublasLt",
    baseline="cublaslt",
    cases=tuple(
        f"m{m} n{n} k{k} {format}"
        for format in FORMATS
        for m in (512, 1024, 2048, 4096, 8192)
        for n, k in SIZES
    ),
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(cuda_program.main(PROGRAM, sys.argv[1:]))
