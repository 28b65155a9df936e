"""pack_weights: what is in PackedWeights, FP8 rows and those of four bits."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from decode_model import (
    CONFIGS,
    FOUR_BIT_CONFIGS,
    by_kv_head,
    frequencies,
    model_of,
    random_arrays,
)

from jaxkern import quantize
from jaxkern.decode import layout, pack, pack_weights
from jaxkern.testing import random_normal

MATRICES = ("qkv", "out", "gate_up", "down", "head")


def packed(name, *args, **options):
    config = CONFIGS[name]
    return pack_weights(model_of(config, random_arrays(config)), *args, **options)


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_matrices(name, multiprocessors):
    """Each is the model's, in the blocks that docs/decode.md asks for."""
    config, arrays = CONFIGS[name], random_arrays(CONFIGS[name])
    arrays = {**arrays, "qkv": by_kv_head(config, arrays["qkv"])}
    if config.qkv_bias:
        arrays["qkv_bias"] = by_kv_head(config, arrays["qkv_bias"])
    got = packed(name, multiprocessors=multiprocessors)
    for key in MATRICES:
        matrix, rows = getattr(got, key), arrays[key]
        assert matrix.values.shape == (*rows.shape[:-2], rows.shape[-2] * rows.shape[-1])
        assert matrix.values.dtype == jnp.bfloat16
        assert (matrix.rows, matrix.columns) == rows.shape[-2:]
        unit = 2 if key == "gate_up" else 1
        assert matrix.rows_of_unit == unit
        wanted = layout.number_of_blocks(rows.shape[-2], multiprocessors, config.head_dim, unit)
        assert matrix.blocks == wanted
        values, scale = matrix.unpack()
        np.testing.assert_array_equal(values, rows)
        assert scale is None
        if key != "head":
            kept = jnp.stack([layer[key].values for layer in got.kept])
            np.testing.assert_array_equal(kept, rows)
    for key in ("embedding", "norms", "qkv_bias", "qk_norms"):
        assert (getattr(got, key) is None) == (arrays[key] is None)
        if arrays[key] is not None:
            np.testing.assert_array_equal(getattr(got, key), arrays[key])
            assert getattr(got, key).dtype == jnp.bfloat16
    np.testing.assert_allclose(got.frequencies, frequencies(config), rtol=1e-6)
    assert got.frequencies.dtype == jnp.float32
    assert (got.config, got.weights, got.multiprocessors) == (config, "bf16", multiprocessors)


def test_few_leaves():
    """jit handles each leaf in each call."""
    assert len(jax.tree.leaves(packed("llama", keep_rows=False))) == 8
    assert len(jax.tree.leaves(packed("qwen2", keep_rows=False))) == 9
    assert len(jax.tree.leaves(packed("llama"))) == 8 + 4 * CONFIGS["llama"].layers
    assert len(jax.tree.leaves(packed("llama", "fp8", keep_rows=False))) == 13


def test_multiprocessors_of_no_gpu():
    assert packed("llama").multiprocessors == 8


def test_pytree():
    """Equal ones share a compiled function."""
    leaves, structure = jax.tree.flatten(packed("llama"))
    assert structure == jax.tree.structure(packed("llama"))
    assert structure != jax.tree.structure(packed("llama", multiprocessors=3))
    assert hash(structure) == hash(jax.tree.structure(packed("llama")))
    assert dataclasses.is_dataclass(jax.tree.unflatten(structure, leaves))


def test_fp8():
    """The FP8 rows of the model's, packed like them."""
    config, arrays = CONFIGS["llama"], random_arrays(CONFIGS["llama"])
    arrays = {**arrays, "qkv": by_kv_head(config, arrays["qkv"])}
    got = packed("llama", "fp8")
    for key in MATRICES:
        matrix = getattr(got, key)
        assert matrix.values.dtype == jnp.uint32
        assert matrix.scale.shape == arrays[key].shape[:-1]
        values, scale = matrix.unpack()
        wanted, wanted_scale = pack.quantize_rows(arrays[key])
        np.testing.assert_array_equal(values, wanted.astype(jnp.bfloat16))
        np.testing.assert_array_equal(scale, wanted_scale)
        if key != "head":
            kept = jnp.stack([layer[key].values for layer in got.kept])
            np.testing.assert_array_equal(kept, arrays[key])


four_bit = pytest.mark.parametrize(
    ("weights", "options"), [("nvfp4", {}), ("mxfp4", {}), ("int4", {"group_size": 32})]
)


@four_bit
@pytest.mark.parametrize("name", list(FOUR_BIT_CONFIGS))
@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
def test_four_bit(name, multiprocessors, weights, options):
    """Rows stand for exactly what `quantize` makes of the model's."""
    config = FOUR_BIT_CONFIGS[name]
    arrays = random_arrays(config)
    got = pack_weights(model_of(config, arrays), weights, multiprocessors)
    arrays = {**arrays, "qkv": jnp.asarray(by_kv_head(config, arrays["qkv"]))}
    for key in MATRICES:
        matrix = getattr(got, key)
        assert matrix.values.dtype == jnp.uint32
        assert matrix.scale.shape == arrays[key].shape[:-1]
        assert matrix.scale.dtype == jnp.float32
        rows, columns = arrays[key].shape[-2:]
        unit = matrix.rows_of_unit
        sizes = [rows // unit // matrix.blocks] * matrix.blocks
        for i in range(rows // unit % matrix.blocks):
            sizes[i] += 1
        slices = sum(16 * unit * size + -(-2 * unit * size // 4) * 4 for size in sizes)
        assert matrix.values.shape == (*arrays[key].shape[:-2], slices * columns // 128)
        values, scale = matrix.unpack()
        assert values.dtype == (jnp.float32 if weights == "int4" else jnp.bfloat16)
        wanted = quantize(arrays[key], weights, **options).dequantize()
        np.testing.assert_array_equal(values.astype(jnp.float32) * scale[..., None], wanted)
        if key != "head":
            kept = jnp.stack([layer[key].values for layer in got.kept])
            np.testing.assert_array_equal(kept, arrays[key])


@four_bit
def test_four_bit_rows_of_many_magnitudes(weights, options):
    """Blocks far apart keep their scales, zeros stay zeros, and a NaN is one of its row alone."""
    config = FOUR_BIT_CONFIGS["llama"]
    arrays = random_arrays(config)
    down = np.array(arrays["down"], np.float32)
    down[0, 3] *= np.repeat(np.float32(2.0) ** np.linspace(-100, 0, 12), 32)
    down[0, 5], down[0, 7, 32:64] = 0, 0
    down[1, 2, 40] = np.nan
    arrays["down"] = jnp.asarray(down, jnp.bfloat16)
    values, scale = pack_weights(model_of(config, arrays), weights).down.unpack()
    got = np.array(values.astype(jnp.float32) * scale[..., None])
    wanted = np.array(quantize(arrays["down"], weights, **options).dequantize())
    assert np.isnan(got[1, 2]).all() and np.isnan(wanted[1, 2]).any()
    got[1, 2] = wanted[1, 2] = 0
    np.testing.assert_array_equal(got, wanted)
    assert (
        np.isfinite(wanted).all()
        and not wanted[0, 5].any()
        and wanted[0, 3, :32].any()
        != (
            weights == "nvfp4"  # whose scales are of a matrix
        )
    )


def test_quantize_rows():
    rows = np.array(random_normal(1, (3, 9, 64), dtype="float32")[0])
    rows *= np.float32(10.0) ** np.arange(-4, 5)[:, None]
    values, scale = pack.quantize_rows(jnp.asarray(rows, jnp.bfloat16))
    rows = np.asarray(jnp.asarray(rows, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(scale, abs(rows).max(-1) / 448, rtol=1e-6)
    wanted = (rows / np.asarray(scale)[..., None]).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), wanted.view(np.uint8))
    assert (abs(np.asarray(values, np.float32)).max(-1) == 448).all()


def test_quantize_rows_of_zeros_and_tiny_numbers():
    rows = jnp.zeros((3, 32), jnp.bfloat16).at[1, 3].set(1e-37).at[2].set(3e38)
    values, scale = pack.quantize_rows(rows)
    product = values.astype(jnp.float32) * scale[:, None]
    assert jnp.isfinite(product).all()
    assert not product[0].any()
    assert (abs(product[1] - rows[1].astype(jnp.float32)) < 1e-37).all()
    np.testing.assert_allclose(product[2], rows[2].astype(jnp.float32), rtol=1e-6)


def test_inside_jit():
    config = CONFIGS["llama"]
    arrays = random_arrays(config)
    got = jax.jit(lambda arrays: pack_weights(model_of(config, arrays)))(arrays)
    wanted = pack_weights(model_of(config, arrays))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_errors():
    config = CONFIGS["llama"]
    arrays = random_arrays(config)
    model = model_of(config, arrays)
    names = "'bf16', 'fp8', 'nvfp4', 'mxfp4', 'int4'"
    with pytest.raises(ValueError, match=f"weights is 'int8', wanted one of {names}"):
        pack_weights(model, "int8")
    with pytest.raises(ValueError, match="multiprocessors is 0, wanted a positive integer"):
        pack_weights(model, multiprocessors=0)
    with pytest.raises(ValueError, match="keep_rows is 1, wanted True or False"):
        pack_weights(model, keep_rows=1)
    for name in ("width", "hidden", "head_dim"):
        model.config = dataclasses.replace(config, **{name: 80})
        with pytest.raises(ValueError, match=f"{name} is 80, wanted a multiple of 32 for 'bf16'"):
            pack_weights(model)
    for name, size, change in (
        ("width", 96, {"width": 96}),
        ("hidden", 96, {"hidden": 96}),
        (r"heads \* head_dim", 32, {"heads": 1, "kv_heads": 1}),
    ):
        model.config = dataclasses.replace(config, **change)
        with pytest.raises(ValueError, match=f"{name} is {size}, wanted a multiple of 64 for 'fp8"):
            pack_weights(model, "fp8")
    for weights in ("nvfp4", "mxfp4", "int4"):
        for name, change in (
            ("width is 64", {}),
            ("hidden is 192", {"width": 128, "hidden": 192}),
            (r"heads \* head_dim is 64", {"width": 128, "heads": 2}),
        ):
            model.config = dataclasses.replace(config, **change)
            message = f"{name}, wanted a multiple of 128 for {weights!r}"
            with pytest.raises(ValueError, match=message):
                pack_weights(model, weights)
    model.config = dataclasses.replace(config, layers=3)
    with pytest.raises(ValueError, match="model has 2 blocks, wanted the config's 3"):
        pack_weights(model)
    model.config = dataclasses.replace(config, hidden=64)
    message = r"model\.blocks\[0\]\.gate_up\.kernel has shape \(64, 256\), wanted \(64, 128\)"
    with pytest.raises(ValueError, match=message):
        pack_weights(model)
