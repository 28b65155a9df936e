"""Segments, windows, soft cap and alignment of the nnx and the linen layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from lowering import custom_calls

import jaxkern.linen
import jaxkern.nnx
from jaxkern import _flax

B, T, FEATURES, HEADS, WIDTH = 2, 9, 12, 4, 32


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def capped_attention(query, key, value, mask=None, *, cap=None, **_):
    """Attention with a dense mask and a soft cap, for flax's own layers."""
    logits = jnp.einsum("...qhd,...khd->...hqk", query, key) / jnp.sqrt(query.shape[-1])
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    if mask is not None:
        logits = jnp.where(mask, logits, -1e30)
    return jnp.einsum("...hqk,...khd->...qhd", jax.nn.softmax(logits), value)


class Nnx:
    """A layer and its parameters, as functions of these."""

    def __init__(self, library, is_causal=False, width=WIDTH, **options):
        self.is_causal = is_causal
        layer = library.MultiHeadAttention(
            HEADS, FEATURES, width, rngs=nnx.Rngs(0), decode=False, **options
        )
        self.layer = layer
        self.graph, self.params, self.rest = nnx.split(layer, nnx.Param, ...)

    def __call__(self, params, *inputs, **call):
        layer = nnx.merge(self.graph, params, self.rest)
        return layer(*inputs, is_causal=self.is_causal, **call)

    def decode(self, params, x):
        layer = nnx.merge(self.graph, params, self.rest)
        layer.init_cache(x.shape)

        @nnx.jit
        def step(layer, x):
            return layer(x, decode=True, is_causal=self.is_causal)

        steps = [step(layer, x[..., i : i + 1, :]) for i in range(x.shape[-2])]
        return jnp.concatenate(steps, axis=-2)


class Linen:
    def __init__(self, library, width=WIDTH, **options):
        self.layer = library.MultiHeadAttention(HEADS, qkv_features=width, **options)
        self.params = self.layer.init(jax.random.key(0), jnp.zeros((B, T, FEATURES)))

    def __call__(self, params, *inputs, **call):
        return self.layer.apply(params, *inputs, **call)

    def decode(self, params, x):
        layer = self.layer.clone(decode=True)
        cache = layer.init(jax.random.key(0), x)["cache"]

        @jax.jit
        def step(cache, x):
            return layer.apply({**params, "cache": cache}, x, mutable=["cache"])

        outs = []
        for i in range(x.shape[-2]):
            out, variables = step(cache, x[..., i : i + 1, :])
            cache = variables["cache"]
            outs.append(out)
        return jnp.concatenate(outs, axis=-2)


OURS = {
    "nnx": functools.partial(Nnx, jaxkern.nnx),
    "linen": functools.partial(Linen, jaxkern.linen),
}
FLAX = {"nnx": functools.partial(Nnx, nnx), "linen": functools.partial(Linen, nn)}

each_library = pytest.mark.parametrize("library", OURS)

IDS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 5, 0, 0, 5, 5, 5, 0, 0]])
SAME = (IDS[:, :, None] == IDS[:, None, :])[:, None]  # [B, 1, T, T]
QUERY, KEY = np.ogrid[:T, :T]
VARIANTS = {  # options of the layer, of its call, and what they mean
    "causal": ({"is_causal": True}, {}, KEY <= QUERY, None),
    "window": ({"local_window_size": (3, 1)}, {}, (QUERY - 3 <= KEY) & (KEY <= QUERY + 1), None),
    "window of an int": ({"local_window_size": 2}, {}, abs(QUERY - KEY) <= 2, None),
    "causal window": (
        {"local_window_size": [2, 2], "is_causal": True},
        {},
        (QUERY - 2 <= KEY) & (KEY <= QUERY),
        None,
    ),
    "own key alone": ({"local_window_size": 0}, {}, QUERY == KEY, None),
    "soft cap": ({"logits_soft_cap": 0.5}, {}, None, 0.5),
    "segments": ({}, {"segment_ids": IDS}, SAME, None),
    "a pair of segments": (
        {},
        {"segment_ids": (IDS, IDS[::-1])},
        (IDS[:, :, None] == IDS[::-1][:, None, :])[:, None],
        None,
    ),
    "all": (
        {
            "local_window_size": (3, 3),
            "is_causal": True,
            "logits_soft_cap": 0.5,
            "deterministic_backward": True,
        },
        {"segment_ids": IDS},
        SAME & (QUERY - 3 <= KEY) & (KEY <= QUERY),
        0.5,
    ),
}


def results(layer, params, *inputs, **call):
    """Output, and gradients for parameters and inputs, as a list of arrays."""

    @jax.jit
    def run(params, inputs):
        out, pullback = jax.vjp(lambda *args: layer(args[0], *args[1], **call), params, inputs)
        return out, pullback(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

    return jax.tree.leaves(run(params, inputs))


def assert_close(got, wanted):
    for g, w in zip(got, wanted, strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5 * max(1, jnp.abs(w).max()))


@functools.cache
def plain_output(library):
    """Without any option; parameters do not depend on them."""
    layer = OURS[library]()
    return layer(layer.params, 3 * normal(3, B, T, FEATURES))


@each_library
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_those_of_a_dense_mask(library, variant):
    options, call, mask, cap = VARIANTS[variant]
    ours = OURS[library](**options)
    theirs = FLAX[library](attention_fn=functools.partial(capped_attention, cap=cap))
    x = 3 * normal(3, B, T, FEATURES)
    wanted = results(theirs, ours.params, x, mask=mask)
    assert_close(results(ours, ours.params, x, **call), wanted)
    assert np.abs(plain_output(library) - wanted[0]).max() > 1e-2


@each_library
def test_segments_next_to_a_mask(library):
    ours, x = OURS[library](), normal(3, B, T, FEATURES)
    mask = np.random.default_rng(0).random((B, 1, T, T)) < 0.8
    got = ours(ours.params, x, mask=mask, segment_ids=IDS)
    theirs = FLAX[library](attention_fn=capped_attention)
    seen = (mask & SAME).any(-1)[:, 0]
    wanted = theirs(ours.params, x, mask=mask & SAME)
    np.testing.assert_allclose(got[seen], wanted[seen], atol=1e-5)


@each_library
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_any_number_of_batch_axes(library, batch):
    ours, x = OURS[library](local_window_size=4), normal(3, *batch, T, FEATURES)
    ids = np.broadcast_to(IDS[0], (*batch, T))
    got = ours(ours.params, x, segment_ids=ids)
    flat = x.reshape(-1, T, FEATURES)
    wanted = ours(ours.params, flat, segment_ids=ids.reshape(-1, T))
    np.testing.assert_allclose(got, wanted.reshape(got.shape), atol=1e-6)


@each_library
def test_alignment_in_cross_attention(library):
    """The last query stands at the last key."""
    ours = OURS[library](local_window_size=(3, 0), alignment="bottom_right")
    theirs = FLAX[library](attention_fn=capped_attention)
    x, y = normal(3, B, 4, FEATURES), normal(4, B, T, FEATURES)
    own = np.arange(4)[:, None] + T - 4
    mask = (own - 3 <= np.arange(T)) & (np.arange(T) <= own)
    wanted = results(theirs, ours.params, x, y, mask=mask)
    assert_close(results(ours, ours.params, x, y), wanted)


@each_library
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local_window_size": (2, 0)},
        {"local_window_size": 3, "logits_soft_cap": 0.5},
        {"local_window_size": 0},
        {"local_window_size": (100, 100)},
        {"logits_soft_cap": 0.5, "alignment": "bottom_right"},
    ],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_decoding_is_the_causal_layer_s(library, options, is_causal):
    """Token by token, with the window around the place in the cache."""
    ours = OURS[library](**options, is_causal=is_causal)
    x = 3 * normal(3, B, T, FEATURES)
    wanted = OURS[library](**options, is_causal=True)(ours.params, x)
    np.testing.assert_allclose(ours.decode(ours.params, x), wanted, atol=2e-5)


def test_decoding_with_segments():
    """The id of the one query, and those of the cache."""
    ours = OURS["nnx"](local_window_size=(3, 0))
    x = normal(3, B, T, FEATURES)
    layer = ours.layer
    layer.init_cache(x.shape)
    steps = [
        layer(x[:, i : i + 1], decode=True, segment_ids=(IDS[:, i : i + 1], IDS)) for i in range(T)
    ]
    wanted = layer(x, is_causal=True, segment_ids=IDS)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), wanted, atol=2e-5)


@each_library
def test_the_kernel_runs(library, kernels):
    """For segments, a window and a cap together, also under remat."""
    make, flax_like = {"nnx": (Nnx, jaxkern.nnx), "linen": (Linen, jaxkern.linen)}[library]
    options = {"local_window_size": (3, 0), "logits_soft_cap": 2.0, "dtype": jnp.bfloat16}
    layer = make(flax_like, **options, width=HEADS * 64)

    @jax.checkpoint
    def loss(params, x, ids):
        return layer(params, x, segment_ids=ids).astype(jnp.float32).sum()

    x = normal(3, B, T, FEATURES)
    assert custom_calls(jax.grad(loss), layer.params, x, IDS) == {
        "attention_fwd": 1,
        "attention_bwd": 1,
    }


@each_library
def test_equal_options_make_equal_layers(library):
    options = {"local_window_size": [3, 0], "logits_soft_cap": 2.0, "alignment": "bottom_right"}

    def function(**changes):
        return OURS[library](**(options | changes)).layer.attention_fn

    assert function() == function(local_window_size=(3, 0))
    assert hash(function()) == hash(function(local_window_size=(3, 0)))
    for changes in (
        {"local_window_size": 3},
        {"logits_soft_cap": 2.5},
        {"alignment": "top_left"},
        {"deterministic_backward": True},
    ):
        assert function() != function(**changes)


@each_library
def test_an_attention_fn_of_the_caller_does_not_see_options(library):
    for options in (
        {"local_window_size": 0},
        {"logits_soft_cap": 1.0},
        {"alignment": "bottom_right"},
    ):
        with pytest.raises(ValueError, match=f"does not see {{'{next(iter(options))}'"):
            OURS[library](attention_fn=capped_attention, **options)
    layer = OURS[library](attention_fn=capped_attention)
    with pytest.raises(ValueError, match="does not see segment_ids"):
        layer(layer.params, normal(3, B, T, FEATURES), segment_ids=IDS)


@each_library
@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"local_window_size": 0}, {}),
        ({"logits_soft_cap": 1.0}, {}),
        ({"alignment": "bottom_right"}, {}),
        ({}, {"segment_ids": IDS}),
    ],
    ids=["local_window_size", "logits_soft_cap", "alignment", "segment_ids"],
)
def test_recording_weights_is_refused(library, options, call, request):
    layer = OURS[library](**options)
    name = request.node.callspec.id.split("-")[0]
    with pytest.raises(NotImplementedError, match=f"which has no {name}; wanted sow_weights=False"):
        layer(layer.params, normal(3, B, T, FEATURES), sow_weights=True, **call)


@each_library
def test_segment_ids_of_a_wrong_shape(library):
    layer = OURS[library]()
    for ids, message in (
        (IDS[:1], r"segment_ids has shape \(1, 9\), wanted .* query's batch axes \(2,\)"),
        (IDS[:, :4], r"segment_ids has shape \(2, 4\), wanted \(2, 9\)"),
        ((IDS,) * 3, "segment_ids is a tuple of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(layer.params, normal(3, B, T, FEATURES), segment_ids=ids)


@each_library
def test_ids_are_of_one_call_only(library):
    """Not of the next one, also when a call fails."""
    layer, x = OURS[library](), normal(3, B, T, FEATURES)
    wanted = layer(layer.params, x)
    assert not np.allclose(layer(layer.params, x, segment_ids=IDS), wanted, atol=1e-3)
    with pytest.raises(ValueError, match="segment_ids"):
        layer(layer.params, x, segment_ids=IDS[:1])
    np.testing.assert_array_equal(layer(layer.params, x), wanted)
    assert not _flax._of_this_call.get({})
