"""generate: which tokens, when it stops, what it raises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_model import CONFIGS, FOUR_BIT_CONFIGS, forward, model_of, random_arrays

from jaxkern.decode import KVCache, Status, decode_step, generate, pack_weights, prefill

BATCH, T, NEW = 3, 9, 40
LENGTHS = np.array([9, 1, 4], np.int32)


@functools.cache
def packed(name="llama"):
    config = CONFIGS[name]
    return pack_weights(model_of(config, random_arrays(config)))


@functools.cache
def prompt(batch=BATCH, t=T):
    return np.random.default_rng(2).integers(75, size=(batch, t), dtype=np.int32)


@functools.cache
def generated(name="llama", seed=0, **options):
    key = jax.random.key(seed)
    return generate(packed(name), prompt(), max_new_tokens=NEW, key=key, **options)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_greedy_is_step_by_step(name):
    """The same tokens as a loop of one's own, and the likeliest of a float32 forward pass."""
    weights, config = packed(name), CONFIGS[name]
    cache = prefill(weights, KVCache.create(config, BATCH, T + NEW), prompt()[:, :-1])
    token, tokens = prompt()[:, -1], []
    step = jax.jit(decode_step, donate_argnums=1)
    for _ in range(NEW):
        logits, cache = step(weights, cache, token)
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        tokens.append(token)
    got = generated(name)
    np.testing.assert_array_equal(got.tokens, np.stack(tokens, 1))
    assert (got.tokens.dtype, got.lengths.dtype) == (jnp.int32, jnp.int32)
    assert got.lengths.tolist() == [NEW] * BATCH
    assert got.status.tolist() == [Status.OK] * BATCH
    sequence = np.concatenate([prompt(), got.tokens], 1)
    logits = jax.jit(forward, static_argnums=0)(config, random_arrays(config), sequence)
    logits = logits[:, T - 1 : -1]
    taken = jnp.take_along_axis(logits, got.tokens[..., None], -1)[..., 0]
    assert (logits.max(-1) - taken).max() < 0.15


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}])
def test_ragged(options):
    """A sequence gets what it gets alone; what follows a prompt is ignored."""
    options = dict(options, key=jax.random.key(1))
    run = functools.partial(generate, packed(), max_new_tokens=8, **options)
    padded = np.where(np.arange(T) < LENGTHS[:, None], prompt(), 10**6).astype(np.int32)
    together = run(padded, lengths=LENGTHS)
    assert not together.status.any()
    for b, n in enumerate(LENGTHS):
        if options.get("temperature") and b:
            continue  # its key is that of its place in the batch
        alone = run(prompt()[b : b + 1, :n])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[b])


def test_lengths_are_clipped():
    run = functools.partial(generate, packed(), prompt(), max_new_tokens=3)
    clipped = run(lengths=np.array([1, T, 2], np.int32))
    np.testing.assert_array_equal(run(lengths=np.array([-3, 99, 2])).tokens, clipped.tokens)


def test_prompts_of_one_token():
    got = generate(packed(), prompt()[:, :1], max_new_tokens=5)
    ragged = generate(packed(), prompt(), max_new_tokens=5, lengths=np.ones(BATCH, np.int32))
    np.testing.assert_array_equal(got.tokens, ragged.tokens)


def test_stop_tokens():
    """A sequence ends with its first stop token, which is there again after it."""
    free = np.asarray(generated().tokens)
    stops = int(free[0, 3]), int(free[1, 20])
    got = generated(stop_tokens=stops)
    ends = []
    for row, tokens in zip(free, got.tokens, strict=True):
        at = np.flatnonzero(np.isin(row, stops))
        end = at[0] + 1 if at.size else NEW
        ends.append(end)
        np.testing.assert_array_equal(tokens[:end], row[:end])
        assert (tokens[end:] == row[end - 1]).all()
    assert got.lengths.tolist() == ends
    assert min(ends) < NEW


def test_early_end():
    """When all sequences have ended no further chunk is computed."""
    stops = tuple({int(row[2]) for row in generated().tokens})
    seen = []
    got = generate(packed(), prompt(), max_new_tokens=NEW, stop_tokens=stops, callback=seen.append)
    assert [x.shape for x in seen] == [(BATCH, 16)]
    assert got.tokens.shape == (BATCH, NEW)
    assert got.lengths.max() <= 3
    assert (got.tokens[:, 3:] == got.tokens[:, 2:3]).all()


@pytest.mark.parametrize(
    ("new", "sampled"), [(1, False), (15, True), (16, False), (17, True), (40, True)]
)
def test_callback(new, sampled):
    """It sees all tokens, in chunks, as NumPy arrays; chunks change no token."""
    options = {"temperature": 1.5, "key": jax.random.key(5), "top_k": 9} if sampled else {}
    seen = []
    run = functools.partial(generate, packed(), prompt(), max_new_tokens=new, **options)
    got = run(callback=seen.append)
    assert [x.shape[1] for x in seen] == [16] * (new // 16) + [new % 16] * (new % 16 > 0)
    assert all(isinstance(x, np.ndarray) for x in seen)
    np.testing.assert_array_equal(np.concatenate(seen, 1), got.tokens)
    np.testing.assert_array_equal(run().tokens, got.tokens)


def test_sampled():
    """One key, one text; other keys, others. Low temperatures and top_k = 1 are greedy."""
    run = functools.partial(generated, temperature=1.0)
    first = run().tokens
    again = generate(packed(), prompt(), max_new_tokens=NEW, temperature=1.0, key=jax.random.key(0))
    np.testing.assert_array_equal(again.tokens, first)
    assert (run(seed=1).tokens != first).any()
    random = run(temperature=1e6).tokens  # the model does not matter
    assert all(len(set(row.tolist())) > NEW / 4 for row in random)
    assert (random[1:] != random[:1]).any(1).all()
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-37}, {"temperature": 1e-99}):
        greedy = generated(seed=1, **{"temperature": 1.0, **options})
        np.testing.assert_array_equal(greedy.tokens, generated().tokens)


def test_a_prefix_of_more_tokens():
    """The tokens do not depend on how many there shall be."""
    for options in ({}, {"temperature": 1.0}):
        short = generate(packed(), prompt(), max_new_tokens=7, key=jax.random.key(0), **options)
        np.testing.assert_array_equal(short.tokens, generated(**options).tokens[:, :7])


def test_many_tokens():
    """More than a launch has, with the same tokens, and with an end in each of the launches."""
    config = dataclasses.replace(CONFIGS["llama"], context=256)
    weights = pack_weights(model_of(config, random_arrays(config)))
    run = functools.partial(generate, weights, prompt(1), temperature=1.0, key=jax.random.key(0))
    free = run(max_new_tokens=150).tokens[0]
    np.testing.assert_array_equal(run(max_new_tokens=70).tokens[0], free[:70])
    for at in (10, 64, 90, 140):
        stop = int(free[at])
        end = int(jnp.argmax(free == stop)) + 1
        got = run(max_new_tokens=150, stop_tokens=(stop,))
        assert got.lengths.tolist() == [end]
        np.testing.assert_array_equal(got.tokens[0, :end], free[:end])
        assert (got.tokens[0, end:] == stop).all()


def test_token_out_of_range():
    text = np.array(prompt())
    text[1, 2], text[2, -1] = 75, -1
    got = generate(packed(), text, max_new_tokens=NEW)
    bad = Status.TOKEN_OUT_OF_RANGE
    assert got.status.tolist() == [Status.OK, bad, bad]
    np.testing.assert_array_equal(got.tokens[0], generated().tokens[0])


def test_inside_jit():
    """Stop tokens and all, with the same tokens."""
    stops = (int(generated().tokens[0, 3]),)
    wanted = generated(stop_tokens=stops)

    @jax.jit
    def run(weights, prompt):
        return generate(weights, prompt, max_new_tokens=NEW, stop_tokens=stops)

    got = run(packed(), prompt())
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    constant = jax.jit(lambda: generate(packed(), prompt(), max_new_tokens=4, stop_tokens=stops))
    np.testing.assert_array_equal(constant().tokens, wanted.tokens[:, :4])


def test_the_whole_context():
    """A prompt and its tokens may be as many as the model's context."""
    context = CONFIGS["llama"].context
    got = generate(packed(), prompt(1, context - 2), max_new_tokens=2)
    assert not got.status.any()


@pytest.mark.parametrize("weights", ["fp8", "nvfp4", "mxfp4", "int4"])
def test_quantised_weights(weights):
    config = FOUR_BIT_CONFIGS["llama"]
    model = model_of(config, random_arrays(config))
    got, wanted = (
        generate(pack_weights(model, x), prompt(), max_new_tokens=NEW) for x in (weights, "bf16")
    )
    assert not got.status.any()
    assert (got.tokens[:, 0] == wanted.tokens[:, 0]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": np.ones((2, 3))}, "prompt has dtype float.*, wanted int32"),
        ({"prompt": np.ones(3, np.int32)}, r"prompt has shape \(3,\), wanted \(B, T\)"),
        ({"prompt": np.ones((3, 0), np.int32)}, r"prompt has shape \(3, 0\), wanted one token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, wanted a positive integer"),
        ({"max_new_tokens": 120}, "prompt has 9 tokens and max_new_tokens is 120, together above"),
        ({"lengths": np.ones(2, np.int32)}, r"lengths has shape \(2,\), wanted \(3\)"),
        ({"lengths": np.ones(3, np.float32)}, "lengths has dtype float32, wanted int32"),
        ({"temperature": -1.0}, r"temperature is -1\.0, wanted a Python number, 0 or above"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": jnp.ones(())}, "temperature is .*, wanted a Python number"),
        ({"temperature": 0.5, "key": None}, "key is None, wanted one of jax.random"),
        ({"top_k": 0}, "top_k is 0, wanted a positive integer"),
        ({"top_k": 2.0}, r"top_k is 2\.0, wanted a positive integer"),
        ({"top_p": 0.0}, r"top_p is 0\.0, wanted a Python number above 0, 1 at most"),
        ({"top_p": 1.5}, r"top_p is 1\.5, wanted"),
        ({"stop_tokens": (3, 75)}, "stop_tokens has 75, wanted integers from 0 to 74"),
        ({"stop_tokens": 3}, "stop_tokens is 3, wanted a collection of integers"),
        ({"stop_tokens": ("a",)}, "stop_tokens has 'a', wanted integers"),
        ({"implementation": "triton"}, "implementation is 'triton'"),
    ],
)
def test_errors(options, message):
    arguments = {"prompt": prompt(), "max_new_tokens": 2, "key": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        generate(packed(), **arguments)


def test_no_kernel():
    with pytest.raises(NotImplementedError, match="implementation 'cuda'"):
        generate(packed(), prompt(), max_new_tokens=2, implementation="cuda")
    got = generate(packed(), prompt(), max_new_tokens=2, implementation=["cuda", "xla"])
    np.testing.assert_array_equal(got.tokens, generated().tokens[:, :2])


def test_no_callback_inside_jit():
    run = functools.partial(generate, packed(), max_new_tokens=2, callback=print)
    with pytest.raises(ValueError, match="callback is given under a transformation"):
        jax.jit(run)(prompt())
