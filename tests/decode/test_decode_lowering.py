"""The decode step lowered for CUDA: one kernel a step, the cache in its place."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from decode_model import CONFIGS, model_of, random_arrays
from lowering import attributes, cuda_text, custom_call_lines, custom_calls, types

from jaxkern.decode import KVCache, decode_step, decode_steps, generate, pack_weights
from jaxkern.decode.layout import number_of_blocks

pytestmark = pytest.mark.usefixtures("kernels")

LLAMA = dataclasses.replace(CONFIGS["llama"], head_dim=64)


@functools.cache
def packed(config, weights="bf16"):
    return pack_weights(model_of(config, random_arrays(config)), weights, multiprocessors=3)


def arguments(config, batch, **options):
    cache = KVCache.create(config, batch, 40)
    return packed(config, **options), cache, jnp.zeros(batch, jnp.int32)


def test_call():
    """Operands and results have the shapes of docs/decode.md."""
    c = LLAMA
    line = custom_call_lines(decode_step, *arguments(c, 2))["decode_step"]
    operands, results = types(line)
    n, d, layers = (c.heads + 2 * c.kv_heads) * 64, c.width, c.layers
    keys = f"{layers}x2x{c.kv_heads}x8x2x8x32xbf16"
    values = f"{layers}x2x{c.kv_heads}x2x64x32xbf16"
    cached = ["2xi32", "2xi32", keys, values]
    assert operands[:5] == ["2xi32", *cached]
    assert results[:6] == ["2x0xi32", f"2x{c.vocabulary}xf32", *cached]
    assert operands[5] == results[6] and operands[5].endswith("xi32")
    assert operands[6] == results[7] == "2xi32"
    assert operands[7:] == [
        f"{c.vocabulary}x{d}xbf16",
        f"{2 * layers + 1}x{d}xbf16",
        f"{layers}x{n * d}xbf16",
        f"{layers}x{d * c.heads * 64}xbf16",
        f"{layers}x{2 * c.hidden * d}xbf16",
        f"{layers}x{d * c.hidden}xbf16",
        f"{c.vocabulary * d}xbf16",
        *["0xf32"] * 5,
        "32xf32",
        *["0xbf16"] * 2,
        "0xi32",
        "0xui32",
        "0xf32",
        "0xbf16",
    ]
    assert attributes(line)["multiprocessors"] == "3 : i32"
    assert attributes(line)["format"] == "0 : i32"
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d)", line)
    assert aliases == [(str(i + 1), str(i)) for i in range(1, 7)]


def test_fp8():
    """In words of four, and with the scales of their rows."""
    c = LLAMA
    given = arguments(c, 2, weights="fp8")
    operands, _ = types(custom_call_lines(decode_step, *given)["decode_step"])
    n, d, layers = (c.heads + 2 * c.kv_heads) * 64, c.width, c.layers
    assert operands[9:19] == [
        f"{layers}x{n * d // 4}xui32",
        f"{layers}x{d * c.heads * 64 // 4}xui32",
        f"{layers}x{2 * c.hidden * d // 4}xui32",
        f"{layers}x{d * c.hidden // 4}xui32",
        f"{c.vocabulary * d // 4}xui32",
        f"{layers}x{n}xf32",
        f"{layers}x{d}xf32",
        f"{layers}x{2 * c.hidden}xf32",
        f"{layers}x{d}xf32",
        f"{c.vocabulary}xf32",
    ]


@pytest.mark.parametrize(("weights", "code"), [("nvfp4", 2), ("mxfp4", 3), ("int4", 4)])
def test_four_bit(weights, code):
    """In words, with the scales of blocks among them; a slice of a block is of whole 16 bytes."""
    c = dataclasses.replace(LLAMA, width=128, hidden=384)
    line = custom_call_lines(decode_step, *arguments(c, 2, weights=weights))["decode_step"]
    operands, _ = types(line)
    assert attributes(line)["format"] == f"{code} : i32"
    n, d, layers = (c.heads + 2 * c.kv_heads) * 64, 128, c.layers

    def words(rows, columns, unit=1):
        count = number_of_blocks(rows, 3, 64, unit)
        sizes = [rows // unit // count + (i < rows // unit % count) for i in range(count)]
        return sum(18 * unit * x + 2 * (unit * x % 2) for x in sizes) * columns // 128

    assert operands[9:19] == [
        f"{layers}x{words(n, d)}xui32",
        f"{layers}x{words(d, c.heads * 64)}xui32",
        f"{layers}x{words(2 * c.hidden, d, 2)}xui32",
        f"{layers}x{words(d, c.hidden)}xui32",
        f"{words(c.vocabulary, d)}xui32",
        f"{layers}x{n}xf32",
        f"{layers}x{d}xf32",
        f"{layers}x{2 * c.hidden}xf32",
        f"{layers}x{d}xf32",
        f"{c.vocabulary}xf32",
    ]


@pytest.mark.parametrize(
    ("options", "noise", "top_k", "top_p"),
    [
        ({}, ["0xui32", "0xf32"], 0, "false"),
        ({"top_k": 5, "top_p": 0.5}, ["0xui32", "0xf32"], 0, "false"),  # greedy all the same
        ({"temperature": 0.5}, ["7x2x2xui32", "2xf32"], 0, "false"),
        ({"temperature": 0.5, "top_k": 5}, ["7x2x2xui32", "2xf32"], 5, "false"),
        ({"temperature": 0.5, "top_k": 10**9}, ["7x2x2xui32", "2xf32"], LLAMA.vocabulary, "false"),
        ({"temperature": 0.5, "top_p": 0.5}, ["7x2x2xui32", "2xf32"], 0, "true"),
    ],
)
def test_steps(options, noise, top_k, top_p):
    """All steps are one call, which draws the tokens."""

    def run(*arguments):
        key = jax.random.key(0)
        return decode_steps(*arguments, 7, key=key, stop_tokens=(1, 2), **options)

    calls = custom_calls(run, *arguments(LLAMA, 2))
    assert calls["decode_step"] == 1
    line = custom_call_lines(run, *arguments(LLAMA, 2))["decode_step"]
    operands, results = types(line)
    assert operands[-4:-1] == ["2xi32", *noise]
    assert results[0] == "2x7xi32"
    assert attributes(line)["top_k"] == f"{top_k} : i32"
    assert attributes(line)["top_p"] == top_p


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_what_models_have_besides(name):
    config = dataclasses.replace(CONFIGS[name], head_dim=128)
    operands, _ = types(custom_call_lines(decode_step, *arguments(config, 1))["decode_step"])
    n = (config.heads + 2 * config.kv_heads) * 128
    assert operands[-6] == (f"{config.layers}x{n}xbf16" if config.qkv_bias else "0xbf16")
    assert operands[-5] == (f"{config.layers}x2x128xbf16" if config.qk_norm else "0xbf16")


def test_debug():
    """Places for what phases hand on, of a power of two of layers, which the kernel fills."""
    config = dataclasses.replace(CONFIGS["qwen3"], head_dim=64)
    run = functools.partial(decode_step, debug=True)
    line = custom_call_lines(run, *arguments(config, 2))["decode_step"]
    operands, results = types(line)
    values = (2 * config.heads + 2 * config.kv_heads) * 64 + 2 * config.width + config.hidden
    assert operands[-1] == results[-1] == f"{4 * 2 * values}xbf16"
    assert "output_tuple_indices = [8], operand_index = 25" in line
    *_, phases = jax.eval_shape(
        functools.partial(run, implementation="cuda"), *arguments(config, 2)
    )
    *_, wanted = jax.eval_shape(functools.partial(run, implementation="xla"), *arguments(config, 2))
    assert phases == wanted


def test_generate():
    """64 steps are one call, in a loop where there are more, and what is left is another."""
    prompt = jnp.zeros((1, 5), jnp.int32)
    for new, count in ((8, 1), (64, 1), (70, 2), (100, 2)):
        run = functools.partial(generate, max_new_tokens=new)
        assert custom_calls(run, packed(LLAMA), prompt)["decode_step"] == count


def test_named():
    """By name there is no reference beside the kernel."""
    named = functools.partial(decode_step, implementation="cuda")
    assert "case" not in cuda_text(named, *arguments(LLAMA, 1))


def test_default():
    """The kernel on GPUs, the reference elsewhere."""
    assert custom_calls(decode_step, *arguments(LLAMA, 1)) == {"decode_step": 1}
    assert "custom_call" not in jax.jit(decode_step).lower(*arguments(LLAMA, 1)).as_text()


@pytest.mark.parametrize(
    ("changes", "batch", "reason"),
    [
        ({"head_dim": 32}, 1, "head_dim is 32, supported are 64 and 128"),
        ({}, 17, "there are 17 sequences, supported are up to 16"),
        ({"heads": 9, "kv_heads": 1}, 1, "9 heads share 1 kv_heads"),
        ({"heads": 16, "kv_heads": 16}, 2, "there are 32 kv_heads of all sequences"),
        ({"width": 416}, 1, "width is 416, supported is up to 384"),
    ],
)
def test_what_the_kernel_does_not_take(changes, batch, reason):
    given = arguments(dataclasses.replace(LLAMA, **changes), batch)
    with pytest.raises(NotImplementedError, match=f"'cuda': {reason}"):
        jax.eval_shape(functools.partial(decode_step, implementation="cuda"), *given)
    assert custom_calls(decode_step, *given) == {}
