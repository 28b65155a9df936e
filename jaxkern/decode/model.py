"""What the decode step needs of a model, in arrays for all layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def stacked_arrays(model: Any) -> dict[str, jax.Array | None]:
    """The weights of a model like jaxkern.models.Transformer: bfloat16, rows being outputs.

    Read are `config`, and of it sizes, qkv_bias and qk_norm; `embed.embedding`, `norm.scale`, and
    `head.kernel` unless head is None; of each of `blocks` `attention_norm.scale`, `qkv.kernel`,
    `qkv.bias`, `query_norm.scale`, `key_norm.scale`, `out.kernel`, `mlp_norm.scale`,
    `gate_up.kernel` and `down.kernel`. Anything that gives an array for x[...] is one.

    Returns:
      "embedding" [V, D], "norms" [2 L + 1, D], "qkv" [L, (N + 2 K) H, D], "qkv_bias"
      [L, (N + 2 K) H] or None, "qk_norms" [L, 2, H] or None, "out" [L, D, N H], "gate_up"
      [L, 2 F, D], "down" [L, D, F] and "head" [V, D], which is the embedding where head is None.
      Rows of "qkv" and its bias are by kv head: those of its heads of query, its key, its value.

    Raises:
      ValueError: other shapes, or another number of blocks.
    """
    config = model.config
    width, head_dim = config.width, config.head_dim
    outputs = (config.heads + 2 * config.kv_heads) * head_dim
    blocks = list(model.blocks)
    if len(blocks) != config.layers:
        raise ValueError(f"model has {len(blocks)} blocks, wanted the config's {config.layers}")

    def of_blocks(shape, *paths):
        """These arrays of each block, one block after the other."""
        return [
            _read(block, path, shape, f"model.blocks[{i}]")
            for i, block in enumerate(blocks)
            for path in paths
        ]

    embedding = _rounded(_read(model, "embed.embedding", (config.vocabulary, width)))
    if model.head is None:
        head = embedding
    else:
        head = _rows(_read(model, "head.kernel", (width, config.vocabulary)))
    norms = [
        *of_blocks((width,), "attention_norm.scale", "mlp_norm.scale"),
        _read(model, "norm.scale", (width,)),
    ]
    bias = qk_norms = None
    if config.qkv_bias:
        bias = _by_kv_head(_stacked(of_blocks((outputs,), "qkv.bias")), config)
    if config.qk_norm:
        qk_norms = _stacked(of_blocks((head_dim,), "query_norm.scale", "key_norm.scale"))
        qk_norms = qk_norms.reshape(config.layers, 2, head_dim)
    return {
        "embedding": embedding,
        "norms": _stacked(norms),
        "qkv": _by_kv_head(_stacked_rows(of_blocks((width, outputs), "qkv.kernel")), config),
        "qkv_bias": bias,
        "qk_norms": qk_norms,
        "out": _stacked_rows(of_blocks((config.heads * head_dim, width), "out.kernel")),
        "gate_up": _stacked_rows(of_blocks((width, 2 * config.hidden), "gate_up.kernel")),
        "down": _stacked_rows(of_blocks((config.hidden, width), "down.kernel")),
        "head": head,
    }


def _read(module, path, shape, prefix="model"):
    """The array at a path of attributes, or ValueError if it has another shape."""
    array = module
    for name in path.split("."):
        array = getattr(array, name)
    array = array[...]
    if array.shape != shape:
        raise ValueError(f"{prefix}.{path} has shape {array.shape}, wanted {shape}")
    return array


# Compiled, so that no array exists in a form in between.


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _by_kv_head(rows, config):
    """[L, (N + 2 K) H, ...] of all heads of query, then of key, then of value, by kv head."""
    heads = rows.reshape(config.layers, -1, config.head_dim, *rows.shape[2:])
    query, key, value = jnp.split(heads, [config.heads, config.heads + config.kv_heads], 1)
    lead = config.layers, config.kv_heads
    groups = [x.reshape(*lead, -1, *x.shape[2:]) for x in (query, key, value)]
    return jnp.concatenate(groups, 2).reshape(rows.shape)


@jax.jit
def _rounded(x):
    return x.astype(jnp.bfloat16)


@jax.jit
def _stacked(arrays):
    return jnp.stack([_rounded(x) for x in arrays])


@jax.jit
def _rows(kernel):
    return _rounded(kernel.T)


@jax.jit
def _stacked_rows(kernels):
    return jnp.stack([_rows(x) for x in kernels])
