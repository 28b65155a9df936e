"""A decoder-only transformer of the Llama family."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkern import _flax, dot_product_attention
from jaxkern.models.config import Config
from jaxkern.nnx import Fp8Linear, QuantizedLinear, RMSNorm
from jaxkern.reference.rotary import frequencies, rotate


class Block(nnx.Module):
    """Attention and a SwiGLU MLP (https://arxiv.org/abs/2002.05202), each added to its input.

    Parameters, with N = heads, K = kv_heads and H = head_dim: `attention_norm.scale` [width],
    `qkv.kernel` [width, (N + 2 K) H] and `qkv.bias` where there is one, query's heads first, then
    key's; `query_norm.scale` and `key_norm.scale` [H] where there are such; `out.kernel`
    [N H, width]; `mlp_norm.scale`; `gate_up.kernel` [width, 2 hidden], gate first; `down.kernel`
    [hidden, width].
    """

    def __init__(
        self,
        config: Config,
        *,
        dtype: jax.typing.DTypeLike | None,
        param_dtype: jax.typing.DTypeLike,
        recipe: str | None,
        attention_fn: Callable[..., jax.Array],
        implementation: _flax.Implementation,
        rngs: nnx.Rngs,
    ):
        c = config
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = functools.partial(
            RMSNorm, epsilon=c.norm_epsilon, implementation=implementation, **options
        )
        linear = functools.partial(nnx.Linear, use_bias=False, **options)
        if recipe is not None:  # The same parameters.
            fp8 = {"recipe": recipe, "implementation": implementation}
            linear = functools.partial(Fp8Linear, **linear.keywords, **fp8)
        # The sum of 2 * layers branches starts with the variance of one.
        small = nnx.initializers.variance_scaling(0.5 / c.layers, "fan_in", "normal")
        self.attention_norm = norm(c.width)
        self.qkv = linear(c.width, (c.heads + 2 * c.kv_heads) * c.head_dim, use_bias=c.qkv_bias)
        self.query_norm, self.key_norm = (norm(c.head_dim) if c.qk_norm else None for _ in range(2))
        self.out = linear(c.heads * c.head_dim, c.width, kernel_init=small)
        self.mlp_norm = norm(c.width)
        self.gate_up = linear(c.width, 2 * c.hidden)
        self.down = linear(c.hidden, c.width, kernel_init=small)
        self.config = config
        self.attention_fn = attention_fn

    def __call__(
        self, x: jax.Array, turn: Callable[[jax.Array], jax.Array], segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The block's [B, T, width]; its keys, rotated, and values [B, T, kv_heads, head_dim].

        Args:
            x: [B, T, width].
            turn: rotates heads [B, T, N, H] by their positions.
            segment_ids: [B, T] or None.
        """
        c = self.config
        heads = self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], -1, c.head_dim)
        query, key, value = jnp.split(heads, (c.heads, c.heads + c.kv_heads), axis=2)
        if c.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = turn(query), turn(key)
        attended = self.attention_fn(query, key, value, is_causal=True, segment_ids=segment_ids)
        x = x + self.out(attended.reshape(*x.shape[:2], -1))
        gate, up = jnp.split(self.gate_up(self.mlp_norm(x)), 2, axis=-1)
        return x + self.down(jax.nn.silu(gate) * up), key, value


class Transformer(nnx.Module):
    """Tokens to the logits of those that follow: Llama 3, Qwen2.5, Qwen3, or one of your own.

    Parameters: `embed.embedding` [vocabulary, width], `blocks[i]` as `Block` says, `norm.scale`
    [width], and `head.kernel` [width, vocabulary] but with tied embeddings.

    Args:
        config: the sizes, and what tells the families apart.
        dtype: of activations; default: what parameters promote to.
        param_dtype: of parameters.
        recipe: None, or that of `jaxkern.fp8_matmul` by which the products of the blocks are in
            FP8: "tensor", "row" or "block". Parameters stay as they are.
        one_hot: whether tokens are embedded by a product with one-hot rows. For a small vocabulary
            its gradient beats a scatter's.
        attention_fn: causal attention in place of jaxkern's, called as
            `attention_fn(query, key, value, is_causal=True, segment_ids=segment_ids)`.
        implementation: of attention, norms and FP8 products, as in
            `jaxkern.dot_product_attention`; default: the kernels where they support the call, else
            pure JAX.
        rngs: of the parameters.
    """

    def __init__(
        self,
        config: Config,
        *,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        recipe: str | None = None,
        one_hot: bool = False,
        attention_fn: Callable[..., jax.Array] | None = None,
        implementation: _flax.Implementation = None,
        rngs: nnx.Rngs,
    ):
        c = config
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        implementation = _flax.as_static(implementation)
        if attention_fn is None:
            attention_fn = _flax.Hook(dot_product_attention, implementation=implementation)
        # Logits of tied embeddings start with the variance of others.
        deviation = c.width**-0.5 if c.tied_embeddings else 1.0
        init = nnx.initializers.normal(deviation)
        self.embed = nnx.Embed(c.vocabulary, c.width, embedding_init=init, **options)
        self.blocks = nnx.List(
            Block(
                c,
                recipe=recipe,
                attention_fn=attention_fn,
                implementation=implementation,
                **options,
            )
            for _ in range(c.layers)
        )
        self.norm = RMSNorm(
            c.width, epsilon=c.norm_epsilon, implementation=implementation, **options
        )
        if c.tied_embeddings:
            self.head = None
        else:
            self.head = nnx.Linear(c.width, c.vocabulary, use_bias=False, **options)
        self.config = config
        self.one_hot = one_hot

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the tokens that follow each of `tokens`.

        Args:
            tokens: [B, T], integers below `vocabulary`.
            segment_ids: [B, T], integers: packed sequences do not see each other.
            positions: [B, T], integers; default: 0 to T - 1, also of packed sequences, since
                attention depends on distances alone.

        Returns:
            float32 [B, T, vocabulary].

        Raises:
            ValueError: shapes that do not fit; without positions, a T beyond the config's context.
        """
        x, _ = self._blocks(tokens, segment_ids, positions)
        return self.logits(self.norm(x))

    def forward(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What `logits` takes, and what a cache to decode from holds. Arguments as in the call.

        Returns:
            The hidden state after the last norm [B, T, width], and keys, which are rotated, and
            values of all layers [layers, B, T, kv_heads, head_dim].
        """
        x, cached = self._blocks(tokens, segment_ids, positions)
        keys, values = (jnp.stack(of_layers) for of_layers in zip(*cached, strict=True))
        return self.norm(x), keys, values

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., vocabulary] of `hidden` [..., width], which are not rounded."""
        if isinstance(self.head, QuantizedLinear):
            return self.head(hidden, preferred_element_type=jnp.float32)
        if self.head is None:
            kernel = self.embed.embedding[...].T
        else:
            kernel = self.head.kernel[...]
        return jnp.dot(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def _blocks(self, tokens, segment_ids, positions):
        """The last block's [B, T, width], and the (key, value) of each."""
        c = self.config
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens are {tokens.dtype} of shape {tokens.shape}, wanted integers [B, T]"
            )
        if positions is None:
            if tokens.shape[1] > c.context:
                raise ValueError(
                    f"tokens have length {tokens.shape[1]}, wanted at most the config's context "
                    f"{c.context}, or positions"
                )
            positions = jnp.arange(tokens.shape[1])[None]
        elif positions.shape != tokens.shape:
            raise ValueError(f"positions have shape {positions.shape}, wanted {tokens.shape}")
        if self.one_hot:
            table = self.embed.embedding[...].astype(self.embed.dtype)
            x = jax.nn.one_hot(tokens, c.vocabulary, dtype=table.dtype) @ table
        else:
            x = self.embed(tokens)
        turn = functools.partial(rotate, positions=positions, frequencies=frequencies(c))
        cached = []
        for block in self.blocks:
            x, key, value = block(x, turn, segment_ids)
            cached.append((key, value))
        return x, cached
