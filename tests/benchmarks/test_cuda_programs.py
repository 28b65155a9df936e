"""The benchmarks of products with a stand-in for the compiled programs."""

import cuda_program
import gemm
import pytest
import quantized_matmul_fp8
import quantized_matmul_kernel
import scaled_matmul

from jaxkern import benchmarking

SCRIPTS = (gemm, scaled_matmul, quantized_matmul_kernel, quantized_matmul_fp8)
PROGRAMS = tuple(script.PROGRAM for script in SCRIPTS)
STAND_IN = """#!/bin/sh
[ "$1" = 64 ] && exit 3
[ "$1" = block ] && printf 'jaxkern\\t200.0\\ncublaslt\\t190.0\\n' && exit 0
printf 'jaxkern\\t200.0\\ncublas\\t190.0\\n'
[ "$6" = --variants ] && printf 'n128 stages6\\t250.0\\n'
exit 0
"""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    program = tmp_path / "gemm"
    program.write_text(STAND_IN)
    program.chmod(0o755)
    monkeypatch.setattr(cuda_program.Program, "compile", lambda self, folder: program)
    output = tmp_path / "results"

    def measure(*arguments, program=gemm.PROGRAM):
        destination = ["--output", str(output), "--commit", "abc"]
        return cuda_program.main(program, [*arguments, *destination]), output

    return measure


def test_rows(measure, capsys):
    case = "m4096 n4096 k4096 bf16"
    status, output = measure("--case", case, "--variants")
    assert status == 0
    [path] = output.iterdir()
    rows = benchmarking.read_rows(path)
    assert [(r.provider, r.metric, r.value) for r in rows] == [
        ("jaxkern", "us", 200.0),
        ("jaxkern", "tflops", pytest.approx(2 * 4096**3 / 200 / 1e6, rel=1e-4)),
        ("cublas", "us", 190.0),
        ("cublas", "tflops", pytest.approx(2 * 4096**3 / 190 / 1e6, rel=1e-4)),
        ("jaxkern / cublas", "ratio", 0.95),
    ]
    assert {(r.family, r.case) for r in rows} == {("gemm", case)}
    assert "n128 stages6" in capsys.readouterr().out


def test_failure_of_one_case(measure, capsys):
    status, output = measure("--case", "m64 n64 k64 bf16", "--case", "m128 n128 k128 bf16")
    assert status == 1
    assert "FAILED: m64 n64 k64 bf16: exit status 3" in capsys.readouterr().out
    [path] = output.iterdir()
    assert {r.case for r in benchmarking.read_rows(path)} == {"m128 n128 k128 bf16"}


@pytest.mark.parametrize("case", ["m4096", "m4096 n4096 k4096 f32", "m8 n12 k8 bf16"])
def test_misspelled_case(measure, capsys, case):
    with pytest.raises(SystemExit):
        measure("--case", case)
    assert "--case: wanted" in capsys.readouterr().err


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_usual_cases_are_well_spelled(program):
    assert len(set(program.cases)) == len(program.cases) > 0
    assert all(program.arguments(case) for case in program.cases)


def test_rows_of_a_recipe(measure):
    case = "m16 n32 k48 block"
    status, output = measure("--case", case, program=scaled_matmul.PROGRAM)
    assert status == 0
    [path] = output.iterdir()
    rows = {(r.provider, r.metric): r.value for r in benchmarking.read_rows(path)}
    assert rows["jaxkern / cublaslt", "ratio"] == 0.95
    assert rows["jaxkern", "tflops"] == pytest.approx(2 * 16 * 32 * 48 / 200 / 1e6, rel=1e-4)


@pytest.mark.parametrize(
    "case", ["m16 n32 k48", "m16 n32 k48 rows", "m16 n20 k48 row", "m16 n32 k40 row"]
)
def test_misspelled_recipe(measure, capsys, case):
    with pytest.raises(SystemExit):
        measure("--case", case, program=scaled_matmul.PROGRAM)
    assert "--case: wanted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case", ["m16 n32 k128", "m16 n32 k128 fp4", "m16 n24 k128 nvfp4", "m16 n32 k64 int4"]
)
def test_misspelled_format(measure, capsys, case):
    with pytest.raises(SystemExit):
        measure("--case", case, program=quantized_matmul_kernel.PROGRAM)
    assert "--case: wanted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "case",
    ["m512 n32 k128 fp8", "m64 n32 k128 nvfp4", "m512 n24 k128 mxfp4", "m512 n32 k64 int4"],
)
def test_misspelled_format_beside_fp8(measure, capsys, case):
    with pytest.raises(SystemExit):
        measure("--case", case, program=quantized_matmul_fp8.PROGRAM)
    assert "--case: wanted" in capsys.readouterr().err


def test_filter_that_leaves_no_case(measure, capsys):
    with pytest.raises(SystemExit):
        measure("--filter", "m7 ")
    assert "--filter 'm7 ' leaves no case" in capsys.readouterr().err
