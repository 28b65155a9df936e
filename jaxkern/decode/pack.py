"""pack_weights: a model's matrices in the order in which the decode step reads them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkern import _checks
from jaxkern.decode.layout import (
    FOUR_BIT_COLUMNS,
    FP8_COLUMNS,
    ROW,
    codes_of_words,
    four_bit_words,
    fp8_of_words,
    fp8_words,
    number_of_blocks,
    pack_rows,
    scale_words,
    scales_of_words,
    unpack_rows,
    unpack_scaled_rows,
)
from jaxkern.decode.model import stacked_arrays
from jaxkern.ops.quantize import quantize
from jaxkern.ops.quantized_array import QuantizedArray
from jaxkern.reference import four_bit, rotary
from jaxkern.reference.decode import Rows

FOUR_BIT = {"nvfp4": {}, "mxfp4": {}, "int4": {"group_size": 32}}  # options of `quantize`
WEIGHTS = ("bf16", "fp8", *FOUR_BIT)  # the kernel knows them by their numbers

_FP8 = jnp.float8_e4m3fn
_MULTIPROCESSORS = 8  # where there is no GPU to ask
_MATRICES = ("qkv", "out", "gate_up", "down")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale"],
    meta_fields=["format", "rows", "columns", "blocks", "rows_of_unit"],
)
@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A matrix [N, K], or one for each layer, in blocks of rows as docs/decode.md has them.

    Attributes:
      values: bfloat16 [..., N K], or uint32, words: [..., N K / 4] of four of float8_e4m3fn, or of
        eight values of four bits, with the scales of their blocks.
      scale: what row n is multiplied by, float32 [..., N], or None. Of "nvfp4" it is the scale of
        the matrix, of "mxfp4" the largest of the row's blocks, of "int4" 1; NaN where a block's is.
      format: one of WEIGHTS.
      rows, columns: N and K.
      blocks: how many there are.
      rows_of_unit: how many rows stay in the same block, see `pack_rows`.
    """

    values: jax.Array
    scale: jax.Array | None
    format: str
    rows: int
    columns: int
    blocks: int
    rows_of_unit: int

    @functools.partial(jax.jit, inline=True)
    def unpack(self) -> Rows:
        """The rows in their order, [..., N, K], and their scale.

        bfloat16, which is exact; float32 of "int4", as products with its scales have more bits.
        """
        blocks = self.blocks, self.rows_of_unit
        if self.format == "bf16":
            return Rows(unpack_rows(self.values, self.rows, self.columns, *blocks))
        if self.format == "fp8":
            words = unpack_rows(self.values, self.rows, self.columns // 4, *blocks)
            return Rows(fp8_of_words(words).astype(jnp.bfloat16), self.scale)
        words, scales = unpack_scaled_rows(self.values, self.rows, self.columns // 8, *blocks)
        values = _values_of_words(words, scales, self.format)
        return Rows(values if self.format == "int4" else values.astype(jnp.bfloat16), self.scale)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "embedding",
        "norms",
        "qkv",
        "out",
        "gate_up",
        "down",
        "head",
        "qkv_bias",
        "qk_norms",
        "frequencies",
        "kept",
    ],
    meta_fields=["config", "weights", "multiprocessors"],
)
@dataclasses.dataclass(frozen=True)
class PackedWeights:
    """A model as `decode_step` and `prefill` read it. A pytree, with layers [L] in front.

    Attributes:
      embedding: bfloat16 [V, D].
      norms: bfloat16 [2 L + 1, D]: before a layer's attention, before its MLP, ..., the last one.
      qkv: of L matrices [(N + 2 K) H, D]: for each kv head, rows of its heads of query, of its key
        and of its value.
      out: of L matrices [D, N H].
      gate_up: of L matrices [2 F, D], the rows of gate first.
      down: of L matrices [D, F].
      head: of a matrix [V, D].
      qkv_bias: bfloat16 [L, (N + 2 K) H], in the order of qkv's rows, or None.
      qk_norms: bfloat16 [L, 2, H], of query and key, or None.
      frequencies: float32 [H / 2], see `jaxkern.reference.rotary`.
      kept: of each layer Rows of qkv, out, gate_up and down, bfloat16, for `prefill`; or None.
      config: the model's, like jaxkern.models.Config.
      weights: "bf16", "fp8", "nvfp4", "mxfp4" or "int4".
      multiprocessors: of the GPU that this is packed for.
    """

    embedding: jax.Array
    norms: jax.Array
    qkv: PackedMatrix
    out: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix
    head: PackedMatrix
    qkv_bias: jax.Array | None
    qk_norms: jax.Array | None
    frequencies: jax.Array
    kept: tuple[dict[str, Rows], ...] | None
    config: Any
    weights: str
    multiprocessors: int

    def scan_layers(self, function: Callable, carry: Any, *, prefill: bool = False) -> Any:
        """jax.lax.scan of function(carry, layer, weights) over the layers.

        weights is a dict of one layer: Rows "qkv", "out", "gate_up" and "down", which for prefill
        are those kept, if they are; "norms" [2, D]; "qkv_bias" and "qk_norms", each may be None.
        """
        layers = self.config.layers
        others = {
            "norms": self.norms[:-1].reshape(layers, 2, -1),
            "qkv_bias": self.qkv_bias,
            "qk_norms": self.qk_norms,
        }
        if prefill and self.kept is not None:
            # Not a scan, which would copy each layer's rows out of an array for all.
            results = []
            for layer, rows in enumerate(self.kept):
                own = {name: None if x is None else x[layer] for name, x in others.items()}
                carry, result = function(carry, layer, rows | own)
                results.append(result)
            return carry, jax.tree.map(lambda *x: jnp.stack(x), *results)

        def body(carry, xs):
            layer, matrices, others = xs
            weights = {name: matrix.unpack() for name, matrix in matrices.items()} | others
            return function(carry, layer, weights)

        matrices = {name: getattr(self, name) for name in _MATRICES}
        return jax.lax.scan(body, carry, (jnp.arange(layers), matrices, others))


def pack_weights(
    model: Any,
    weights: str = "bf16",
    multiprocessors: int | None = None,
    *,
    keep_rows: bool = True,
) -> PackedWeights:
    """The weights of a model like jaxkern.models.Transformer, packed for `decode_step`.

    Everything is rounded to bfloat16 first. The arrays stay on the device they are on.

    Args:
      model: see `stacked_arrays` for what is read of it.
      weights: of the matrices in the decode step. "bf16"; "fp8": float8_e4m3fn with a float32
        scale for each row, its largest magnitude / 448; or, of four bits, what `jaxkern.quantize`
        makes of them as "nvfp4", "mxfp4", or "int4" in groups of 32 columns.
      multiprocessors: of the GPU that shall decode. None is those of JAX's default device, or 8
        where that is no GPU.
      keep_rows: whether to keep the matrices of the layers also as bfloat16 rows, for `prefill`.
        Without them it unpacks, in every call, the ones that the decode step reads.

    Raises:
      ValueError: another name, a width, hidden units or elements of heads that are no multiple of
        32 (of all heads, of 64 for FP8 and 128 for four bits), or arrays of other shapes than the
        config asks for.
    """
    _checks.one_of("weights", weights, WEIGHTS)
    keep_rows = _checks.flag("keep_rows", keep_rows)
    if multiprocessors is None:
        multiprocessors = getattr(jax.devices()[0], "core_count", None) or _MULTIPROCESSORS
    multiprocessors = _checks.positive_int("multiprocessors", multiprocessors)
    config = model.config
    columns = {"bf16": ROW, "fp8": FP8_COLUMNS}.get(weights, FOUR_BIT_COLUMNS)
    for name, size, unit in (
        ("head_dim", config.head_dim, ROW),
        ("width", config.width, columns),
        ("hidden", config.hidden, columns),
        ("heads * head_dim", config.heads * config.head_dim, columns),
    ):
        if size % unit:
            raise ValueError(f"{name} is {size}, wanted a multiple of {unit} for {weights!r}")
    arrays = stacked_arrays(model)

    def pack(name, rows_of_unit=1):
        rows, columns = arrays[name].shape[-2:]
        blocks = number_of_blocks(rows, multiprocessors, config.head_dim, rows_of_unit)
        packed = _pack(arrays[name], weights, blocks, rows_of_unit)
        return PackedMatrix(*packed, weights, rows, columns, blocks, rows_of_unit)

    return PackedWeights(
        embedding=arrays["embedding"],
        norms=arrays["norms"],
        qkv=pack("qkv"),
        out=pack("out"),
        gate_up=pack("gate_up", rows_of_unit=2),
        down=pack("down"),
        head=pack("head"),
        qkv_bias=arrays["qkv_bias"],
        qk_norms=arrays["qk_norms"],
        frequencies=jnp.asarray(rotary.frequencies(config)),
        kept=_kept(arrays) if keep_rows else None,
        config=config,
        weights=weights,
        multiprocessors=multiprocessors,
    )


@jax.jit
def _kept(arrays):
    """Rows of the matrices of each layer."""
    layers = len(arrays["qkv"])
    return tuple({name: Rows(arrays[name][i]) for name in _MATRICES} for i in range(layers))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _pack(rows, weights, blocks, rows_of_unit):
    """Values and scale of a PackedMatrix."""
    if weights == "bf16":
        return pack_rows(rows, blocks, rows_of_unit), None
    if weights == "fp8":
        rows, scale = quantize_rows(rows)
        return pack_rows(fp8_words(rows), blocks, rows_of_unit), scale

    def pack(rows):
        quantized = quantize(rows, weights, **FOUR_BIT[weights])
        words, scales, scale = _words_of_values(quantized, weights)
        return pack_rows(words, blocks, rows_of_unit, scales), scale

    # One matrix after the other: quantising takes several times its memory.
    return pack(rows) if rows.ndim == 2 else jax.lax.map(pack, rows)


def _words_of_values(w: QuantizedArray, format):
    """Words of values [N, K / 8] and of scales [N, K / 64], and the scale of rows [N]."""
    bad = jnp.isnan(w.scale.astype(jnp.float32))
    scale = jnp.where(bad, 0, w.scale.astype(jnp.float32))
    if format == "int4":
        codes, of_rows = w.values.astype(jnp.int32) + 8, jnp.ones(len(scale), jnp.float32)
    else:
        codes = jax.lax.bitcast_convert_type(w.values, jnp.uint4)
        of_rows = scale.max(-1)
        if format == "nvfp4":
            of_rows = jnp.broadcast_to(w.tensor_scale[:, 0], of_rows.shape)
        else:
            scale = jnp.where(bad, 0, scale / jnp.where(of_rows > 0, of_rows, 1)[:, None])
    of_rows = jnp.where(bad.any(-1), jnp.nan, of_rows)
    return four_bit_words(codes, format), scale_words(scale, format), of_rows


def _values_of_words(words, scales, format):
    """What _words_of_values were of, but for the scale of rows: float32 [..., N, K]."""
    codes, scale = codes_of_words(words, format), scales_of_words(scales, format)
    if format == "int4":
        values = codes.astype(jnp.float32) - 8
    else:
        values = jax.lax.bitcast_convert_type(codes.astype(jnp.uint4), four_bit.E2M1)
        values = values.astype(jnp.float32)
    blocks = values.reshape(*scale.shape, -1) * scale[..., None]
    return blocks.reshape(values.shape)


def quantize_rows(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float8_e4m3fn values [..., N, K] and float32 scale [..., N]: rows are about their product."""
    rows = rows.astype(jnp.float32)
    largest = float(jnp.finfo(_FP8).max)
    smallest = float(jnp.finfo(jnp.float32).tiny)  # a scale of a row of zeros
    scale = jnp.maximum(jnp.abs(rows).max(-1) / largest, smallest)
    return jnp.clip(rows / scale[..., None], -largest, largest).astype(_FP8), scale
