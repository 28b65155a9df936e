"""Trains a decoder-only transformer on the source files of Python's standard library.

The text is what every Python installation already has, read as bytes: files packed one after the
other, each a document that attention does not leave. The model is jaxkern's, in Flax nnx on its
attention, norms and FP8 products, the optimiser optax, the input grain, the checkpoints orbax.

    python examples/train_transformer.py                  # a small float32 model, minutes on a CPU
    python examples/train_transformer.py --preset gpu     # about 100M parameters, bf16, on one GPU
    python examples/train_transformer.py --preset gpu-1b  # about 1B parameters

A run leaves `losses.csv`, `loss.png`, `sample.txt` and `checkpoints/` in `--output`. The same
command goes on from the last checkpoint, with the same data in the same order; `--restart` begins
anew. The last line printed is the result as JSON.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import json
import os
import shutil
import sysconfig
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxkern import models

VOCABULARY = 256  # bytes
HELD_OUT = 10  # every tenth file is held out
SAMPLE = 300  # bytes of generated text
DTYPES = ("float32", "bfloat16", "float16")
PRECISIONS = ("dtype", "fp8-row", "fp8-block", "fp8-tensor")


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the losses of a run, up to rounding. The defaults are the cpu preset."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 0  # of key and value; 0: as many as heads
    hidden: int = 384  # width inside the MLP
    context: int = 128  # bytes the model sees
    batch: int = 32  # sequences per step
    steps: int = 200
    learning_rate: float = 3e-3
    warmup: int = 50  # steps of rising learning rate
    weight_decay: float = 0.1
    dtype: str = "float32"  # of activations; parameters are float32
    precision: str = "dtype"  # of the blocks' products: dtype's, or FP8 by a recipe
    log_every: int = 10  # steps between updates of losses.csv
    eval_every: int = 50  # steps between held-out losses, each with a checkpoint
    eval_batches: int = 8
    seed: int = 0


GPU_SIZE = {"layers": 12, "width": 768, "heads": 6, "hidden": 2560, "context": 2048, "batch": 64}
BIG_SIZE = {"layers": 20, "width": 2048, "heads": 16, "hidden": 5632, "context": 4096, "batch": 4}
# Blocks of Llama 3 8B, as many as one GPU of 140 GB trains.
LLAMA_SIZE = {"layers": 6, "width": 4096, "heads": 32, "kv_heads": 8, "hidden": 14336}
GPU_RUN = {"steps": 600, "dtype": "bfloat16", "eval_every": 100}
PRESETS = {
    "cpu": Config(),
    "gpu": Config(**GPU_SIZE, **GPU_RUN, learning_rate=1e-3),
    "gpu-1b": Config(**BIG_SIZE, **GPU_RUN, learning_rate=3e-4),
    "gpu-8b-blocks": Config(**LLAMA_SIZE, **GPU_RUN, learning_rate=3e-4, context=4096, batch=8),
}


# Data


def read_corpus() -> tuple[np.ndarray, np.ndarray]:
    """The standard library's *.py files as two uint8 arrays: for training and held out.

    Files come in the order of their paths, each followed by a zero byte.
    """
    root = Path(sysconfig.get_path("stdlib"))
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    paths = sorted(p.relative_to(root) for p in root.rglob("*.py"))
    paths = [p for p in paths if not foreign.intersection(p.parts)]

    def read(some):
        text = b"".join((root / p).read_bytes() + b"\0" for p in some)
        return np.frombuffer(text, np.uint8)

    held_out = paths[HELD_OUT - 1 :: HELD_OUT]
    return read(p for i, p in enumerate(paths) if (i + 1) % HELD_OUT), read(held_out)


class TextWindows(grain.sources.RandomAccessDataSource):
    """Window i of a text: `context` bytes to read and the byte that follows each."""

    def __init__(self, text: np.ndarray, context: int):
        self.text, self.context = text, context

    def __len__(self):
        return (len(self.text) - 1) // self.context

    def __getitem__(self, i):
        return self.text[i * self.context : (i + 1) * self.context + 1]


def training_batches(text: np.ndarray, config: Config) -> grain.DatasetIterator:
    """Endless uint8 batches [batch, context + 1], shuffled anew every epoch; can be saved."""
    dataset = grain.MapDataset.source(TextWindows(text, config.context))
    dataset = dataset.seed(config.seed).shuffle().repeat().batch(config.batch)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def held_out_batches(text: np.ndarray, config: Config) -> np.ndarray:
    """[eval_batches, batch, context + 1], evenly spread over the text."""
    windows = TextWindows(text, config.context)
    picks = np.linspace(0, len(windows) - 1, config.eval_batches * config.batch).astype(int)
    return np.stack([windows[i] for i in picks]).reshape(config.eval_batches, config.batch, -1)


# Model


def documents(tokens: jax.Array) -> jax.Array:
    """Which document each of the bytes [B, T] is of; a zero byte is the last one of its own."""
    ends = (tokens == 0).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends


def attend_with_cudnn(query, key, value, *, is_causal, segment_ids):
    """Attention by jax.nn's cuDNN, which has a mask B x 1 x T x T for documents."""
    mask = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=is_causal, implementation="cudnn"
    )


def make_model(config: Config, implementation: str | None) -> models.Transformer:
    """A model of bytes with new parameters."""
    c = config
    sizes = {name: getattr(c, name) for name in ("layers", "width", "heads", "hidden", "context")}
    heads = {"kv_heads": c.kv_heads or c.heads, "head_dim": c.width // c.heads}
    with_cudnn = implementation == "cudnn"
    return models.Transformer(
        models.Config(VOCABULARY, **sizes, **heads),
        dtype=jnp.dtype(c.dtype),
        recipe=None if c.precision == "dtype" else c.precision.removeprefix("fp8-"),
        one_hot=True,
        attention_fn=attend_with_cudnn if with_cudnn else None,
        implementation=None if with_cudnn else implementation,
        rngs=nnx.Rngs(c.seed),
    )


def next_bytes(model: models.Transformer, tokens: jax.Array) -> jax.Array:
    """float32 logits [B, T, 256] of the byte that follows each of `tokens` [B, T] of documents."""
    return model(tokens, segment_ids=documents(tokens))


def loss(model: models.Transformer, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats per byte of windows [B, T + 1], but documents' first bytes."""
    tokens, labels = windows[:, :-1], windows[:, 1:].astype(jnp.int32)
    logits = next_bytes(model, tokens)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(where=tokens != 0)


# Training


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW under a warmup and a cosine, with clipped gradients; only matrices decay."""
    peak, warmup = config.learning_rate, min(config.warmup, config.steps // 2)
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps, end_value=0.1 * peak)
    matrices = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
    adamw = optax.adamw(rate, b2=0.95, weight_decay=config.weight_decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adamw)


class Trainer:
    """The model's state on a mesh of devices, and the compiled functions over it."""

    def __init__(self, config: Config, implementation: str | None, devices: int):
        chosen = jax.devices()[:devices]
        mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=chosen)
        self.split_batch = NamedSharding(mesh, PartitionSpec("data"))
        graph, params = nnx.split(make_model(config, implementation))
        optimizer = make_optimizer(config)
        state = {"params": params, "optimizer": optimizer.init(params)}
        self.state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))  # A copy on each.
        self.parameters = sum(p.size for p in jax.tree.leaves(params))

        def loss_of(params, windows):
            return loss(nnx.merge(graph, params), windows)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, windows):
            value, grads = jax.value_and_grad(loss_of)(state["params"], windows)
            updates, memory = optimizer.update(grads, state["optimizer"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            return {"params": params, "optimizer": memory}, value

        @jax.jit
        def generate(params, prompt, key, temperature=0.7):
            """`prompt` [P] and what the model says after it, SAMPLE bytes in all."""
            model, span = nnx.merge(graph, params), min(config.context, SAMPLE)

            def put_next(i, text):
                start = jnp.maximum(i - span, 0)
                window = jax.lax.dynamic_slice(text, (start,), (span,))
                logits = next_bytes(model, window[None])[0, i - start - 1] / temperature
                return text.at[i].set(jax.random.categorical(jax.random.fold_in(key, i), logits))

            text = jnp.zeros(SAMPLE, jnp.int32).at[: len(prompt)].set(prompt)
            return jax.lax.fori_loop(len(prompt), SAMPLE, put_next, text)

        self._graph = graph
        self._step, self._loss, self._generate = step, jax.jit(loss_of), generate

    def restore(self, checkpoints: ocp.CheckpointManager, step: int, **others) -> None:
        """Takes the state of a checkpoint; `others` say how to restore what else is of interest."""
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, self.state)
        contents = ocp.args.Composite(state=ocp.args.StandardRestore(target), **others)
        self.state = checkpoints.restore(step, args=contents)["state"]

    def model(self) -> models.Transformer:
        """The model as it is now."""
        return nnx.merge(self._graph, self.state["params"])

    def train(self, windows: np.ndarray) -> jax.Array:
        """One step on uint8 windows [batch, context + 1]; the loss before it."""
        self.state, loss = self._step(self.state, jax.device_put(windows, self.split_batch))
        return loss

    def held_out_loss(self, batches: np.ndarray) -> float:
        """Mean loss over [eval_batches, batch, context + 1]."""
        params, batches = self.state["params"], jax.device_put(list(batches), self.split_batch)
        return float(np.mean([self._loss(params, windows) for windows in batches]))

    def sample(self, prompt: bytes, seed: int) -> str:
        """SAMPLE bytes of text that begin with `prompt`."""
        prompt = np.frombuffer(prompt, np.uint8)
        text = self._generate(self.state["params"], prompt, jax.random.key(seed))
        return bytes(np.asarray(text, np.uint8)).decode(errors="replace")


class LossLog:
    """`losses.csv`: a row per step with its batch's loss, and the held-out loss where measured."""

    def __init__(self, path: Path, last_step: int):
        """Keeps the rows up to `last_step`: a killed run may have written more."""
        self.path, self.rows, kept = path, [], []
        if path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= last_step]
        path.write_text("step,train,held_out\n")
        self.add(kept)

    def add(self, rows: list[dict]) -> None:
        """Appends rows, on disk too."""
        self.rows += rows
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, ["step", "train", "held_out"], lineterminator="\n").writerows(rows)

    def plot(self, path: Path, title: str) -> None:
        """Draws both losses over the steps."""
        figure = matplotlib.figure.Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, style in (("train", "-"), ("held_out", "o-")):
            rows = [row for row in self.rows if row[name] != ""]
            x, y = ([float(row[column]) for row in rows] for column in ("step", name))
            axes.plot(x, y, style, label=name.replace("_", "-"))
        axes.set(xlabel="step", ylabel="loss (nats/byte)", title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """Options to a run's settings; exits with a message where they do not fit."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="cpu", help="settings to start from (default: cpu)")
    add("--output", type=Path, help="folder of the run (default: runs/train_transformer_PRESET)")
    add("--restart", action="store_true", help="discard the run in --output, if there is one")
    add("--devices", type=int, default=1, help="devices to split the batch over (default: 1)")
    text = "jaxkern's kernels, its pure JAX, or attention by jax.nn's cuDNN (default: what can run)"
    add("--implementation", choices=("cuda", "xla", "cudnn"), help=text)
    group = parser.add_argument_group("settings, each overriding the preset's")
    for field in dataclasses.fields(Config):
        option = f"--{field.name.replace('_', '-')}"
        choices = {"dtype": DTYPES, "precision": PRECISIONS}.get(field.name)
        values = ", ".join(f"{name} {getattr(c, field.name)}" for name, c in PRESETS.items())
        group.add_argument(option, type=field.type, choices=choices, help=values)
    args = parser.parse_args(argv)
    given = {f.name: v for f in dataclasses.fields(Config) if (v := vars(args)[f.name]) is not None}
    config = c = dataclasses.replace(PRESETS[args.preset], **given)

    for name, value in [("devices", args.devices), *dataclasses.asdict(config).items()]:
        least = 0 if name in ("seed", "warmup", "kv_heads") else 1
        if isinstance(value, int) and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}; wanted at least {least}")
    if args.devices > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX is running: it has the devices it has.
            jax.config.update("jax_num_cpu_devices", args.devices)
    platform, count = jax.default_backend(), jax.device_count()
    if args.devices > count:
        parser.error(f"--devices is {args.devices}; JAX has {count} ({platform})")
    if c.batch % args.devices:
        parser.error(f"--batch {c.batch} must be a multiple of --devices {args.devices}")
    if c.width % (2 * c.heads):
        parser.error(f"--width {c.width} must be a multiple of twice --heads {c.heads}")
    if c.kv_heads and c.heads % c.kv_heads:
        parser.error(f"--heads {c.heads} must be a multiple of --kv-heads {c.kv_heads}")
    if c.eval_every % c.log_every:
        parser.error(f"--eval-every {c.eval_every} must be a multiple of --log-every {c.log_every}")
    for name, value in (("preset", args.preset), ("implementation", args.implementation)):
        if value in {*PRESETS, "cuda", "cudnn"} - {"cpu"} and platform != "gpu":
            parser.error(f"--{name} {value} needs a GPU; JAX has {platform} only")
    return args, config


def default_output(preset: str) -> Path:
    """The folder of a run without --output."""
    return Path("runs", f"train_transformer_{preset}")


def open_run(output: Path, config: Config, restart: bool) -> None:
    """Makes the folder of a run; exits with a message if it holds one with other settings."""
    settings = output / "config.json"
    if restart:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
    elif settings.exists():
        before = json.loads(settings.read_text())
        for name, value in dataclasses.asdict(config).items():
            if (had := before.get(name)) != value:
                raise SystemExit(
                    f"{output} holds a run with {name} {had}, this one has {value}: give the same "
                    "settings to go on, --restart to discard it, or another --output"
                )
    output.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(dataclasses.asdict(config), indent=2))


def train(config, trainer, batches, held_out, log, checkpoints, step) -> float | None:
    """Trains from `step` to the end; returns tokens per second, None if there was little to do."""
    losses, laps, rate = [], [], None
    with tqdm(total=config.steps, initial=step, unit="step", dynamic_ncols=True) as bar:
        start = time.perf_counter()
        while step < config.steps:
            losses.append(trainer.train(next(batches)))
            step += 1
            evaluate = step % config.eval_every == 0 or step == config.steps
            if step % config.log_every and not evaluate:
                continue
            losses = [float(loss) for loss in jax.device_get(losses)]  # Waits for the device.
            laps.append((len(losses) * config.batch * config.context, time.perf_counter() - start))
            tokens, seconds = np.sum(laps[1:], axis=0) if laps[1:] else (0, 0)  # Lap 0 compiles.
            rate = tokens / seconds if tokens else None
            first = step - len(losses) + 1
            rows = [{"step": i, "train": v, "held_out": ""} for i, v in enumerate(losses, first)]
            if evaluate:
                rows[-1]["held_out"] = trainer.held_out_loss(held_out)
            log.add(rows)
            if evaluate:
                state = ocp.args.StandardSave(trainer.state)
                data = grain.checkpoint.CheckpointSave(batches)
                checkpoints.save(step, args=ocp.args.Composite(state=state, data=data))
            bar.update(len(losses))
            speed = f", {rate:,.0f} tokens/s" if rate else ""
            bar.set_postfix_str(f"loss {np.mean(losses):.3f}{speed}")
            losses, start = [], time.perf_counter()
    checkpoints.wait_until_finished()
    return rate


def last_model(output: Path) -> models.Transformer | None:
    """The model of the last checkpoint in the folder of a run; None if it has none."""
    folder = output.resolve() / "checkpoints"
    if not folder.exists():
        return None
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return None
        config = Config(**json.loads((output / "config.json").read_text()))
        trainer = Trainer(config, None, 1)
        trainer.restore(checkpoints, step)
    return trainer.model()


def main(argv: list[str] | None = None) -> None:
    """Trains, or goes on training, and leaves the results in the run's folder."""
    args, config = parse(argv)
    output = (args.output or default_output(args.preset)).resolve()
    open_run(output, config, args.restart)
    train_text, held_out_text = read_corpus()
    batches = training_batches(train_text, config)
    held_out = held_out_batches(held_out_text, config)
    trainer = Trainer(config, args.implementation, args.devices)
    print(
        f"{trainer.parameters:,} parameters, {len(train_text):,} bytes to train on, "
        f"{len(held_out_text):,} held out, {args.devices} x {jax.devices()[0].device_kind}"
    )
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(output / "checkpoints", options=options) as checkpoints:
        step = checkpoints.latest_step() or 0
        if step:
            trainer.restore(checkpoints, step, data=grain.checkpoint.CheckpointRestore(batches))
            print(f"going on from step {step}")
        log = LossLog(output / "losses.csv", step)
        rate = train(config, trainer, batches, held_out, log, checkpoints, step)
    log.plot(output / "loss.png", f"{trainer.parameters / 1e6:.1f}M parameters, {config.dtype}")
    sample = trainer.sample(b"import os\n\n\ndef ", config.seed)
    (output / "sample.txt").write_text(sample)
    held_out_loss = float(log.rows[-1]["held_out"])
    print(f"--- sample\n{sample}\n--- held-out loss {held_out_loss:.4f} nats/byte; see {output}")
    result = {"held_out_loss": held_out_loss, "tokens_per_s": rate, "steps": config.steps}
    result |= {"parameters": trainer.parameters, "implementation": args.implementation}
    result |= {"devices": args.devices, "device": jax.devices()[0].device_kind}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
