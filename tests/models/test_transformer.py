"""The transformer: what each option does, what it sees, that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxkern.models import Config, RopeScaling, Transformer
from jaxkern.reference.rotary import frequencies, rotate
from jaxkern.testing import relative_error

SMALL = Config(
    vocabulary=32,
    layers=2,
    width=24,
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=40,
    context=16,
    rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32),
)
FAMILIES = {
    "llama": SMALL,
    "qwen2": dataclasses.replace(SMALL, rope_scaling=None, qkv_bias=True, tied_embeddings=True),
    "qwen3": dataclasses.replace(SMALL, rope_scaling=None, qk_norm=True),
}
families = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)


def make(config=SMALL, **options):
    return Transformer(config, rngs=nnx.Rngs(0), **options)


def some_tokens(batch=2, length=16, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, SMALL.vocabulary, (batch, length), np.int32)


def loss(model, tokens, **options):
    logits = model(tokens[:, :-1], **options)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@families
@pytest.mark.parametrize(
    ("dtype", "param_dtype", "result"),
    [
        (None, "float32", "float32"),
        (None, "bfloat16", "bfloat16"),
        ("float16", "float32", "float16"),
    ],
)
def test_shapes_and_dtypes(config, dtype, param_dtype, result):
    model = make(config, dtype=dtype and jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype))
    tokens = some_tokens()
    logits = model(tokens)
    assert logits.shape == (2, 16, 32) and logits.dtype == jnp.float32
    hidden, keys, values = model.forward(tokens)
    assert hidden.shape == (2, 16, 24)
    assert keys.shape == values.shape == (2, 2, 16, 2, 8)
    assert {x.dtype for x in (hidden, keys, values)} == {jnp.dtype(result)}
    np.testing.assert_array_equal(model.logits(hidden), logits)


@families
def test_parameters(config):
    block = {
        ("attention_norm", "scale"): (24,),
        ("qkv", "kernel"): (24, 8 * 8),
        ("out", "kernel"): (32, 24),
        ("mlp_norm", "scale"): (24,),
        ("gate_up", "kernel"): (24, 80),
        ("down", "kernel"): (40, 24),
    }
    if config.qkv_bias:
        block["qkv", "bias"] = (64,)
    if config.qk_norm:
        block |= {("query_norm", "scale"): (8,), ("key_norm", "scale"): (8,)}
    wanted = {("blocks", i, *path): shape for i in range(2) for path, shape in block.items()}
    wanted |= {("embed", "embedding"): (32, 24), ("norm", "scale"): (24,)}
    if not config.tied_embeddings:
        wanted["head", "kernel"] = (24, 32)
    state = nnx.to_flat_state(nnx.state(make(config)))
    assert {path: variable.shape for path, variable in state} == wanted


@families
def test_logits_start_with_the_spread_of_one(config):
    assert 0.5 < float(make(dataclasses.replace(config, width=256))(some_tokens()).std()) < 1.5


@families
def test_it_sees_the_past_alone(config):
    model, tokens = make(config), some_tokens()
    changed = tokens.copy()
    changed[:, 9] = (changed[:, 9] + 1) % 32
    one, other = model(tokens), model(changed)
    np.testing.assert_array_equal(one[:, :9], other[:, :9])
    assert (np.abs(one - other).max(-1) > 1e-4)[:, 9:].all()


def test_segments_are_as_sequences_of_their_own():
    model, tokens = make(), some_tokens(1)
    ids = jnp.array([[3] * 7 + [1] * 9])
    packed = model(tokens, segment_ids=ids)
    for part in (slice(0, 7), slice(7, 16)):
        np.testing.assert_allclose(packed[:, part], model(tokens[:, part]), atol=2e-5)
    assert np.abs(packed - model(tokens))[:, 7:].max() > 1e-2


def test_positions():
    model, tokens = make(), some_tokens()
    count = jnp.broadcast_to(jnp.arange(16), (2, 16))
    plain = model(tokens)
    np.testing.assert_array_equal(model(tokens, positions=count), plain)
    np.testing.assert_allclose(model(tokens, positions=count + 5), plain, atol=1e-4)  # as far apart
    apart = model(tokens, positions=count * jnp.array([[1], [2]]))
    np.testing.assert_allclose(apart[0], plain[0], atol=1e-6)
    assert np.abs(apart[1] - plain[1]).max() > 1e-2
    longer = some_tokens(length=20)
    positions = jnp.arange(20)[None].repeat(2, 0)
    assert model(longer, positions=positions).shape == (2, 20, 32)


@families
def test_keys_are_rotated_and_values_are_not(config):
    """Those of the first block, from its parameters."""
    model, tokens = make(config), some_tokens()
    positions = jnp.arange(16)[None] + jnp.array([[0], [30]])
    block = model.blocks[0]
    if config.qkv_bias:
        block.qkv.bias[...] = jnp.linspace(-1, 1, 64)
    if config.qk_norm:
        block.key_norm.scale[...] = jnp.linspace(1, 2, 8)
    _, keys, values = model.forward(tokens, positions=positions)
    x = model.embed.embedding[...][tokens]
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + config.norm_epsilon)
    heads = x @ block.qkv.kernel[...] + (block.qkv.bias[...] if config.qkv_bias else 0)
    heads = heads.reshape(2, 16, 8, 8)
    key, value = heads[:, :, 4:6], heads[:, :, 6:]
    if config.qk_norm:
        key = key / jnp.sqrt((key * key).mean(-1, keepdims=True) + config.norm_epsilon)
        key = key * jnp.linspace(1, 2, 8)
    np.testing.assert_allclose(values[0], value, atol=1e-5)
    np.testing.assert_allclose(keys[0], rotate(key, positions, frequencies(config)), atol=1e-5)


@families
def test_it_learns(config):
    model, tokens = make(config), some_tokens(4)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, gradients = nnx.value_and_grad(loss)(model, tokens)
        optimizer.update(model, gradients)
        return value, gradients

    losses = []
    for _ in range(8):
        value, gradients = step(model, optimizer)
        losses.append(float(value))
        norms = {path: float(jnp.linalg.norm(x[...])) for path, x in nnx.to_flat_state(gradients)}
        assert all(0 < norm < np.inf for norm in norms.values()), norms
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("recipe", ["row", "block", "tensor"])
def test_fp8_products(recipe):
    """Of the same parameters, about the same."""
    plain, fp8 = make(), make(recipe=recipe)
    tokens = some_tokens()
    (value, gradients), (wanted, wanted_gradients) = (
        nnx.value_and_grad(loss)(model, tokens) for model in (fp8, plain)
    )
    assert 0 < abs(value - wanted) < 0.05
    for (path, ours), (_, theirs) in zip(
        nnx.to_flat_state(gradients), nnx.to_flat_state(wanted_gradients), strict=True
    ):
        assert relative_error(ours[...], theirs[...]) < 0.3, path
    assert {type(block.qkv) for block in plain.blocks} == {nnx.Linear}


def test_one_hot_embeddings():
    """The same values and gradients."""
    tokens = some_tokens()
    results = [nnx.value_and_grad(loss)(make(one_hot=hot), tokens) for hot in (False, True)]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *results)
    model = make(one_hot=True, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(model(tokens), make(dtype=jnp.bfloat16)(tokens))


def test_an_attention_of_the_caller_s():
    calls = []

    def attend(query, key, value, *, is_causal, segment_ids):
        calls.append((query.shape, key.shape, value.shape, is_causal))
        mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal)

    tokens, ids = some_tokens(), jnp.arange(32).reshape(2, 16) // 5
    got = make(attention_fn=attend)(tokens, segment_ids=ids)
    np.testing.assert_allclose(got, make()(tokens, segment_ids=ids), atol=1e-5)
    assert calls == [((2, 16, 4, 8), (2, 16, 2, 8), (2, 16, 2, 8), True)] * 2


def test_models_of_the_same_options_share_compilations():
    traces = []

    @nnx.jit
    def logits(model, tokens):
        traces.append(model)
        return model(tokens)

    for implementation in (["xla"], ("xla",), None):
        logits(make(implementation=implementation), some_tokens())
    assert len(traces) == 2


@pytest.mark.parametrize("recipe", [None, "row"])
def test_the_kernels_are_reached(kernels, recipe):
    config = dataclasses.replace(FAMILIES["qwen3"], head_dim=64)
    model = make(config, recipe=recipe, implementation="cuda", dtype=jnp.bfloat16)
    graph, params = nnx.split(model)

    def run(params, tokens, ids):
        return loss(nnx.merge(graph, params), tokens, segment_ids=ids[:, :-1])

    traced = jax.jit(jax.grad(run)).trace(params, some_tokens(), jnp.zeros((2, 16), jnp.int32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    names = ["attention_fwd", "attention_bwd", "rms_norm_fwd", "rms_norm_bwd"]
    for name in names + ["scaled_matmul"] * (recipe is not None):
        assert f"jaxkern.{name}" in text
    assert "has_segments = true" in text


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (
            np.zeros((2, 16), np.float32),
            {},
            r"tokens are float32 of shape \(2, 16\), wanted",
        ),
        (np.zeros(16, np.int32), {}, r"tokens are int32 of shape \(16,\), wanted integers"),
        (
            some_tokens(length=17),
            {},
            "tokens have length 17, wanted at most the config's context 16",
        ),
        (
            some_tokens(),
            {"positions": np.arange(16)},
            r"positions have shape \(16,\), wanted \(2,",
        ),
        (some_tokens(), {"segment_ids": np.zeros((2, 15), int)}, "segment_ids"),
    ],
)
def test_errors(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        make()(tokens, **options)
