"""jaxkern.linen's attention layers and attention_fn against flax's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxkern.linen
from jaxkern.testing import assert_close_to_reference

B, T, S, FEATURES = 2, 6, 9, 12
BIAS = nn.initializers.normal()
NAMES = ("MultiHeadDotProductAttention", "MultiHeadAttention")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def layers(name=NAMES[0], is_causal=False, implementation=None, **options):
    """flax's layer, and ours."""
    options = {"num_heads": 4, "qkv_features": 32, "bias_init": BIAS} | options
    ours = getattr(jaxkern.linen, name)(
        **options, is_causal=is_causal, implementation=implementation
    )
    return getattr(nn, name)(**options), ours


def results(layer, variables, *inputs, **call):
    """Output, and gradients for parameters and inputs, as a list of arrays."""

    @jax.jit
    def run(variables, inputs):
        def loss(variables, inputs):
            out = layer.apply(variables, *inputs, **call)
            weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, inputs)
        return out, grads

    return jax.tree.leaves(run(variables, inputs))


def assert_same(theirs, ours, *inputs, their_mask=None, **call):
    """Output and every gradient of `ours` as close to float32 arithmetic as `theirs` are."""
    variables = theirs.init(jax.random.key(0), *inputs)
    single = ours.dtype in (None, jnp.float32)
    slack = 2e-5 if single else float(jnp.finfo(ours.dtype).eps)
    got = results(ours, variables, *inputs, **call)
    if their_mask is not None:
        call["mask"] = their_mask
    same = results(theirs, variables, *inputs, **call)
    ref = same if single else results(theirs.clone(dtype=jnp.float32), variables, *inputs, **call)
    assert len(got) == len(same)
    for x, y, z in zip(got, same, ref, strict=True):
        assert_close_to_reference(x, z, y, atol=slack * max(1, jnp.abs(z).max()))


CAUSAL = nn.make_causal_mask(np.ones((B, T)))
PADDING = (np.arange(T) < np.array([[4], [6]]))[:, None, None]  # [B, 1, 1, T]
CASES = {
    "self": ({}, {}),
    "is_causal": ({"is_causal": True}, {"their_mask": CAUSAL}),
    "float mask": ({}, {"mask": CAUSAL}),
    "bool mask": ({"normalize_qk": True}, {"mask": PADDING}),
    "mask and is_causal": (
        {"is_causal": True},
        {"mask": PADDING, "their_mask": PADDING * CAUSAL},
    ),
    "other widths": ({"use_bias": False, "out_features": 5}, {}),
    "float32 softmax": ({"force_fp32_for_softmax": True}, {}),
    "dropout off": ({"dropout_rate": 0.5}, {"deterministic": True}),
    "dropout off for the layer": ({"dropout_rate": 0.5, "deterministic": True}, {}),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, jnp.float32) for case in CASES if "dropout" not in case),
        *((case, jnp.bfloat16) for case in ("is_causal", "bool mask", "float32 softmax")),
    ],
)
def test_outputs_and_gradients_are_flax_s(case, dtype):
    options, call = CASES[case]
    assert_same(*layers(dtype=dtype, **options), normal(3, B, T, FEATURES), **call)


@pytest.mark.parametrize("case", ["dropout off", "dropout off for the layer"])
def test_dropout_that_is_off(case):
    options, call = CASES[case]
    theirs, ours = layers(**options)
    x = normal(3, B, T, FEATURES)
    variables = layers()[0].init(jax.random.key(0), x)
    np.testing.assert_allclose(
        ours.apply(variables, x, **call), theirs.apply(variables, x, **call), atol=1e-5
    )


@pytest.mark.parametrize("inputs", [2, 3])
def test_cross_attention(inputs):
    others = [normal(i, B, S, 7) for i in range(inputs - 1)]
    assert_same(*layers(), normal(3, B, T, FEATURES), *others)


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_number_of_batch_axes(batch):
    assert_same(*layers(), normal(3, *batch, T, FEATURES))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_have_flax_s_names_in_a_model(name):
    def model(library):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = x + getattr(library, name)(num_heads=2)(x)
                return x + getattr(library, name)(num_heads=3)(x)

        return Model()

    x = normal(3, B, T, FEATURES)
    theirs, ours = model(nn), model(jaxkern.linen)
    variables = theirs.init(jax.random.key(0), x)
    mine = ours.init(jax.random.key(0), x)
    assert jax.tree.structure(mine) == jax.tree.structure(variables)
    for got, want in zip(jax.tree.leaves(mine), jax.tree.leaves(variables), strict=True):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), atol=1e-5)


def test_self_attention_and_its_deprecation():
    theirs, ours = layers("SelfAttention", is_causal=True)
    x = normal(3, B, T, FEATURES)
    with pytest.warns(DeprecationWarning, match="SelfAttention"):
        variables = theirs.init(jax.random.key(0), x)
        want = theirs.apply(variables, x, CAUSAL)
        got = ours.apply(variables, x)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_decoding_is_flax_s_and_the_causal_layer_s(is_causal):
    theirs, ours = layers(decode=True, is_causal=is_causal)
    x = normal(3, B, T, FEATURES)
    variables = theirs.init(jax.random.key(0), x)

    def decode(layer):
        @jax.jit
        def step(cache, x):
            return layer.apply({**variables, **cache}, x, mutable=["cache"])

        cache, outs = {"cache": variables["cache"]}, []
        for i in range(T):
            out, cache = step(cache, x[:, i : i + 1])
            outs.append(out)
        return jnp.concatenate(outs, axis=1), cache

    (got, cache), (want, flax_cache) = decode(ours), decode(theirs)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert jax.tree.structure(cache) == jax.tree.structure(flax_cache)
    for ours_leaf, leaf in zip(jax.tree.leaves(cache), jax.tree.leaves(flax_cache), strict=True):
        np.testing.assert_allclose(ours_leaf, leaf, atol=1e-6)
    whole = ours.clone(decode=False, is_causal=True).apply({"params": variables["params"]}, x)
    np.testing.assert_allclose(got, whole, atol=1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
def test_recorded_weights_are_flax_s(is_causal):
    theirs, ours = layers(is_causal=is_causal)
    x = normal(3, B, T, FEATURES)
    variables = theirs.init(jax.random.key(0), x)
    options = {"sow_weights": True, "mutable": ["intermediates"]}
    want = theirs.apply(variables, x, mask=CAUSAL if is_causal else None, **options)
    got = ours.apply(variables, x, **options)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_equal_layers_compare_equal():
    """So that jit does not compile again for a layer made anew."""
    one, other = (layers(implementation="xla", is_causal=True)[1] for _ in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != layers(implementation="xla")[1]
    assert layers(implementation=["cuda", "xla"])[1].attention_fn.keywords["implementation"] == (
        "cuda",
        "xla",
    )


def test_a_clone_takes_its_own_options():
    _, layer = layers(implementation="xla", is_causal=True)
    assert layer.clone() == layer
    clone = layer.clone(is_causal=False, local_window_size=3)
    assert clone.attention_fn.keywords == layer.attention_fn.keywords | {
        "is_causal": False,
        "local_window_size": 3,
    }


def test_an_attention_fn_of_the_caller_is_used():
    def first_value(query, key, value):
        return jnp.broadcast_to(value[:, :1], query.shape)

    _, ours = layers(attention_fn=first_value)
    x = normal(0, B, T, FEATURES)
    out = ours.init_with_output(jax.random.key(0), x)[0]
    np.testing.assert_allclose(out, jnp.broadcast_to(out[:, :1], out.shape), atol=1e-6)
    with pytest.raises(ValueError, match="does not see.*is_causal"):
        layers(attention_fn=first_value, is_causal=True)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_fn_in_flax_s_own_layer(masked):
    """It must see the mask: linen drops what a function does not name."""
    theirs, _ = layers()
    ours = theirs.clone(attention_fn=functools.partial(jaxkern.linen.attention_fn))
    x = normal(3, B, T, FEATURES)
    variables = theirs.init(jax.random.key(0), x)
    mask = CAUSAL if masked else None
    np.testing.assert_allclose(
        ours.apply(variables, x, mask=mask), theirs.apply(variables, x, mask=mask), atol=1e-5
    )


@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_runs_where_there_is_no_mask(kernels, masked):
    _, layer = layers(num_heads=2, qkv_features=128, dtype=jnp.bfloat16, is_causal=True)
    x = jnp.ones((1, 8, 16))
    variables = layer.init(jax.random.key(0), x)
    mask = np.ones((1, 1, 8, 8)) if masked else None

    def loss(variables):
        return layer.apply(variables, x, mask=mask).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss)).trace(variables).lower(lowering_platforms=("cuda",)).as_text()
    assert ("jaxkern.attention_fwd" in text) != masked
    assert ("jaxkern.attention_bwd" in text) != masked


def einsum_class():
    return jnp.einsum


BAD = {
    "dropout": (
        {"dropout_rate": 0.1},
        {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}},
        NotImplementedError,
        "dropout_rate=0.1; wanted 0 or deterministic=True.*flax.linen.dot_product_attention",
    ),
    "einsum of weights": (
        {"qk_attn_weights_einsum_cls": einsum_class},
        {},
        NotImplementedError,
        "qk_attn_weights_einsum=",
    ),
    "einsum of values": (
        {"attn_weights_value_einsum_cls": einsum_class},
        {},
        NotImplementedError,
        "attn_weights_value_einsum=",
    ),
    "name": ({"implementation": "metal"}, {}, ValueError, "implementation.*'metal'"),
    "cuda in float32": ({"implementation": "cuda"}, {}, NotImplementedError, "dtype float32"),
    "cuda and weights": (
        {"implementation": "cuda"},
        {"sow_weights": True},
        NotImplementedError,
        "sow_weights=True; wanted implementation=None",
    ),
    "mask": ({}, {"mask": np.ones((S, T))}, ValueError, "mask"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, call, error, message = BAD[case]
    theirs, _ = layers()
    _, ours = layers(**options)
    x = normal(3, B, T, FEATURES)
    variables = theirs.init(jax.random.key(0), x)
    with pytest.raises(error, match=message):
        ours.apply(variables, x, **call)
