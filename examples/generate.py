"""Continues a prompt by a model of Hugging Face, or by the bytes of train_transformer.py.

    python examples/generate.py --model FOLDER --prompt "The capital of France is" --weights fp8
    python examples/generate.py                    # the model of train_transformer.py
    python examples/generate.py --run runs/train_transformer_gpu

FOLDER is what transformers has saved or the hub holds of a Llama 3, Qwen2.5 or Qwen3, with
tokenizer.json. The prompt is continued as it is, without a chat template. Of a run of
train_transformer.py the model is that of the last checkpoint. Without either option it is the run
that `python examples/train_transformer.py` leaves, or else a model that is trained first, which
takes a minute on a CPU and is kept in runs/generate.

The text comes in chunks of up to 16 tokens. It is generated once more to measure how long that
takes without compilation. The last line printed is the result as JSON.
"""

import argparse
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxkern import decode, models

SHORT_RUN = Path("runs", "generate")
SHORT_STEPS = 100
TIMED = 64  # tokens, the time to which is measured
READ_BYTES = 2**29  # to measure memory bandwidth


class Text(NamedTuple):
    """How text becomes tokens and tokens text, and which tokens end it."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    stops: list[int]


def read_stops(folder: Path) -> list[int]:
    """The tokens that end a sequence, by generation_config.json, else by config.json."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        stops = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        if stops is not None:
            return stops if isinstance(stops, list) else [stops]
    return []


def load_folder(folder: Path) -> tuple[models.Transformer, Text]:
    """The model of Hugging Face in a folder, and its text."""
    tokenizer = models.load_tokenizer(folder)
    text = Text(lambda string: tokenizer.encode(string).ids, tokenizer.decode, read_stops(folder))
    return models.from_pretrained(folder), text


def load_run(run: Path | None) -> tuple[models.Transformer, Text]:
    """The model of bytes that a run of train_transformer.py has left, and its text.

    Without a run it is that of the cpu preset, else a short one, which is trained if need be.
    """
    import train_transformer  # A folder of Hugging Face does not need its packages.

    ours = (train_transformer.default_output("cpu"), SHORT_RUN)
    folders = ours if run is None else (run,)
    trained = map(train_transformer.last_model, folders)
    model = next((model for model in trained if model is not None), None)
    if model is None and run is not None:
        raise SystemExit(f"{run} has no checkpoint of train_transformer.py")
    if model is None:
        train_transformer.main([f"--output={SHORT_RUN}", f"--steps={SHORT_STEPS}"])
        model = train_transformer.last_model(SHORT_RUN)

    def to_string(tokens):
        return bytes(tokens).decode(errors="replace")

    return model, Text(lambda string: list(string.encode()), to_string, [0])


class Printer:
    """Prints text as its tokens come; a character when all of its tokens are there."""

    def __init__(self, text: Text):
        self.text, self.tokens, self.string, self.printed = text, [], "", 0

    def __call__(self, tokens: np.ndarray) -> None:
        """Goes on with tokens [1, n]."""
        self.tokens += [token for token in tokens[0].tolist() if token not in self.text.stops]
        self.string = self.text.decode(self.tokens)
        self._print_to(len(self.string.rstrip("\N{REPLACEMENT CHARACTER}")))

    def end(self) -> None:
        """Prints what was left of a character, and ends the line."""
        self._print_to(len(self.string))
        print()

    def _print_to(self, length):
        print(self.string[self.printed : length], end="", flush=True)
        self.printed = max(self.printed, length)


def seconds(function: Callable[[], object]) -> float:
    """How long it takes until what the function returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def memory_bandwidth() -> float:
    """Bytes per second at which the device reads a large array, at best."""
    read = jax.jit(lambda x: x.sum(-1))
    array = jnp.ones((4096, READ_BYTES // 4096 // 4), jnp.float32)
    seconds(lambda: read(array))  # Compiles.
    times = [seconds(lambda: [read(array) for _ in range(4)]) for _ in range(3)]
    return 4 * array.nbytes / min(times)


def bytes_per_token(packed: decode.PackedWeights) -> int:
    """Bytes of weights that a decode step has to read; of the embedding it needs only a row."""
    read = dataclasses.replace(packed, embedding=None, kept=None)
    return sum(x.nbytes for x in jax.tree.leaves(read))


def measure(run: Callable[..., decode.GeneratedTokens], max_new_tokens: int) -> dict:
    """Times of run(max_new_tokens=..., callback=...), which has compiled for these tokens."""
    seconds(lambda: run(max_new_tokens=1))  # Compiles.
    to_first = seconds(lambda: run(max_new_tokens=1))
    counts, times = [], []

    def note(tokens):
        times.append(time.perf_counter() - start)
        counts.append(tokens.shape[1])

    start = time.perf_counter()
    made = int(run(max_new_tokens=max_new_tokens, callback=note).lengths[0])
    counts = np.cumsum(counts)
    timed = min(TIMED, made)
    steady = (counts[-1] - counts[0]) / (times[-1] - times[0]) if len(times) > 1 else None
    return {
        "tokens": made,
        "seconds_to_first_token": to_first,
        "timed_tokens": timed,
        "seconds_to_timed_tokens": times[np.searchsorted(counts, timed)],
        "tokens_per_s": steady,
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Options; exits with a message where they do not fit."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, help="folder of a model of Hugging Face")
    source.add_argument("--run", type=Path, help="folder of a run of train_transformer.py")
    add = parser.add_argument
    add("--prompt", default="import os\n\n\ndef ", help="text to continue (default: of a program)")
    weights = ("bf16", "fp8", "nvfp4", "mxfp4", "int4")
    add("--weights", choices=weights, default="bf16", help="(default: bf16)")
    add("--max-new-tokens", type=int, default=64, help="tokens to generate (default: 64)")
    add("--temperature", type=float, default=0.7, help="0: the likeliest (default: 0.7)")
    add("--top-k", type=int, help="draw from the k likeliest tokens (default: from all)")
    add("--top-p", type=float, help="draw from the likeliest of this probability (default: all)")
    add("--seed", type=int, default=0, help="of the draws (default: 0)")
    text = "jaxkern's kernels or its plain JAX (default: what can run)"
    add("--implementation", choices=("cuda", "xla"), help=text)
    args = parser.parse_args(argv)
    for name, fits, wanted in (
        ("max_new_tokens", args.max_new_tokens >= 1, "at least 1"),
        ("temperature", 0 <= args.temperature < math.inf, "0 or above"),
        ("top_k", args.top_k is None or args.top_k >= 1, "at least 1"),
        ("top_p", args.top_p is None or 0 < args.top_p <= 1, "above 0, 1 at most"),
    ):
        if not fits:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} is {vars(args)[name]}; wanted {wanted}")
    if not args.prompt:
        parser.error("--prompt is empty; wanted some text")
    platform = jax.default_backend()
    if args.implementation == "cuda" and platform != "gpu":
        parser.error(f"--implementation cuda needs a GPU; JAX has {platform} only")
    return args


def main(argv: list[str] | None = None) -> None:
    """Prints the prompt with what follows, and how long that took."""
    args = parse(argv)
    model, text = load_run(args.run) if args.model is None else load_folder(args.model)
    packed = decode.pack_weights(model, args.weights)
    del model  # The packed weights are a copy.
    prompt = np.array([text.encode(args.prompt)], np.int32)
    run = functools.partial(
        decode.generate,
        packed,
        prompt,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        key=jax.random.key(args.seed),
        stop_tokens=text.stops,
        implementation=args.implementation,
    )
    printer = Printer(text)
    printer(prompt)
    status = decode.Status(int(run(max_new_tokens=args.max_new_tokens, callback=printer).status[0]))
    printer.end()
    if status != decode.Status.OK:
        raise SystemExit(f"{status.name}: the text means nothing")

    result = measure(run, args.max_new_tokens)
    size, bandwidth, rate = bytes_per_token(packed), memory_bandwidth(), result["tokens_per_s"]
    read = None if rate is None else size * rate
    print(
        f"--- {result['tokens']} tokens after {prompt.size}: the first in "
        f"{result['seconds_to_first_token'] * 1e3:.1f} ms, "
        f"{result['timed_tokens']} in {result['seconds_to_timed_tokens'] * 1e3:.1f} ms"
    )
    if rate is not None:
        print(
            f"{rate:.1f} tokens/s, each of {size / 1e6:,.1f} MB of weights: {read / 1e9:.1f} GB/s, "
            f"{read / bandwidth:.1%} of the {bandwidth / 1e9:.1f} GB/s at which memory is read"
        )
    result |= {"weight_bytes_per_token": size, "weight_bytes_per_s": read}
    result |= {"memory_bytes_per_s": bandwidth, "weights": args.weights}
    result |= {"implementation": args.implementation, "device": jax.devices()[0].device_kind}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
