"""RMS norm, forward and backward, beside what XLA makes of the same formula.

    python benchmarks/rms_norm.py
    python benchmarks/rms_norm.py --case 'bwd r8192 w5120 bf16'

GB/s count the bytes that must move: each operand read once, each result written once.
"""

from __future__ import annotations

import dataclasses
import re
import sys

import common
import jax
import jax.numpy as jnp

import jaxkern


@dataclasses.dataclass(frozen=True)
class Shape:
    """x is [rows, width]; scale is [width], of x's dtype."""

    rows: int
    width: int
    dtype: str

    _PATTERN = re.compile(r"(fwd|bwd) r(\d+) w(\d+) (bf16|f16|f32)")

    @classmethod
    def parse(cls, case: str) -> tuple[str, Shape]:
        """Direction and shape of a case. Raises ValueError if it is spelled otherwise."""
        found = cls._PATTERN.fullmatch(case)
        if not found:
            raise ValueError(f"wanted the form 'fwd r16384 w4096 bf16', got {case!r}")
        direction, rows, width, dtype = found.groups()
        return direction, cls(int(rows), int(width), dtype)

    def case(self, direction: str) -> str:
        return f"{direction} r{self.rows} w{self.width} {self.dtype}"

    def work(self, direction: str) -> float:
        """Bytes: x, scale -> y; or x, dy, scale, rstd -> dx, dscale."""
        size = jnp.dtype(common.DTYPES[self.dtype]).itemsize
        matrix, vector = self.rows * self.width * size, self.width * size
        if direction == "fwd":
            return 2 * matrix + vector
        return 3 * matrix + 2 * vector + 4 * self.rows


_ELEMENTS = 2**26
SHAPES = tuple(
    Shape(_ELEMENTS // width, width, dtype)
    for dtype in ("bf16", "f32")
    for width in (1024, 4096, 8192, 16384)
)
QUICK = tuple(s for s in SHAPES if s.width == 4096)
PROVIDERS = ("jaxkern", "jaxkern xla", "jnp")


def inputs(shape: Shape) -> common.Inputs:
    dtype = common.DTYPES[shape.dtype]
    matrix = (shape.rows, shape.width)
    return common.normal_inputs((matrix, (shape.width,)), (dtype, dtype), (matrix, dtype))


@jax.checkpoint
def plain_rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The formula as XLA does it best: backward keeps x, where autodiff would keep float32."""
    wide = x.astype(jnp.float32)
    rstd = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * rstd * scale.astype(jnp.float32)).astype(x.dtype)


def _jaxkern(implementation: str):
    return lambda shape: (
        lambda x, scale: jaxkern.rms_norm(x, scale, epsilon=1e-6, implementation=implementation)
    )


def main(argv: list[str]) -> int:
    parser = common.options("RMS norm, forward and backward, side by side.", seconds=0.01)
    chosen = parser.parse_args(argv)
    selected = common.select(parser, chosen, SHAPES, QUICK)
    if chosen.list:
        return common.print_list(selected, PROVIDERS)
    makers = (_jaxkern("cuda"), _jaxkern("xla"), lambda shape: plain_rms_norm)
    known = {
        name: common.jax_provider(make, chosen.seconds)
        for name, make in zip(PROVIDERS, makers, strict=True)
    }
    providers = common.pick_providers(parser, chosen.providers, known, PROVIDERS)
    run = common.start_run(parser, "rms_norm.py", argv)
    family = common.Family("rms_norm", "gbps", inputs, baseline="jnp")
    return common.Comparison(family, providers, run, chosen).measure(selected)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
