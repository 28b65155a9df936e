"""Small calls of every kernel, for compute-sanitizer (the step `sanitize` of benchmarks/gpu.py).

Operands and expected values are computed on the CPU, so that little but our kernels runs under the
tool. Lengths that no tile divides are what finds stray accesses.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_model import CONFIGS, model_of, random_arrays
from four_bit import FORMATS
from fp8 import E4M3, assert_same_fp8, numpy_quantize, numpy_scaled_matmul, random_operands

import jaxkern
from jaxkern import (
    pack_weight,
    quantize,
    quantize_rms_norm,
    quantize_swiglu,
    quantize_swiglu_grad,
    quantized_matmul,
    scaled_matmul,
)
from jaxkern.decode import KVCache, decode_step, decode_steps, pack_weights
from jaxkern.testing import relative_error

pytestmark = pytest.mark.gpu

ATTENTION = {
    "head dim 64, causal, grouped": ((1, 130, 200, 2, 1, 64), jnp.bfloat16, True),
    "head dim 64, one query": ((2, 1, 65, 1, 1, 64), jnp.float16, False),
    "head dim 128, several tiles": ((1, 257, 129, 1, 1, 128), jnp.bfloat16, False),
    "head dim 128, causal, whole tiles": ((1, 256, 256, 2, 2, 128), jnp.float16, True),
    "head dim 128, causal, more queries": ((1, 200, 70, 2, 1, 128), jnp.bfloat16, True),
    "head dim 128, many queries": ((1, 1030, 70, 1, 1, 128), jnp.bfloat16, False),
    "head dim 128, causal, many queries": ((1, 2050, 130, 1, 1, 128), jnp.bfloat16, True),
}
IDS = np.arange(200, dtype=np.int32)[None] // 70, np.arange(130, dtype=np.int32)[None] // 45
VARIANTS = {
    "window": ((1, 130, 200, 2, 1, 64), {"local_window_size": (30, 70)}),
    "causal window": (
        (1, 200, 200, 2, 2, 128),
        {"local_window_size": (65, 0), "is_causal": True, "deterministic": True},
    ),
    "bottom right": ((1, 200, 70, 1, 1, 64), {"is_causal": True, "alignment": "bottom_right"}),
    "lengths": (
        (3, 130, 140, 2, 1, 64),
        {
            "query_seq_lengths": np.array([0, 65, 130], np.int32),
            "key_value_seq_lengths": np.array([140, 1, 0], np.int32),
        },
    ),
    "segments": ((1, 200, 130, 2, 1, 128), {"segment_ids": IDS}),
    "soft cap": ((1, 100, 130, 1, 1, 64), {"logits_soft_cap": 2.0}),
    "head dim 256": ((1, 130, 70, 2, 1, 256), {}),
    "head dim 256, one tile": ((1, 100, 170, 1, 1, 256), {}),
    "head dim 256, causal": ((1, 200, 200, 1, 1, 256), {"is_causal": True}),
    "head dim 256, deterministic": ((1, 200, 200, 1, 1, 256), {"deterministic": True}),
    "deterministic": ((2, 130, 257, 2, 1, 128), {"deterministic": True}),
    "everything": (
        (1, 200, 130, 2, 1, 256),
        {
            "is_causal": True,
            "local_window_size": (90, 0),
            "alignment": "bottom_right",
            "query_seq_lengths": np.array([190], np.int32),
            "key_value_seq_lengths": np.array([129], np.int32),
            "segment_ids": IDS,
            "logits_soft_cap": 2.0,
            "deterministic": True,
        },
    ),
}
RMS_NORM = {
    "odd width": ((5, 33), jnp.bfloat16),
    "one element": ((1, 1), jnp.float32),
    "many rows": ((300, 136), jnp.float16),
    "wide": ((3, 5000), jnp.float32),
}

QUANTIZE = {
    "tensor": ((130, 200), jnp.bfloat16),
    "row": ((70, 1000), jnp.float32),
    "1x128": ((257, 130), jnp.bfloat16),
    "128x128": ((129, 131), jnp.float16),
}
FUSED = {name: case for name, case in QUANTIZE.items() if name != "tensor"}
SCALED_MATMUL = {  # M, N, K, both scalings
    "few rows": (5, 200, 400, "row", "tensor"),
    "few rows, blocks": (20, 136, 1040, "1x128", "128x128"),
    "few rows, halves of K": (100, 264, 2048, "row", "row"),
    "rows": (300, 264, 144, "row", "row"),
    "blocks": (130, 264, 400, "1x128", "128x128"),
    "blocks of both": (257, 136, 300, "1x128", "1x128"),
}

DECODE = {  # model, weights, lengths, and how tokens are drawn
    "one sequence": ("llama", "bf16", (30,), {}),
    "sequences, FP8": ("qwen2", "fp8", (0, 31, 40), {"temperature": 1.0}),
    "eight sequences": (
        "qwen3",
        "bf16",
        (0, 1, 31, 32, 33, 300, 50, 7),
        {"temperature": 1.0, "top_k": 20, "top_p": 0.9},
    ),
    "sixteen sequences": ("llama", "bf16", tuple(range(16)), {"temperature": 1.0, "top_p": 0.9}),
}


def normal(seed, shapes, dtype):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def outputs_and_gradients(fn, operands, cotangents):
    outputs, pullback = jax.vjp(fn, *operands)
    return outputs, pullback(cotangents)


def check(fn, operands, cotangents):
    """`fn(implementation)` on the GPU by the kernel, on the CPU by the reference."""
    results = []
    for platform, implementation in (("cuda", "cuda"), ("cpu", "xla")):
        arrays = jax.device_put((operands, cotangents), jax.devices(platform)[0])
        run = jax.jit(lambda o, c, i=implementation: outputs_and_gradients(fn(i), o, c))
        results.append([np.asarray(x, np.float32) for x in jax.tree.leaves(run(*arrays))])
    for got, wanted in zip(*results, strict=True):
        huge = np.abs(wanted) > 1e30  # the log-sum-exp of a query without a key
        np.testing.assert_array_equal(got[huge], wanted[huge])
        got, wanted = got[~huge], wanted[~huge]
        assert np.linalg.norm(got - wanted) <= 2e-2 * np.linalg.norm(wanted) + 1e-3


def check_attention(shape, dtype, options):
    batch, queries, keys, heads, kv_heads, width = shape
    query, key = (batch, queries, heads, width), (batch, keys, kv_heads, width)
    *operands, dout = normal(0, (query, key, key, query), dtype)
    [dlse] = normal(1, [(batch, queries, heads)], jnp.float32)

    def fn(implementation):
        return functools.partial(
            jaxkern.dot_product_attention,
            **options,
            implementation=implementation,
            return_residual=True,
        )

    check(fn, operands, (dout, dlse))


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case):
    shape, dtype, causal = ATTENTION[case]
    check_attention(shape, dtype, {"is_causal": causal})


@pytest.mark.parametrize("case", VARIANTS)
def test_attention_variant(case):
    shape, options = VARIANTS[case]
    check_attention(shape, jnp.bfloat16, options)


@pytest.mark.parametrize("case", RMS_NORM)
def test_rms_norm(case):
    (rows, width), dtype = RMS_NORM[case]
    x, dy = normal(0, [(rows, width)] * 2, dtype)
    [scale] = normal(1, [(width,)], dtype)

    def fn(implementation):
        return lambda x, scale: jaxkern.rms_norm(x, scale, implementation=implementation)

    check(fn, (x, scale), dy)


@pytest.mark.parametrize("scaling", QUANTIZE)
def test_quantize(scaling):
    shape, dtype = QUANTIZE[scaling]
    [x] = normal(0, [shape], dtype)
    options = {"scaling": scaling, "orientation": "both", "implementation": "cuda"}
    got = jax.jit(functools.partial(quantize, **options))(x)
    for array, matrix in zip(got, (x, x.T), strict=True):
        values, scale = numpy_quantize(matrix, E4M3, scaling)
        np.testing.assert_array_equal(array.scale, scale)
        assert_same_fp8(array.values, values)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_four_bit(name, dtype):
    [x] = normal(0, [(2, 37, 192)], dtype)
    leaves = []
    for platform, implementation in (("cuda", "cuda"), ("cpu", "xla")):
        options = {"format": name.split()[0], **FORMATS[name], "implementation": implementation}
        run = jax.jit(functools.partial(quantize, **options))
        got = run(jax.device_put(x, jax.devices(platform)[0]))
        leaves.append([np.float32(a) for a in jax.tree.leaves(got)])
    for got, wanted in zip(*leaves, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("orientation", ["natural", "both"])
@pytest.mark.parametrize("scaling", FUSED)
def test_fused_quantizers(scaling, orientation):
    """Of gates at which sigmoids are 1: the products are those of NumPy."""
    shape, dtype = FUSED[scaling]
    up, dh = normal(0, [shape] * 2, dtype)
    gate = np.full(shape, 32, dtype)
    options = {"scaling": scaling, "orientation": orientation, "implementation": "cuda"}
    h = jax.jit(functools.partial(quantize_swiglu, **options))(gate, up)
    grads = jax.jit(functools.partial(quantize_swiglu_grad, **options))(gate, up, dh)
    for arrays, x in zip((h, *grads), (gate * up, dh * up, dh * gate), strict=True):
        found = arrays if orientation == "both" else [arrays]
        for array, matrix in zip(found, (x, x.T), strict=False):
            values, scale = numpy_quantize(matrix, E4M3, scaling)
            np.testing.assert_array_equal(array.scale, scale)
            assert_same_fp8(array.values, values)


@pytest.mark.parametrize("orientation", ["natural", "both"])
@pytest.mark.parametrize("scaling", FUSED)
def test_quantize_rms_norm(scaling, orientation):
    shape, dtype = FUSED[scaling]
    [x], [scale] = normal(0, [shape], dtype), normal(1, [shape[1:]], np.float32)
    options = {"scaling": scaling, "orientation": orientation, "implementation": "cuda"}
    arrays, rstd = jax.jit(functools.partial(quantize_rms_norm, **options))(x, scale)
    z = (x.astype(np.float32) * np.asarray(rstd)[:, None] * scale).astype(dtype)
    found = arrays if orientation == "both" else [arrays]
    for array, matrix in zip(found, (z, z.T), strict=False):
        values, scale = numpy_quantize(matrix, E4M3, scaling)
        np.testing.assert_array_equal(array.scale, scale)
        assert_same_fp8(array.values, values)


@pytest.mark.parametrize("case", SCALED_MATMUL)
def test_scaled_matmul(case):
    m, n, k, *scalings = SCALED_MATMUL[case]
    operands = random_operands(0, m, n, k, *scalings, formats=(E4M3, E4M3))
    exact, terms = numpy_scaled_matmul(*operands)
    out = jax.jit(functools.partial(scaled_matmul, implementation="cuda"))(*operands)
    assert (np.abs(np.asarray(out, np.float64) - exact) <= 1e-3 * terms).all()


@pytest.mark.parametrize("rows", [5, 20, 70, 140])
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_matmul(name, rows):
    [x], [w] = normal(0, [(rows, 384)], jnp.bfloat16), normal(1, [(136, 384)], np.float32)
    with jax.default_device(jax.devices("cpu")[0]):
        quantized = quantize(jnp.asarray(w), name.split()[0], **FORMATS[name])
        packed, exact = pack_weight(quantized), np.float64(quantized.dequantize())
    packed = jax.device_put(packed, jax.devices("cuda")[0])
    out = jax.jit(functools.partial(quantized_matmul, implementation="cuda"))(x, packed)
    assert relative_error(out, np.float64(x) @ exact.T) < 5e-3


@pytest.mark.parametrize("rows", [5, 140, 270])
@pytest.mark.parametrize("name", FORMATS)
def test_gradient_of_quantized_matmul(name, rows):
    [x], [w] = normal(0, [(rows, 320)], jnp.bfloat16), normal(1, [(136, 320)], np.float32)
    [dy] = normal(2, [(rows, 136)], jnp.bfloat16)
    with jax.default_device(jax.devices("cpu")[0]):
        quantized = quantize(jnp.asarray(w), name.split()[0], **FORMATS[name])
        packed, exact = pack_weight(quantized), np.float64(quantized.dequantize())
    packed = jax.device_put(packed, jax.devices("cuda")[0])

    @jax.jit
    def gradient(x, packed, dy):
        run = functools.partial(quantized_matmul, w=packed, implementation="cuda")
        return jax.vjp(run, x)[1](dy)[0]

    assert relative_error(gradient(x, packed, dy), np.float64(dy) @ exact) < 5e-3


@pytest.mark.parametrize("rows", [3, 390])
@pytest.mark.parametrize("name", [*FORMATS, "int4 of 128"])
def test_quantized_matmul_fp8(name, rows):
    """Few rows, and so many that the weight is expanded: they fill no tile; an odd number of
    panels."""
    [x], [w] = normal(0, [(rows, 384)], jnp.bfloat16), normal(1, [(136, 384)], np.float32)
    run = functools.partial(quantized_matmul, activation_format="fp8")
    with jax.default_device(jax.devices("cpu")[0]):
        x = jnp.asarray(x)
        w = quantize(jnp.asarray(w), name.split()[0], **FORMATS.get(name, {}))
        packed, wanted = pack_weight(w), run(x, w, implementation="xla")
    x, packed = jax.device_put((x, packed), jax.devices("cuda")[0])
    out = jax.jit(functools.partial(run, implementation="cuda"))(x, packed)
    assert relative_error(out, wanted) < 5e-3


@pytest.mark.parametrize("case", DECODE)
def test_decode(case):
    name, weights, lengths, options = DECODE[case]
    config = dataclasses.replace(CONFIGS[name], head_dim=64, context=352)
    gpu, cpu = jax.devices("cuda")[0], jax.devices("cpu")[0]
    with jax.default_device(cpu):
        model = model_of(config, random_arrays(config))
        packed = pack_weights(model, weights, multiprocessors=gpu.core_count)
        cache = KVCache.create(config, len(lengths), 352)
        cache = dataclasses.replace(cache, lengths=jnp.array(lengths, jnp.int32))
        tokens = np.arange(len(lengths), dtype=np.int32)
        wanted, _ = jax.jit(decode_step)(packed, cache, tokens)
    packed, cache = jax.device_put((packed, cache), gpu)
    got, cache = decode_step(packed, cache, tokens, implementation="cuda")
    assert relative_error(got, wanted) < 0.012
    options = {"key": jax.random.key(0), "implementation": "cuda", **options}
    drawn, _, cache = decode_steps(packed, cache, tokens, 4, **options)
    assert ((drawn >= 0) & (drawn < config.vocabulary)).all()
    assert cache.lengths.tolist() == [length + 5 for length in lengths]
