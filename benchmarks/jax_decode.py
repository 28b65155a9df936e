"""Decoding in plain JAX, as `decode.py` compares it: what is written without jaxkern.

Layers are unrolled, which is faster than to scan them. A layer's cache is its keys and values,
bfloat16 [B, S, K, H] each, donated and written by dynamic_update_slice. Attention is two einsums
over all of it. Weights are the parameters of a jaxkern.models.Transformer as nested dicts; a kernel
may be FP8 with a scale beside it, or of four bits with scales of blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jaxkern
from jaxkern.decode.pack import FOUR_BIT, quantize_rows
from jaxkern.models import Config
from jaxkern.reference import norm, rotary

Cache = list[tuple[jax.Array, jax.Array]]


def empty_cache(config: Config, batch: int, length: int) -> Cache:
    shape = batch, length, config.kv_heads, config.head_dim
    return [(jnp.zeros(shape, jnp.bfloat16),) * 2 for _ in range(config.layers)]


def forward(
    config: Config, weights: Mapping, cache: Cache, tokens: jax.Array, start: jax.Array
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] that follow tokens [B, T] at positions from start on, and the cache."""
    batch, t = tokens.shape
    heads, kv_heads, head_dim = config.heads, config.kv_heads, config.head_dim
    positions = start + jnp.arange(t)
    seen = jnp.arange(cache[0][0].shape[1]) <= positions[:, None]
    turn = functools.partial(
        rotary.rotate, positions=positions, frequencies=rotary.frequencies(config)
    )

    def normalized(x, weights):
        return norm.rms_norm(x, weights["scale"], epsilon=config.norm_epsilon)[0]

    x = weights["embed"]["embedding"][tokens]
    written = []
    for i, (keys, values) in enumerate(cache):
        block = weights["blocks"][i]
        qkv = product(normalized(x, block["attention_norm"]), block["qkv"])
        qkv = qkv.reshape(batch, t, heads + 2 * kv_heads, head_dim)
        query, key, value = jnp.split(qkv, (heads, heads + kv_heads), axis=2)
        if config.qk_norm:
            query = normalized(query, block["query_norm"])
            key = normalized(key, block["key_norm"])
        query = turn(query).reshape(batch, t, kv_heads, -1, head_dim)
        keys = jax.lax.dynamic_update_slice_in_dim(keys, turn(key), start, axis=1)
        values = jax.lax.dynamic_update_slice_in_dim(values, value, start, axis=1)
        written.append((keys, values))
        wide = {"preferred_element_type": jnp.float32}
        logits = jnp.einsum("btkgh,bskh->bkgts", query, keys, **wide) * head_dim**-0.5
        attended = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)).astype(x.dtype)
        attended = jnp.einsum("bkgts,bskh->btkgh", attended, values)
        x += product(attended.reshape(batch, t, heads * head_dim), block["out"])
        gate_up = product(normalized(x, block["mlp_norm"]), block["gate_up"])
        gate, up = jnp.split(gate_up, 2, axis=-1)
        x += product(jax.nn.silu(gate) * up, block["down"])
    head = weights.get("head") or {"kernel": weights["embed"]["embedding"].T}
    return product(normalized(x[:, -1], weights["norm"]), head, jnp.float32), written


def product(x: jax.Array, linear: Mapping, dtype: Any = jnp.bfloat16) -> jax.Array:
    """x [..., K] times a kernel [K, N], which may have a scale and a bias [N].

    Or the rows of the kernel are in blocks, with block_scale [K / block, N].
    """
    kernel = linear["kernel"].astype(x.dtype)
    if "block_scale" in linear:
        scale = linear["block_scale"]
        blocks = kernel.reshape(len(scale), -1, kernel.shape[-1]) * scale[:, None]
        kernel = blocks.reshape(kernel.shape)
    y = jnp.dot(x, kernel, preferred_element_type=dtype)
    if "scale" in linear:
        y *= linear["scale"].astype(dtype)
    return y + linear["bias"] if "bias" in linear else y


first_logits = jax.jit(forward, static_argnums=0, donate_argnums=2)


@functools.partial(jax.jit, static_argnums=(0, 5), donate_argnums=2)
def greedy_steps(
    config: Config, weights: Mapping, cache: Cache, token: jax.Array, start: jax.Array, steps: int
) -> tuple[jax.Array, Cache]:
    """Tokens [steps, B] that follow token [B] at position start, and the cache."""

    def step(carry, position):
        cache, token = carry
        logits, cache = forward(config, weights, cache, token[:, None], position)
        token = jnp.argmax(logits, -1)
        return (cache, token), token

    (cache, _), tokens = jax.lax.scan(step, (cache, token), start + jnp.arange(steps))
    return tokens, cache


@functools.partial(jax.jit, static_argnums=(0, 3))
def prefill(
    config: Config, weights: Mapping, prompt: jax.Array, length: int
) -> tuple[jax.Array, Cache]:
    """Logits [B, V] that follow a prompt [B, T], and a cache for sequences of this length."""
    return forward(config, weights, empty_cache(config, len(prompt), length), prompt, 0)


def generate(config: Config, weights: Mapping, prompt: jax.Array, new: int) -> list[jax.Array]:
    """Greedy tokens that follow a prompt [B, T], in arrays [B] and [new - 1, B]."""
    t = prompt.shape[1]
    logits, cache = prefill(config, weights, prompt, t + new - 1)
    first = jnp.argmax(logits, -1)
    if new == 1:
        return [first]
    return [first, greedy_steps(config, weights, cache, first, t, new - 1)[0]]


def quantized(config: Config, weights: Mapping, format: str) -> dict:
    """The weights with kernels of this format, and a head where embeddings are tied."""
    if config.tied_embeddings:
        weights = {**weights, "head": {"kernel": weights["embed"]["embedding"].T}}

    def visit(node):
        if not isinstance(node, Mapping):
            return node
        node = {name: visit(child) for name, child in node.items()}
        if "kernel" in node:
            node |= _quantize(node["kernel"], format)
        return node

    return visit(weights)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(kernel, format):
    """What takes the place of a kernel [K, N]."""
    if format == "fp8":
        values, scale = quantize_rows(kernel.T)
        return {"kernel": values.T, "scale": scale}
    w = jaxkern.quantize(kernel.T.astype(jnp.bfloat16), format, **FOUR_BIT[format])
    rows = {"kernel": w.values.T, "block_scale": w.scale.T.astype(jnp.bfloat16)}
    if w.tensor_scale is not None:
        rows["scale"] = jnp.broadcast_to(w.tensor_scale[:, 0], len(w.values))
    return rows
