"""What a function becomes when it is lowered for CUDA, which needs no GPU."""

import math
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


def exchanges(function, *args, **jit_options):
    """What a device takes part in when jit(function)(*args) runs, as {"all-reduce f32 8192": 1}
    for 8192 numbers, and its result."""
    compiled = jax.jit(function, **jit_options).lower(*args).compile()
    instruction = rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\("
    found = Counter(
        f"{name} {dtype} {math.prod(int(size) for size in sizes.split(',') if size)}"
        for arrays, name in re.findall(instruction, compiled.as_text())
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", arrays)
    )
    return found, compiled(*args)


def sum_of(array):
    """The exchange that adds up float32 shares of a sharded array."""
    return f"all-reduce f32 {array.addressable_shards[0].data.size}"


def collectives(function, *args, **jit_options):
    """The names of the collectives in what jit(function)(*args) compiles to, and its result."""
    found, result = exchanges(function, *args, **jit_options)
    return {name.split()[0] for name in found}, result
