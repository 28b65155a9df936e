"""The tile library: its tests in CUDA, compiled here and run where there is a GPU, and its page."""

import re
import subprocess
import textwrap
from pathlib import Path

import check_kernels
import nvcc
import pytest

ROOT = Path(__file__).parents[1]
TILE = ROOT / "cuda" / "tile"
PROGRAMS = sorted((ROOT / "cuda" / "tests").glob("*_test.cu"))
PAGE = ROOT / "docs" / "tile.md"
QUOTED = [ROOT / "cuda" / "matmul" / name for name in ("gemm_sm90.cuh", "gemm.h")]

programs = pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.stem)


@pytest.fixture
def program(tmp_path):
    if nvcc.find() is None:
        pytest.skip("needs nvcc {}.{}".format(*nvcc.OLDEST))
    return tmp_path / "program"


@programs
def test_compiles(source, program):
    nvcc.compile_program(source, program, optimise=False)
    assert program.exists()


@pytest.mark.gpu
@programs
def test_passes(source, program):
    said = nvcc.compile_program(source, program)
    assert not check_kernels.COMPLAINTS.findall(said), said
    done = subprocess.run(
        [program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    print(done.stdout)
    assert done.returncode == 0


HEADERS = {path.stem for path in TILE.glob("*.cuh")} - {"tile"}  # which includes the others


def test_every_header_has_a_test():
    assert HEADERS <= {path.stem.removesuffix("_test") for path in PROGRAMS}


@pytest.mark.parametrize("overview", [TILE / "tile.cuh", PAGE], ids=lambda path: path.name)
def test_every_header_is_listed(overview):
    text = overview.read_text()
    assert [header for header in sorted(HEADERS) if f"{header}.cuh" not in text] == []


def test_asm_is_in_ptx_alone():
    for path in (ROOT / "cuda").rglob("*.cu*"):
        if path.parent.name != "ptx":
            assert not re.search(r"\basm\b", path.read_text()), path


def code_lines(text):
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_page_quotes_the_kernel():
    blocks = re.findall(r"```cpp\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks
    sources = ["\n".join(code_lines(path.read_text())) for path in QUOTED]
    for block in blocks:
        quoted = "\n".join(code_lines(block))
        assert any(quoted in source for source in sources), textwrap.dedent(block)
