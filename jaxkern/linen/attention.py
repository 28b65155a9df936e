"""Multi-head attention for Flax linen."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

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
    module: nn.Module | None = None,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
    attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
    is_causal: bool = False,
    segment_ids: _flax.SegmentIds = None,
    key_value_seq_lengths: jax.typing.ArrayLike | None = None,
    local_window_size: _flax.Window = None,
    logits_soft_cap: float | None = None,
    alignment: str = "top_left",
    deterministic_backward: bool = False,
    implementation: _flax.Implementation = None,
) -> jax.Array:
    """`jaxkern.dot_product_attention` as the `attention_fn` of linen's attention layers.

    The kernel runs where there is no mask and no bias. A causal mask given as an array looks like
    any other mask, so ask for it with `is_causal=True`, here or as the layer's attribute.

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
        precision: accepted for flax; unused.
        module: the module that records the attention weights (`sow_weights=True`). Weights exist
            only in flax's own function, which then answers the call.
        force_fp32_for_softmax: accepted for flax; the softmax is always float32.
        qk_attn_weights_einsum: must be None.
        attn_weights_value_einsum: must be None.
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
        NotImplementedError: dropout; an einsum; an `implementation` by name that cannot answer
            the call; `module` next to what flax's function lacks.
        ValueError: ranks or shapes that do not fit.
    """
    _flax.reject_dropout("jaxkern.linen", "flax.linen", dropout_rate, deterministic)
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise NotImplementedError(
            "jaxkern.linen.attention_fn takes no einsum, got qk_attn_weights_einsum="
            f"{qk_attn_weights_einsum!r} and attn_weights_value_einsum="
            f"{attn_weights_value_einsum!r}; wanted None, or "
            "attention_fn=flax.linen.dot_product_attention"
        )
    beyond_flax = {
        "segment_ids": segment_ids,
        "key_value_seq_lengths": key_value_seq_lengths,
        "local_window_size": local_window_size,
        "logits_soft_cap": logits_soft_cap,
        "alignment": alignment,
    }
    if module is not None:
        _flax.reject_sowing("jaxkern.linen", implementation, beyond_flax)
        if is_causal:
            causal = jnp.tri(query.shape[-3], key.shape[-3], dtype=bool)
            mask = causal if mask is None else jnp.logical_and(mask, causal)
        return nn.dot_product_attention(
            query, key, value, bias, mask, dtype=dtype, module=module, force_fp32_for_softmax=True
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


class _KernelAttention(nn.Module):
    """Puts jaxkern's attention function into one of flax's attention layers."""

    attention_fn: Callable[..., jax.Array] | None = None
    implementation: _flax.Implementation = None
    is_causal: bool = False
    local_window_size: _flax.Window = None
    logits_soft_cap: float | None = None
    alignment: str = "top_left"
    deterministic_backward: bool = False

    def __post_init__(self):
        self.attention_fn = _flax.bind(
            attention_fn,
            self.attention_fn,
            implementation=self.implementation,
            is_causal=self.is_causal and not self.decode,
            local_window_size=self.local_window_size,
            logits_soft_cap=self.logits_soft_cap,
            alignment=self.alignment,
            deterministic_backward=self.deterministic_backward,
        )
        super().__post_init__()

    def __call__(self, *args, segment_ids: _flax.SegmentIds = None, **kwargs) -> jax.Array:
        """Attention as flax's layer, which has all arguments but `segment_ids`.

        Args:
            segment_ids: [..., T] where T == S, or a pair [..., T] and [..., S]: packed sequences do
                not see each other. S is the length of the cache when decoding.
        """
        windowed = self.decode and _flax.window_of(self.attention_fn) is not None
        cached = windowed and self.has_variable("cache", "cache_index")
        index = self.get_variable("cache", "cache_index") if cached else None
        with _flax.call_options(self.attention_fn, segment_ids, index):
            return super().__call__(*args, **kwargs)


class MultiHeadDotProductAttention(_KernelAttention, nn.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` on `jaxkern.dot_product_attention`.

    Attributes, parameters, decode cache and results are flax's, so its checkpoints load. The
    kernel runs where the caller gives no mask; for a causal layer set `is_causal` and give no
    mask. Decoding installs a mask of its own and runs on the reference; a window is then around
    the place in the cache. Active dropout raises NotImplementedError.

    Attributes:
        attention_fn: a function to use in place of jaxkern's.
        implementation: as in `jaxkern.dot_product_attention`; default: the kernel where it
            supports the call, else pure JAX.
        is_causal: query t sees keys 0 to t only. Ignored when decoding, where the one query sees
            every key of the cache.
        local_window_size: (left, right) or one int for both: how far a query sees.
        logits_soft_cap: as in `jaxkern.dot_product_attention`.
        alignment: as in `jaxkern.dot_product_attention`.
        deterministic_backward: whether gradients repeat bitwise; `deterministic` is about dropout.
    """


class MultiHeadAttention(_KernelAttention, nn.MultiHeadAttention):
    """`MultiHeadDotProductAttention` by its other name, as in flax."""


class SelfAttention(_KernelAttention, nn.SelfAttention):
    """`flax.linen.SelfAttention` on `jaxkern.dot_product_attention`.

    See `MultiHeadDotProductAttention`. Flax deprecates this layer and warns in the call.
    """
