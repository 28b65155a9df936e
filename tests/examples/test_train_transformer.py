"""examples/train_transformer.py, made tiny: its runs, its resumption, its parts."""

import csv
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx

from jaxkern import dot_product_attention
from jaxkern.nnx import Fp8Linear

SCRIPT = Path(__file__).parents[2] / "examples" / "train_transformer.py"
STEPS, SAVE_EVERY = 24, 4
TINY = {
    "layers": 2,
    "width": 32,
    "heads": 2,
    "hidden": 48,
    "context": 32,
    "batch": 8,
    "steps": STEPS,
    "log_every": 2,
    "eval_every": SAVE_EVERY,
    "eval_batches": 2,
    "learning_rate": 1e-2,
    "warmup": 4,
}


def options(**changes):
    return [f"--{k.replace('_', '-')}={v}" for k, v in (TINY | changes).items()]


def start(output, *arguments):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(SCRIPT), f"--output={output}", *options(), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def run(output, *arguments):
    """What a run to the end prints, and its result."""
    process = start(output, *arguments)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return out, json.loads(out.splitlines()[-1])


def rows(output):
    with (output / "losses.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_transformer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder, the output and the result of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder)


def test_a_run_learns_and_leaves_its_results(whole):
    folder, out, result = whole
    losses = [float(row["train"]) for row in rows(folder)]
    assert [int(row["step"]) for row in rows(folder)] == list(range(1, STEPS + 1))
    measured = [int(row["step"]) for row in rows(folder) if row["held_out"]]
    assert measured == list(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY))
    assert losses[0] == pytest.approx(np.log(256), abs=1.5)
    assert np.mean(losses[-4:]) < losses[0] - 1
    assert result["held_out_loss"] == float(rows(folder)[-1]["held_out"]) < losses[0] - 1
    assert result["tokens_per_s"] > 0 and result["steps"] == STEPS
    sample = (folder / "sample.txt").read_bytes()
    assert sample.startswith(b"import os\n\n\ndef ") and len(sample) >= 300
    assert "held-out loss" in out and "going on" not in out
    image = matplotlib.image.imread(folder / "loss.png")
    assert image.shape[0] > 200 and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 10


def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole, tmp_path):
    """Losses, held-out losses and the sample are those of the uninterrupted run, to the bit."""
    process = start(tmp_path)
    deadline = time.monotonic() + 200
    while not any((tmp_path / "checkpoints" / str(s)).exists() for s in (8, 12, 16)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert len(rows(tmp_path)) < STEPS
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    out, result = run(tmp_path)
    assert f"going on from step {saved}\n" in out and 0 < saved < STEPS
    folder, _, want = whole
    assert rows(tmp_path) == rows(folder)
    assert (tmp_path / "sample.txt").read_text() == (folder / "sample.txt").read_text()
    assert result["held_out_loss"] == want["held_out_loss"]

    again, result = run(tmp_path)
    assert f"going on from step {STEPS}\n" in again
    assert result == want | {"tokens_per_s": None}
    assert rows(tmp_path) == rows(folder)


def test_eight_devices_have_the_losses_of_one(whole, tmp_path):
    folder, _, want = whole
    _, result = run(tmp_path, "--devices=8")
    assert result["devices"] == 8
    losses = [float(row["train"]) for row in rows(tmp_path)]
    np.testing.assert_allclose(losses, [float(row["train"]) for row in rows(folder)], rtol=2e-3)
    assert result["held_out_loss"] == pytest.approx(want["held_out_loss"], rel=2e-3)


def test_a_folder_keeps_its_settings(example, tmp_path, whole):
    folder, _, _ = whole
    config = example.Config(**TINY)
    with pytest.raises(SystemExit, match=r"batch 8, this one has 16.*--restart"):
        example.open_run(folder, example.dataclasses.replace(config, batch=16), restart=False)
    example.open_run(folder, config, restart=False)
    assert (folder / "checkpoints" / str(STEPS)).exists()
    example.open_run(tmp_path / "new", config, restart=False)
    recorded = json.loads((tmp_path / "new" / "config.json").read_text())
    assert recorded["precision"] == "dtype"
    fp8 = example.dataclasses.replace(config, precision="fp8-row")
    with pytest.raises(SystemExit, match="with precision dtype, this one has fp8-row"):
        example.open_run(tmp_path / "new", fp8, restart=False)
    before = {name: value for name, value in recorded.items() if name != "precision"}
    (tmp_path / "new" / "config.json").write_text(json.dumps(before))
    with pytest.raises(SystemExit, match="with precision None, this one has dtype"):
        example.open_run(tmp_path / "new", config, restart=False)
    example.open_run(tmp_path / "new", config, restart=True)
    (tmp_path / "new" / "checkpoints" / "4").mkdir(parents=True)
    changed = example.dataclasses.replace(config, seed=5)
    example.open_run(tmp_path / "new", changed, restart=True)
    assert not (tmp_path / "new" / "checkpoints").exists()
    example.open_run(tmp_path / "new", changed, restart=False)


def test_rows_after_the_last_checkpoint_are_dropped(example, tmp_path):
    log = example.LossLog(tmp_path / "losses.csv", 0)
    log.add([{"step": i, "train": 1.0 / i, "held_out": ""} for i in range(1, 6)])
    assert len(rows(tmp_path)) == 5
    example.LossLog(tmp_path / "losses.csv", 3)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_the_texts_are_the_library_s_and_do_not_overlap(example):
    training, held_out = example.read_corpus()
    again, _ = example.read_corpus()
    assert training.dtype == np.uint8 and np.array_equal(training, again)
    assert 3 < len(training) / len(held_out) < 40
    ours = Path(example.argparse.__file__).read_bytes()
    assert ours in training.tobytes() or ours in held_out.tobytes()
    files = [set(text.tobytes().split(b"\0")) - {b""} for text in (training, held_out)]
    copies = [len(text) for text in files[0] & files[1]]
    assert sum(copies) < 0.01 * len(held_out)
    assert Path(np.__file__).read_bytes() not in training.tobytes()


def test_batches_are_windows_of_the_text_and_can_be_resumed(example):
    config = example.Config(**TINY)
    text = np.arange(8 * 32 * 10 + 1, dtype=np.int64)

    def batches():
        return example.training_batches(text, config)

    first = batches()
    seen = [next(first) for _ in range(12)]
    state = first.get_state()
    after = [next(first) for _ in range(5)]
    second = batches()
    second.set_state(state)
    assert all(np.array_equal(next(second), x) for x in after)
    assert all(np.array_equal(np.diff(x), np.ones((8, 32))) for x in seen)
    starts = np.concatenate([x[:, 0] for x in seen[:10]])
    assert sorted(starts) == list(range(0, 8 * 32 * 10, 32))  # An epoch has every window once,
    assert not np.array_equal(starts[:8], np.arange(0, 8 * 32, 32))  # in shuffled order.
    assert not np.array_equal(seen[0], seen[10])
    other = example.training_batches(text, example.dataclasses.replace(config, seed=1))
    assert not np.array_equal(next(other), seen[0])


@pytest.fixture(scope="module")
def model(example):
    return example.make_model(example.Config(**TINY), None)


@pytest.fixture(scope="module")
def logits(example, model):
    return functools.partial(example.next_bytes, model)


def test_the_model_sees_the_past_only(logits):
    tokens = np.random.default_rng(0).integers(1, 255, (2, 32))
    changed = tokens.copy()
    changed[:, 20] += 1
    one, other = logits(tokens), logits(changed)
    np.testing.assert_allclose(one[:, :20], other[:, :20], atol=1e-5)
    assert (np.abs(one - other).max(-1) > 1e-3)[:, 20:].all()


def test_a_zero_byte_ends_a_document(example):
    tokens = np.array([[7, 0, 5, 5, 0, 0, 9], [0, 1, 1, 1, 1, 1, 0]], np.uint8)
    wanted = [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    np.testing.assert_array_equal(example.documents(tokens), wanted)


def test_the_model_does_not_see_other_documents(logits):
    tokens = np.random.default_rng(0).integers(1, 255, (2, 32))
    tokens[:, 14] = 0
    before, after = tokens.copy(), tokens.copy()
    before[:, :14] += 1
    after[:, 15:] += 1
    one = logits(tokens)
    np.testing.assert_array_equal(logits(before)[:, 15:], one[:, 15:])
    np.testing.assert_array_equal(logits(after)[:, :15], one[:, :15])
    assert (np.abs(logits(before) - one).max(-1) > 1e-3)[:, :15].all()


def test_cudnn_s_mask_keeps_the_same_documents_apart(example, monkeypatch):
    """Values and gradients, with jax.nn's plain JAX in the place of cuDNN."""
    plain = jax.nn.dot_product_attention

    def attention(*operands, implementation, **options):
        assert implementation == "cudnn"
        return plain(*operands, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    tokens = np.random.default_rng(0).integers(0, 4, (2, 24))
    arrays = jax.random.normal(jax.random.key(0), (3, 2, 24, 2, 8))

    def results(attention):
        ids = example.documents(tokens)
        attend = functools.partial(attention, is_causal=True, segment_ids=ids)
        out, pullback = jax.vjp(attend, *arrays)
        return out, *pullback(jnp.cos(out))

    cudnn = example.make_model(example.Config(**TINY), "cudnn").blocks[0].attention_fn
    for got, wanted in zip(results(cudnn), results(dot_product_attention), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_the_loss_is_of_the_byte_that_follows_in_the_document(example, model, logits):
    windows = np.random.default_rng(0).integers(0, 8, (2, 33))
    scores = jax.nn.log_softmax(logits(windows[:, :-1]))
    inside = [(b, t) for b in range(2) for t in range(32) if windows[b, t] != 0]
    assert 0 < len(inside) < 64
    want = -np.mean([scores[b, t, windows[b, t + 1]] for b, t in inside])
    assert float(example.loss(model, windows)) == pytest.approx(want, rel=1e-5)


def test_the_sample_is_the_model_s(example):
    """It goes on with what the model has learnt, far beyond one context."""
    config = example.Config(**TINY | {"steps": 60})
    trainer = example.Trainer(config, None, 1)
    text = np.frombuffer(b"abcde" * 20, np.uint8)
    for _ in range(config.steps):
        trainer.train(np.stack([text[i : i + 33] for i in range(8)]))
    assert trainer.sample(b"cde", 0) == ("cde" + "abcde" * 60)[: example.SAMPLE]


def test_eight_devices_share_a_batch(example):
    trainer = example.Trainer(example.Config(**TINY), None, 8)
    windows = jax.device_put(np.ones((8, 33), np.uint8), trainer.split_batch)
    assert {shard.data.shape for shard in windows.addressable_shards} == {(1, 33)}
    compiled = trainer._step.lower(trainer.state, windows).compile()
    assert "all-reduce" in compiled.as_text() and "all-gather" not in compiled.as_text()
    trainer.train(np.ones((8, 33), np.uint8))
    leaves = jax.tree.leaves(trainer.state)
    assert all(x.sharding.is_fully_replicated and len(x.devices()) == 8 for x in leaves)


@pytest.fixture(scope="module")
def learn(example):
    """A function of the precision: the losses of ten steps, and the shapes of the state."""

    @functools.cache
    def learn(precision):
        windows = np.frombuffer(SCRIPT.read_bytes()[: 8 * 33], np.uint8).reshape(8, 33)
        config = example.Config(
            **TINY | {"dtype": "bfloat16", "precision": precision, "kv_heads": 1}
        )
        trainer = example.Trainer(config, "xla", 1)
        losses = [float(trainer.train(windows)) for _ in range(10)]
        return np.array(losses), jax.eval_shape(lambda: trainer.state)

    return learn


def test_bfloat16_keeps_float32_weights_and_learns(learn):
    losses, state = learn("dtype")
    assert losses[-1] < losses[0] - 1
    assert {x.dtype for x in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}


@pytest.mark.parametrize("precision", ["fp8-row", "fp8-block", "fp8-tensor"])
def test_fp8_learns_beside_the_plain_run(learn, precision):
    """From the same parameters, which stay float32, with a loss near to theirs and not the same."""
    (plain, shapes), (fp8, fp8_shapes) = learn("dtype"), learn(precision)
    assert fp8[-1] < fp8[0] - 1
    np.testing.assert_allclose(fp8, plain, rtol=0.05)
    assert (fp8 != plain).all()
    assert fp8_shapes == shapes


def test_the_precision_of_blocks_alone(example):
    config = example.Config(**TINY | {"precision": "fp8-block"})
    model = example.make_model(config, "cudnn")
    names = ("qkv", "out", "gate_up", "down")
    linears = {name: type(x) for name, x in nnx.iter_modules(model) if isinstance(x, nnx.Linear)}
    ours = {(*b, n) for b in (("blocks", 0), ("blocks", 1)) for n in names}
    assert {name for name, kind in linears.items() if kind is Fp8Linear} == ours
    assert set(linears) - ours == {("head",)}
    layer = model.blocks[0].qkv
    assert (layer.recipe, layer.implementation) == ("block", None)  # which cudnn has not


def test_fewer_heads_of_key_and_value(example):
    """Query heads in groups share them; all groups alike when every one has the same."""
    whole, shared = (
        example.make_model(example.Config(**TINY | {"kv_heads": n}), "xla") for n in (2, 1)
    )
    for mine, theirs in zip(shared.blocks, whole.blocks, strict=True):
        query, key, value = jnp.split(mine.qkv.kernel[...].reshape(32, 4, 16), (2, 3), axis=1)
        heads = jnp.concatenate([query, key, key, value, value], axis=1)
        theirs.qkv.kernel[...] = heads.reshape(32, 96)
        for name in ("out", "gate_up", "down"):
            getattr(theirs, name).kernel[...] = getattr(mine, name).kernel[...]
    whole.embed.embedding[...] = shared.embed.embedding[...]
    whole.head.kernel[...] = shared.head.kernel[...]
    tokens = np.random.default_rng(0).integers(0, 255, (2, 32))
    np.testing.assert_allclose(shared(tokens), whole(tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("preset", "parameters", "precision"),
    [("gpu", 1e8, "dtype"), ("gpu-1b", 1e9, "fp8-row"), ("gpu-8b-blocks", 1.31e9, "fp8-block")],
)
def test_gpu_presets_have_their_size_and_reach_the_kernels(
    example, kernels, preset, parameters, precision
):
    config = example.dataclasses.replace(example.PRESETS[preset], precision=precision)
    model = nnx.eval_shape(lambda: example.make_model(config, "cuda"))
    graph, params = nnx.split(model)
    assert sum(x.size for x in jax.tree.leaves(params)) == pytest.approx(parameters, rel=0.05)
    windows = jax.ShapeDtypeStruct((config.batch, config.context + 1), jnp.uint8)

    def loss(params, windows):
        return example.loss(nnx.merge(graph, params), windows)

    traced = jax.jit(jax.grad(loss)).trace(params, windows)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for name in ("attention_fwd", "attention_bwd", "rms_norm_fwd", "rms_norm_bwd"):
        assert f"jaxkern.{name}" in text
    assert "has_segments = true" in text
    products = 0 if precision == "dtype" else 4 * 3  # Each linear's is one function of all blocks.
    assert text.count("custom_call @jaxkern.scaled_matmul") == products
    square = f"x{config.context}x{config.context}x"
    assert f"{square}i1" not in text and f"x{config.heads}{square}" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset=tpu"], "invalid choice: 'tpu'"),
        (["--implementation=triton"], "invalid choice: 'triton'"),
        (["--dtype=int8"], "invalid choice: 'int8'"),
        (["--steps=ten"], "invalid int value: 'ten'"),
        (["--steps=0"], "--steps is 0; wanted at least 1"),
        (["--eval-batches=0"], "--eval-batches is 0; wanted at least 1"),
        (["--seed=-1"], "--seed is -1; wanted at least 0"),
        (["--devices=0"], "--devices is 0; wanted at least 1"),
        (["--devices=9000"], "--devices is 9000; JAX has 8 (cpu)"),
        (["--devices=3"], "--batch 8 must be a multiple of --devices 3"),
        (["--heads=3"], "--width 32 must be a multiple of twice --heads 3"),
        (["--log-every=3"], "--eval-every 4 must be a multiple of --log-every 3"),
        (["--preset=gpu"], "--preset gpu needs a GPU; JAX has cpu only"),
        (["--precision=fp4"], "invalid choice: 'fp4'"),
        (["--kv-heads=3"], "--heads 2 must be a multiple of --kv-heads 3"),
        (["--kv-heads=-1"], "--kv-heads is -1; wanted at least 0"),
        (["--preset=gpu-1b"], "--preset gpu-1b needs a GPU; JAX has cpu only"),
        (["--preset=gpu-8b-blocks", "--kv-heads=1"], "--preset gpu-8b-blocks needs a GPU; JAX has"),
        (["--implementation=cuda"], "--implementation cuda needs a GPU; JAX has cpu only"),
        (["--implementation=cudnn"], "--implementation cudnn needs a GPU; JAX has cpu only"),
    ],
)
def test_bad_arguments(example, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        example.parse([*options(), *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_arguments_override_the_preset(example):
    args, config = example.parse(["--batch=16", "--learning-rate=0.5", "--dtype=bfloat16"])
    want = {"batch": 16, "learning_rate": 0.5, "dtype": "bfloat16"}
    assert config == example.dataclasses.replace(example.PRESETS["cpu"], **want)
    assert args.preset == "cpu" and args.implementation is None and not args.restart
