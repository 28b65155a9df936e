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
        implementation: as in `jaxkern.dot_product_attention`.

    Returns:
        [..., T, N, H] in `dtype`.

    Raises:
        NotImplementedError: dropout; an `implementation` by name that cannot answer the call.
        ValueError: ranks or shapes that do not fit.
    """
    _flax.reject_dropout("jaxkern.nnx", "flax.nnx", dropout_rate, deterministic)
    if module is not None:
        _flax.reject_sowing("jaxkern.nnx", implementation)
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
        implementation=implementation,
    )


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` on `jaxkern.dot_product_attention`.

    Constructor, parameters, decode cache and results are flax's, so its checkpoints load. The
    kernel runs where the caller gives no mask; for a causal layer call it with `is_causal=True`
    and no mask. Decoding installs a mask of its own and runs on the reference.

    Args:
        *args: as for flax: num_heads, in_features, qkv_features, out_features, num_kv_heads,
            in_kv_features.
        implementation: as in `jaxkern.dot_product_attention`; default: the kernel where it
            supports the call, else pure JAX.
        **kwargs: as for flax. An `attention_fn` takes the place of jaxkern's.

    Raises:
        ValueError: `implementation` together with `attention_fn`; what flax rejects.
        NotImplementedError: in the call, for active dropout.
    """

    def __init__(
        self,
        *args,
        implementation: _flax.Implementation = None,
        **kwargs,
    ):
        given = kwargs.pop("attention_fn", None)
        implementation = _flax.as_static(implementation)
        function = _flax.bind(attention_fn, given, implementation=implementation)
        super().__init__(*args, attention_fn=function, **kwargs)

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        decode: bool | None = None,
        is_causal: bool = False,
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
            **kwargs: as for flax: mask, deterministic, rngs, sow_weights, out_sharding, ...

        Returns:
            [..., T, out_features].
        """
        decoding = self.decode if decode is None else decode
        return super().__call__(
            inputs_q,
            inputs_k,
            inputs_v,
            decode=decode,
            is_causal=is_causal and not decoding,
            **kwargs,
        )
