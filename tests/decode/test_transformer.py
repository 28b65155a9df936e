"""jaxkern.models.Transformer, packed and decoded."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from decode_model import CONFIGS
from flax import nnx

from jaxkern.decode import KVCache, decode_step, generate, pack_weights, prefill
from jaxkern.models import Transformer
from jaxkern.testing import relative_error


@pytest.mark.parametrize("name", list(CONFIGS))
def test_logits(name):
    """Those that the model itself gives."""
    config = CONFIGS[name]
    options = {"dtype": jnp.float32, "param_dtype": jnp.bfloat16}
    model = Transformer(config, rngs=nnx.Rngs(0), **options)
    if config.qkv_bias:  # which starts with zeros
        for block in model.blocks:
            block.qkv.bias[...] += jnp.arange(block.qkv.bias.shape[0], dtype=jnp.bfloat16) % 3
    tokens = np.random.default_rng(0).integers(config.vocabulary, size=(2, 24), dtype=np.int32)
    weights = pack_weights(model)
    lengths = np.array([23, 11], np.int32)
    cache = prefill(weights, KVCache.create(config, 2, 24), tokens[:, :-1], lengths)
    logits, _ = decode_step(weights, cache, tokens[np.arange(2), lengths])
    wanted = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)[np.arange(2), lengths]
    assert relative_error(logits, wanted) < 0.012

    got = generate(weights, tokens, max_new_tokens=1, lengths=lengths + 1)
    np.testing.assert_array_equal(got.tokens[:, 0], logits.argmax(-1))


def test_no_flax():
    """Only the model needs it."""
    program = "import sys, jaxkern.decode; assert 'flax' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
