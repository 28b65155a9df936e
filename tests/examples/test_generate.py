"""examples/generate.py: what it prints of tiny models, from folders and from runs."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from jaxkern import decode, models

SCRIPT = Path(__file__).parents[2] / "examples" / "generate.py"
LLAMA = Path(__file__).parents[1] / "models" / "llama"
PROMPT, PROMPT_TOKENS = "t11 t42 t7", [11, 42, 7]
NEW = 40
TINY_RUN = {
    "layers": 1,
    "width": 64,
    "heads": 2,
    "hidden": 64,
    "context": 64,
    "batch": 4,
    "steps": 4,
    "log_every": 2,
    "eval_every": 2,
    "eval_batches": 2,
}


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        module = importlib.import_module("generate")
        patch.setattr(module, "READ_BYTES", 2**20)
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The llama of tests/models in sizes that pack_weights takes, with a tokenizer of 64 words.

    Two of its heads are one here, and there are 16 more hidden units, of zeros, and 32 more of
    what has its width.
    """
    folder = tmp_path_factory.mktemp("llama")
    tensors = {}
    for path in LLAMA.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    for name, x in tensors.items():
        gives_width = "o_proj" in name or "down" in name
        pads = [(0, 0)] * x.ndim
        pads[0 if gives_width or x.ndim == 1 else 1] = (0, 32)
        if "mlp" in name:
            pads[1 if gives_width else 0] = (0, 16)
        tensors[name] = np.pad(x, pads)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    sizes |= {"intermediate_size": 64, "hidden_size": 64}
    raw = json.loads((LLAMA / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | sizes | {"eos_token_id": None}))
    words = {f"t{i}": i for i in range(65)}  # the model knows 64
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def trained(example, tmp_path_factory):
    """The folder of a run of train_transformer.py."""
    folder = tmp_path_factory.mktemp("run")
    options = [f"--{k.replace('_', '-')}={v}" for k, v in TINY_RUN.items()]
    importlib.import_module("train_transformer").main([f"--output={folder}", *options])
    return folder


@pytest.fixture
def run(example, folder, capsys):
    """A function of options: the text that the model of the folder prints, and the result."""

    def run(*options, folder=folder, prompt=PROMPT):
        source = [f"--model={folder}", f"--prompt={prompt}", f"--max-new-tokens={NEW}"]
        example.main([*source, *options])
        text, rest = capsys.readouterr().out.split("\n---")
        return text, json.loads(rest.splitlines()[-1])

    return run


def expected(folder, weights="bf16", **options):
    """The tokens that follow PROMPT."""
    packed = decode.pack_weights(models.from_pretrained(folder), weights)
    prompt = np.array([PROMPT_TOKENS])
    return decode.generate(packed, prompt, max_new_tokens=NEW, **options).tokens[0].tolist()


def words(tokens):
    return " ".join(f"t{i}" for i in tokens)


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_greedy(run, folder, weights):
    """The prompt and what generate gives, each time."""
    options = f"--weights={weights}", "--temperature=0", "--implementation=xla"
    text, result = run(*options)
    assert text == words(PROMPT_TOKENS + expected(folder, weights))
    assert run(*options, "--seed=5")[0] == text
    assert (result["tokens"], result["timed_tokens"]) == (NEW, NEW)
    assert (result["weights"], result["implementation"]) == (weights, "xla")
    times = [result[f"seconds_to_{name}"] for name in ("first_token", "timed_tokens")]
    assert 0 < min(times) and max(times) < 100
    assert 0 < result["tokens_per_s"] < 1e6
    rate = result["tokens_per_s"] * result["weight_bytes_per_token"]
    assert result["weight_bytes_per_s"] == pytest.approx(rate)
    assert 0 < result["memory_bytes_per_s"] < 1e14


def test_sampling(run, folder):
    """Draws of generate, which the seed decides; and not the likeliest tokens unless there is a
    choice of one."""
    options = "--temperature=1.5", "--top-k=20", "--top-p=0.95"
    text, _ = run(*options, "--seed=3")
    sampling = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "key": jax.random.key(3)}
    assert text == words(PROMPT_TOKENS + expected(folder, **sampling))
    greedy = words(PROMPT_TOKENS + expected(folder))
    texts = {text, run(*options, "--seed=4")[0], run()[0], greedy}
    assert len(texts) == 4
    assert run("--temperature=1.5", "--top-k=1")[0] == greedy


def test_stop_token(run, folder, tmp_path):
    """The text ends before it, in the middle of a chunk, and it is counted."""
    tokens = expected(folder)
    stop = next(token for i, token in enumerate(tokens) if i > 16 and token not in tokens[:i])
    place = tokens.index(stop)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    text, result = run("--temperature=0", folder=tmp_path)
    assert text == words(PROMPT_TOKENS + tokens[:place])
    assert result["tokens"] == result["timed_tokens"] == place + 1


def test_stop_tokens_of_a_folder(example, tmp_path):
    """Those of generation_config.json, if it has any, come before those of config.json."""
    (tmp_path / "config.json").write_text("{}")
    assert example.read_stops(tmp_path) == []
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert example.read_stops(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert example.read_stops(tmp_path) == [2]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 0]}')
    assert example.read_stops(tmp_path) == [5, 0]


def test_a_token_that_the_model_does_not_know(run):
    with pytest.raises(SystemExit, match="TOKEN_OUT_OF_RANGE"):
        run(prompt="t3 t64")


def test_one_chunk_has_no_rate(run):
    _, result = run("--max-new-tokens=3")
    assert result["tokens"] == 3 and result["seconds_to_timed_tokens"] > 0
    assert result["tokens_per_s"] is None and result["weight_bytes_per_s"] is None


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_bytes_per_token(example, folder, weights):
    width, hidden, vocabulary, layers = 64, 64, 64, 2
    shapes = [(128, width), (width, 64), (2 * hidden, width), (width, hidden)] * layers
    shapes.append((vocabulary, width))
    rows, elements = (sum(map(f, shapes)) for f in (lambda shape: shape[0], math.prod))
    matrices = 2 * elements if weights == "bf16" else elements + 4 * rows
    rest = 2 * (2 * layers + 1) * width + 4 * 16  # norms and frequencies
    packed = decode.pack_weights(models.from_pretrained(folder), weights)
    assert example.bytes_per_token(packed) == matrices + rest


def test_a_character_is_printed_when_it_is_whole(example, capsys):
    printer = example.Printer(example.Text(None, lambda x: bytes(x).decode(errors="replace"), [0]))

    def printed(tokens):
        printer(np.array([list(tokens)]))
        return capsys.readouterr().out

    euro = "€".encode()
    assert printed(b"a" + euro[:1]) == "a"
    assert printed(euro[1:2]) == ""
    assert printed(euro[2:] + b"b") == "€b"
    assert printed(b"\xffc") == "\N{REPLACEMENT CHARACTER}c"
    assert printed(euro[:2] + b"\0\0") == ""
    printer.end()
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_the_model_of_a_run_is_the_last_one(trained):
    """It has the last held-out loss of the run."""
    training = importlib.import_module("train_transformer")
    config = training.Config(**TINY_RUN)
    _, held_out = training.read_corpus()
    model = training.last_model(trained)
    losses = [training.loss(model, x) for x in training.held_out_batches(held_out, config)]
    last = (trained / "losses.csv").read_text().splitlines()[-1].split(",")
    assert int(last[0]) == TINY_RUN["steps"]
    assert np.mean(losses) == pytest.approx(float(last[2]), rel=1e-5)


def test_a_run_by_the_command(trained, tmp_path):
    """From another folder, with bytes of a character of two in the prompt."""
    command = [sys.executable, "-W", "error", str(SCRIPT), f"--run={trained}", "--prompt=é"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "encoding": "utf-8"}
    done = subprocess.run(
        [*command, "--max-new-tokens=20", "--weights=fp8"], timeout=200, **options
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("é") and " after 2: the first in " in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["tokens"] <= 20
    assert not list(tmp_path.iterdir())


def test_runs_in_order(example, trained, tmp_path, monkeypatch):
    """That of the cpu preset, a short one, which is trained if need be; one by name is no other."""
    training = importlib.import_module("train_transformer")
    monkeypatch.chdir(tmp_path)
    calls = []

    def train(options):
        calls.append(options)
        shutil.copytree(trained, example.SHORT_RUN)

    monkeypatch.setattr(training, "main", train)
    with pytest.raises(SystemExit, match="runs/other has no checkpoint of train_transformer.py"):
        example.load_run(Path("runs", "other"))
    assert not calls
    for _ in range(2):
        model, text = example.load_run(None)
    assert calls == [["--output=runs/generate", "--steps=100"]]
    assert (model.config.width, text.stops) == (TINY_RUN["width"], [0])
    assert text.encode("é") == [0xC3, 0xA9] and text.decode([0xC3, 0xA9]) == "é"

    shutil.move(example.SHORT_RUN, training.default_output("cpu"))
    example.load_run(None)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights=int8"], "invalid choice: 'int8'"),
        (["--implementation=triton"], "invalid choice: 'triton'"),
        (["--implementation=cuda"], "--implementation cuda needs a GPU; JAX has cpu only"),
        (["--model=a", "--run=b"], "not allowed with argument"),
        (["--prompt="], "--prompt is empty; wanted some text"),
        (["--max-new-tokens=0"], "--max-new-tokens is 0; wanted at least 1"),
        (["--temperature=-1"], "--temperature is -1.0; wanted 0 or above"),
        (["--temperature=nan"], "--temperature is nan; wanted 0 or above"),
        (["--top-k=0"], "--top-k is 0; wanted at least 1"),
        (["--top-p=0"], "--top-p is 0.0; wanted above 0, 1 at most"),
    ],
)
def test_bad_arguments(example, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        example.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_errors_of_the_library(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        run(folder=tmp_path)
    with pytest.raises(ValueError, match="together above the context 64"):
        run("--max-new-tokens=62")
