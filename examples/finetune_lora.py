"""Quantises the model of train_transformer.py to four bits, and trains adapters beside it.

    python examples/finetune_lora.py
    python examples/finetune_lora.py --run runs/train_transformer_gpu --format int4 --rank 16

The matrices of the blocks become NVFP4, MXFP4 or integers, and stay what they are. Beside each of
them learns a low-rank product (LoRA, Hu et al. 2021), on the text that the model was trained on.
What is printed are perplexities of held-out text, per byte, and the bytes that weights take: of the
model in bfloat16, in four bits, and in four bits with adapters.

Without --run the model is that of `python examples/train_transformer.py`, or else a short run of
it, as in generate.py. The last line printed is the result as JSON.
"""

import argparse
import json
import math
import time
from pathlib import Path

import generate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_transformer
from flax import nnx
from tqdm import tqdm

from jaxkern.models import Transformer
from jaxkern.nnx import QuantizedLinear, quantize_model

MATRICES = "blocks/.*"  # paths of what is quantised


def rounded(model: nnx.Module) -> nnx.Module:
    """A copy with parameters in bfloat16."""
    graph, parameters, others = nnx.split(model, nnx.Param, ...)
    parameters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)
    return nnx.merge(graph, parameters, others)


def adapt(model: nnx.Module, rank: int, seed: int) -> None:
    """Puts an adapter beside each quantised layer of the blocks, which adds nothing yet."""
    rngs = nnx.Rngs(seed)
    for block in model.blocks:
        for name, layer in vars(block).copy().items():
            if isinstance(layer, QuantizedLinear):
                sizes = layer.in_features, rank, layer.out_features
                setattr(block, name, nnx.LoRA(*sizes, base_module=layer, rngs=rngs))


def bytes_of(model: nnx.Module) -> int:
    """Of everything that the model holds."""
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))


def perplexity(model: nnx.Module, batches: np.ndarray) -> float:
    """exp of the mean loss of held-out windows [batches, B, T + 1]."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, windows: train_transformer.loss(nnx.merge(graph, state), windows))
    return math.exp(np.mean([float(run(state, windows)) for windows in batches]))


def finetune(model: nnx.Module, batches, steps: int, learning_rate: float) -> float:
    """Trains the adapters; returns the seconds that it took after the first step."""
    graph, adapters, constants = nnx.split(model, nnx.LoRAParam, ...)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    @jax.jit
    def step(adapters, memory, constants, windows):
        def loss(adapters):
            return train_transformer.loss(nnx.merge(graph, adapters, constants), windows)

        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, memory = optimizer.update(gradient, memory)
        return optax.apply_updates(adapters, updates), memory, value

    memory, start = optimizer.init(adapters), None
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for _ in range(steps):
            adapters, memory, value = step(adapters, memory, constants, next(batches))
            bar.set_postfix_str(f"loss {float(value):.3f}")
            bar.update()
            start = start or time.perf_counter()
    nnx.update(model, adapters)
    return time.perf_counter() - start


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; exits with a message where they do not fit."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--run", type=Path, help="folder of a run of train_transformer.py")
    add("--format", choices=("nvfp4", "mxfp4", "int4"), default="nvfp4", help="(default: nvfp4)")
    add("--rank", type=int, default=8, help="of adapters (default: 8)")
    add("--steps", type=int, default=150, help="of training (default: 150)")
    add("--batch", type=int, default=16, help="sequences per step (default: 16)")
    add("--learning-rate", type=float, default=3e-3, help="at the start (default: 3e-3)")
    add("--seed", type=int, default=1, help="of adapters and of the text's order (default: 1)")
    args = parser.parse_args(argv)
    for name in ("rank", "steps", "batch", "learning_rate"):
        if (value := vars(args)[name]) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}; wanted above 0")
    return args


def main(argv: list[str] | None = None) -> None:
    """Prints what each model gives and takes."""
    args = parse(argv)
    model, _ = generate.load_run(args.run)
    train_text, held_out_text = train_transformer.read_corpus()
    config = train_transformer.Config(
        context=model.config.context, batch=args.batch, seed=args.seed
    )
    held_out = train_transformer.held_out_batches(held_out_text, config)
    batches = train_transformer.training_batches(train_text, config)

    result = {}

    def show(name: str, model: Transformer) -> None:
        result[name] = {"perplexity": perplexity(model, held_out), "bytes": bytes_of(model)}
        numbers = result[name]
        print(f"{name:<16} {numbers['perplexity']:8.4f} {numbers['bytes']:14,} bytes", flush=True)

    print(f"{'':<16} perplexity")
    model = rounded(model)
    show("bf16", model)
    model = quantize_model(model, {MATRICES: {"format": args.format, "search": True}})
    show(args.format, model)
    adapt(model, args.rank, args.seed)
    seconds = finetune(model, batches, args.steps, args.learning_rate)
    show(f"{args.format} + LoRA", model)
    if args.steps > 1:
        tokens = (args.steps - 1) * args.batch * config.context
        print(f"{tokens / seconds:,.0f} tokens/s in training")
    print(json.dumps(result | {"rank": args.rank, "device": jax.devices()[0].device_kind}))


if __name__ == "__main__":
    main()
