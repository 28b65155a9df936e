"""Checks the compiled kernels: their code, not their results.

    python tools/check_kernels.py build/libjaxkern_kernels.a build/kernels.log

Every kernel must be compiled for sm_90a alone and use no stack, every kernel called `*_sm90_kernel`
must use the tensor cores: by wgmma, HGMMA of 16-bit elements or QGMMA of 8-bit ones, or, those of
which a warp has fewer rows than wgmma multiplies, by mma, HMMA. And ptxas must not have
complained in the build's log.
Needs cuobjdump and nvdisasm: in PATH, or from `pip install --group inspect`.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

BY_MMA = ("decode_step", "quantized_matmul_few_rows")

# What ptxas says when registers run out, and when it serialises wgmma instructions.
COMPLAINTS = re.compile(r".*(?:[1-9]\d* bytes spill|spilled|Potential Performance Loss).*")


def code_objects(sass: str) -> set[str]:
    """The architectures in cuobjdump's listing."""
    return set(re.findall(r"^arch = (\S+)", sass, re.M))


def instruction(kernel: str) -> str:
    """That of the tensor cores which a kernel is to use."""
    return "mma" if any(name in kernel for name in BY_MMA) else "wgmma"


def tensor_core_counts(sass: str) -> dict[str, int]:
    """How many instructions of its kind each kernel in cuobjdump's listing has."""
    _, *parts = re.split(r"^\s*Function : (\S+)$", sass, flags=re.M)
    names = {"wgmma": r"\b[HQ]GMMA\b", "mma": r"\bHMMA\b"}
    return {
        name: len(re.findall(names[instruction(name)], body))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def stack_bytes(resources: str) -> dict[str, int]:
    """The stack of each kernel in cuobjdump's listing: spills, or arrays not in registers."""
    found = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", resources)
    return {name: int(stack) for name, stack in found}


def problems(sass: str, resources: str, log: str) -> list[str]:
    """What is wrong with the kernels, one line each."""
    counts = tensor_core_counts(sass)
    found = [] if counts else ["there are no kernels"]
    if (archs := code_objects(sass)) != {"sm_90a"}:
        found.append(f"compiled for {sorted(archs)}, wanted sm_90a alone")
    for name, count in counts.items():
        if "_sm90_kernel" in name and count == 0:
            found.append(f"{name} has no {instruction(name)} instruction")
    found += [f"{name} uses {n} bytes of stack" for name, n in stack_bytes(resources).items() if n]
    found += [f"ptxas: {line.strip()}" for line in COMPLAINTS.findall(log)]
    return found


def _search_path() -> str:
    """PATH, then the directories that the wheels put their tools in."""
    paths = [os.environ["PATH"]]
    if importlib.util.find_spec("nvidia") and (wheels := importlib.util.find_spec("nvidia.cu13")):
        paths += [f"{root}/bin" for root in wheels.submodule_search_locations]
    return os.pathsep.join(paths)


def _cuobjdump(option: str, library: Path) -> str:
    path = _search_path()
    tool = shutil.which("cuobjdump", path=path)
    if tool is None:
        raise SystemExit("cuobjdump was not found: pip install --group inspect")
    command = [tool, option, str(library)]
    return subprocess.run(
        command, env=os.environ | {"PATH": path}, check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def main() -> None:
    """Print a table of the kernels; exit with a message when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path, help="libjaxkern_kernels.a, or the module _C")
    parser.add_argument("log", type=Path, help="the log of its build")
    args = parser.parse_args()
    sass = _cuobjdump("--dump-sass", args.library)
    for name, count in sorted(tensor_core_counts(sass).items()):
        print(f"{count:6} {instruction(name):5}  {name}")
    found = problems(sass, _cuobjdump("--dump-resource-usage", args.library), args.log.read_text())
    if found:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
