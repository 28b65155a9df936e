"""Two linears, K -> N -> K, forward and with their gradients, in FP8 and in bfloat16.

    python benchmarks/fp8_linear.py
    python benchmarks/fp8_linear.py --filter '^fwd-bwd' --providers 'xla bf16,jaxkern row'
    python benchmarks/fp8_linear.py --case 'fwd m8192 k4096 n14336 bf16 w-bf16'

A time includes all that a step of training does: the quantisation of every operand, and of `flax
fp8` the scales for the next step. `fwd-bwd` gives y and the gradients of x and both weights.

`jaxkern R` is fp8_matmul by recipe, `jaxkern R hoisted` with weights that quantize_weight has
quantised outside of what is timed, `jaxkern R fast` with fast accumulation of the forward products.
`xla fp8` quantises by tensor, from the values at hand, for XLA to make cuBLASLt's products of it;
`flax fp8` is flax.linen's Fp8DirectDotGeneralOp, with scales of the steps before. These two let
cuBLASLt sum forward with fewer bits, as `fast` does. Unless all their products were compiled to
cuBLASLt's FP8, they fail.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import common
import jax
import jax.numpy as jnp
from flax import linen as nn

import jaxkern
from jaxkern import benchmarking

DIRECTIONS = ("fwd", "fwd-bwd")
RECIPES = ("row", "block", "tensor")
IMPLEMENTATION = "cuda"  # of jaxkern
FP8_CALL = 'custom_call_target="__cublas$lt$matmul$f8"'
STATE = nn.fp8_ops.OVERWRITE_WITH_GRADIENT

# The gradients come of two products, each off by up to 0.06: see FP8_PRODUCT_LIMITS.
ERROR_LIMIT = 0.2


@dataclasses.dataclass(frozen=True)
class Shape:
    """x is [tokens, depth], the weights are [depth, width] and [width, depth]."""

    tokens: int
    depth: int
    width: int
    dtype: str
    weight_dtype: str

    _PATTERN = re.compile(
        r"(fwd|fwd-bwd) m(\d+) k(\d+) n(\d+) (bf16|f16|f32) w-(bf16|f16|f32)",
    )

    @classmethod
    def parse(cls, case: str) -> tuple[str, Shape]:
        """Direction and shape of a case. Raises ValueError if it is spelled otherwise."""
        found = cls._PATTERN.fullmatch(case)
        if not found:
            wanted = "fwd-bwd m16384 k4096 n16384 bf16 w-bf16"
            raise ValueError(f"wanted the form {wanted!r}, got {case!r}")
        direction, *sizes, dtype, weight_dtype = found.groups()
        return direction, cls(*map(int, sizes), dtype, weight_dtype)

    def case(self, direction: str) -> str:
        return (
            f"{direction} m{self.tokens} k{self.depth} n{self.width} "
            f"{self.dtype} w-{self.weight_dtype}"
        )

    def products(self, direction: str) -> int:
        return 2 if direction == "fwd" else 6

    def work(self, direction: str) -> float:
        """Operations of all products."""
        return self.products(direction) * 2 * self.tokens * self.depth * self.width


SHAPES = (
    Shape(16384, 4096, 16384, "bf16", "bf16"),
    Shape(16384, 4096, 16384, "bf16", "f32"),
    Shape(4096, 4096, 16384, "bf16", "bf16"),
)
QUICK = SHAPES[:1]


def inputs(shape: Shape) -> common.Inputs:
    dtype, weight_dtype = common.DTYPES[shape.dtype], common.DTYPES[shape.weight_dtype]
    x, w = (shape.tokens, shape.depth), (shape.depth, shape.width)
    return common.normal_inputs((x, w, w[::-1]), (dtype, *[weight_dtype] * 2), (x, dtype))


# --- Providers ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Linears:
    """What a provider computes: y of `function(x, w1, w2, *more)`.

    `more` makes what else it takes, of (step, dy, x, w1, w2). fwd-bwd differentiates x, the
    weights and, if `has_state`, that: its gradient is the next state.
    """

    function: Callable[..., jax.Array]
    more: Callable[..., tuple] = lambda *_: ()
    has_state: bool = False
    must_call: str = ""  # what XLA must make of every product on a GPU


def fp8_provider(make: Callable[[Shape], Linears], seconds: float) -> common.Provider:
    """A provider of the `Linears` of a shape."""

    def prepare(shape, directions, inputs, expected):
        linears = make(shape)

        def step(cotangent, *arguments):
            count = 4 if linears.has_state else 3
            fixed = arguments[count:]
            y, pullback = jax.vjp(lambda *a: linears.function(*a, *fixed), *arguments[:count])
            return y, *pullback(cotangent)

        calls = [
            (dy, *arguments, *linears.more(jax.jit(step), dy, *arguments))
            for dy, arguments in zip(inputs.cotangents, inputs.arguments, strict=True)
        ]
        functions = {"fwd": lambda dy, *arguments: (linears.function(*arguments),), "fwd-bwd": step}
        samplers, results = {}, {}
        for direction in directions:
            compiled = jax.jit(functions[direction]).lower(*calls[0]).compile()
            if linears.must_call and jax.default_backend() == "gpu":
                check_calls(compiled.as_text(), linears.must_call, shape.products(direction))
            results[direction] = compiled(*calls[0])[:4]  # y, dx, dw1, dw2
            samplers[direction] = benchmarking.Sampler(compiled, calls, seconds=seconds)
        return common.Prepared(
            samplers, common.relative_error(results, expected or results), results
        )

    return prepare


def check_calls(text: str, call: str, wanted: int) -> None:
    """Raises RuntimeError unless a compiled module's text has the call as often as wanted."""
    found = text.count(call)
    if found < wanted:
        raise RuntimeError(f"XLA compiled {found} of {wanted} products to {call}")


def jaxkern_linears(recipe: str, hoisted: bool = False, fast: bool = False) -> Linears:
    """fp8_matmul, with weights that are quantised beforehand or not."""

    def linear(x, w, quantized=None):
        options = {"recipe": recipe, "implementation": IMPLEMENTATION, "fast_accumulation": fast}
        return jaxkern.fp8_matmul(x, w, quantized_weight=quantized, **options)

    def function(x, w1, w2, *quantized):
        first, second = quantized or (None, None)
        return linear(linear(x, w1, first), w2, second)

    def quantize_weights(step, dy, x, *weights):
        quantize = functools.partial(jaxkern.quantize_weight, implementation=IMPLEMENTATION)
        return tuple(quantize(w, recipe) for w in weights)

    return Linears(function, quantize_weights) if hoisted else Linears(function)


def bf16_linears() -> Linears:
    """Plain products in x's dtype, with float32 sums."""
    return Linears(lambda x, w1, w2: (x @ w1.astype(x.dtype)) @ w2.astype(x.dtype))


def xla_linears() -> Linears:
    """Products of FP8 operands, quantised by tensor, times both scales."""
    return Linears(lambda x, w1, w2: xla_dot(xla_dot(x, w1), w2), must_call=FP8_CALL)


def quantize_tensor(x: jax.Array, format: Any) -> tuple[jax.Array, jax.Array]:
    """x in an FP8 format, and its scale."""
    largest = jnp.finfo(format).max.astype(jnp.float32)
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide)) / largest
    return jnp.clip(wide / scale, -largest, largest).astype(format), scale


def quantized_dot(lhs, rhs, contracted, dtype, precision=None) -> jax.Array:
    """The product of two of quantize_tensor's results over an axis of each."""
    dimensions = (tuple((axis,) for axis in contracted), ((), ()))
    options = {"precision": precision, "preferred_element_type": dtype}
    product = jax.lax.dot_general(lhs[0], rhs[0], dimensions, **options)
    return product * (lhs[1] * rhs[1]).astype(dtype)


@jax.custom_vjp
def xla_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [M, K] times w [K, N], and gradients whose operands are FP8 too."""
    return _xla_dot_fwd(x, w)[0]


def _xla_dot_fwd(x, w):
    q, p = (quantize_tensor(a, jnp.float8_e4m3fn) for a in (x, w))
    return quantized_dot(q, p, (1, 0), x.dtype), (q, p, jnp.zeros((), w.dtype))


def _xla_dot_bwd(residuals, dy):
    x, w, like_w = residuals
    q = quantize_tensor(dy, jnp.float8_e5m2)
    multiply = functools.partial(quantized_dot, precision=jax.lax.Precision.HIGHEST)
    return multiply(q, w, (1, 1), dy.dtype), multiply(x, q, (0, 0), like_w.dtype)


xla_dot.defvjp(_xla_dot_fwd, _xla_dot_bwd)


def flax_linears(shape: Shape) -> Linears:
    """flax.linen's dense layers with its FP8 product, whose scales come from earlier steps."""
    dense = functools.partial(
        nn.Dense,
        use_bias=False,
        dtype=common.DTYPES[shape.dtype],
        param_dtype=common.DTYPES[shape.weight_dtype],
        dot_general_cls=nn.Fp8DirectDotGeneralOp,
    )
    model = nn.Sequential([dense(shape.width), dense(shape.depth)])

    def function(x, w1, w2, state):
        params = {f"layers_{i}": {"kernel": w} for i, w in enumerate((w1, w2))}
        return model.apply({"params": params, STATE: state}, x)

    def warm_state(step, dy, x, w1, w2):
        """Scales as they are some steps into a run: at the first one they are all 1."""
        state = jax.jit(lambda x: model.init(jax.random.key(0), x)[STATE])(x)
        for _ in range(3):  # an amax of the first layer's gradient follows from all of the others'
            *_, state = step(dy, x, w1, w2, state)
        return (state,)

    return Linears(function, warm_state, has_state=True, must_call=FP8_CALL)


MAKERS: dict[str, Callable[[Shape], Linears]] = {
    "xla bf16": lambda shape: bf16_linears(),
    **{f"jaxkern {r}": lambda shape, r=r: jaxkern_linears(r) for r in RECIPES},
    **{
        f"jaxkern {r} hoisted": lambda shape, r=r: jaxkern_linears(r, hoisted=True) for r in RECIPES
    },
    **{
        f"jaxkern {r} fast": lambda shape, r=r: jaxkern_linears(r, fast=True)
        for r in ("row", "tensor")
    },
    "xla fp8": lambda shape: xla_linears(),
    "flax fp8": flax_linears,
}
PROVIDERS = tuple(MAKERS)


def main(argv: list[str]) -> int:
    parser = common.options("FP8 linears, forward and with gradients, side by side.")
    chosen = parser.parse_args(argv)
    selected = common.select(parser, chosen, SHAPES, QUICK, DIRECTIONS)
    if chosen.list:
        return common.print_list(selected, PROVIDERS)
    known = {name: fp8_provider(make, chosen.seconds) for name, make in MAKERS.items()}
    providers = common.pick_providers(parser, chosen.providers, known, PROVIDERS)
    run = common.start_run(parser, "fp8_linear.py", argv, ["flax"])
    family = common.Family(
        "fp8_linear",
        "tflops",
        inputs,
        baseline="xla bf16",
        subject="jaxkern row",
        also=[name for name in PROVIDERS if name.startswith("jaxkern") and name != "jaxkern row"],
        directions=DIRECTIONS,
        error_limit=ERROR_LIMIT,
    )
    return common.Comparison(family, providers, run, chosen).measure(selected)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
