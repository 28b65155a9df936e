"""Random attention problems, and attention in float64 NumPy."""

from typing import NamedTuple

import numpy as np

from jaxkern.testing import random_normal


class AttentionCase(NamedTuple):
    batch: int
    query_length: int
    key_length: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: str
    is_causal: bool
    scale: float | None
    seed: int

    def operands(self, dtype=None):
        """query, key, value and the cotangents dout and dlse [B, T, N]."""
        query = (self.batch, self.query_length, self.heads, self.head_dim)
        key = (self.batch, self.key_length, self.key_heads, self.head_dim)
        arrays = random_normal(self.seed, query, key, key, query, dtype=dtype or self.dtype)
        return *arrays, *random_normal(self.seed + 1, query[:3], dtype="float32")


def random_attention_case(seed: int) -> AttentionCase:
    """A problem that the kernel supports. Lengths are small, odd, or next to a multiple of 64."""
    rng = np.random.default_rng(seed)

    def length():
        kind = rng.integers(3)
        if kind == 0:
            return int(rng.integers(1, 64))
        if kind == 1:
            return int(rng.integers(64, 400))
        return int(64 * rng.integers(1, 6) + rng.integers(-1, 2))

    key_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    query_length = length()
    return AttentionCase(
        batch=int(rng.integers(1, 4)),
        query_length=query_length,
        key_length=query_length if rng.random() < 0.4 else length(),
        heads=key_heads * group,
        key_heads=key_heads,
        head_dim=int(rng.choice([64, 128])),
        dtype=str(rng.choice(["bfloat16", "float16"])),
        is_causal=bool(rng.integers(2)),
        scale=None if rng.random() < 0.7 else float(rng.uniform(0.02, 0.5)),
        seed=1000 * seed,
    )


def oracle(query, key, value, dout, dlse, *, is_causal, scale):
    """out, lse, dquery, dkey, dvalue in float64, from the formulas and without any blocking."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (query, key, value, dout, dlse))
    group = q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    kn, vn = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    logits = np.einsum("btnh,bsnh->bnts", q, kn) * scale
    if is_causal:
        logits = np.where(np.tri(*logits.shape[2:], dtype=bool), logits, -np.inf)
    peak = logits.max(-1, keepdims=True)
    weights = np.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    weights /= total
    out = np.einsum("bnts,bsnh->btnh", weights, vn)
    lse = (np.log(total) + peak)[..., 0].swapaxes(1, 2)

    dweights = np.einsum("btnh,bsnh->bnts", dout, vn)
    delta = (dout * out).sum(-1) - dlse
    dlogits = weights * (dweights - delta.swapaxes(1, 2)[..., None]) * scale
    dquery = np.einsum("bnts,bsnh->btnh", dlogits, kn)
    dkey = np.einsum("bnts,btnh->bsnh", dlogits, q)
    dvalue = np.einsum("bnts,btnh->bsnh", weights, dout)

    def gather(x):  # query heads of a group share a key head
        return x.reshape(*k.shape[:3], group, k.shape[3]).sum(3)

    return out, lse, dquery, gather(dkey), gather(dvalue)
