"""Multi-head attention for Flax nnx."""

import jax
from flax import nnx

from jaxkern import _flax


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    module: nnx.Module | None = None,
    is_causal: bool = False,
    segment_ids: _flax.SegmentIds = None,
    key_value_seq_lengths: jax.typing.ArrayLike | None = None,
    local_window_size: _flax.Window = None,
    logits_soft_cap: float | None = None,
    alignment: str = "top_left",
    deterministic_backward: bool = False,
    implementation: _flax.Implementation = None,
) -> jax.Array:
    """`jaxkern.dot_product_attention` as the `attention_fn` of `flax.nnx.MultiHeadAttention`.

    The kernel runs where there is no mask and no bias. A causal mask given as an array looks like
    any other mask, so ask for it with `is_causal=True` in the call of the layer.

    Args:
        query: [..., T, N, H], any number of batch axes, any real dtype.
        key: [..., S, K, H]; K divides N.
        value: [..., S, K, H].
        bias: added to the logits; broadcasts to [..., N, T, S].
        mask: zero or False where a query must not see a key; broadcasts to [..., N, T, S]; any
            dtype (flax passes float32 when decoding).
        dropout_rng: accepted for flax; unused.
        dropout_rate: probability of dropping a weight; must be 0 unless `deterministic`.
        broadcast_dropout: accepted for flax; unused.
        deterministic: whether dropout is off.
        dtype: dtype of the computation and the result; default: what the operands promote to.
        precision: accepted for flax; unused, as in flax's own fast path.
        module: the module that records the attention weights (`sow_weights=True`). Weights exist
            only in flax's own function, which then answers the call.
        is_causal: query t sees keys 0 to t only.
        segment_ids: [..., T], or a pair [..., T] and [..., S], as in
            `jaxkern.dot_product_attention`: packed sequences do not see each other.
        key_value_seq_lengths: keys from there on are left out; broadcasts to [...].
        local_window_size: (left, right) or one int for both: how far a query sees.
        logits_soft_cap: as in `jaxkern.dot_product_attention`.
        alignment: as in `jaxkern.dot_product_attention`.
        deterministic_backward: `deterministic` of `jaxkern.dot_product_attention`; flax's argument
            of that name is about dropout.
        implementation: as in `jaxkern.dot_product_attention`.

    Returns:
        [..., T, N, H] in `dtype`.

    Raises:
        NotImplementedError: dropout; an `implementation` by name that cannot answer the call;
            `module` next to what flax's function lacks.
        ValueError: ranks or shapes that do not fit.
    """
    _flax.reject_dropout("jaxkern.nnx", "flax.nnx", dropout_rate, deterministic)
    beyond_flax = {
        "segment_ids": segment_ids,
        "key_value_seq_lengths": key_value_seq_lengths,
        "local_window_size": local_window_size,
        "logits_soft_cap": logits_soft_cap,
        "alignment": alignment,
    }
    if module is not None:
        _flax.reject_sowing("jaxkern.nnx", implementation, beyond_flax)
        return nnx.dot_product_attention(
            query, key, value, bias, mask, dtype=dtype, module=module, is_causal=is_causal
        )
    return _flax.attend(
        query,
        key,
        value,
        bias,
        mask,
        dtype=dtype,
        is_causal=is_causal,
        **beyond_flax,
        deterministic=deterministic_backward,
        implementation=implementation,
    )


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` on `jaxkern.dot_product_attention`.

    Constructor, parameters, decode cache and results are flax's, so its checkpoints load. The
    kernel runs where the caller gives no mask; for a causal layer call it with `is_causal=True`
    and no mask. Decoding installs a mask of its own and runs on the reference; a window is then
    around the place in the cache.

    Args:
        *args: as for flax: num_heads, in_features, qkv_features, out_features, num_kv_heads,
            in_kv_features.
        local_window_size: (left, right) or one int for both: how far a query sees.
        logits_soft_cap: as in `jaxkern.dot_product_attention`.
        alignment: as in `jaxkern.dot_product_attention`.
        deterministic_backward: whether gradients repeat bitwise; `deterministic` is about dropout.
        implementation: as in `jaxkern.dot_product_attention`; default: the kernel where it
            supports the call, else pure JAX.
        **kwargs: as for flax. An `attention_fn` takes the place of jaxkern's.

    Raises:
        ValueError: one of these together with an `attention_fn`; what flax rejects.
        NotImplementedError: in the call, for active dropout.
    """

    def __init__(
        self,
        *args,
        local_window_size: _flax.Window = None,
        logits_soft_cap: float | None = None,
        alignment: str = "top_left",
        deterministic_backward: bool = False,
        implementation: _flax.Implementation = None,
        **kwargs,
    ):
        function = _flax.bind(
            attention_fn,
            kwargs.pop("attention_fn", None),
            local_window_size=local_window_size,
            logits_soft_cap=logits_soft_cap,
            alignment=alignment,
            deterministic_backward=deterministic_backward,
            implementation=implementation,
        )
        super().__init__(*args, attention_fn=function, **kwargs)

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        decode: bool | None = None,
        is_causal: bool = False,
        segment_ids: _flax.SegmentIds = None,
        **kwargs,
    ) -> jax.Array:
        """Attention of `inputs_q` [..., T, in_features] over `inputs_k` and `inputs_v`.

        Args:
            inputs_q: [..., T, in_features].
            inputs_k: [..., S, in_kv_features]; default: `inputs_q`.
            inputs_v: [..., S, in_kv_features]; default: `inputs_k`.
            decode: write one position into the cache and attend over what it holds. Overrides
                the constructor's.
            is_causal: query t sees keys 0 to t only. Ignored when decoding, where the one query
                sees every key of the cache.
            segment_ids: [..., T] where T == S, or a pair [..., T] and [..., S]: packed sequences do
                not see each other. S is the length of the cache when decoding.
            **kwargs: as for flax: mask, deterministic, rngs, sow_weights, out_sharding, ...

        Returns:
            [..., T, out_features].
        """
        decoding = self.decode if decode is None else decode
        windowed = decoding and _flax.window_of(self.attention_fn) is not None
        index = self.cache_index[...] if windowed and self.cache_index is not None else None
        with _flax.call_options(self.attention_fn, segment_ids, index):
            return super().__call__(
                inputs_q,
                inputs_k,
                inputs_v,
                decode=decode,
                is_causal=is_causal and not decoding,
                **kwargs,
            )
