"""Products with weights of four bits beside cuBLAS with bfloat16 ones, kernel by kernel. Needs nvcc
and cuBLAS' headers, for quantized_matmul_kernel.cu; quantized_matmul.py has what JAX makes of both.

    python benchmarks/quantized_matmul_kernel.py
    python benchmarks/quantized_matmul_kernel.py --case 'm16 n28672 k8192 nvfp4'
    python benchmarks/quantized_matmul_kernel.py --filter 'm1 ' --variants

FLOPs: 2*M*N*K. A row is the case, cuBLAS' time over the provider's, its time, TFLOP/s and name.
"""

from __future__ import annotations

import re
import sys

import cuda_program

FORMATS = ("nvfp4", "mxfp4", "int4")
SIZES = ((14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672), (8192, 8192))


def arguments(case: str) -> list[str]:
    """Format, M, N and K of a case. Raises ValueError if it is spelled otherwise."""
    found = re.fullmatch(rf"m(\d+) n(\d+) k(\d+) ({'|'.join(FORMATS)})", case)
    if not found:
        raise ValueError(f"wanted the form 'm16 n28672 k8192 nvfp4', got {case!r}")
    if int(found[2]) % 16 or int(found[3]) % 128:
        raise ValueError(f"wanted multiples of 16 for n and of 128 for k, got {case!r}")
    return [found[4], *found.groups()[:3]]


PROGRAM = cuda_program.Program(
    name="quantized_matmul_kernel",
    description="Products with weights of four bits beside cuBLAS.",
    library="cublas",
    baseline="cublas",
    cases=tuple(
        f"m{m} n{n} k{k} {format}"
        for format in FORMATS
        for m in (1, 8, 16, 32, 64, 512, 2048, 8192)
        for n, k in SIZES
    ),
    arguments=arguments,
)

if __name__ == "__main__":
    sys.exit(cuda_program.main(PROGRAM, sys.argv[1:]))
