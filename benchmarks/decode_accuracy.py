"""How far decode steps are from the model in float32, beside transformers in bfloat16.

    python benchmarks/decode_accuracy.py
    python benchmarks/decode_accuracy.py --model qwen2.5-1.5b --prompts 4 --length 512

transformers makes a model of the real shape with random weights, saves it in bfloat16, and gives
the logits after every token of some random prompts, in float32 and in bfloat16. jaxkern reads the
folder and decodes the same tokens one by one. What is measured is the Kullback-Leibler divergence
of a provider's distribution from the float32 one, in nats a token, the mean over all positions.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile

import common
import jax
import jax.numpy as jnp
import numpy as np
import torch_attention
import transformers_logits
from decode_cases import MODELS

from jaxkern import benchmarking, decode
from jaxkern.models import from_pretrained

PROVIDERS = {"jaxkern": "bf16"} | {
    f"jaxkern {weights}": weights for weights in ("fp8", "nvfp4", "mxfp4", "int4")
}


@jax.jit
def divergence(exact: jax.Array, logits: jax.Array) -> jax.Array:
    """Of softmax(logits) from softmax(exact), over the last axis."""
    exact, logits = (jax.nn.log_softmax(x.astype(jnp.float32)) for x in (exact, logits))
    return (jnp.exp(exact) * (exact - logits)).sum(-1)


@functools.partial(jax.jit, donate_argnums=1)
def decode_one(packed, cache, tokens, exact):
    """The divergences after one token of each prompt, and the cache."""
    logits, cache = decode.decode_step(packed, cache, tokens)
    return divergence(exact, logits), cache


def decoded(packed: decode.PackedWeights, tokens: np.ndarray, exact: np.ndarray) -> float:
    """The mean divergence of decode steps, for tokens [B, T] and exact logits [B, T, V]."""
    cache = decode.KVCache.create(packed.config, *tokens.shape)
    found = []
    for t in range(tokens.shape[1]):
        one, cache = decode_one(packed, cache, tokens[:, t], exact[:, t])
        found.append(one)
    return float(jnp.stack(found).mean())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Decoded distributions beside those of the model in float32.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", choices=MODELS, default="llama-3.2-1b")
    parser.add_argument("--prompts", type=int, default=4, metavar="B")
    parser.add_argument("--length", type=int, default=256, metavar="T")
    parser.add_argument("--device", default="cuda", help="transformers' (default: cuda)")
    common.add_destination(parser)
    chosen = parser.parse_args(argv)
    config = MODELS[chosen.model]
    if not 0 < chosen.length <= config.context:
        parser.error(f"--length: {chosen.length}, wanted 1 to the model's {config.context}")
    common.share_memory()
    run = common.start_run(parser, "decode_accuracy.py", argv, ["torch", "transformers"])
    size = chosen.prompts, chosen.length
    tokens = np.random.default_rng(0).integers(config.vocabulary, size=size, dtype=np.int32)
    case = f"decode_accuracy {chosen.model} b{chosen.prompts} t{chosen.length}"
    with tempfile.TemporaryDirectory() as folder:
        worker = common.Worker(
            torch_attention.start if chosen.device == "cuda" else transformers_logits.start
        )
        try:
            call = functools.partial(worker, transformers_logits.logits, folder)
            worker(transformers_logits.save, config, folder)
            exact = np.load(call(tokens, "float32", chosen.device))
            rounded = np.load(call(tokens, "bfloat16", chosen.device))
        finally:
            worker.close()
        model = from_pretrained(folder)
    results = {"transformers": float(divergence(exact, rounded).mean())}
    for name, weights in PROVIDERS.items():
        packed = decode.pack_weights(model, weights, keep_rows=False)
        results[name] = decoded(packed, tokens, exact)
    for name, value in results.items():
        print(f"{case}  {name:<13} {value:.4e} nats")
    rows = [
        run.row("decode_accuracy", case, name, "kl_divergence", x) for name, x in results.items()
    ]
    benchmarking.append_rows(chosen.output, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
