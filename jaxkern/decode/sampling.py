"""sample: a token from logits."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def sample(
    logits: jax.Array,
    key: jax.Array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
) -> jax.Array:
    """A token for each row of logits, drawn from softmax(logits / temperature), int32 [B].

    top_k comes first: the top_k largest logits stay, of equal ones those of smaller tokens. Then
    top_p (Holtzman et al. 2019, arXiv:1904.09751): with the probabilities of what stayed, which add
    up to 1 again, and from the largest on, a token stays if those before it add up to less than
    top_p. So the largest one always does. Sums are float32 ones.

    Row b is drawn with jax.random.fold_in(key, b), whatever the other rows are. A row of NaN gives
    token 0.

    Args:
      logits: [B, V], computed with in float32.
      key: of jax.random.
      temperature: positive; not checked.
      top_k: from 1 on; V where it is larger, like None.
      top_p: above 0 and up to 1; not checked. None is 1.
    """
    batch, vocabulary = logits.shape
    logits = logits.astype(jnp.float32)
    logits = (logits - logits.max(-1, keepdims=True)) / temperature
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    draw = jax.vmap(jax.random.categorical)
    if top_k is None and top_p is None:
        return draw(keys, logits).astype(jnp.int32)
    logits, tokens = jax.lax.top_k(logits, min(top_k or vocabulary, vocabulary))
    if top_p is not None:
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, -1) - probabilities
        logits = jnp.where(before < top_p, logits, -jnp.inf)
    place = draw(keys, logits)
    return jnp.take_along_axis(tokens, place[:, None], axis=-1)[:, 0]


def greedy(logits: jax.Array) -> jax.Array:
    """The token with the largest logit in each row, of equal ones the smallest; int32 [B]."""
    return jnp.argmax(logits, -1).astype(jnp.int32)
