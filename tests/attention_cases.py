"""Attention problems, and two ways to solve them: in float64 NumPy, and rounded to 16 bits."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import jaxkern
from jaxkern.testing import assert_close_to_reference, random_normal

RESULTS = ("out", "lse", "dquery", "dkey", "dvalue")
MASKED_LSE = -0.7 * float(np.finfo(np.float32).max)  # of a query that sees no key


class AttentionCase(NamedTuple):
    batch: int
    query_length: int
    key_length: int
    key_heads: int
    group: int
    head_dim: int
    dtype: str
    seed: int
    scale: float | None = None
    is_causal: bool = False
    window: int | tuple[int, int] | None = None
    alignment: str = "top_left"
    lengths: str | None = None  # of "queries", "keys" or "both"
    segments: str | None = None  # a kind of _SEGMENTS
    soft_cap: float | None = None
    deterministic: bool = False
    lse_cotangent: bool = True

    @property
    def heads(self):
        return self.key_heads * self.group

    def operands(self, dtype=None):
        """query, key, value and the cotangents dout and dlse [B, T, N]."""
        query = (self.batch, self.query_length, self.heads, self.head_dim)
        key = (self.batch, self.key_length, self.key_heads, self.head_dim)
        arrays = random_normal(self.seed, query, key, key, query, dtype=dtype or self.dtype)
        [dlse] = random_normal(self.seed + 1, query[:3], dtype="float32")
        return *arrays, dlse if self.lse_cotangent else jnp.zeros_like(dlse)

    def query_lengths(self):
        """[B], also below zero and beyond the end; or None."""
        if self.lengths not in ("queries", "both"):
            return None
        rng = np.random.default_rng(self.seed + 2)
        return rng.integers(-2, self.query_length + 3, self.batch, np.int32)

    def key_lengths(self):
        if self.lengths not in ("keys", "both"):
            return None
        rng = np.random.default_rng(self.seed + 3)
        return rng.integers(-2, self.key_length + 3, self.batch, np.int32)

    def segment_ids(self):
        """Query ids [B, T] and key ids [B, S], or None. The same ones if T == S and none lacks."""
        if self.segments is None:
            return None
        rng = np.random.default_rng(self.seed + 4)
        make = _SEGMENTS[self.segments]
        query = make(rng, self.batch, self.query_length)
        if self.segments == "missing":
            return query, make(rng, self.batch, self.key_length) // 2 * 2
        if self.query_length == self.key_length:
            return query, query
        return query, make(rng, self.batch, self.key_length)

    def options(self):
        """The arguments of jaxkern.dot_product_attention."""
        ids = self.segment_ids()
        return {
            "scale": self.scale,
            "is_causal": self.is_causal,
            "local_window_size": self.window,
            "alignment": self.alignment,
            "query_seq_lengths": self.query_lengths(),
            "key_value_seq_lengths": self.key_lengths(),
            "segment_ids": ids[0] if ids is not None and ids[0] is ids[1] else ids,
            "logits_soft_cap": self.soft_cap,
            "deterministic": self.deterministic,
        }

    def live(self):
        """[B, T]: which queries are within their sequence."""
        ends = np.full(self.batch, self.query_length)
        if (given := self.query_lengths()) is not None:
            ends = given.clip(0, self.query_length)
        return np.arange(self.query_length) < ends[:, None]

    def seen(self):
        """[B, T, S]: which keys a query sees, element by element as the contract has it."""
        key_ends = np.full(self.batch, self.key_length)
        if (given := self.key_lengths()) is not None:
            key_ends = given.clip(0, self.key_length)
        query_ends = self.live().sum(1)
        b, t, s = np.ogrid[: self.batch, : self.query_length, : self.key_length]
        own = t + (key_ends - query_ends)[b] if self.alignment == "bottom_right" else t
        seen = self.live()[:, :, None] & (s < key_ends[b])
        if self.is_causal:
            seen &= s <= own
        if self.window is not None:
            left, right = (self.window,) * 2 if isinstance(self.window, int) else self.window
            seen &= (own - left <= s) & (s <= own + right)
        if (ids := self.segment_ids()) is not None:
            seen &= ids[0][:, :, None] == ids[1][:, None, :]
        return seen


def _packed(rng, batch, length):
    """Runs of rising ids, as documents are packed."""
    return np.cumsum(rng.random((batch, length)) < 4 / (length + 1), axis=1, dtype=np.int32)


def _padded(rng, batch, length):
    """Packed, and the last part is padding, which has an id of its own."""
    ends = rng.integers(0, length + 1, (batch, 1))
    return np.where(np.arange(length) < ends, _packed(rng, batch, length), -1).astype(np.int32)


def _unsorted(rng, batch, length):
    return rng.integers(-2, 3, (batch, length), np.int32)


_SEGMENTS = {
    "packed": _packed,
    "padded": _padded,
    "unsorted": _unsorted,
    "missing": _packed,  # and no key has an odd id
}


def random_attention_case(seed: int) -> AttentionCase:
    """A problem without variants. Lengths are small, odd, or next to a multiple of 64."""
    rng = np.random.default_rng(seed)

    def length():
        kind = rng.integers(3)
        if kind == 0:
            return int(rng.integers(1, 64))
        if kind == 1:
            return int(rng.integers(64, 400))
        return int(64 * rng.integers(1, 6) + rng.integers(-1, 2))

    query_length = length()
    return AttentionCase(
        batch=int(rng.integers(1, 4)),
        query_length=query_length,
        key_length=query_length if rng.random() < 0.4 else length(),
        key_heads=int(rng.integers(1, 4)),
        group=int(rng.integers(1, 5)),
        head_dim=int(rng.choice([64, 128, 256])),
        dtype=str(rng.choice(["bfloat16", "float16"])),
        is_causal=bool(rng.integers(2)),
        scale=None if rng.random() < 0.7 else float(rng.uniform(0.02, 0.5)),
        seed=1000 * seed,
    )


@st.composite
def attention_variants(draw, longest, head_dims=(64, 128, 256), dtypes=("bfloat16", "float16")):
    """Any combination of what the kernel supports, with up to `longest` queries and keys."""
    length = st.integers(1, longest)
    if longest >= 64:
        tiles = st.builds(
            lambda count, more: 64 * count + more,
            st.integers(1, longest // 64),
            st.integers(-1, 1),
        )
        length = st.one_of(length, tiles)
    query_length = draw(length)
    reach = st.integers(0, longest)
    return AttentionCase(
        batch=draw(st.integers(1, 3)),
        query_length=query_length,
        key_length=draw(st.one_of(st.just(query_length), length)),
        key_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 4)),
        head_dim=draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
        scale=draw(st.sampled_from([None, 0.05, 0.4])),
        is_causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), reach, st.tuples(reach, reach))),
        alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        lengths=draw(st.sampled_from([None, "queries", "keys", "both"])),
        segments=draw(st.sampled_from([None, *_SEGMENTS])),
        soft_cap=draw(st.sampled_from([None, 1.0, 20.0])),
        deterministic=draw(st.booleans()),
        lse_cotangent=draw(st.booleans()),
    )


def oracle(case, query, key, value, dout, dlse):
    """out, lse, dquery, dkey, dvalue in float64, from the formulas and without any blocking."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (query, key, value, dout, dlse))
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    kn, vn = (np.repeat(x, case.group, axis=2) for x in (k, v))
    seen, live = case.seen()[:, None], case.live()[:, None, :, None]
    logits = np.einsum("btnh,bsnh->bnts", q, kn) * scale
    slope = scale
    if case.soft_cap is not None:
        capped = np.tanh(logits / case.soft_cap)
        logits, slope = case.soft_cap * capped, scale * (1 - capped**2)
    some = seen.any(-1, keepdims=True)
    peak = np.where(some, np.where(seen, logits, -np.inf).max(-1, keepdims=True), 0)
    weights = np.where(seen, np.exp(np.minimum(logits - peak, 0)), ~some)
    total = weights.sum(-1, keepdims=True)
    lse = np.where(some, np.log(total) + peak, MASKED_LSE)[..., 0].swapaxes(1, 2)
    weights = weights / total * live
    out = np.einsum("bnts,bsnh->btnh", weights, vn)

    dweights = np.einsum("btnh,bsnh->bnts", dout, vn)
    delta = (dout * out).sum(-1) - dlse
    dlogits = weights * (dweights - delta.swapaxes(1, 2)[..., None]) * some * slope
    dquery = np.einsum("bnts,bsnh->btnh", dlogits, kn)
    dkey = np.einsum("bnts,btnh->bsnh", dlogits, q)
    dvalue = np.einsum("bnts,btnh->bsnh", weights, dout)

    def gather(x):  # query heads of a group share a key head
        return x.reshape(*k.shape[:3], case.group, case.head_dim).sum(3)

    return out, lse, dquery, gather(dkey), gather(dvalue)


def rounded_attention(case, query, key, value, dout, dlse):
    """out, lse, dquery, dkey, dvalue by the formulas, every intermediate rounded to the dtype.

    The logits and sums are float32, as in any attention in 16 bits.
    """
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    dtype, single = query.dtype, jnp.float32
    bits = jnp.finfo(dtype)
    query, key, value, dout = (x.astype(single) for x in (query, key, value, dout))
    key, value = (jnp.repeat(x, case.group, axis=2) for x in (key, value))
    seen, live = case.seen()[:, None], case.live()[:, None, :, None]
    some = seen.any(-1, keepdims=True)

    def product(spec, *operands):
        return jnp.einsum(spec, *operands, precision="highest")

    def rounded(x):  # a conversion there and back is what XLA may leave out
        return jax.lax.reduce_precision(x, bits.nexp, bits.nmant)

    logits = product("btnh,bsnh->bnts", query, key) * scale
    slope = 1.0
    if case.soft_cap is not None:
        capped = jnp.tanh(logits / case.soft_cap)
        logits, slope = case.soft_cap * capped, 1 - capped**2
    logits = jnp.where(seen, logits, jnp.where(some, -jnp.inf, 0))
    sums = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    weights = rounded(jnp.exp(logits - sums) * live)
    lse = jnp.where(some, sums, jnp.float32(MASKED_LSE))[..., 0].swapaxes(1, 2)
    out = rounded(product("bnts,bsnh->btnh", weights, value))
    dweights = rounded(product("btnh,bsnh->bnts", dout, value))
    delta = (dout * out).sum(-1) - dlse
    dlogits = weights * (dweights - delta.swapaxes(1, 2)[..., None]) * slope
    dlogits = rounded(jnp.where(some, dlogits, 0))
    dquery = scale * product("bnts,bsnh->btnh", dlogits, key)
    dkey = scale * product("bnts,btnh->bsnh", dlogits, query)
    dvalue = product("bnts,btnh->bsnh", weights, dout)

    def gather(x):  # query heads of a group share a key head
        return x.reshape(*x.shape[:2], -1, case.group, case.head_dim).sum(3)

    results = out, dquery, gather(dkey), gather(dvalue)
    out, *gradients = (x.astype(dtype) for x in results)
    return out, lse, *gradients


def with_gradients(attend, query, key, value, dout, dlse):
    """out, lse, dquery, dkey, dvalue of attend(query, key, value), jitted."""

    @jax.jit
    def run(query, key, value, dout, dlse):
        results, pullback = jax.vjp(attend, query, key, value)
        return (*results, *pullback((dout, dlse)))

    return run(query, key, value, dout, dlse)


def solve(case, implementation, arrays):
    """out, lse, dquery, dkey, dvalue by jaxkern."""
    attend = functools.partial(
        jaxkern.dot_product_attention,
        **case.options(),
        implementation=implementation,
        return_residual=True,
    )
    return with_gradients(attend, *arrays)


def check_case(case, implementation):
    """Values and gradients by the tolerance rule, with a cotangent of the log-sum-exp."""
    arrays = case.operands()
    got = solve(case, implementation, arrays)
    ref32 = solve(case, "xla", [x.astype(jnp.float32) for x in arrays])
    same = jax.jit(functools.partial(rounded_attention, case))(*arrays)
    for name, *compared in zip(RESULTS, got, ref32, same, strict=True):
        atol = {"bfloat16": 2e-3, "float16": 3e-4, "float32": 2e-4}[compared[0].dtype.name]
        try:
            assert_close_to_reference(*compared, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{name} of {case}: {error}") from error
