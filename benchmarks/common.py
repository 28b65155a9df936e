"""What the benchmark scripts share: options, the side-by-side measurement, the table."""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import gc
import math
import multiprocessing
import os
import pathlib
import re
import secrets
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jaxkern import benchmarking

DTYPES = {"bf16": jnp.bfloat16, "f16": jnp.float16, "f32": jnp.float32}
DIRECTIONS = ("fwd", "bwd")
RESULTS = pathlib.Path(__file__).parent / "results"
UNITS = {"tflops": "TFLOP/s", "gbps": "GB/s", "tokens_per_s": "tokens/s"}
PER_US = {"tflops": 1e-6, "gbps": 1e-3, "tokens_per_s": 1e6}  # work in a microsecond, in the unit

# Relative Frobenius error against the first provider. It catches a wrong function, not rounding:
# two bf16 implementations differ by a few 1e-3.
ERROR_LIMIT = 3e-2


class Shape(Protocol):
    """The size of a problem; together with a direction it is a case."""

    def case(self, direction: str) -> str: ...
    def work(self, direction: str) -> float:
        """Operations (tflops) or bytes (gbps) that the direction cannot do without, or tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Argument tuples to rotate through, and a cotangent of the output for each."""

    arguments: list[tuple]
    cotangents: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A provider ready to be timed on a shape: one sampler per direction.

    `results` maps a direction to the arrays of the first call, `error` is their distance from the
    expected ones. Both may be missing: a provider in another process compares by itself.
    """

    samplers: Mapping[str, Callable[[], float]]
    error: float = 0.0
    results: Mapping[str, Any] | None = None


# (shape, directions, inputs, expected results or None) -> Prepared. Raises NotImplementedError for
# a shape that the provider does not do.
Provider = Callable[[Any, Sequence[str], Any, Mapping[str, Any] | None], Prepared]


@dataclasses.dataclass(frozen=True)
class Family:
    """What is measured: `subject` is compared with every other provider, first with `baseline`.

    `inputs(shape)` is what every provider gets. `also` are further providers with a ratio to the
    baseline, `error_limit` what the relative error against the first provider may be.
    """

    name: str
    metric: str
    inputs: Callable[[Any], Any]
    baseline: str
    subject: str = "jaxkern"
    also: Sequence[str] = ()
    directions: Sequence[str] = DIRECTIONS
    error_limit: float = ERROR_LIMIT


def options(description: str, seconds: float = 0.02) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--filter", default="", metavar="REGEX", help="only the cases in which it is found")
    add("--case", action="append", metavar="CASE", help="a case of your own, spelled as in --list")
    add("--providers", default="", metavar="A,B", help="only these, in this order")
    add("--quick", action="store_true", help="a few cases, three repeats")
    add("--repeats", type=int, default=11, help="samples per case and provider (%(default)s)")
    add("--seconds", type=float, default=seconds, help="length of a sample (%(default)s)")
    add("--kernels", action="store_true", help="time each kernel of the subject, by CUPTI")
    add("--list", action="store_true", help="print cases and providers, measure nothing")
    add_destination(parser)
    return parser


def add_destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=pathlib.Path, default=RESULTS, help="folder of the results file"
    )
    parser.add_argument("--commit", help="the commit measured, where there is no git checkout")


def add_programs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--programs", metavar="FOLDER", help="where to keep compiled programs")


def start_run(
    parser: argparse.ArgumentParser, script: str, argv: Sequence[str], also: Iterable[str] = ()
) -> benchmarking.Run:
    """The run's identity. Its command leaves out where things go: that is a machine's matter."""
    destination = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_destination(destination)
    add_programs(destination)
    where, measured = destination.parse_known_args(argv)
    command = shlex.join(["python", f"benchmarks/{script}", *measured])
    try:
        return benchmarking.Run.here(command, where.commit, folder=RESULTS.parent, also=also)
    except ValueError as error:
        parser.error(str(error))


def select(
    parser: argparse.ArgumentParser,
    chosen: argparse.Namespace,
    shapes: Sequence,
    quick: Sequence,
    directions: Sequence[str] = DIRECTIONS,
) -> dict[Any, list[str]]:
    """Shapes to measure and the directions of each: those of --case, else those of the family."""
    shapes = quick if chosen.quick else shapes
    cases = [(direction, shape) for shape in shapes for direction in directions]
    return select_cases(parser, chosen, cases, type(shapes[0]).parse)


def select_cases(
    parser: argparse.ArgumentParser,
    chosen: argparse.Namespace,
    cases: Iterable[tuple[str, Any]],
    parse: Callable[[str], tuple[str, Any]],
) -> dict[Any, list[str]]:
    """Like `select`, of (direction, shape) pairs; `parse` gives those of --case."""
    try:
        cases = [parse(case) for case in chosen.case or ()] or cases
    except ValueError as error:
        parser.error(f"--case: {error}")
    selected: dict[Any, list[str]] = {}
    for direction, shape in cases:
        if re.search(chosen.filter, shape.case(direction)):
            selected.setdefault(shape, []).append(direction)
    if not selected:
        parser.error(f"--filter {chosen.filter!r} leaves no case")
    return selected


def pick_providers(
    parser: argparse.ArgumentParser, names: str, known: Mapping[str, Provider], default: Sequence
) -> dict[str, Provider]:
    chosen = [name.strip() for name in names.split(",")] if names else default
    if unknown := [name for name in chosen if name not in known]:
        parser.error(f"--providers: no {', '.join(unknown)}; there are {', '.join(known)}")
    return {name: known[name] for name in chosen}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype)


def normal_inputs(
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[Any],
    cotangent: tuple[tuple[int, ...], Any] | None = None,
) -> Inputs:
    """Fresh normal arguments, and cotangents if asked for, enough sets to miss the L2 cache."""
    total = sum(
        math.prod(shape) * jnp.dtype(dtype).itemsize
        for shape, dtype in zip(shapes, dtypes, strict=True)
    )
    sets = benchmarking.rotations(total, benchmarking.l2_cache_bytes())
    keys = iter(jax.random.split(jax.random.key(secrets.randbits(32)), sets * (len(shapes) + 1)))
    return Inputs(
        [
            tuple(_normal(next(keys), s, d) for s, d in zip(shapes, dtypes, strict=True))
            for _ in range(sets)
        ],
        [_normal(next(keys), *cotangent) for _ in range(sets)] if cotangent else [],
    )


def jax_provider(make: Callable[[Any], Callable[..., jax.Array]], seconds: float) -> Provider:
    """A provider that is a JAX function; `make(shape)` gives it.

    Backward is the pullback alone, jitted over its residuals, so forward is no part of its time.
    """

    def prepare(shape, directions, inputs, expected):
        fn = make(shape)
        samplers, results = {}, {}
        if "fwd" in directions:
            forward = jax.jit(fn)
            results["fwd"] = forward(*inputs.arguments[0])
            samplers["fwd"] = benchmarking.Sampler(forward, inputs.arguments, seconds=seconds)
        if "bwd" in directions:
            linearize = jax.jit(lambda *arguments: jax.vjp(fn, *arguments)[1])
            flat = [jax.tree.flatten(linearize(*arguments)) for arguments in inputs.arguments]
            tree = flat[0][1]
            backward = jax.jit(
                lambda residuals, cotangent: jax.tree.unflatten(tree, residuals)(cotangent)
            )
            pairs = [
                (residuals, cotangent)
                for (residuals, _), cotangent in zip(flat, inputs.cotangents, strict=True)
            ]
            results["bwd"] = backward(*pairs[0])
            samplers["bwd"] = benchmarking.Sampler(backward, pairs, seconds=seconds)
        return Prepared(samplers, relative_error(results, expected or results), results)

    return prepare


@jax.jit
def _relative_error(got: jax.Array, wanted: jax.Array) -> jax.Array:
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)


def relative_error(got: Any, wanted: Any) -> float:
    """The largest relative Frobenius distance over the arrays; NaN if any is not finite."""
    errors = jax.tree.leaves(jax.tree.map(_relative_error, got, wanted))
    return float(jnp.max(jnp.stack(errors)))


class Comparison:
    """Measures every provider on every shape, printing a line and appending rows per case."""

    def __init__(
        self, family: Family, providers: Mapping[str, Provider], run: benchmarking.Run, chosen
    ):
        self.family, self.providers, self.run, self.options = family, providers, run, chosen
        self.repeats = 3 if chosen.quick else chosen.repeats
        self._skipped: dict[str, list[str]] = {}
        self._failed: dict[str, list[str]] = {}
        self._speedups: dict[tuple[str, str], dict[str, float]] = {}
        self._spread = 0.0
        self._measured = 0

    def measure(self, selected: Mapping[Shape, Sequence[str]]) -> int:
        """Returns the exit status: 1 if a provider failed or nothing was measured."""
        cases = [shape.case(d) for shape, directions in selected.items() for d in directions]
        self._width = max(map(len, cases), default=4)
        print(f"{self.run.gpu} | commit {self.run.commit} | {self.run.versions}")
        self._column = max(18, *(len(name) + 2 for name in self.providers))
        self._print("", {name: name for name in self.providers}, "")
        unit = UNITS[self.family.metric]
        self._print("case", {name: f"us {unit:>8}" for name in self.providers}, "ratio")
        for shape, directions in selected.items():
            self._measure_shape(shape, directions)
            gc.collect()
        self._summarize()
        return 1 if self._failed or not self._measured else 0

    def _measure_shape(self, shape: Shape, directions: Sequence[str]) -> None:
        prepared = self._prepare(shape, directions)
        for direction in directions:
            samplers = {
                name: ready.samplers[direction]
                for name, ready in prepared.items()
                if direction in ready.samplers
            }
            if not samplers:
                continue
            try:
                samples = benchmarking.alternate(samplers, self.repeats)
            except Exception as error:
                self._fail("sampling", error, shape.case(direction))
                continue
            self._report(shape, direction, samples)
            if self.options.kernels and self.family.subject in samplers:
                _print_kernels(samplers[self.family.subject])

    def _prepare(self, shape: Shape, directions: Sequence[str]) -> dict[str, Prepared]:
        inputs = self.family.inputs(shape)
        prepared: dict[str, Prepared] = {}
        expected = None
        where = ", ".join(shape.case(direction) for direction in directions)
        for name, provider in self.providers.items():
            try:
                ready = provider(shape, directions, inputs, expected)
            except NotImplementedError as error:
                self._skipped.setdefault(f"{name}: {_first_line(error)}", []).append(where)
                if name == self.family.subject:
                    return {}
                continue
            except Exception as error:
                self._fail(name, error, where)
                continue
            if not ready.error <= self.family.error_limit:
                why = f"{name} and {next(iter(prepared), name)} disagree, so nothing is measured"
                self._failed.setdefault(why, []).append(f"{where} ({ready.error:.2g})")
                return {}
            expected = expected or ready.results
            prepared[name] = ready
        return prepared

    def _fail(self, what: str, error: Exception, where: str) -> None:
        why = f"{what}: {type(error).__name__}: {_first_line(error)}"
        self._failed.setdefault(why, []).append(where)

    def _report(self, shape: Shape, direction: str, samples: Mapping[str, list[float]]) -> None:
        self._measured += 1
        case, work = shape.case(direction), shape.work(direction)
        us = {name: statistics.median(values) for name, values in samples.items()}
        for values in samples.values():
            self._spread = max(self._spread, _quartile_spread(values))
        scale = PER_US[self.family.metric]
        rate = {name: work / value * scale for name, value in us.items()}
        row = functools.partial(self.run.row, self.family.name, case)
        rows = []
        for name in us:
            rows += [row(name, "us", us[name]), row(name, self.family.metric, rate[name])]
        ratio = ""
        if self.family.subject in us:
            for name in us:
                self._speedups.setdefault((direction, name), {})[case] = (
                    us[name] / us[self.family.subject]
                )
        for name in (self.family.subject, *self.family.also):
            if {name, self.family.baseline} <= us.keys():
                value = us[self.family.baseline] / us[name]
                rows.append(row(f"{name} / {self.family.baseline}", "ratio", value))
                ratio = ratio or f"{value:.2f}"
        self._print(case, {name: f"{us[name]:.1f} {rate[name]:8.4g}" for name in us}, ratio)
        benchmarking.append_rows(self.options.output, rows)

    def _summarize(self) -> None:
        for direction in self.family.directions:
            means = {
                name: f"{math.exp(statistics.fmean(map(math.log, ratios.values()))):.3f}"
                for (d, name), ratios in self._speedups.items()
                if d == direction and name != self.family.subject
            }
            if means:
                self._print(f"{direction}: {self.family.subject} is faster by (geomean)", means, "")
        for direction in self.family.directions:
            if ratios := self._speedups.get((direction, self.family.baseline)):
                case = min(ratios, key=ratios.__getitem__)
                print(f"lowest against {self.family.baseline}: {ratios[case]:.3f} at {case}")
        print(f"largest quartile spread of the samples {self._spread:.1%}")
        for title, reasons in (("skipped", self._skipped), ("FAILED", self._failed)):
            for why, where in reasons.items():
                more = f" and {len(where) - 3} more" if len(where) > 3 else ""
                print(f"{title}: {why}: {'; '.join(where[:3])}{more}")

    def _print(self, case: str, cells: Mapping[str, str], ratio: str) -> None:
        columns = [cells.get(name, "-" if case else "") for name in self.providers]
        line = "".join(f"{cell:>{self._column}}" for cell in columns)
        print(f"{case:<{self._width}}{line}{ratio:>7}", flush=True)


def _print_kernels(sampler: benchmarking.Sampler) -> None:
    try:
        times = benchmarking.kernel_times(sampler.fn, *sampler.inputs[0])
    except Exception as error:
        print(f"  no kernel times: {_first_line(error)}")
        return
    for name, us in times:
        print(f"  {us:9.1f} us  {name[:100]}")


def _quartile_spread(samples: list[float]) -> float:
    if len(samples) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def print_list(selected: Mapping[Shape, Sequence[str]], providers: Iterable[str]) -> int:
    for shape, directions in selected.items():
        for direction in directions:
            print(shape.case(direction))
    print("providers:", ", ".join(providers))
    return 0


class Worker:
    """A process of its own, in which `start` runs first. Functions travel by name."""

    def __init__(self, start: Callable[[], None]):
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(1, context)
        self._started = self._pool.submit(start)

    def __call__(self, function: Callable, *arguments: Any) -> Any:
        """What the function gives there. Raises what it raises, or what `start` has raised."""
        self._started.result()
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        self._pool.shutdown()


def share_memory() -> None:
    """Lets other providers have memory beside JAX, which otherwise takes most of it at the start.

    To be called before JAX first touches a device.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
