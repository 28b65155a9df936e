import dataclasses
import inspect
import subprocess
import time

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import profiler

from jaxkern import benchmarking

RUN = benchmarking.Run(
    "2026-01-02T03:04:05Z", "abc", "NVIDIA H200", "jax=1", "python x.py --a 'b c'"
)


def row(**changes):
    return dataclasses.replace(RUN.row("attention", "fwd b1", "jaxkern", "us", 12.5), **changes)


class TestRows:
    def test_file_is_named_after_the_gpu(self, tmp_path):
        benchmarking.append_rows(tmp_path, [row(), row(gpu="NVIDIA GH200 480GB")])
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {"nvidia-h200.csv", "nvidia-gh200-480gb.csv"}

    def test_appending_keeps_what_was_there_and_one_header(self, tmp_path):
        benchmarking.append_rows(tmp_path / "new", [row()])
        path = tmp_path / "new" / "nvidia-h200.csv"
        before = path.read_text()
        benchmarking.append_rows(tmp_path / "new", [row(provider="jnp", value=2.0)])
        after = path.read_text()
        assert after.startswith(before)
        assert (
            after.count("date,commit,gpu,versions,family,case,provider,metric,value,command") == 1
        )
        assert benchmarking.read_rows(path) == [row(), row(provider="jnp", value=2.0)]

    def test_values_keep_five_digits(self, tmp_path):
        benchmarking.append_rows(tmp_path, [row(value=1234.5678), row(value=0.000123456)])
        rows = benchmarking.read_rows(tmp_path / "nvidia-h200.csv")
        assert [r.value for r in rows] == [1234.6, 0.00012346]

    def test_other_columns_are_refused(self, tmp_path):
        path = tmp_path / "nvidia-h200.csv"
        path.write_text("date,value\n1,2\n")
        with pytest.raises(ValueError, match="columns must be date,commit,gpu"):
            benchmarking.append_rows(tmp_path, [row()])
        assert path.read_text() == "date,value\n1,2\n"

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
    def test_value_must_be_positive_and_finite(self, value):
        with pytest.raises(ValueError, match="value must be positive and finite"):
            row(value=value)

    def test_unknown_metric(self):
        with pytest.raises(ValueError, match="metric must be one of us, tflops.*got 'ms'"):
            row(metric="ms")


class TestRun:
    @pytest.fixture
    def checkout(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        (tmp_path / "code.py").write_text("1")
        results = tmp_path / "benchmarks" / "results" / "cpu.csv"
        results.parent.mkdir(parents=True)
        results.write_text("1")
        me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        for command in (["init", "-q"], ["add", "."], [*me, "commit", "-q", "-m", "first"]):
            subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
        return tmp_path

    def test_commit_is_marked_when_the_code_differs(self, checkout):
        clean = benchmarking.git_commit(checkout)
        assert len(clean) == 10 and int(clean, 16) >= 0
        (checkout / "benchmarks" / "results" / "cpu.csv").write_text("2")
        assert benchmarking.git_commit(checkout) == clean
        (checkout / "code.py").write_text("2")
        assert benchmarking.git_commit(checkout) == clean + "+"

    def test_without_a_checkout_the_commit_must_be_named(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
        with pytest.raises(ValueError, match="--commit: needed, as .* is in no git checkout"):
            benchmarking.Run.here("python x.py", folder=tmp_path)
        run = benchmarking.Run.here("python x.py", commit="abc", also=["numpy", "not-installed"])
        assert (run.commit, run.gpu) == ("abc", jax.devices()[0].device_kind)
        assert f"jax={jax.__version__}" in run.versions.split()
        assert "numpy=" in run.versions and "not-installed" not in run.versions


class TestTiming:
    def test_rotations_fill_three_caches(self):
        assert benchmarking.rotations(10, cache_bytes=60) == 18
        assert benchmarking.rotations(7, cache_bytes=60) * 7 >= 180
        assert benchmarking.rotations(1000, cache_bytes=60) == 2
        assert benchmarking.rotations(1, cache_bytes=60) == 32

    def test_l2_cache_is_a_plausible_size(self):
        assert 1 << 20 <= benchmarking.l2_cache_bytes() <= 1 << 30

    def test_sampler_rotates_and_waits_once_per_sample(self):
        seen, waited = [], []

        def fn(x):
            seen.append(x)
            time.sleep(1e-3)
            return x

        sampler = benchmarking.Sampler(fn, [(1,), (2,), (3,)], wait=waited.append, seconds=0.02)
        assert 2 <= sampler.calls <= 20
        seen.clear()
        waited.clear()
        us = sampler()
        assert seen == [1 + i % 3 for i in range(sampler.calls)]
        assert waited == [seen[-1]]
        assert us >= 1000

    def test_waiting_is_part_of_the_time(self):
        sampler = benchmarking.Sampler(
            lambda: None, [()], wait=lambda _: time.sleep(4e-3), seconds=1e-3
        )
        assert sampler.calls == 2
        assert sampler() >= 2000

    def test_time_of_a_step(self):
        def call():
            time.sleep(4e-3)

        sampler = benchmarking.Sampler(call, [()], wait=lambda _: None, seconds=0.02, steps=4)
        assert 2 <= sampler.calls <= 5
        assert 1000 <= sampler() < 4000

    def test_samplers_take_turns(self):
        order = []

        def sampler(name, value):
            return lambda: order.append(name) or value

        samples = benchmarking.alternate({"a": sampler("a", 1.0), "b": sampler("b", 2.0)}, 3)
        assert order == ["a", "b"] * 3
        assert samples == {"a": [1.0] * 3, "b": [2.0] * 3}

    def test_device_time_tells_a_large_product_from_a_small_one(self):
        fn = jax.jit(jnp.matmul)
        small, large = (
            benchmarking.device_time(fn, [(jnp.ones((n, n)),) * 2], repeats=3, seconds=1e-3)
            for n in (16, 512)
        )
        assert 0 < small < large

    def test_kernel_times_come_in_microseconds(self, monkeypatch):
        def measure(f, *, aggregate=True, iterations=1):
            assert not aggregate
            return lambda *arguments: (f(*arguments), [("kernel", 0.25), ("other", 1.5)])

        known = inspect.signature(profiler.measure).parameters
        assert list(known) == list(inspect.signature(measure).parameters)
        monkeypatch.setattr(profiler, "measure", measure)
        times = benchmarking.kernel_times(jnp.sin, 1.0)
        assert times == [("kernel", 250.0), ("other", 1500.0)]
