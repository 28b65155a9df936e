"""Small models of the Llama family, and their forward pass written once more."""

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern.models import Config, RopeScaling

_SMALL = {
    "vocabulary": 75,
    "layers": 2,
    "width": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "hidden": 128,
    "context": 128,
}

CONFIGS = {
    "llama": Config(**_SMALL),
    "llama3": Config(
        rope_theta=500.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, original_context=16),  # the tests' go beyond
        tied_embeddings=True,
        **_SMALL | {"hidden": 96},  # too few for FP8
    ),
    "qwen2": Config(qkv_bias=True, **_SMALL | {"kv_heads": 1, "head_dim": 64}),
    "qwen3": Config(
        qk_norm=True,
        tied_embeddings=True,
        norm_epsilon=0.1,
        **_SMALL | {"layers": 3, "kv_heads": 4},
    ),
}


# Sizes that weights of four bits can have.
FOUR_BIT_CONFIGS = {
    name: dataclasses.replace(CONFIGS[name], width=128, hidden=384) for name in ("llama", "qwen3")
}


def random_arrays(config, seed=0):
    """Weights, all of bfloat16 numbers, as rows of outputs; logits are about 2 in magnitude."""
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0, mean=0.0):
        return jnp.asarray(mean + scale * rng.standard_normal(shape), jnp.bfloat16)

    def matrix(*shape):
        return normal(*shape, scale=shape[-1] ** -0.5)

    layers, width, head_dim = config.layers, config.width, config.head_dim
    outputs = (config.heads + 2 * config.kv_heads) * head_dim
    embedding = normal(config.vocabulary, width, scale=0.25)
    return {
        "embedding": embedding,
        "norms": normal(2 * layers + 1, width, scale=0.2, mean=1.0),
        "qkv": matrix(layers, outputs, width),
        "qkv_bias": normal(layers, outputs) if config.qkv_bias else None,
        "qk_norms": normal(layers, 2, head_dim, scale=0.5, mean=1.0) if config.qk_norm else None,
        "out": matrix(layers, width, config.heads * head_dim),
        "gate_up": matrix(layers, 2 * config.hidden, width),
        "down": matrix(layers, width, config.hidden),
        "head": embedding if config.tied_embeddings else normal(*embedding.shape, scale=0.25),
    }


def forward(config, arrays, tokens, dtype="float32"):
    """The logits [B, T, V] after each token, with all results rounded to dtype."""
    arrays = {name: None if x is None else x.astype(dtype) for name, x in arrays.items()}
    batch, t = tokens.shape
    turns = jnp.outer(jnp.arange(t), np.array(frequencies(config), np.float32))
    turns = jnp.exp(1j * turns)[:, None]
    groups = config.heads // config.kv_heads
    causal = jnp.tril(jnp.ones((t, t), bool))

    def norm(x, scale):
        wide = x.astype(jnp.float32)
        mean = (wide * wide).mean(-1, keepdims=True)
        return (wide / jnp.sqrt(mean + config.norm_epsilon)).astype(dtype) * scale

    def rotated(x):
        real, imaginary = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        x = (real + 1j * imaginary) * turns
        return jnp.concatenate([x.real, x.imag], -1).astype(dtype)

    h = arrays["embedding"][tokens]
    for i in range(config.layers):
        x = norm(h, arrays["norms"][2 * i]) @ arrays["qkv"][i].T
        if config.qkv_bias:
            x += arrays["qkv_bias"][i]
        x = x.reshape(batch, t, -1, config.head_dim)
        q, k, v = jnp.split(x, [config.heads, config.heads + config.kv_heads], axis=2)
        if config.qk_norm:
            q, k = norm(q, arrays["qk_norms"][i, 0]), norm(k, arrays["qk_norms"][i, 1])
        k, v = (jnp.repeat(x, groups, axis=2) for x in (rotated(k), v))
        logits = jnp.einsum("btnh,bsnh->bnts", rotated(q), k) / math.sqrt(config.head_dim)
        weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf)).astype(dtype)
        x = jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(batch, t, -1)
        h += x @ arrays["out"][i].T
        gate, up = jnp.split(norm(h, arrays["norms"][2 * i + 1]) @ arrays["gate_up"][i].T, 2, -1)
        h += (gate * jax.nn.sigmoid(gate) * up) @ arrays["down"][i].T
    return norm(h, arrays["norms"][-1]) @ arrays["head"].T


def frequencies(config):
    """As Hugging Face's transformers has them, one after the other."""
    found = []
    scaling = config.rope_scaling
    for i in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * i / config.head_dim)
        if scaling is not None:
            wavelength = 2 * math.pi / frequency
            longest = scaling.original_context / scaling.low_frequency_factor
            shortest = scaling.original_context / scaling.high_frequency_factor
            if wavelength > longest:
                frequency /= scaling.factor
            elif wavelength > shortest:
                smooth = scaling.original_context / wavelength - scaling.low_frequency_factor
                smooth /= scaling.high_frequency_factor - scaling.low_frequency_factor
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        found.append(frequency)
    return found


def model_of(config, arrays):
    """A model as `pack_weights` reads it, with the attributes of jaxkern.models.Transformer."""

    def norm(scale):
        return SimpleNamespace(scale=scale)

    def linear(rows, bias=None):
        return SimpleNamespace(kernel=rows.T, bias=bias)

    def block(i):
        scales = [None] * 2 if arrays["qk_norms"] is None else map(norm, arrays["qk_norms"][i])
        query_norm, key_norm = scales
        bias = None if arrays["qkv_bias"] is None else arrays["qkv_bias"][i]
        return SimpleNamespace(
            attention_norm=norm(arrays["norms"][2 * i]),
            qkv=linear(arrays["qkv"][i], bias),
            query_norm=query_norm,
            key_norm=key_norm,
            out=linear(arrays["out"][i]),
            mlp_norm=norm(arrays["norms"][2 * i + 1]),
            gate_up=linear(arrays["gate_up"][i]),
            down=linear(arrays["down"][i]),
        )

    return SimpleNamespace(
        config=config,
        embed=SimpleNamespace(embedding=arrays["embedding"]),
        blocks=[block(i) for i in range(config.layers)],
        norm=norm(arrays["norms"][-1]),
        head=None if config.tied_embeddings else linear(arrays["head"]),
    )


def by_kv_head(config, rows, *, inverse=False):
    """Rows [L, (N + 2 K) H, ...], those of a kv head's query, key and value next to each other.

    inverse: from that order to all of query, then of key, then of value.
    """
    n, k, group = config.heads, config.kv_heads, config.heads // config.kv_heads
    order = [[*range(i * group, (i + 1) * group), n + i, n + k + i] for i in range(k)]
    order = np.argsort(np.ravel(order)) if inverse else np.ravel(order)
    heads = np.asarray(rows).reshape(config.layers, n + 2 * k, config.head_dim, *rows.shape[2:])
    return heads[:, order].reshape(rows.shape)
