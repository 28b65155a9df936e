import io
import subprocess
import sys
import time
import zipfile

import gpu
import pytest


def python(title, code, **environment):
    return gpu.Command(title, [sys.executable, "-c", code], environment)


def make_wheel(folder, name="jaxkern"):
    path = folder / f"{name}-0.0.1-py3-none-any.whl"
    info = f"{name}-0.0.1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{name}/__main__.py", "print('installed', __file__)")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.0.1\n")
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")
    return path


class TestRunner:
    @pytest.fixture
    def runner(self, tmp_path):
        return gpu.Runner(tmp_path, {}, io.StringIO())

    def test_output_is_printed_and_logged(self, runner, capsys):
        outcome = runner.run(python("say", "print('one'); print('two'); print()"), 30)
        assert (outcome.result, outcome.last_line) == ("passed", "two")
        assert "\none\ntwo\n" in capsys.readouterr().out
        assert "\none\ntwo\n" in runner.log.getvalue()

    def test_environment_and_folder(self, runner, tmp_path):
        code = "import os; print(os.environ['WORD'], os.getcwd())"
        outcome = runner.run(python("env", code, WORD="hello"), 30)
        assert outcome.last_line == f"hello {tmp_path}"

    def test_failure(self, runner):
        assert runner.run(python("fail", "raise SystemExit(3)"), 30).result == "failed (3)"

    def test_program_that_is_not_there(self, runner):
        outcome = runner.run(gpu.Command("none", ["/no/such/program"]), 30)
        assert outcome.result == "not started" and not outcome.passed

    def test_limit_ends_children_too(self, runner, tmp_path):
        child = "import time, pathlib; time.sleep(2); pathlib.Path('late').touch()"
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        start = time.monotonic()
        outcome = runner.run(python("slow", code), 0.5)
        assert time.monotonic() - start < 1.9
        assert outcome.result.startswith("stopped after") and not outcome.passed
        time.sleep(2)
        assert not (tmp_path / "late").exists()

    def test_commands_of_a_step_share_its_limit(self, runner):
        slow = python("slow", "import time; time.sleep(30)")
        outcomes = gpu.run_step(runner, "bench", [slow, python("next", "print(1)")], 0.5)
        assert [outcome.passed for outcome in outcomes] == [False, False]
        assert outcomes[1].result.startswith("not run")


def test_tree_has_everything_but_the_package(tmp_path):
    gpu.copy_tree(tmp_path / "tree")
    assert (tmp_path / "tree" / "benchmarks" / "gpu.py").is_file()
    assert (tmp_path / "tree" / "cuda" / "tests" / "test.h").is_file()
    assert (tmp_path / "tree" / "tests" / "benchmarks" / "test_gpu_script.py").is_file()
    assert not (tmp_path / "tree" / "jaxkern").exists()
    assert not (tmp_path / "tree" / ".git").exists()


class TestWheels:
    def test_one_in_a_folder_and_others(self, tmp_path):
        ours, other = make_wheel(tmp_path), make_wheel(tmp_path, "grain")
        assert gpu.find_wheels(tmp_path, None) == [ours]
        assert gpu.find_wheels(ours, tmp_path) == [ours, other]

    def test_none_or_several(self, tmp_path):
        with pytest.raises(ValueError, match="wanted one jaxkern wheel at .*, got none"):
            gpu.find_wheels(tmp_path, None)
        make_wheel(tmp_path).rename(tmp_path / "jaxkern-0.0.2-py3-none-any.whl")
        make_wheel(tmp_path)
        with pytest.raises(ValueError, match=r"got jaxkern-0.0.1.*, jaxkern-0.0.2"):
            gpu.find_wheels(tmp_path, None)


@pytest.fixture
def main(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "WORK", tmp_path / "work")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    output = tmp_path / "output"

    def main(*arguments):
        return gpu.main([*arguments, "--output", str(output)]), output / "gpu.log"

    return main


def test_installs_the_wheel_and_goes_on_after_a_failure(main, tmp_path, monkeypatch, capsys):
    make_wheel(tmp_path)
    monkeypatch.setattr(
        gpu, "test_commands", lambda chosen: [python("test", "raise SystemExit(1)")]
    )
    monkeypatch.setattr(
        gpu, "sanitize_commands", lambda: [python("memcheck", "import jaxkern; print('clean')")]
    )
    status, log = main("--wheel", str(tmp_path), "--steps", "install,test,sanitize")
    assert status == 1
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index("=== steps") + 1 :]
    assert [line.split()[:2] for line in table] == [
        ["install", "passed"],
        ["jaxkern", "passed"],
        ["test", "failed"],
        ["memcheck", "passed"],
    ]
    assert f"installed {tmp_path / 'work' / 'site' / 'jaxkern'}" in log.read_text()
    assert table[-1].endswith("clean")


def test_nothing_runs_on_a_broken_install(main, tmp_path, monkeypatch):
    (tmp_path / "jaxkern-0.0.1-py3-none-any.whl").write_text("no zip file")
    monkeypatch.setattr(gpu, "test_commands", lambda chosen: [python("test", "print('ran')")])
    status, log = main("--wheel", str(tmp_path), "--steps", "install,test")
    assert status == 1
    assert "ran" not in log.read_text().splitlines()


def test_commands_of_the_steps(tmp_path):
    arguments = ["--output", str(tmp_path), "--steps", "test,bench", "--commit", "abc"]
    arguments += ["--attention=--filter '^fwd .*h64' --quick", "--pytest", "-k 'rms or norm'"]
    chosen = gpu.parse(arguments)
    test, large = gpu.test_commands(chosen)
    assert ["-m", "gpu"] == test.argv[-4:-2] and ["-k", "rms or norm"] == test.argv[-2:]
    assert ["no:xdist", "-m", "gpu", "tests/test_large_attention.py"] == large.argv[-4:]
    attention, norm = gpu.measure_commands(chosen, ("attention", "rms_norm"), tmp_path)
    destination = ["--output", str(tmp_path), "--commit", "abc"]
    wanted = ["benchmarks/attention.py", *destination, "--filter", "^fwd .*h64", "--quick"]
    assert attention.argv[1:] == wanted
    assert norm.argv[1:] == ["benchmarks/rms_norm.py", *destination]
    tools = [command.argv[command.argv.index("--tool") + 1] for command in gpu.sanitize_commands()]
    assert tools == ["memcheck", "racecheck", "synccheck"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "test,fly"], "--steps: no fly; there are install, test, sanitize"),
        (["--steps", "install"], "--wheel: the step install needs it"),
        (["--steps", "test,train"], "--commit: the steps bench and train need it"),
        (["--steps", "test", "--step-limit", "test"], "error: "),
    ],
)
def test_wrong_options(main, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main(*arguments)
    assert message in capsys.readouterr().err


def test_help_says_what_the_steps_are():
    done = subprocess.run(
        [sys.executable, gpu.__file__, "--help"], capture_output=True, text=True, check=True
    )
    assert "install,test,sanitize,bench,train" in done.stdout
