"""jaxkern.nnx.MultiHeadAttention and attention_fn against flax's own."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxkern.nnx
from jaxkern.testing import assert_close_to_reference

B, T, S, FEATURES = 2, 6, 9, 12


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def copied(module, **options):
    """flax's layer, ours with its weights, and both with float32 arithmetic."""
    options = {"num_heads": 4, "in_features": FEATURES, "qkv_features": 32, **options}
    options = {"decode": False, "bias_init": nnx.initializers.normal(), **options}
    theirs = module(**options, rngs=nnx.Rngs(0))
    exact = module(**{**options, "dtype": jnp.float32}, rngs=nnx.Rngs(1))
    ours = getattr(jaxkern.nnx, module.__name__)(**options, rngs=nnx.Rngs(2))
    for copy in (exact, ours):
        nnx.update(copy, nnx.state(theirs))
    return theirs, ours, exact


def results(layer, *inputs, **call):
    """Output, and gradients for parameters and inputs, as a list of arrays."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(params, inputs):
        def loss(params, inputs):
            out = nnx.merge(graph, params, rest)(*inputs, **call)
            weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return jnp.sum(out.astype(jnp.float32) * weight), out

        grads, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, inputs)
        return out, grads

    return jax.tree.leaves(run(params, inputs))


def assert_same(theirs, ours, exact, *inputs, **call):
    """Output and every gradient of `ours` as close to `exact` as `theirs` are."""
    single = ours.dtype in (None, jnp.float32)
    slack = 2e-5 if single else float(jnp.finfo(ours.dtype).eps)
    got, same = results(ours, *inputs, **call), results(theirs, *inputs, **call)
    ref = same if single else results(exact, *inputs, **call)
    assert len(got) == len(same) == len(ref)
    for x, y, z in zip(got, same, ref, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert_close_to_reference(x, z, y, atol=slack * max(1, jnp.abs(z).max()))


PADDING = np.arange(T) < np.array([[4], [6]])  # [B, T]
CASES = {
    "self": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "grouped": ({"num_kv_heads": 2}, {"is_causal": True}),
    "one key head": ({"num_kv_heads": 1}, {}),
    "normalised": ({"normalize_qk": True}, {"is_causal": True}),
    "without bias": ({"use_bias": False, "out_features": 5}, {}),
    "float causal mask": ({}, {"mask": nnx.make_causal_mask(np.ones((B, T)))}),
    "bool mask": ({"num_kv_heads": 2}, {"mask": PADDING[:, None, None, :]}),
    "mask of a head": ({}, {"mask": np.random.default_rng(0).random((1, 4, T, T)) < 0.5}),
    "mask and causal": ({}, {"mask": PADDING[:, None, None, :], "is_causal": True}),
    "dropout off": ({"dropout_rate": 0.5}, {"deterministic": True}),
    "dropout off for the layer": ({"dropout_rate": 0.5, "deterministic": True}, {}),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, jnp.float32) for case in CASES),
        *((case, jnp.bfloat16) for case in ("causal", "grouped", "normalised", "bool mask")),
    ],
)
def test_outputs_and_gradients_are_flax_s(case, dtype):
    options, call = CASES[case]
    assert_same(
        *copied(nnx.MultiHeadAttention, dtype=dtype, **options), normal(3, B, T, 12), **call
    )


@pytest.mark.parametrize("inputs", [2, 3])
def test_cross_attention(inputs):
    layers = copied(nnx.MultiHeadAttention, in_kv_features=7)
    assert_same(
        *layers, normal(3, B, T, FEATURES), *(normal(i, B, S, 7) for i in range(inputs - 1))
    )


@pytest.mark.parametrize(
    ("batch", "masked"), [((), False), ((2, 3), False), ((2, 1, 3), True), ((2, 3), True)]
)
def test_any_number_of_batch_axes(batch, masked):
    mask = np.tril(np.ones((*batch, 1, T, T), np.float32), 1) if masked else None
    layers = copied(nnx.MultiHeadAttention)
    assert_same(*layers, normal(3, *batch, T, FEATURES), mask=mask)


def test_a_mask_broadcasts_over_batch_axes():
    theirs, ours, _ = copied(nnx.MultiHeadAttention)
    x = normal(3, 2, 3, T, FEATURES)
    mask = np.random.default_rng(0).random((3, 1, T, T)) < 0.7
    want = theirs(x, mask=np.broadcast_to(mask, (2, 3, 1, T, T)))
    np.testing.assert_allclose(ours(x, mask=mask), want, atol=1e-5)


def test_a_query_with_no_key_left_gets_the_mean():
    theirs, ours, _ = copied(nnx.MultiHeadAttention)
    x, mask = normal(3, B, T, FEATURES), np.zeros((1, 1, 1, T))
    np.testing.assert_allclose(ours(x, mask=mask), theirs(x, mask=mask), atol=1e-5)
    mean = ours.out(jnp.broadcast_to(ours.value(x).mean(1, keepdims=True), (B, T, 4, 8)))
    np.testing.assert_allclose(ours(x, mask=mask), mean, atol=1e-5)


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype"),
    [
        (jnp.bfloat16, None, jnp.float32),
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.int32, None, jnp.float32),
        (jnp.float16, jnp.bfloat16, jnp.float32),
    ],
)
def test_dtype_promotion(x_dtype, dtype, param_dtype):
    theirs, ours, _ = copied(nnx.MultiHeadAttention, dtype=dtype, param_dtype=param_dtype)
    x = (3 * normal(3, B, T, FEATURES)).astype(x_dtype)
    want, got = theirs(x), ours(x)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(np.float32(got), np.float32(want), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "normalize_qk": True}])
def test_decoding_is_flax_s_and_the_causal_layer_s(options, dtype):
    theirs, ours, exact = copied(nnx.MultiHeadAttention, dtype=dtype, decode=True, **options)
    x = normal(3, B, T, FEATURES)
    for layer in (theirs, ours, exact):
        layer.init_cache((B, T, FEATURES), dtype=layer.dtype)

    @nnx.jit
    def step(layer, x):
        return layer(x)

    def decode(layer):
        return jnp.concatenate([step(layer, x[:, i : i + 1]) for i in range(T)], axis=1)

    got, same, ref = decode(ours), decode(theirs), decode(exact)
    assert_close_to_reference(got, ref, same, atol=2e-3)
    for name in ("cached_key", "cached_value", "cache_index"):
        np.testing.assert_array_equal(
            np.float32(getattr(ours, name)[...]), np.float32(getattr(theirs, name)[...])
        )
    whole = ours(x, decode=False, is_causal=True)
    assert_close_to_reference(got, ref, whole, atol=2e-3)


def test_decoding_ignores_is_causal():
    _, ours, _ = copied(nnx.MultiHeadAttention, decode=True)
    x = normal(3, B, 3, FEATURES)
    ours.init_cache((B, 3, FEATURES))
    out = [ours(x[:, i : i + 1], is_causal=True) for i in range(3)]
    want = ours(x, decode=False, is_causal=True)
    np.testing.assert_allclose(jnp.concatenate(out, axis=1), want, atol=1e-5)


def test_decoding_with_a_mask():
    theirs, ours, _ = copied(nnx.MultiHeadAttention, decode=True)
    for layer in (theirs, ours):
        layer.init_cache((B, 3, FEATURES))
    mask = np.array([1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    for i in range(3):
        x = normal(i, B, 1, FEATURES)
        np.testing.assert_allclose(ours(x, mask=mask), theirs(x, mask=mask), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow():DeprecationWarning")
def test_recorded_weights_are_flax_s():
    theirs, ours, _ = copied(nnx.MultiHeadAttention, num_kv_heads=2)
    x = normal(3, B, T, FEATURES)
    outs = [layer(x, sow_weights=True, is_causal=True) for layer in (theirs, ours)]
    np.testing.assert_allclose(outs[1], outs[0], atol=1e-6)
    want, got = (nnx.pop(layer, nnx.Intermediate)["attention_weights"] for layer in (theirs, ours))
    assert got[0].shape == (B, 4, T, T)
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)


def test_loads_a_checkpoint_of_flax_s_layer(tmp_path):
    options = {"num_kv_heads": 2, "normalize_qk": True}
    theirs, _, _ = copied(nnx.MultiHeadAttention, **options)
    other = jaxkern.nnx.MultiHeadAttention(
        4, FEATURES, 32, decode=False, rngs=nnx.Rngs(5), **options
    )
    x = normal(3, B, T, FEATURES)
    assert not np.allclose(other(x), theirs(x), atol=1e-2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.state(theirs))
        checkpointer.wait_until_finished()
        state = checkpointer.restore(tmp_path / "layer", nnx.state(other))
    nnx.update(other, state)
    np.testing.assert_allclose(other(x), theirs(x), atol=1e-5)


def test_constructor_has_flax_s_names_and_values():
    def fields(layer):
        return {k: v for k, v in vars(layer).items() if not isinstance(v, nnx.Module)}

    theirs, ours, _ = copied(nnx.MultiHeadAttention, dropout_rate=0.1, keep_rngs=False)
    parameters = inspect.signature(nnx.MultiHeadAttention.__init__).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    assert defaults.keys() == parameters.keys() - {"self", "num_heads", "in_features", "rngs"}
    del defaults["attention_fn"]
    layer = jaxkern.nnx.MultiHeadAttention(num_heads=2, in_features=4, rngs=nnx.Rngs(0), **defaults)
    assert layer.attention_fn.func is jaxkern.nnx.attention_fn
    assert fields(ours).keys() == fields(theirs).keys()
    assert jax.tree.structure(nnx.state(ours)) == jax.tree.structure(nnx.state(theirs))


def test_equal_layers_have_equal_graphs():
    """So that layers can be stacked, scanned over and compared by jit."""

    def graph(**options):
        layer = jaxkern.nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0), **options)
        return nnx.graphdef(layer)

    assert graph() == graph() and hash(graph()) == hash(graph())
    names = ["cuda", "xla"]
    assert graph(implementation=names) == graph(implementation=tuple(names)) != graph()


def test_an_attention_fn_of_the_caller_is_used():
    def first_value(query, key, value, **_):
        return jnp.broadcast_to(value[:, :1], query.shape)

    options = {"attention_fn": first_value, "decode": False, "rngs": nnx.Rngs(0)}
    layer = jaxkern.nnx.MultiHeadAttention(2, FEATURES, **options)
    x = normal(0, B, T, FEATURES)
    np.testing.assert_allclose(layer(x)[:, 3], layer.out(layer.value(x))[:, 0], atol=1e-6)
    with pytest.raises(ValueError, match="attention_fn=.*first_value.*does not see.*'xla'"):
        jaxkern.nnx.MultiHeadAttention(2, FEATURES, implementation="xla", **options)


def test_attention_fn_in_flax_s_own_layer():
    theirs, _, _ = copied(nnx.MultiHeadAttention, num_kv_heads=2)
    _, ours, _ = copied(
        nnx.MultiHeadAttention, num_kv_heads=2, attention_fn=jaxkern.nnx.attention_fn
    )
    x = normal(3, B, T, FEATURES)
    np.testing.assert_allclose(ours(x, is_causal=True), theirs(x, is_causal=True), atol=1e-5)


def test_attention_fn_adds_a_bias_and_converts_to_dtype():
    q, k, v = (normal(i, B, T, 2, 8) for i in range(3))
    bias = normal(4, 2, T, T)
    got = jaxkern.nnx.attention_fn(q, k, v, bias, dtype=jnp.bfloat16)
    want = jax.nn.dot_product_attention(q, k, v, bias[None])
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), want, atol=0.03)


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        ({}, True),
        ({"is_causal": True}, True),
        ({"mask": np.ones((1, 1, 8, 8))}, False),
        ({"is_causal": True, "mask": np.ones((1, 1, 8, 8))}, False),
    ],
)
def test_the_kernel_runs_where_there_is_no_mask(kernels, call, kernel):
    layer = jaxkern.nnx.MultiHeadAttention(
        2, 16, 128, num_kv_heads=1, dtype=jnp.bfloat16, decode=False, rngs=nnx.Rngs(0)
    )
    graph, state = nnx.split(layer)

    def loss(state, x):
        return nnx.merge(graph, state)(x, **call).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss)).trace(state, jnp.ones((1, 8, 16)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("jaxkern.attention_fwd" in text) == kernel
    assert ("jaxkern.attention_bwd" in text) == kernel


def test_dropout_says_what_to_do():
    options = {"dropout_rate": 0.1, "deterministic": False}
    theirs, ours, _ = copied(nnx.MultiHeadAttention, **options)
    x = normal(3, B, T, FEATURES)
    with pytest.raises(NotImplementedError, match="dropout_rate=0.1; wanted 0 or deterministic"):
        ours(x)
    _, ours, _ = copied(nnx.MultiHeadAttention, attention_fn=nnx.dot_product_attention, **options)
    assert not np.allclose(ours(x), ours(x, deterministic=True))


BAD = {
    "length": ({}, {"inputs_q": (B, T, 11)}, {}, ValueError, "11.*12|12.*11"),
    "features": ({}, {"inputs_q": (B, T, 12), "inputs_k": (3, S, 12)}, {}, ValueError, "batch"),
    "mask": ({}, {"inputs_q": (B, T, 12)}, {"mask": np.ones((T, S))}, ValueError, "mask"),
    "heads": ({"num_kv_heads": 3}, {}, {}, ValueError, "num_heads.*3"),
    "name": (
        {"implementation": "metal"},
        {"inputs_q": (B, T, 12)},
        {},
        ValueError,
        "implementation.*'metal'",
    ),
    "cuda in float32": (
        {"implementation": "cuda"},
        {"inputs_q": (B, T, 12)},
        {},
        NotImplementedError,
        "query has dtype float32",
    ),
    "cuda with a mask": (
        {"implementation": "cuda"},
        {"inputs_q": (B, T, 12)},
        {"mask": np.ones((1, 1, T, T))},
        NotImplementedError,
        "mask",
    ),
    "cuda and weights": (
        {"implementation": "cuda"},
        {"inputs_q": (B, T, 12)},
        {"sow_weights": True},
        NotImplementedError,
        "sow_weights=True; wanted implementation=None",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    options, inputs, call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        layer = jaxkern.nnx.MultiHeadAttention(
            **{"num_heads": 4, "in_features": 12, **options}, decode=False, rngs=nnx.Rngs(0)
        )
        layer(**{name: jnp.zeros(shape) for name, shape in inputs.items()}, **call)


@pytest.mark.parametrize(
    "shapes",
    [
        ((T, 8),) * 3,
        ((B, T, 2, 8), (T, 2, 8), (T, 2, 8)),
        ((2, 3, T, 2, 8), (3, 2, T, 2, 8), (3, 2, T, 2, 8)),
    ],
)
def test_attention_fn_rejects_shapes(shapes):
    with pytest.raises(ValueError, match="wanted .* of one rank with the same batch axes"):
        jaxkern.nnx.attention_fn(*(jnp.zeros(shape) for shape in shapes))
