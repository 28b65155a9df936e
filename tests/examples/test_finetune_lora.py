"""examples/finetune_lora.py: adapters learn beside weights of four bits."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxkern.nnx import QuantizedLinear, QuantizedParam, quantize_model

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = {
    "layers": 1,
    "width": 128,
    "heads": 2,
    "hidden": 128,
    "context": 32,
    "batch": 8,
    "steps": 60,
    "log_every": 20,
    "eval_every": 60,
    "eval_batches": 1,
}


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("finetune_lora")


@pytest.fixture(scope="module")
def run(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = [f"--{name.replace('_', '-')}={value}" for name, value in RUN.items()]
    example.train_transformer.main([f"--output={folder}", *options])
    return folder


def test_result(example, run, capsys):
    format, bits = "mxfp4", 4.25
    options = ["--steps=60", "--batch=8", "--rank=4", f"--format={format}"]
    example.main([f"--run={run}", *options])
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    rounded, quantized, adapted = (result[name] for name in ("bf16", format, f"{format} + LoRA"))
    assert adapted["perplexity"] < 0.99 * quantized["perplexity"]
    assert rounded["perplexity"] < 1.2 * quantized["perplexity"]
    rows = 3 * 128 + 128 + 2 * 128 + 128  # of all layers, each of which has 128 columns
    of_rows = 4 * rows
    assert rounded["bytes"] - quantized["bytes"] == rows * 128 * (16 - bits) / 8 - of_rows
    assert adapted["bytes"] - quantized["bytes"] == 4 * 4 * (rows + 4 * 128)
    assert any(line.startswith(f"{format} + LoRA") for line in lines)


def test_adapters(example, run):
    """Add nothing at first, and nothing else learns."""
    model, _ = example.generate.load_run(run)
    model = quantize_model(example.rounded(model), {example.MATRICES: "nvfp4"})
    tokens = jnp.arange(32)[None]
    before = model(tokens)
    example.adapt(model, 4, 0)
    np.testing.assert_array_equal(model(tokens), before)
    assert isinstance(model.blocks[0].qkv.base_module, QuantizedLinear)
    kept = [nnx.state(model, kind) for kind in (QuantizedParam, nnx.Param)]
    adapters = jax.tree.map(np.asarray, nnx.state(model, nnx.LoRAParam))
    frozen = [jax.tree.map(np.asarray, state) for state in kept]
    windows = np.random.default_rng(0).integers(1, 255, (4, 33), np.uint8)
    example.finetune(model, iter([windows] * 3), 3, 1e-2)
    after = [nnx.state(model, kind) for kind in (QuantizedParam, nnx.Param)]
    changed = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(adapters), changed, strict=True))
    flat = [
        {path: x for path, x in nnx.to_flat_state(state) if "lora" not in str(path)}
        for states in (frozen, after)
        for state in states
    ]
    for old, new in zip(flat[:2], flat[2:], strict=True):
        assert old.keys() == new.keys() and old
        for path, x in old.items():
            np.testing.assert_array_equal(x[...], new[path][...])


@pytest.mark.parametrize("option", ["--rank=0", "--steps=-1", "--learning-rate=0"])
def test_options(example, option, capsys):
    with pytest.raises(SystemExit):
        example.main([option])
    assert "wanted above 0" in capsys.readouterr().err


def test_no_run(example, tmp_path):
    with pytest.raises(SystemExit, match="has no checkpoint"):
        example.main([f"--run={tmp_path}"])
