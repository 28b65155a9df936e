"""Quantisation beside what XLA makes of it, and beside a copy of as many bytes.

    python benchmarks/quantize.py
    python benchmarks/quantize.py --filter 'row both'
    python benchmarks/quantize.py --case 'quantize row both r8192 w5120 bf16 e4m3'
    python benchmarks/quantize.py --case 'quantize 1x64 natural r8192 w5120 bf16 int4-zero'

Formats of four bits are spelled with the size of a block, and "int4-zero" has zero points.

GB/s count the bytes that must move: the operands read, values and scales written. The operands
count twice where a scale needs more of them than a kernel can keep: all of a tensor, as NVFP4's of
a matrix does too, or whole columns ("row" of a transpose). `copy` copies an array of half the
case's bytes on the device, which moves the same bytes: the ratio to it is the part of a copy's rate
that is reached.
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
# Of four bits: the format of jaxkern.quantize, and sizes of blocks.
FOUR_BIT = {
    "nvfp4": ("nvfp4", (16,)),
    "mxfp4": ("mxfp4", (32,)),
    "int4": ("int4", (32, 64, 128)),
    "int4-zero": ("int4", (32, 64, 128)),
}
SCALINGS = ("tensor", "row", "1x128", "128x128")
BLOCKS = ("1x16", "1x32", "1x64")  # of four bits, beside 1x128
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
        rf"({'|'.join(FORMS)}) ({'|'.join(SCALINGS + BLOCKS)}) ({'|'.join(ORIENTATIONS)}) "
        rf"r(\d+) w(\d+) ({'|'.join(common.DTYPES)}) ({'|'.join([*FORMATS, *FOUR_BIT])})"
    )

    @classmethod
    def parse(cls, case: str) -> tuple[str, Shape]:
        """Direction and shape of a case. Raises ValueError if it is spelled otherwise."""
        if found := cls._PATTERN.fullmatch(case):
            *words, rows, width, dtype, format = found.groups()
            shape = cls(*words, int(rows), int(width), dtype, format)
            if shape.is_known:
                return "fwd", shape
        wanted = "quantize row both r16384 w8192 bf16 e4m3"
        raise ValueError(f"wanted the form {wanted!r}, got {case!r}")

    def case(self, direction: str) -> str:
        return (
            f"{self.form} {self.scaling} {self.orientation} "
            f"r{self.rows} w{self.width} {self.dtype} {self.format}"
        )

    @property
    def block(self) -> int:
        """Of four bits."""
        return int(self.scaling.removeprefix("1x"))

    @property
    def is_known(self) -> bool:
        """Whether the words go together."""
        if self.format not in FOUR_BIT:
            return self.scaling in SCALINGS
        _, blocks = FOUR_BIT[self.format]
        return (
            (self.form, self.orientation) == ("quantize", "natural")
            and self.scaling in [f"1x{block}" for block in blocks]
            and self.width % self.block == 0
        )

    @property
    def options(self) -> dict:
        """Of the form's function."""
        if self.format not in FOUR_BIT:
            return {
                "format": FORMATS[self.format],
                "scaling": self.scaling,
                "orientation": self.orientation,
            }
        name, _ = FOUR_BIT[self.format]
        integers = {"group_size": self.block, "zero_point": self.format == "int4-zero"}
        return {"format": name} | (integers if name == "int4" else {})

    @property
    def reads(self) -> int:
        """How often the operands are read."""
        if self.format in FOUR_BIT:
            return 2 if self.format == "nvfp4" else 1
        of_columns = self.scaling == "row" and self.orientation != "natural"
        return 2 if self.scaling == "tensor" or of_columns else 1

    def work(self, direction: str) -> float:
        """Bytes: the operands as often as they are read, values and scales."""
        form, count = FORMS[self.form], self.rows * self.width
        read = self.reads * form.operands * count * jnp.dtype(common.DTYPES[self.dtype]).itemsize
        if self.format in FOUR_BIT:
            of_block = {"nvfp4": 1, "mxfp4": 1, "int4": 2, "int4-zero": 2.5}[self.format]
            of_matrix = 4 if self.format == "nvfp4" else 0
            return read + count / 2 + count // self.block * of_block + of_matrix
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
SHAPES += tuple(
    Shape("quantize", f"1x{block}", "natural", rows, width, "bf16", format)
    for rows, width in ((8192, 8192), (4096, 14336), (28672, 8192))
    for format, block in (("nvfp4", 16), ("mxfp4", 32), ("int4", 128), ("int4-zero", 128))
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
        FORMS[shape.form].function, **shape.options, implementation=implementation
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
    parser = common.options("Quantisation, side by side.", seconds=0.01)
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
