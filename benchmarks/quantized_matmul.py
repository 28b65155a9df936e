"""Products with weights of four bits beside those with bfloat16 ones and with other four bits.

    python benchmarks/quantized_matmul.py
    python benchmarks/quantized_matmul.py --filter 'm1 .*nvfp4' --providers jaxkern,"jax bf16"
    python benchmarks/quantized_matmul.py --case 'm16 n28672 k8192 nvfp4'

Activations are bfloat16. `jax bf16` multiplies by the dequantised weight, kept in bfloat16, as XLA
does that; `jax dequantize` by one that it dequantises in the same jit; `torch bf16` is PyTorch's
cuBLAS, `torch int4` its product of bfloat16 and int4 in groups of 128, whatever the case's format.
A call makes products with several weights, one after another, 32 at least where a product takes
little, and a time is that of one product: below 15 us or so the host's part of a launch shows, for
which quantized_matmul_kernel.py is. GB/s count the bytes of the case's weight, with its scales, and
of x and the result.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Mapping

import common
import jax
import jax.numpy as jnp
import torch_matmul

import jaxkern
from jaxkern import benchmarking

FORMATS = {"nvfp4": {}, "mxfp4": {}, "int4": {"group_size": 128}}
DIRECTIONS = ("fwd",)
BITS = {"nvfp4": 4.5, "mxfp4": 4.25, "int4": 4.125}
LEAST_SETS = 32


@dataclasses.dataclass(frozen=True)
class Shape:
    """x [m, k] by a weight [n, k]."""

    m: int
    n: int
    k: int
    format: str

    _PATTERN = re.compile(rf"m(\d+) n(\d+) k(\d+) ({'|'.join(FORMATS)})")

    @classmethod
    def parse(cls, case: str) -> tuple[str, Shape]:
        """Direction and shape of a case. Raises ValueError if it is spelled otherwise."""
        found = cls._PATTERN.fullmatch(case)
        if not found:
            raise ValueError(f"wanted the form 'm16 n28672 k8192 nvfp4', got {case!r}")
        m, n, k, format = found.groups()
        return "fwd", cls(int(m), int(n), int(k), format)

    def case(self, direction: str) -> str:
        return f"m{self.m} n{self.n} k{self.k} {self.format}"

    def work(self, direction: str) -> float:
        """Bytes: the packed weight, x and the result."""
        return self.weight_bytes + 2 * self.m * (self.n + self.k)

    @property
    def weight_bytes(self) -> float:
        return self.n * self.k * BITS[self.format] / 8


SIZES = ((14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672), (8192, 8192))
SHAPES = tuple(
    Shape(m, n, k, format)
    for format in FORMATS
    for m in (1, 8, 16, 32, 64, 128, 512, 2048, 8192)
    for n, k in SIZES
)
QUICK = tuple(s for s in SHAPES if (s.n, s.k, s.format) == (8192, 8192, "nvfp4"))
TORCH_PROVIDERS = ("torch bf16", "torch int4")


def inputs(shape: Shape) -> common.Inputs:
    """x and a weight in the form of each JAX provider, in this order."""
    cache = benchmarking.l2_cache_bytes()
    sets = benchmarking.rotations(int(shape.weight_bytes), cache)
    sets = max(sets, LEAST_SETS if shape.m < 512 else 2)

    @jax.jit
    def weights(key):
        w = jax.random.normal(key, (shape.n, shape.k), jnp.float32)
        quantized = jaxkern.quantize(w, shape.format, **FORMATS[shape.format])
        return quantized.dequantize(jnp.bfloat16), jaxkern.pack_weight(quantized), quantized

    keys = jax.random.split(jax.random.key(0), sets + 1)
    x = jax.random.normal(keys[0], (shape.m, shape.k), jnp.bfloat16)
    return common.Inputs([(x, *weights(key)) for key in keys[1:]], [])


def by_plain(x, w):
    return jnp.dot(x, w.T)


def by_packed(x, w):
    return jaxkern.quantized_matmul(x, w, implementation="cuda")


def by_dequantized(x, w):
    return jnp.dot(x, w.dequantize(x.dtype).T)


JAX_PROVIDERS = {"jax bf16": by_plain, "jaxkern": by_packed, "jax dequantize": by_dequantized}


def jax_provider(name: str, seconds: float) -> common.Provider:
    """The product with every weight, in one call."""
    place = 1 + list(JAX_PROVIDERS).index(name)

    @jax.jit
    def run(x, weights):
        return [JAX_PROVIDERS[name](x, w) for w in weights]

    def prepare(shape, directions, inputs, expected):
        x, weights = inputs.arguments[0][0], [one[place] for one in inputs.arguments]
        sampler = benchmarking.Sampler(run, [(x, weights)], seconds=seconds, steps=len(weights))
        results = {"fwd": run(x, weights)[0]}
        error = common.relative_error(results, expected or results)
        return common.Prepared({"fwd": sampler}, error, results)

    return prepare


class TorchWorker:
    """PyTorch in a process of its own, with weights of its own."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._worker = common.Worker(torch_matmul.start)

    def provider(self, name: str) -> common.Provider:
        def prepare(shape, directions, inputs, expected):
            sets, size = len(inputs.arguments), (shape.m, shape.n, shape.k)
            error = self._worker(torch_matmul.prepare, name, *size, sets, self._seconds)
            return common.Prepared({"fwd": lambda: self._worker(torch_matmul.sample, name)}, error)

        return prepare

    def close(self) -> None:
        self._worker.close()


def main(argv: list[str]) -> int:
    parser = common.options("Products with weights of four bits, side by side.", seconds=0.01)
    chosen = parser.parse_args(argv)
    selected = common.select(parser, chosen, SHAPES, QUICK, DIRECTIONS)
    known: Mapping[str, common.Provider] = {
        name: jax_provider(name, chosen.seconds) for name in JAX_PROVIDERS
    }
    torch = importlib.util.find_spec("torch") is not None
    default = [*JAX_PROVIDERS, *(TORCH_PROVIDERS if torch else ())]
    if chosen.list:
        return common.print_list(selected, default)
    worker = None
    if torch and (not chosen.providers or "torch" in chosen.providers):
        common.share_memory()
        worker = TorchWorker(chosen.seconds)
        known |= {name: worker.provider(name) for name in TORCH_PROVIDERS}
    try:
        providers = common.pick_providers(parser, chosen.providers, known, default)
        run = common.start_run(parser, "quantized_matmul.py", argv, ["torch"] if worker else [])
        family = common.Family(
            "quantized_matmul", "gbps", inputs, baseline="jax bf16", directions=DIRECTIONS
        )
        return common.Comparison(family, providers, run, chosen).measure(selected)
    finally:
        if worker:
            worker.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
