"""Side-by-side measurement, with providers that take a known time."""

import itertools
import operator
import os

import common
import jax.numpy as jnp
import pytest

from jaxkern import benchmarking


class Shape:
    def __init__(self, name):
        self.name = name

    def case(self, direction):
        return f"{direction} {self.name}"

    def work(self, direction):
        return 8e6 if direction == "fwd" else 2e7


def provider(us, result=1.0, error=None):
    """Takes `us` microseconds; answers `result`; raises `error` when there is one."""

    def prepare(shape, directions, inputs, expected):
        if error:
            raise error
        results = {d: jnp.full(3, result) for d in directions}
        samplers = {d: itertools.cycle(us).__next__ for d in directions}
        return common.Prepared(
            samplers, common.relative_error(results, expected or results), results
        )

    return prepare


@pytest.fixture
def compare(tmp_path, capsys):
    def compare(shapes=("one",), directions=common.DIRECTIONS, **providers):
        providers = {name.replace("_", " "): p for name, p in providers.items()}
        parser = common.options("test")
        chosen = parser.parse_args(["--output", str(tmp_path), "--repeats", "5"])
        run = benchmarking.Run("date", "abc", "Some GPU", "jax=1", "python x.py")
        family = common.Family("test", "tflops", lambda shape: None, baseline="jax.nn cudnn")
        selected = {Shape(name): list(directions) for name in shapes}
        status = common.Comparison(family, providers, run, chosen).measure(selected)
        path = tmp_path / "some-gpu.csv"
        rows = benchmarking.read_rows(path) if path.exists() else []
        figures = {(r.case, r.provider, r.metric): r.value for r in rows}
        return status, figures, capsys.readouterr().out

    return compare


def test_rows_and_table(compare):
    status, figures, out = compare(
        **{"jaxkern": provider([5.0, 4.0, 4.0]), "jax.nn_cudnn": provider([3.0])}
    )
    assert status == 0
    assert figures == {
        ("fwd one", "jaxkern", "us"): 4.0,
        ("fwd one", "jaxkern", "tflops"): 2.0,
        ("fwd one", "jax.nn cudnn", "us"): 3.0,
        ("fwd one", "jax.nn cudnn", "tflops"): 2.6667,
        ("fwd one", "jaxkern / jax.nn cudnn", "ratio"): 0.75,
        ("bwd one", "jaxkern", "us"): 4.0,
        ("bwd one", "jaxkern", "tflops"): 5.0,
        ("bwd one", "jax.nn cudnn", "us"): 3.0,
        ("bwd one", "jax.nn cudnn", "tflops"): 6.6667,
        ("bwd one", "jaxkern / jax.nn cudnn", "ratio"): 0.75,
    }
    line = next(line for line in out.splitlines() if line.startswith("fwd one"))
    assert line.split() == ["fwd", "one", "4.0", "2", "3.0", "2.667", "0.75"]


def test_geometric_mean_and_lowest_come_last(compare):
    times = iter([[1.0], [4.0]])

    def ours(shape, *arguments):
        return provider(next(times))(shape, *arguments)

    _, _, out = compare(
        ["one", "two"], ["fwd"], **{"jaxkern": ours, "jax.nn_cudnn": provider([2.0])}
    )
    means, lowest = out.splitlines()[-3:-1]
    assert means.split() == ["fwd:", "jaxkern", "is", "faster", "by", "(geomean)", "-", "1.000"]
    assert lowest == "lowest against jax.nn cudnn: 0.500 at fwd two"


def test_unsupported_shape_is_skipped_by_every_provider(compare):
    unsupported = provider([1.0], error=NotImplementedError("head dim 256\nmore"))
    status, figures, out = compare(**{"jaxkern": unsupported, "jax.nn_cudnn": provider([1.0])})
    assert status == 1 and not figures  # Nothing at all was measured.
    assert "skipped: jaxkern: head dim 256: fwd one, bwd one\n" in out


def test_baseline_that_does_not_do_a_shape_leaves_the_others(compare):
    baseline = provider([1.0], error=NotImplementedError("too large"))
    status, figures, out = compare(**{"jaxkern": provider([4.0]), "jax.nn_cudnn": baseline})
    assert status == 0
    assert {name for _, name, _ in figures} == {"jaxkern"}
    assert "skipped: jax.nn cudnn: too large: fwd one, bwd one\n" in out


def test_failure_is_reported_and_leaves_the_others(compare):
    baseline = provider([1.0], error=RuntimeError("no memory"))
    status, figures, out = compare(**{"jaxkern": provider([4.0]), "jax.nn_cudnn": baseline})
    assert status == 1
    assert {name for _, name, _ in figures} == {"jaxkern"}
    assert "FAILED: jax.nn cudnn: RuntimeError: no memory: fwd one, bwd one\n" in out


def test_failure_while_sampling_loses_one_case(compare):
    def breaks_in_backward(shape, directions, inputs, expected):
        ready = provider([1.0])(shape, directions, inputs, expected)
        return common.Prepared({**ready.samplers, "bwd": [].pop}, ready.error)

    status, figures, out = compare(
        **{"jaxkern": provider([4.0]), "jax.nn_cudnn": breaks_in_backward}
    )
    assert status == 1
    assert {case for case, _, _ in figures} == {"fwd one"}
    assert "FAILED: sampling: IndexError: pop from empty list: bwd one\n" in out


@pytest.mark.parametrize("result", [1.1, float("nan"), float("inf")])
def test_providers_that_disagree_are_not_measured(compare, result):
    status, figures, out = compare(
        **{"jaxkern": provider([4.0]), "jax.nn_cudnn": provider([4.0], result=result)}
    )
    assert status == 1 and not figures
    assert "FAILED: jax.nn cudnn and jaxkern disagree, so nothing is measured: fwd one" in out


def test_subject_that_is_not_finite_is_not_measured(compare):
    status, figures, _ = compare(jaxkern=provider([4.0], result=float("nan")))
    assert status == 1 and not figures


def test_relative_error():
    wanted = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
    got = {"a": jnp.array([3.0, 4.5]), "b": jnp.array([1.02])}
    assert common.relative_error(got, wanted) == pytest.approx(0.1)


def test_command_leaves_out_the_machine(tmp_path):
    parser = common.options("test")
    argv = ["--filter", "^fwd h128", "--output", str(tmp_path), "--commit=abc", "--quick"]
    run = common.start_run(parser, "attention.py", argv)
    assert run.command == "python benchmarks/attention.py --filter '^fwd h128' --quick"
    assert run.commit == "abc"


def test_inputs_are_fresh_and_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(benchmarking, "l2_cache_bytes", lambda: 4096)
    make = [common.normal_inputs([(8, 64), (64,)], [jnp.bfloat16] * 2, ((8, 64), jnp.bfloat16))]
    make += [common.normal_inputs([(8, 64), (64,)], [jnp.bfloat16] * 2, ((8, 64), jnp.bfloat16))]
    first, second = make
    assert len(first.arguments) == len(first.cotangents) == 11  # of 1152 bytes
    arrays = [x[0] for x in first.arguments + second.arguments] + first.cotangents
    for one, other in itertools.combinations(arrays, 2):
        assert not jnp.array_equal(one, other)
    assert 0.8 < float(jnp.std(jnp.stack(arrays).astype(jnp.float32))) < 1.2


class TestWorker:
    def test_is_a_process_of_its_own(self):
        worker = common.Worker(os.getpid)
        try:
            assert worker(os.getpid) not in (worker(os.getppid), os.getpid())
            assert worker(operator.sub, 3, 2) == 1
            with pytest.raises(ZeroDivisionError):
                worker(operator.floordiv, 3, 0)
        finally:
            worker.close()

    def test_nothing_runs_where_it_did_not_start(self):
        worker = common.Worker(operator.neg)  # which is given nothing to negate
        try:
            with pytest.raises(TypeError, match="neg"):
                worker(os.getpid)
        finally:
            worker.close()
