"""What a function becomes when it is lowered for CUDA, which needs no GPU."""

import re
from collections import Counter

import jax


def cuda_text(function, *args):
    """StableHLO of jit(function)(*args) for CUDA."""
    return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def custom_calls(function, *args):
    """How often each kernel is called: {"attention_fwd": 1, ...}. A loop body counts once."""
    bodies = {}
    for chunk in re.split(r"(?=func\.func )", cuda_text(function, *args)):
        if name := re.match(r"func\.func (?:public |private )?@([\w.]+)", chunk):
            bodies[name[1]] = chunk

    def count(name):
        total = Counter(re.findall(r"custom_call @jaxkern\.(\w+)", bodies[name]))
        for callee in re.findall(r"\bcall @([\w.]+)", bodies[name]):
            total.update(count(callee))
        return total

    return dict(count("main"))


def custom_call_lines(function, *args):
    """The lines of the calls, by kernel."""
    lines = re.findall(r".*custom_call @jaxkern\.(\w+)(.*)", cuda_text(function, *args))
    return dict(lines)


def types(line):
    """Operand and result types of a custom call, as ["2x130x4x64xbf16", ...]."""
    operands, results = re.search(r": \(([^)]*)\) -> \(?([^)]*)", line).groups()
    return re.findall(r"tensor<(\S+)>", operands), re.findall(r"tensor<(\S+)>", results)


def attributes(line):
    """Attributes of a custom call, as {"scale": "2.500000e-01 : f32", ...}."""
    return dict(
        re.findall(r"(\w+) = ([^,}]+)", line.split("mhlo.backend_config = {")[1].split("}")[0])
    )


COLLECTIVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "all-reduce")


def collectives(function, *args, **jit_options):
    """The collectives in what jit(function)(*args) compiles to, and its result."""
    compiled = jax.jit(function, **jit_options).lower(*args).compile()
    text = compiled.as_text()
    found = {name for name in COLLECTIVES if re.search(rf"{name}(-start)?\(", text)}
    return found, compiled(*args)
