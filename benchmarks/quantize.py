"""FP8 quantisation beside what XLA makes of it, and beside a copy of as many bytes.

    python benchmarks/quantize.py
    python benchmarks/quantize.py --filter 'row both'
    python benchmarks/quantize.py --case 'quantize row both r8192 w5120 bf16 e4m3'

GB/s count the bytes that must move: the operands read, values and scales written. The operands
count twice where a scale needs more of them than a kernel can keep: all of a tensor, or whole
columns ("row" of a transpose). `copy` copies an array of half the case's bytes on the device, which
moves the same bytes: the ratio to it is the part of a copy's rate that is reached.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Sequence

import common
import jax
import jax.numpy as jnp

import jaxkern
from jaxkern import benchmarking

FORMATS = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}
SCALINGS = ("tensor", "row", "1x128", "128x128")
ORIENTATIONS = ("natural", "transposed", "both")
DIRECTIONS = ("fwd",)


@dataclasses.dataclass(frozen=True)
class Form:
    """What is quantised: a function of matrices [rows, width], and how many it takes and gives.

    normalises: it also takes a scale [width], and gives rstd [rows]; float32.
    """

    function: Callable
    operands: int = 1
    results: int = 1
    scalings: Sequence[str] = SCALINGS
    normalises: bool = False


FUSED = ("row", "1x128", "128x128")  # with "tensor" the matrices are made in memory first
FORMS = {
    "quantize": Form(jaxkern.quantize),
    "quantize_rms_norm": Form(jaxkern.quantize_rms_norm, 1, 1, FUSED, normalises=True),
    "quantize_swiglu": Form(jaxkern.quantize_swiglu, 2, 1, FUSED),
    "quantize_swiglu_grad": Form(jaxkern.quantize_swiglu_grad, 3, 2, FUSED),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Every operand of the form is [rows, width]."""

    form: str
    scaling: str
    orientation: str
    rows: int
    width: int
    dtype: str
    format: str

    _PATTERN = re.compile(
        rf"({'|'.join(FORMS)}) ({'|'.join(SCALINGS)}) ({'|'.join(ORIENTATIONS)}) "
        rf"r(\d+) w(\d+) ({'|'.join(common.DTYPES)}) ({'|'.join(FORMATS)})"
    )

    @classmethod
    def parse(cls, case: str) -> tuple[str, Shape]:
        """Direction and shape of a case. Raises ValueError if it is spelled otherwise."""
        found = cls._PATTERN.fullmatch(case)
        if not found:
            wanted = "quantize row both r16384 w8192 bf16 e4m3"
            raise ValueError(f"wanted the form {wanted!r}, got {case!r}")
        *words, rows, width, dtype, format = found.groups()
        return "fwd", cls(*words, int(rows), int(width), dtype, format)

    def case(self, direction: str) -> str:
        return (
            f"{self.form} {self.scaling} {self.orientation} "
            f"r{self.rows} w{self.width} {self.dtype} {self.format}"
        )

    @property
    def reads(self) -> int:
        """How often the operands are read."""
        of_columns = self.scaling == "row" and self.orientation != "natural"
        return 2 if self.scaling == "tensor" or of_columns else 1

    def work(self, direction: str) -> float:
        """Bytes: the operands as often as they are read, values and float32 scales."""
        form, count = FORMS[self.form], self.rows * self.width
        read = self.reads * form.operands * count * jnp.dtype(common.DTYPES[self.dtype]).itemsize
        sides = [(self.rows, self.width)] * (self.orientation != "transposed")
        sides += [(self.width, self.rows)] * (self.orientation != "natural")
        written = sum(count + 4 * _scales(self.scaling, *side) for side in sides)
        norm = 4 * (self.rows + self.width) if form.normalises else 0
        return read + form.results * written + norm


def _scales(scaling: str, rows: int, columns: int) -> int:
    """How many scales a matrix [rows, columns] has."""
    high, wide = {
        "tensor": (rows, columns),
        "row": (1, columns),
        "1x128": (1, 128),
        "128x128": (128, 128),
    }[scaling]
    return -(-rows // high) * -(-columns // wide)


SHAPES = tuple(
    Shape(form, scaling, orientation, rows, width, "bf16", "e4m3")
    for form in FORMS
    for rows, width in ((16384, 4096), (16384, 8192), (16384, 16384), (4096, 4096))
    for scaling in FORMS[form].scalings
    for orientation in ORIENTATIONS
)
QUICK = tuple(s for s in SHAPES if (s.rows, s.width, s.orientation) == (16384, 8192, "both"))
PROVIDERS = ("jaxkern", "jaxkern xla", "copy")


def inputs(shape: Shape) -> common.Inputs:
    form = FORMS[shape.form]
    shapes = [(shape.rows, shape.width)] * form.operands + [(shape.width,)] * form.normalises
    dtypes = [common.DTYPES[shape.dtype]] * form.operands + [jnp.float32] * form.normalises
    return common.normal_inputs(shapes, dtypes)


def _jaxkern(implementation: str):
    return lambda shape: functools.partial(
        FORMS[shape.form].function,
        format=FORMATS[shape.format],
        scaling=shape.scaling,
        orientation=shape.orientation,
        implementation=implementation,
    )


def _copy(seconds: float) -> common.Provider:
    """A copy that moves as many bytes as the case; there is nothing to compare it with."""

    def prepare(shape, directions, inputs, expected):
        half = int(shape.work("fwd")) // 2
        sources = common.normal_inputs([(half // 2,)], [jnp.bfloat16]).arguments
        copy = benchmarking.Sampler(jax.jit(jnp.copy), sources, seconds=seconds)
        return common.Prepared(dict.fromkeys(directions, copy))

    return prepare


def main(argv: list[str]) -> int:
    parser = common.options("FP8 quantisation, side by side.", seconds=0.01)
    chosen = parser.parse_args(argv)
    selected = common.select(parser, chosen, SHAPES, QUICK, DIRECTIONS)
    if chosen.list:
        return common.print_list(selected, PROVIDERS)
    makers = {"jaxkern": _jaxkern("cuda"), "jaxkern xla": _jaxkern("xla")}
    known = {name: common.jax_provider(make, chosen.seconds) for name, make in makers.items()}
    known["copy"] = _copy(chosen.seconds)
    providers = common.pick_providers(parser, chosen.providers, known, PROVIDERS)
    run = common.start_run(parser, "quantize.py", argv)
    family = common.Family("quantize", "gbps", inputs, baseline="copy", directions=DIRECTIONS)
    return common.Comparison(family, providers, run, chosen).measure(selected)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
