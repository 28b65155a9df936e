"""Decode steps and generation, greedily, beside plain JAX and Hugging Face's transformers.

    python benchmarks/decode.py --quick
    python benchmarks/decode.py --filter '^decode qwen2.5-1.5b bf16 b1 '
    python benchmarks/decode.py --filter '^generate' --providers 'jaxkern,jax,transformers eager'
    python benchmarks/decode.py --case 'decode llama-3.2-1b fp8 b2 ctx1024'

`decode` is a step, one token for each of b sequences: of 32 steps in one compiled function, each
fed with the tokens of the one before, the last of which makes ctx tokens. For jaxkern they are one
call of decode_steps. GB/s are of the weights that a step reads. `generate` is a call from p tokens
of a prompt to n new ones, waited for; with n1 it is the time to the first token.

Weights are random. `jaxkern` is what runs where no implementation is named; `jaxkern cuda` is
skipped where the kernel cannot. `jax` is jax_decode.py.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import common
import jax
import jax.numpy as jnp
import jax_decode
import torch_attention
import transformers_generate
from decode_cases import MODELS, QUICK, SHAPES, STEPS, Generation, Shape, Step, parse
from flax import nnx

from jaxkern import benchmarking, decode
from jaxkern.models import Transformer

DEVIATION = 0.02  # of weights

# Plain JAX rounds to bfloat16 what is added up over the layers, jaxkern does not. Random weights
# make the most of it: 28 layers differ by 0.06.
ERROR_LIMIT = 0.1


# --- What providers share -------------------------------------------------------------------------


def keep_last(make: Callable) -> Callable:
    """Like functools.lru_cache(1), but it drops the last before it makes the next."""
    kept = {}

    @functools.wraps(make)
    def get(*key):
        if key not in kept:
            kept.clear()
            kept[key] = make(*key)
        return kept[key]

    return get


def random_keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(0, impl="rbg"), count)


@functools.partial(jax.jit, static_argnums=1)
def random_weights(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return (DEVIATION * jax.random.normal(key, shape)).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnums=1)
def random_layers(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[layers, ...], one after the other, so that nothing else of this size is made on the way."""
    keys = jax.random.split(key, shape[0])
    return jax.lax.map(lambda key: jax.random.normal(key, shape[1:], jnp.bfloat16), keys)


@keep_last
def random_model(name: str) -> Transformer:
    """In bfloat16: norms of one, all else normal."""
    model = nnx.eval_shape(
        lambda: Transformer(MODELS[name], param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    graph, parameters = nnx.split(model)
    parameters = nnx.to_flat_state(parameters)

    made = []
    for (path, variable), key in zip(parameters, random_keys(len(parameters)), strict=True):
        is_norm = path[-1] == "scale"
        shape = variable.shape
        array = jnp.ones(shape, jnp.bfloat16) if is_norm else random_weights(key, shape)
        made.append((path, variable.replace(array)))
    return nnx.merge(graph, nnx.from_flat_state(made))


@keep_last
def packed_weights(name: str, weights: str, keep_rows: bool) -> decode.PackedWeights:
    return decode.pack_weights(random_model(name), weights, keep_rows=keep_rows)


@keep_last
def plain_weights(name: str, weights: str) -> Mapping:
    """The same weights as nested dicts, for jax_decode."""
    plain = nnx.to_pure_dict(nnx.state(random_model(name), nnx.Param))
    return plain if weights == "bf16" else jax_decode.quantized(MODELS[name], plain, weights)


class Inputs:
    """Of a case, made when they are asked for. Steps donate the cache and put it back.

    Tokens are [B], or prompts [B, T].
    """

    def __init__(self, shape: Shape):
        self.shape = shape
        size = (shape.batch, shape.prompt) if isinstance(shape, Generation) else (shape.batch,)
        key, vocabulary = jax.random.key(1), shape.config.vocabulary
        self.tokens = jax.random.randint(key, size, 0, vocabulary, jnp.int32)

    @functools.cached_property
    def packed(self) -> decode.PackedWeights:
        """With rows kept where there is a prompt."""
        keep_rows = isinstance(self.shape, Generation)
        return packed_weights(self.shape.model, self.shape.weights, keep_rows)

    @functools.cached_property
    def cache(self) -> decode.KVCache:
        """Full of normal numbers, of which lengths say nothing yet."""
        shape = self.shape
        cache = decode.KVCache.create(shape.config, shape.batch, shape.context)
        keys, values = map(random_layers, random_keys(2), (cache.keys.shape, cache.values.shape))
        return dataclasses.replace(cache, keys=keys, values=values)

    @property
    def plain(self) -> Mapping:
        return plain_weights(self.shape.model, self.shape.weights)


def with_lengths(cache: decode.KVCache, length: jax.Array) -> decode.KVCache:
    return dataclasses.replace(cache, lengths=jnp.full(cache.batch, length, jnp.int32))


# --- Providers ------------------------------------------------------------------------------------


def provider(steps: Callable, generation: Callable, seconds: float) -> common.Provider:
    """Of what a provider computes.

    Args:
      steps: from Inputs to a function from cache and tokens [B] to the logits that follow and the
        cache; one to the tokens of STEPS steps and the cache; and what has that as its `cache`.
      generation: from Inputs to a function from prompts to the logits that follow, and one to all
        new tokens.
    """

    def prepare(shape, directions, inputs, expected):
        if isinstance(shape, Step):
            first, rest, owner = steps(inputs)
            logits, owner.cache = first(owner.cache, inputs.tokens)

            def call(tokens):
                tokens, owner.cache = rest(owner.cache, tokens)
                return tokens

            count = STEPS
        else:
            first, generate = generation(inputs)
            logits, count = first(inputs.tokens), 1

            def call(prompt):
                return jax.block_until_ready(generate(prompt))

        sampler = benchmarking.Sampler(call, [(inputs.tokens,)], seconds=seconds, steps=count)
        results = {shape.direction: logits}
        error = common.relative_error(results, expected or results)
        return common.Prepared({shape.direction: sampler}, error, results)

    return prepare


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def decode_once(packed, cache, tokens, start, implementation):
    """The logits after tokens at position start, and the cache."""
    cache = with_lengths(cache, start)
    return decode.decode_step(packed, cache, tokens, implementation=implementation)


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def decode_greedily(packed, cache, tokens, start, implementation):
    """Tokens [B, STEPS] that follow tokens at position start, and the cache."""
    cache = with_lengths(cache, start)
    run = functools.partial(decode.decode_steps, implementation=implementation)
    tokens, _, cache = run(packed, cache, tokens, STEPS)
    return tokens, cache


def jaxkern_provider(implementation: str | None, seconds: float) -> common.Provider:
    def steps(inputs):
        start = inputs.shape.start

        def first(cache, tokens):
            return decode_once(inputs.packed, cache, tokens, start, implementation)

        def rest(cache, tokens):
            return decode_greedily(inputs.packed, cache, tokens, start, implementation)

        return first, rest, inputs

    def generation(inputs):
        options = {"implementation": implementation}

        def first(prompt):
            cache = decode.KVCache.create(inputs.shape.config, *prompt.shape)
            cache = decode.prefill(inputs.packed, cache, prompt[:, :-1], **options)
            return decode.decode_step(inputs.packed, cache, prompt[:, -1], **options)[0]

        new = inputs.shape.new
        return first, functools.partial(
            decode.generate, inputs.packed, max_new_tokens=new, **options
        )

    return provider(steps, generation, seconds)


@jax.jit
def read_layer(cache: decode.KVCache, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cache.read(layer)


def plain_provider(seconds: float) -> common.Provider:
    def steps(inputs):
        shape = inputs.shape

        def first(cache, tokens):
            step = jax_decode.first_logits
            return step(shape.config, inputs.plain, cache, tokens[:, None], shape.start)

        def rest(cache, tokens):
            steps = jax_decode.greedy_steps
            return steps(shape.config, inputs.plain, cache, tokens, shape.start, STEPS)

        cache = [read_layer(inputs.cache, layer) for layer in range(shape.config.layers)]
        return first, rest, SimpleNamespace(cache=cache)

    def generation(inputs):
        config, new = inputs.shape.config, inputs.shape.new

        def first(prompt):
            return jax_decode.prefill(config, inputs.plain, prompt, prompt.shape[1] + new - 1)[0]

        return first, lambda prompt: jax_decode.generate(config, inputs.plain, prompt, new)

    return provider(steps, generation, seconds)


def transformers_provider(name: str, worker: common.Worker, seconds: float) -> common.Provider:
    """Weights are others, so nothing is compared with those of the other providers."""

    def prepare(shape, directions, inputs, expected):
        if isinstance(shape, Step):
            raise NotImplementedError("a step alone is not measured")
        if shape.weights != "bf16":
            raise NotImplementedError("weights are bf16 only")
        which = name, shape.config, (shape.batch, shape.prompt, shape.new)
        worker(transformers_generate.prepare, *which, seconds)
        return common.Prepared(
            {shape.direction: lambda: worker(transformers_generate.sample, *which)}
        )

    return prepare


IMPLEMENTATIONS = {"jaxkern": None, "jaxkern cuda": "cuda", "jaxkern xla": "xla"}
TORCH_PROVIDERS = tuple(transformers_generate.OPTIONS)
DEFAULT_PROVIDERS = (*IMPLEMENTATIONS, "jax", "transformers")
METRICS = {"decode": "gbps", "generate": "tokens_per_s"}


def main(argv: list[str]) -> int:
    # A call is 20 ms: of fewer in a sample, the host's way into the first would be a part.
    parser = common.options("Decode steps and generation, side by side.", seconds=0.5)
    chosen = parser.parse_args(argv)
    cases = [(shape.direction, shape) for shape in (QUICK if chosen.quick else SHAPES)]
    selected = common.select_cases(parser, chosen, cases, parse)
    torch = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    default = [name for name in DEFAULT_PROVIDERS if torch or name not in TORCH_PROVIDERS]
    if chosen.list:
        return common.print_list(selected, default)
    known = {name: jaxkern_provider(i, chosen.seconds) for name, i in IMPLEMENTATIONS.items()}
    known["jax"] = plain_provider(chosen.seconds)
    worker = None
    if torch and (not chosen.providers or "transformers" in chosen.providers):
        worker = common.Worker(torch_attention.start)
        known |= {
            name: transformers_provider(name, worker, chosen.seconds) for name in TORCH_PROVIDERS
        }
    try:
        providers = common.pick_providers(parser, chosen.providers, known, default)
        if worker:
            common.share_memory()
        also = ["flax", *(("torch", "transformers") if worker else ())]
        run = common.start_run(parser, "decode.py", argv, also)
        status = 0
        for direction, metric in METRICS.items():
            family = common.Family(
                direction,
                metric,
                Inputs,
                baseline="jax",
                also=[name for name in IMPLEMENTATIONS if name != "jaxkern"],
                directions=(direction,),
                error_limit=ERROR_LIMIT,
            )
            if part := {s: d for s, d in selected.items() if s.direction == direction}:
                status |= common.Comparison(family, providers, run, chosen).measure(part)
        return status
    finally:
        if worker:
            worker.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
