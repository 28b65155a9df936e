"""What the decode step needs of a model."""

from typing import Any

import jax
import jax.numpy as jnp


def stacked_arrays(model: Any) -> dict[str, jax.Array | None]:
    return model.stacked()
