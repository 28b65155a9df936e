"""What the ops become for CUDA, seen from a machine without a GPU: the calls of the kernels."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import attributes, cuda_text, custom_call_lines, custom_calls, types

import jaxkern
from jaxkern import _ffi
from jaxkern.testing import random_normal

pytestmark = pytest.mark.usefixtures("kernels")

B, T, S, N, K, H = 2, 130, 70, 4, 2, 64


def attention_gradient(query, key, value, **options):
    def loss(*operands):
        out, lse = jaxkern.dot_product_attention(*operands, return_residual=True, **options)
        return out.astype(jnp.float32).sum() + lse.sum()

    return jax.value_and_grad(loss, (0, 1, 2))(query, key, value)


def norm_gradient(x, scale, **options):
    def loss(*operands):
        return jaxkern.rms_norm(*operands, **options).astype(jnp.float32).sum()

    return jax.value_and_grad(loss, (0, 1))(x, scale)


def operands(dtype="bfloat16", width=H):
    return random_normal(1, (B, T, N, width), (B, S, K, width), (B, S, K, width), dtype=dtype)


UNBOUNDED = f"{2**31 - 1} : i32"
PLAIN = {
    "scale": "2.500000e-01 : f32",
    "soft_cap": "0.000000e+00 : f32",
    "left": UNBOUNDED,
    "right": UNBOUNDED,
    "bottom_right": "false",
    "has_lengths": "false",
    "has_segments": "false",
}
LENGTHS = [f"{B}xi32"] * 2
SEGMENTS = [f"{B}x{T}xi32", f"{B}x{S}xi32"]
IDS = np.zeros((B, T), np.int32), np.zeros((B, S), np.int32)
ENDS = np.array([3, 60], np.uint8)
CALLS = {  # options, attributes, operands that follow
    "plain": ({}, {}, []),
    "causal": ({"is_causal": True}, {"right": "0 : i32"}, []),
    "window": ({"local_window_size": (5, 3)}, {"left": "5 : i32", "right": "3 : i32"}, []),
    "window of an int": ({"local_window_size": 9}, {"left": "9 : i32", "right": "9 : i32"}, []),
    "causal window": (
        {"local_window_size": 5, "is_causal": True},
        {"left": "5 : i32", "right": "0 : i32"},
        [],
    ),
    "bottom right": (
        {"is_causal": True, "alignment": "bottom_right"},
        {"right": "0 : i32", "bottom_right": "true"},
        [],
    ),
    "soft cap": ({"logits_soft_cap": 50}, {"soft_cap": "5.000000e+01 : f32"}, []),
    "query lengths": ({"query_seq_lengths": ENDS}, {"has_lengths": "true"}, LENGTHS),
    "key lengths": ({"key_value_seq_lengths": ENDS}, {"has_lengths": "true"}, LENGTHS),
    "segments": ({"segment_ids": IDS}, {"has_segments": "true"}, SEGMENTS),
    "everything": (
        {
            "is_causal": True,
            "local_window_size": (5, 3),
            "alignment": "bottom_right",
            "logits_soft_cap": 0.5,
            "query_seq_lengths": ENDS,
            "key_value_seq_lengths": ENDS,
            "segment_ids": IDS,
        },
        {
            "left": "5 : i32",
            "right": "0 : i32",
            "bottom_right": "true",
            "soft_cap": "5.000000e-01 : f32",
            "has_lengths": "true",
            "has_segments": "true",
        },
        LENGTHS + SEGMENTS,
    ),
}


def check_calls(arrays, name, options, changes, masks):
    """The calls of both kernels: attributes, and types of operands and results."""
    lines = custom_call_lines(functools.partial(attention_gradient, scale=0.25, **options), *arrays)
    assert set(lines) == {"attention_fwd", "attention_bwd"}
    deterministic = str(options.get("deterministic", False)).lower()
    for line in lines.values():
        assert attributes(line) == PLAIN | changes | {"deterministic": deterministic}
    assert not any("has_side_effect" in line for line in lines.values())
    width = arrays[0].shape[-1]
    query, key = f"{B}x{T}x{N}x{width}x{name}", f"{B}x{S}x{K}x{width}x{name}"
    lse = f"{B}x{N}x{T}xf32"
    granule = 4 + 2 * 64  # where the keys of 64 rows lie, and of each of them
    workspace = f"{4 + granule * B * 3}xi32"  # T is 3 tiles of 64
    assert types(lines["attention_fwd"]) == ([query, key, key, *masks], [query, lse, workspace])
    padded = f"{B}x{N}x256"  # T in whole tiles of 128 or 80
    workspace = f"{B * K * width + granule * B * 2 + B * N * 32}xi32"  # S is 2 tiles of 64
    assert types(lines["attention_bwd"]) == (
        [query, key, key, query, lse, query, lse, *masks],
        [query, key, key, *[f"{padded}xf32"] * 2, f"{padded}x{width}xf32", workspace],
    )


@pytest.mark.parametrize("t, s", [(1, 1), (64, 65), (176, 49), (177, 1000), (2048, 192)])
def test_workspaces_are_as_large_as_the_kernels_want(t, s):
    wanted = pytest.importorskip("jaxkern._C").attention_workspaces
    arrays = random_normal(1, (3, t, 4, 64), (3, s, 2, 64), (3, s, 2, 64), dtype="bfloat16")
    lines = custom_call_lines(attention_gradient, *arrays)
    found = [types(lines[name])[1][-1] for name in ("attention_fwd", "attention_bwd")]
    assert found == [f"{words}xi32" for words in wanted(3, t, s, 4, 2, 64)]


@pytest.mark.parametrize("case", CALLS)
def test_attention_calls(case):
    check_calls(operands(), "bf16", *CALLS[case])


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "bf16"), ("float16", "f16")])
def test_attention_calls_of_each_type(width, dtype, name):
    check_calls(operands(dtype, width), name, {"deterministic": True}, {}, [])


@pytest.mark.parametrize(
    "options",
    [
        {"local_window_size": (T - 1, S - 1)},
        {"local_window_size": 2**40},
        {"local_window_size": (S - 1, T - 1), "alignment": "bottom_right"},
        {"alignment": "bottom_right"},
        {"segment_ids": None, "logits_soft_cap": None, "query_seq_lengths": None},
    ],
    ids=["window", "huge window", "bottom right window", "bottom right", "None"],
)
def test_options_that_change_nothing_are_dropped(options):
    check_calls(operands(), "bf16", options, {}, [])


@pytest.mark.parametrize(
    ("window", "alignment", "changes"),
    [
        ((T - 2, S - 1), "top_left", {"left": f"{T - 2} : i32"}),
        ((T - 1, S - 2), "top_left", {"right": f"{S - 2} : i32"}),
        ((S - 2, T - 1), "bottom_right", {"left": f"{S - 2} : i32", "bottom_right": "true"}),
        ((S - 1, T - 2), "bottom_right", {"right": f"{T - 2} : i32", "bottom_right": "true"}),
    ],
)
def test_a_window_that_leaves_out_one_pair_is_kept(window, alignment, changes):
    options = {"local_window_size": window, "alignment": alignment}
    check_calls(operands(), "bf16", options, changes, [])


def test_alignment_of_equal_lengths_is_dropped():
    """Unless each sequence has a length of its own."""
    square = random_normal(1, (B, T, N, H), (B, T, K, H), (B, T, K, H), dtype="bfloat16")

    def bottom_right(**options):
        attend = functools.partial(
            jaxkern.dot_product_attention, is_causal=True, alignment="bottom_right", **options
        )
        return attributes(custom_call_lines(attend, *square)["attention_fwd"])["bottom_right"]

    assert bottom_right() == "false"
    assert bottom_right(key_value_seq_lengths=ENDS) == "true"


def test_lengths_and_ids_of_other_dtypes_become_int32():
    lengths = np.array([-5, 2**31 - 1], np.int32)
    ids = tuple(np.full(x.shape, 2**32 - 1, np.uint32) for x in IDS)
    line = custom_call_lines(
        functools.partial(
            jaxkern.dot_product_attention, query_seq_lengths=lengths, segment_ids=ids
        ),
        *operands(),
    )["attention_fwd"]
    assert types(line)[0][3:] == LENGTHS + SEGMENTS


@pytest.mark.parametrize("case", CALLS)
def test_no_tensor_has_the_size_of_the_logits(case):
    """Neither in the forward nor in the backward pass."""
    options, _, _ = CALLS[case]
    text = cuda_text(functools.partial(attention_gradient, **options), *operands())
    shapes = {tuple(map(int, dims.split("x"))) for dims in re.findall(r"tensor<([\dx]+)x\w", text)}
    assert (B, T, N, H) in shapes
    assert not [shape for shape in shapes if {T, S} <= set(shape)]
    plain = functools.partial(attention_gradient, implementation="xla", **options)
    assert f"{T}x{S}x" in cuda_text(plain, *operands())  # as they would be found


@pytest.mark.parametrize(
    ("scale", "text"),
    [(None, "1.250000e-01"), (1, "1.000000e+00"), (np.float32(2), "2.000000e+00")],
)
def test_scale_attribute(scale, text):
    """One type, whatever number the caller gave: attributes are compared with ==."""
    attend = functools.partial(jaxkern.dot_product_attention, scale=scale)
    line = custom_call_lines(attend, *operands())["attention_fwd"]
    assert attributes(line)["scale"] == f"{text} : f32"


@pytest.mark.parametrize(("dtype", "name"), [("float32", "f32"), ("bfloat16", "bf16")])
@pytest.mark.parametrize(
    ("scale_dtype", "scale_name"),
    [("float32", "f32"), ("bfloat16", None), ("float16", "f32")],
)
def test_norm_calls(dtype, name, scale_dtype, scale_name):
    """A scale that is neither float32 nor of x's dtype is widened."""
    if scale_name is None:
        scale_name = "bf16" if dtype == "bfloat16" else "f32"
    x, scale = random_normal(1, (3, 5, 33), (33,), dtype=dtype)
    lines = custom_call_lines(
        functools.partial(norm_gradient, epsilon=0.5), x, scale.astype(scale_dtype)
    )
    assert set(lines) == {"rms_norm_fwd", "rms_norm_bwd"}
    assert "mhlo.backend_config = {epsilon = 5.000000e-01 : f32}" in lines["rms_norm_fwd"]
    assert "mhlo.backend_config = {}" in lines["rms_norm_bwd"]
    rows, scale = f"15x33x{name}", f"33x{scale_name}"
    assert types(lines["rms_norm_fwd"]) == ([rows, scale], [rows, "15xf32"])
    assert types(lines["rms_norm_bwd"]) == (
        [rows, scale, "15xf32", rows],
        [rows, "33xf32", "256x33xf32"],
    )


@pytest.mark.parametrize("shape", [(33,), (1, 1), (2, 3, 4, 5)])
def test_norm_of_any_rank(shape):
    lines = custom_call_lines(
        jaxkern.rms_norm, *random_normal(1, shape, shape[-1:], dtype="float32")
    )
    rows = int(np.prod(shape[:-1], dtype=int))
    assert types(lines["rms_norm_fwd"])[0][0] == f"{rows}x{shape[-1]}xf32"


def test_vmap_folds_into_the_batch():
    arrays = random_normal(1, (3, B, T, N, H), (B, S, K, H), (3, B, S, K, H), dtype="bfloat16")
    attend = jax.vmap(jaxkern.dot_product_attention, (0, None, 0))
    line = custom_call_lines(attend, *arrays)["attention_fwd"]
    key = f"{3 * B}x{S}x{K}x{H}xbf16"
    assert types(line)[0] == [f"{3 * B}x{T}x{N}x{H}xbf16", key, key]


def test_vmap_of_masks_folds_into_the_batch():
    """Whichever of the operands have the mapped axis."""
    query, key, value = operands()
    lengths, segments = np.zeros((3, B), np.int32), np.zeros((3, B, S), np.int32)

    def attend(query, lengths, key_ids):
        return attention_gradient(
            query, key, value, key_value_seq_lengths=lengths, segment_ids=(IDS[0], key_ids)
        )

    ids = [f"{3 * B}x{T}xi32", f"{3 * B}x{S}xi32"]
    for axes, args in (
        ((None, 0, None), (query, lengths, IDS[1])),
        ((0, None, 0), (jnp.stack([query] * 3), lengths[0], segments)),
    ):
        lines = custom_call_lines(jax.vmap(attend, axes), *args)
        assert types(lines["attention_fwd"])[0][3:] == [f"{3 * B}xi32"] * 2 + ids
        assert types(lines["attention_bwd"])[0][7:] == [f"{3 * B}xi32"] * 2 + ids


def test_vmap_of_the_gradient_of_norm_is_one_call():
    """Of all rows, where the examples share the scale."""
    x, scale = random_normal(1, (4, 3, 33), (33,), dtype="float32")
    lines = custom_call_lines(jax.vmap(norm_gradient, (0, None)), x, scale)
    assert set(lines) == {"rms_norm_fwd", "rms_norm_bwd"}
    assert all(types(line)[0][:2] == ["12x33xf32", "33xf32"] for line in lines.values())


def test_reference_multiplies_in_float32():
    """Not in the TF32 that a GPU takes by default."""
    text = cuda_text(attention_gradient, *operands("float32"))
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(products) >= 6
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_shards_in_shard_map():
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), auto, devices=jax.devices("cpu"))
    spec = jax.P("data", None, "model")
    attend = jax.shard_map(jaxkern.dot_product_attention, mesh=mesh, in_specs=spec, out_specs=spec)
    arrays = random_normal(1, (4, T, 8, H), (4, S, 4, H), (4, S, 4, H), dtype="bfloat16")
    query, key, _ = types(custom_call_lines(attend, *arrays)["attention_fwd"])[0]
    assert (query, key) == (f"2x{T}x2x{H}xbf16", f"2x{S}x1x{H}xbf16")


@pytest.mark.parametrize(
    "options",
    [
        {"implementation": "xla"},
        {"scale": -1.0},
        {"bias": jnp.zeros((1, 1, 1, 1))},
        {"mask": jnp.ones((1, 1, 1, 1), bool)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_calls_that_the_kernel_does_not_support_go_to_the_reference(options):
    attend = functools.partial(jaxkern.dot_product_attention, **options)
    assert custom_calls(attend, *operands()) == {}


@pytest.mark.parametrize("implementation", [None, "cuda", ("cuda",), ("cuda", "xla")])
def test_implementations_that_call_the_kernel(implementation):
    x, scale = random_normal(1, (3, 33), (33,), dtype="float32")
    norm = functools.partial(jaxkern.rms_norm, implementation=implementation)
    assert custom_calls(norm, x, scale) == {"rms_norm_fwd": 1}


def test_lowering_for_cpu_has_no_custom_call():
    arrays = operands()
    assert "jaxkern." not in jax.jit(attention_gradient).lower(*arrays).as_text()
    assert "jaxkern." in cuda_text(attention_gradient, *arrays)


def test_without_the_kernels_lowering_for_cuda_is_the_reference(monkeypatch):
    monkeypatch.setattr(_ffi, "missing", lambda: "not built")
    x, scale = random_normal(1, (3, 33), (33,), dtype="float32")
    assert custom_calls(jaxkern.rms_norm, x, scale) == {}


def test_operands_are_row_major():
    """A transposed operand is copied, not passed with another layout."""
    query, key, value = random_normal(1, (B, N, T, H), (B, K, S, H), (B, K, S, H), dtype="bfloat16")

    def attend(*operands):
        return jaxkern.dot_product_attention(*(x.swapaxes(1, 2) for x in operands))

    line = custom_call_lines(attend, query, key, value)["attention_fwd"]
    layouts = re.search(r"operand_layouts = \[(.*?)\], ", line)[1]
    assert layouts.count("dense<[3, 2, 1, 0]>") == 3
