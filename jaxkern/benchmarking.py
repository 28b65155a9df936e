"""Device time of jitted functions, and the tidy rows that the benchmarks append.

Method. A *sample* enqueues many calls without waiting, blocks once on the last result, and divides
the wall time by the number of calls. The device queue stays full, so the host's dispatch hides
behind the device's work and one start-up (tens of microseconds) is shared by the whole sample.
Nothing is subtracted: a figure includes the gaps between the kernels of a call, as a program sees
them. It is right for calls of 50 us and more; below that the host's dispatch shows. The arguments
rotate through sets that together exceed the L2 cache, so no call finds its inputs there.

Functions that are compared are sampled in turn (`alternate`), so that they meet the same clocks,
and the median over the turns is reported. The sampler needs nothing of JAX, so that another
framework is timed in the very same way.
"""

from __future__ import annotations

import csv
import ctypes
import dataclasses
import datetime
import importlib.metadata
import math
import pathlib
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

METRICS = ("us", "tflops", "gbps", "ratio", "tokens_per_s", "held_out_loss", "kl_divergence")

_L2_CACHE_SIZE = 38  # CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE
_L2_UNKNOWN = 128 << 20


def l2_cache_bytes(device: jax.Device | None = None) -> int:
    """The L2 cache of a CUDA device in bytes; a generous 128 MiB where the driver is not there."""
    ordinal = getattr(device or jax.devices()[0], "local_hardware_id", None) or 0
    size, handle = ctypes.c_int(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _L2_UNKNOWN
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(handle), ordinal)
        or cuda.cuDeviceGetAttribute(ctypes.byref(size), _L2_CACHE_SIZE, handle)
    )
    return _L2_UNKNOWN if failed else size.value


def rotations(bytes_per_call: int, cache_bytes: int) -> int:
    """How many sets of arguments to rotate through so that together they fill three caches.

    Between 2 and 32: a call of less than a tenth of the cache will find part of its inputs there.
    """
    return min(32, max(2, math.ceil(3 * cache_bytes / max(1, bytes_per_call))))


class Sampler:
    """Samples the time of `fn(*arguments)`, rotating through `inputs`.

    Args:
      fn: enqueues work on the device and returns without waiting, as a jitted function does.
      inputs: argument tuples, used in turn. Each is called once while the sampler is made, so
        compilation stays out of the samples.
      wait: blocks until the result of the last call is ready.
      seconds: how long one sample lasts, about; at least two calls.
      steps: how many times over a call does what is to be timed.

    Calling the sampler takes one sample and returns microseconds per step of a call.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        inputs: Sequence[tuple],
        *,
        wait: Callable[[Any], Any] = jax.block_until_ready,
        seconds: float = 0.02,
        steps: int = 1,
    ):
        self.fn, self.inputs, self._wait, self.steps = fn, inputs, wait, steps
        self.calls = len(inputs)
        self()
        self.calls = min(1000, max(2, math.ceil(seconds * 1e6 / (self() * steps))))

    def __call__(self) -> float:
        result = None
        start = time.perf_counter()
        for i in range(self.calls):
            result = self.fn(*self.inputs[i % len(self.inputs)])
        self._wait(result)
        return (time.perf_counter() - start) / (self.calls * self.steps) * 1e6


def alternate(
    samplers: Mapping[str, Callable[[], float]], repeats: int = 11
) -> dict[str, list[float]]:
    """Takes `repeats` samples from every sampler, one from each in turn."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(repeats):
        for name, sampler in samplers.items():
            samples[name].append(sampler())
    return samples


def device_time(
    fn: Callable[..., Any], inputs: Sequence[tuple], *, repeats: int = 11, seconds: float = 0.02
) -> float:
    """Microseconds that one call of the jitted `fn` takes on the device: the median sample.

    Args:
      fn: a jitted function.
      inputs: argument tuples to rotate through; see `rotations` for how many make sense.
      repeats: samples to take.
      seconds: how long one sample lasts, about.
    """
    return statistics.median(alternate({"": Sampler(fn, inputs, seconds=seconds)}, repeats)[""])


def kernel_times(fn: Callable[..., Any], *arguments: Any) -> list[tuple[str, float]]:
    """Name and microseconds of each kernel that one call of the jitted `fn` launches, by CUPTI.

    For finding out where the time of a call goes; published figures come from `device_time`.
    CUPTI serves one tool at a time, so this fails under Nsight and compute-sanitizer. Empty when
    nothing ran on a GPU. Raises RuntimeError where this jaxlib has no CUPTI binding.
    """
    from jax.experimental.mosaic.gpu import profiler

    _, timings = profiler.measure(fn, aggregate=False)(*arguments)
    return [(name, milliseconds * 1e3) for name, milliseconds in timings or ()]


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured figure. `metric` is one of `METRICS`; a ratio above 1 means faster than."""

    date: str
    commit: str
    gpu: str
    versions: str
    family: str
    case: str
    provider: str
    metric: str
    value: float
    command: str

    def __post_init__(self):
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"value must be positive and finite, got {self.value} ({self.case})")


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


@dataclasses.dataclass(frozen=True)
class Run:
    """What all rows of one run share. Rows with equal `date` and `commit` are comparable."""

    date: str
    commit: str
    gpu: str
    versions: str
    command: str

    @classmethod
    def here(
        cls,
        command: str,
        commit: str | None = None,
        *,
        folder: str | pathlib.Path = ".",
        also: Iterable[str] = (),
    ) -> Run:
        """This machine, now.

        The commit is that of the git checkout around `folder` where it is not given; `also` names
        further distributions whose versions matter.
        """
        return cls(
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            commit=commit or git_commit(folder),
            gpu=jax.devices()[0].device_kind,
            versions=versions(also),
            command=command,
        )

    def row(self, family: str, case: str, provider: str, metric: str, value: float) -> Row:
        return Row(
            **dataclasses.asdict(self),
            family=family,
            case=case,
            provider=provider,
            metric=metric,
            value=value,
        )


def git_commit(folder: str | pathlib.Path = ".") -> str:
    """The commit checked out around `folder`, with `+` when tracked files differ from it.

    Raises ValueError outside a git checkout: a figure without its commit is of no use later.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        changed = git(
            "status",
            "--porcelain",
            "--untracked-files=no",
            "--",
            ":/",
            ":(top,exclude)benchmarks/results",
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"--commit: needed, as {folder} is in no git checkout") from error
    return commit + ("+" if changed else "")


def versions(also: Iterable[str] = ()) -> str:
    """`name=version` of what decides the figures, separated by spaces."""
    found = {}
    for name in ("jaxkern", "jax", *also):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if cuda := re.search(r"cuda (\d+)", jax.devices()[0].client.platform_version):
        number = int(cuda[1])
        found["cuda"] = f"{number // 1000}.{number % 1000 // 10}"
        for name in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
            try:
                found["cudnn"] = importlib.metadata.version(name)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
        found["driver"] = _driver_version()
    return " ".join(f"{name}={version}" for name, version in found.items())


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results_file(directory: str | pathlib.Path, gpu: str) -> pathlib.Path:
    """Where the rows of a GPU are kept: `nvidia-h200.csv` for "NVIDIA H200"."""
    return pathlib.Path(directory, re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".csv")


def append_rows(directory: str | pathlib.Path, rows: Iterable[Row]) -> None:
    """Appends rows to the results file of their GPU, making it with its header where it is missing.

    Raises ValueError if a file is there with other columns.
    """
    files: dict[pathlib.Path, list[Row]] = {}
    for row in rows:
        files.setdefault(results_file(directory, row.gpu), []).append(row)
    for path, added in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        if not new:
            read_rows(path)
        with path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(COLUMNS)
            for row in added:
                writer.writerow(dataclasses.astuple(row)[:-2] + (f"{row.value:.5g}", row.command))


def read_rows(path: str | pathlib.Path) -> list[Row]:
    """The rows of a results file, oldest first. Raises ValueError if its columns are others."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path}: columns must be {','.join(COLUMNS)}, got {reader.fieldnames}"
            )
        return [Row(**{**fields, "value": float(fields["value"])}) for fields in reader]
