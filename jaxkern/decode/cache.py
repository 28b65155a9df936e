"""KVCache: keys and values of the tokens so far, as the decode step reads them."""

import dataclasses
import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxkern import _checks
from jaxkern.decode.layout import ROW

_KEYS = 8  # tokens next to each other in a block of keys


class Status(enum.IntEnum):
    """What became of a sequence. Once it is not OK it stays so, and its logits are NaN."""

    OK = 0
    TOKEN_OUT_OF_RANGE = 1  # of the vocabulary; the nearest token was taken
    CACHE_FULL = 2  # there was no room for the token


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "lengths", "status", "workspace"],
    meta_fields=["config"],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of B sequences of up to T tokens, in the layouts of docs/decode.md.

    Attributes:
      keys: bfloat16 [layers, B, kv_heads, T / 8, head_dim / 32, 8, 32], rotated.
      values: bfloat16 [layers, B, kv_heads, T / 32, head_dim, 32].
      lengths: int32 [B], how many tokens are there. What is beyond them is never used.
      status: int32 [B], of `Status`.
      workspace: int32, what the kernel keeps from step to step.
      config: of the model, like jaxkern.models.Config.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    status: jax.Array
    workspace: jax.Array
    config: Any

    @classmethod
    def create(cls, config: Any, batch: int, max_length: int) -> "KVCache":
        """An empty cache for sequences of up to max_length tokens, rounded up to 32 of them.

        Raises:
          ValueError: a size that is not positive, max_length above config.context, or a head_dim
            that is no multiple of 32.
        """
        for name, size in (("batch", batch), ("max_length", max_length)):
            _checks.positive_int(name, size)
        if max_length > config.context:
            raise ValueError(f"max_length is {max_length}, above the context {config.context}")
        check_head_dim(config)
        blocks = -(-max_length // ROW)
        lead = config.layers, batch, config.kv_heads
        keys = (*lead, blocks * ROW // _KEYS, config.head_dim // ROW, _KEYS, ROW)
        values = (*lead, blocks, config.head_dim, ROW)
        return cls(
            jnp.zeros(keys, jnp.bfloat16),
            jnp.zeros(values, jnp.bfloat16),
            lengths=jnp.zeros(batch, jnp.int32),
            status=jnp.zeros(batch, jnp.int32),
            workspace=jnp.full(_workspace_size(config, batch), -1, jnp.int32),
            config=config,
        )

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def max_length(self) -> int:
        return self.keys.shape[3] * _KEYS

    def write(self, keys: ArrayLike, values: ArrayLike, lengths: ArrayLike) -> "KVCache":
        """The cache with these tokens and no others.

        Args:
          keys, values: [layers, B, T, kv_heads, head_dim], keys rotated; rounded to bfloat16.
          lengths: int32 [B], how many of the T tokens each sequence has, clipped to 0..T.

        Raises:
          ValueError: arrays of other shapes, or T above max_length.
        """
        keys, values = _checks.float_array("keys", keys), _checks.float_array("values", values)
        config = self.config
        for name, x in (("keys", keys), ("values", values)):
            wanted = (config.layers, self.batch, "T", config.kv_heads, config.head_dim)
            if x.shape[:2] + x.shape[3:] != wanted[:2] + wanted[3:] or x.shape != keys.shape:
                raise ValueError(f"{name} has shape {x.shape}, wanted {wanted}")
        length = keys.shape[2]
        if length > self.max_length:
            raise ValueError(f"keys has {length} tokens, the cache room for {self.max_length}")
        lengths = jnp.clip(_checks.int32("lengths", lengths, (self.batch,)), 0, length)
        status = jnp.full(self.batch, Status.OK, jnp.int32)
        return self.with_packed(pack_keys(keys), pack_values(values), lengths, status)

    def with_packed(
        self, keys: jax.Array, values: jax.Array, lengths: jax.Array, status: jax.Array
    ) -> "KVCache":
        """The cache with what pack_keys and pack_values gave in front, these lengths and status."""
        return dataclasses.replace(
            self,
            keys=self.keys.at[:, :, :, : keys.shape[3]].set(keys),
            values=self.values.at[:, :, :, : values.shape[3]].set(values),
            lengths=lengths,
            status=status,
        )

    def append(self, layer: ArrayLike, key: jax.Array, value: jax.Array) -> "KVCache":
        """The cache with key and value [B, kv_heads, head_dim] of one more token in a layer.

        lengths stay, which `advance` is for: that is where they are written. A full sequence's are
        not written.
        """
        t = self.lengths
        sequences = jnp.arange(self.batch)
        key = key.reshape(*key.shape[:-1], -1, ROW)
        keys = self.keys.at[layer, sequences, :, t // _KEYS, :, t % _KEYS]
        values = self.values.at[layer, sequences, :, t // ROW, :, t % ROW]
        return dataclasses.replace(
            self,
            keys=keys.set(key.astype(jnp.bfloat16), mode="drop"),
            values=values.set(value.astype(jnp.bfloat16), mode="drop"),
        )

    def advance(self, tokens: jax.Array) -> "KVCache":
        """The cache after tokens [B] have been appended in every layer."""
        full = self.lengths >= self.max_length
        status = status_of(self.config, tokens, jnp.where(full, Status.CACHE_FULL, Status.OK))
        return dataclasses.replace(
            self,
            lengths=jnp.where(full, self.lengths, self.lengths + 1),
            status=jnp.where(self.status == Status.OK, status, self.status),
        )

    def read(self, layer: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Keys and values of a layer, bfloat16 [B, max_length, kv_heads, head_dim] each."""
        return unpack_keys(self.keys[layer]), unpack_values(self.values[layer])


def status_of(config: Any, tokens: jax.Array, otherwise: ArrayLike) -> jax.Array:
    """TOKEN_OUT_OF_RANGE where a token [...] is not of the vocabulary, else otherwise; int32."""
    known = (tokens >= 0) & (tokens < config.vocabulary)
    return jnp.where(known, otherwise, Status.TOKEN_OUT_OF_RANGE).astype(jnp.int32)


def check_head_dim(config: Any) -> None:
    """ValueError if rows of 32 do not divide a head."""
    if config.head_dim % ROW:
        raise ValueError(f"head_dim is {config.head_dim}, wanted a multiple of {ROW}")


def _workspace_size(config, batch):
    """int32 enough for what the kernel's blocks send each other, on up to 256 multiprocessors.

    After a header two places for each bfloat16 value: the results of the phases of a layer, and
    those of attention once more for each of 16 splits. Two for each float32: of two phases a sum of
    each block, and of attention a logarithm for each split and head. Two for each block's rank, and
    four histograms of 256 bins, of 8 bytes each.
    """
    heads = config.heads * config.head_dim
    outputs = heads + 2 * config.kv_heads * config.head_dim
    values = outputs + heads + 2 * config.width + config.hidden + 16 * heads
    sums = 2 * (256 + config.width // 64) + 16 * config.heads
    ranks = 256 + 2 * 256
    return 256 + batch * (values + 2 * sums + 4 * ranks)


# --- Layouts --------------------------------------------------------------------------------------


def pack_keys(keys: jax.Array) -> jax.Array:
    """[..., T, K, H] as [..., K, T / 8, H / 32, 8, 32], bfloat16, T rounded up to 32 with zeros."""
    keys = _padded(keys)
    *lead, t, heads, h = keys.shape
    keys = keys.reshape(*lead, t // _KEYS, _KEYS, heads, h // ROW, ROW)
    return jnp.moveaxis(keys, (-3, -4), (-5, -2))


def unpack_keys(keys: jax.Array) -> jax.Array:
    """The inverse of pack_keys, [..., T, K, H]."""
    *lead, heads, blocks, parts, _, _ = keys.shape
    keys = jnp.moveaxis(keys, (-5, -2), (-3, -4))
    return keys.reshape(*lead, blocks * _KEYS, heads, parts * ROW)


def pack_values(values: jax.Array) -> jax.Array:
    """[..., T, K, H] as [..., K, T / 32, H, 32], bfloat16, T rounded up to 32 with zeros."""
    values = _padded(values)
    *lead, t, heads, h = values.shape
    values = values.reshape(*lead, t // ROW, ROW, heads, h)
    return jnp.moveaxis(values, (-2, -3), (-4, -1))


def unpack_values(values: jax.Array) -> jax.Array:
    """The inverse of pack_values, [..., T, K, H]."""
    *lead, heads, blocks, h, _ = values.shape
    values = jnp.moveaxis(values, (-4, -1), (-2, -3))
    return values.reshape(*lead, blocks * ROW, heads, h)


def _padded(x):
    pads = [(0, 0)] * (x.ndim - 3) + [(0, -x.shape[-3] % ROW), (0, 0), (0, 0)]
    return jnp.pad(x.astype(jnp.bfloat16), pads)
