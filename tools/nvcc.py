"""Compiles one CUDA program of this tree as the build compiles kernels.

python tools/nvcc.py cuda/tests/mma_test.cu /tmp/mma_test
python tools/nvcc.py benchmarks/gemm.cu /tmp/gemm -lcublas
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = (13, 0)

# Those of cmake/Kernels.cmake.
FLAGS = [
    *("-std=c++20", "-lineinfo", "-I", str(ROOT), "-gencode", "arch=compute_90a,code=sm_90a"),
    *("-Werror", "all-warnings", "-Xcompiler=-Wall,-Wextra"),
]
OPTIMISED = ["-O3", "-Xptxas=-v,--warn-on-spills"]
QUICK = ["-O0", "--Ofast-compile=max"]  # a tenth of the time for the largest
HOST_SOURCES = [str(ROOT / "cuda" / "host" / name) for name in ("device.cc", "tensor_map.cc")]


def find() -> list[str] | None:
    """The start of a command line, or None without an nvcc that is new enough.

    Looks where cmake/FindNvcc.cmake does: CUDACXX, PATH, /usr/local/cuda, PyPI's wheels.
    """
    program = os.environ.get("CUDACXX") or shutil.which("nvcc")
    command = [program or "/usr/local/cuda/bin/nvcc"]
    if not Path(command[0]).exists():
        if not (importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cu13")):
            return None
        [root] = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
        command = [f"{root}/bin/nvcc", f"-L{root}/lib"]
        if not Path(command[0]).exists():
            return None
    answer = subprocess.run([*command[:1], "--version"], stdout=subprocess.PIPE, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", answer)
    return command if release and tuple(map(int, release.groups())) >= OLDEST else None


def compile_program(
    source: str | Path, program: str | Path, *more: str, optimise: bool = True
) -> str:
    """Returns what the compiler says. Raises RuntimeError, with that, where it fails.

    Without `optimise` registers may spill.
    """
    nvcc = find()
    if nvcc is None:
        raise RuntimeError("there is no nvcc {}.{} or newer".format(*OLDEST))
    flags = [*FLAGS, *(OPTIMISED if optimise else QUICK)]
    command = [*nvcc, *flags, str(source), *HOST_SOURCES, "-o", str(program), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    try:
        print(compile_program(*sys.argv[1:]))
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
