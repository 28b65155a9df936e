"""Checkpoints of Hugging Face: transformers' own logits, and what is wrong with bad folders."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from flax import nnx

from jaxkern.models import Config, RopeScaling, from_pretrained, load_tokenizer, read_config
from jaxkern.testing import relative_error

FOLDER = pathlib.Path(__file__).parent  # make_fixtures.py there has made them
NAMES = ("llama", "qwen2", "qwen3")
each = pytest.mark.parametrize("name", NAMES)


def edit_config(folder, removed=(), **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: x for key, x in raw.items() if key not in removed}))


def read_tensors(folder):
    files = [safetensors.numpy.load_file(path) for path in folder.glob("*.safetensors")]
    return {name: x for file in files for name, x in file.items()}


def write_tensors(folder, tensors):
    """As one file, in the place of those there are."""
    for path in folder.glob("model*"):
        path.unlink()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@contextlib.contextmanager
def problems(*wanted):
    """Expects one ValueError with exactly these lines."""
    with pytest.raises(ValueError) as error:
        yield
    title, *lines = str(error.value).splitlines()
    assert title.endswith("cannot be loaded:")
    assert sorted(line.strip() for line in lines) == sorted(wanted)


@pytest.fixture
def copy(tmp_path):
    """A function of the name: a copy of that folder."""
    return lambda name: pathlib.Path(shutil.copytree(FOLDER / name, tmp_path / name))


@each
def test_logits_of_transformers(name):
    model = from_pretrained(FOLDER / name, dtype=jnp.float32)
    tokens, wanted = (np.load(FOLDER / name / f"{x}.npy") for x in ("tokens", "logits"))
    assert wanted.dtype == np.float32 and wanted.std() > 1
    got = model(tokens)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@each
def test_bfloat16_is_the_default(name):
    """Each parameter is rounded once, and the logits are as near as that allows."""
    whole, rounded = (
        from_pretrained(FOLDER / name, dtype=jnp.float32),
        from_pretrained(FOLDER / name),
    )

    def compare(x, y):
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(x.astype(jnp.bfloat16), y)

    jax.tree.map(compare, nnx.state(whole), nnx.state(rounded))
    tokens = np.load(FOLDER / name / "tokens.npy")
    assert 0 < relative_error(rounded(tokens), whole(tokens)) < 0.05


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_of_files(copy, dtype):
    """One file of another dtype in the place of the shards."""
    folder = copy("llama")
    tensors = {name: x.astype(jnp.dtype(dtype)) for name, x in read_tensors(folder).items()}
    # As old checkpoints have it.
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    write_tensors(folder, tensors)
    got, wanted = (from_pretrained(x, dtype=jnp.float32) for x in (folder, FOLDER / "llama"))
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(dtype).astype(jnp.float32)),
        nnx.state(got),
        nnx.state(wanted),
    )


def test_options_of_the_transformer():
    model = from_pretrained(FOLDER / "qwen2", recipe="row", implementation="xla")
    layer = model.blocks[0].qkv
    assert (layer.recipe, layer.implementation) == ("row", "xla")
    assert model(np.load(FOLDER / "qwen2" / "tokens.npy")).shape == (2, 48, 64)


def test_configurations():
    """What the folders on the hub have."""
    llama = Config(
        vocabulary=64,
        layers=2,
        width=32,
        heads=4,
        kv_heads=2,
        head_dim=16,
        hidden=48,
        context=64,
        rope_theta=500.0,
        rope_scaling=RopeScaling(4.0, 1.0, 4.0, 32),
        norm_epsilon=1e-5,
    )
    assert read_config(FOLDER / "llama") == llama
    qwen = dataclasses.replace(llama, rope_theta=1e6, rope_scaling=None, norm_epsilon=1e-6)
    qwen2 = dataclasses.replace(qwen, head_dim=8, tied_embeddings=True, qkv_bias=True)
    assert read_config(FOLDER / "qwen2") == qwen2
    assert read_config(FOLDER / "qwen3") == dataclasses.replace(qwen, head_dim=12, qk_norm=True)


@pytest.mark.parametrize("word", ["rope_type", "type"])
def test_configurations_of_before_transformers_5(copy, word):
    for name in NAMES:
        folder, wanted = copy(name), read_config(FOLDER / name)
        rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
        theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
        rope = rope | {word: kind} if rope else None
        edit_config(folder, ["rope_parameters"], rope_theta=theta, rope_scaling=rope)
        assert read_config(folder) == wanted


def test_defaults(copy):
    """What older configurations leave out."""
    removed = ["head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps", "hidden_act"]
    removed += ["tie_word_embeddings", "attention_bias", "mlp_bias", "layer_types"]
    for name, head_dim in (("llama", 8), ("qwen2", 8), ("qwen3", 128)):
        edit_config(folder := copy(name), removed)
        got = read_config(folder)
        assert (got.kv_heads, got.head_dim, got.rope_theta) == (4, head_dim, 10_000.0)
        assert (got.norm_epsilon, got.tied_embeddings, got.rope_scaling) == (1e-6, False, None)


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', wanted 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True, wanted False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True, wanted False"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True, wanted False"),
        (
            "llama",
            {"quantization_config": {"bits": 4}},
            "quantization_config is {'bits': 4}, wanted None",
        ),
        (
            "qwen2",
            {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_type is 'yarn', wanted 'default' or 'llama3'",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, wanted 1.0"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5, wanted 1.0",
        ),
        (
            "qwen2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "sliding windows are in use, wanted full attention in all layers",
        ),
        (
            "qwen2",
            {
                "layer_types": None,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 1,
            },
            "sliding windows are in use, wanted full attention in all layers",
        ),
        ("llama", {"num_key_value_heads": 3}, "kv_heads 3 do not divide heads 4"),
        ("llama", {"num_attention_heads": 0}, "heads must be positive, got 0"),
    ],
)
def test_settings_that_are_not_supported(copy, name, changes, problem):
    edit_config(folder := copy(name), **changes)
    for function in (read_config, from_pretrained):
        with problems(problem):
            function(folder)


@pytest.mark.parametrize("architectures", [None, [], ["MistralForCausalLM"]])
def test_other_architectures(copy, architectures):
    edit_config(folder := copy("llama"), architectures=architectures)
    wanted = "('LlamaForCausalLM', 'Qwen2ForCausalLM', 'Qwen3ForCausalLM')"
    with problems(f"architectures is {architectures!r}, wanted one of {wanted}"):
        from_pretrained(folder)


def test_windows_that_no_layer_has(copy):
    for changes in (
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    ):
        edit_config(folder := copy("qwen2"), ["layer_types"], **changes)
        assert read_config(folder) == read_config(FOLDER / "qwen2")
        shutil.rmtree(folder)


def test_what_a_configuration_leaves_out(copy):
    folder = copy("llama")
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0}
    edit_config(folder, ["vocab_size", "hidden_size"], rope_parameters=rope)
    with problems(
        "vocab_size is missing",
        "hidden_size is missing",
        "high_freq_factor is missing",
        "original_max_position_embeddings is missing",
    ):
        read_config(folder)


def test_tensors_that_do_not_fit(copy):
    folder = copy("qwen3")
    tensors = read_tensors(folder)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(48, np.float32)
    query = "model.layers.1.self_attn.q_proj.weight"
    tensors[query] = np.ascontiguousarray(tensors[query].T)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    write_tensors(folder, tensors)
    with problems(
        "model.norm.weight is missing",
        "model.layers.0.self_attn.q_proj.bias is unknown",
        "model.layers.1.self_attn.q_proj.weight has shape (32, 48), wanted (48, 32)",
        "lm_head.weight has dtype I8, wanted one of ('BF16', 'F16', 'F32')",
    ):
        from_pretrained(folder)


def test_files_that_are_missing(copy):
    (folder := copy("llama")).joinpath("model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        from_pretrained(folder)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    gone = [name for name, file in index.items() if file.startswith("model-00002")]
    file = "model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names"
    assert sorted(lines) == sorted([file, *(f"{name} is missing" for name in gone)])

    (folder / "model.safetensors.index.json").unlink()
    with problems("there is neither model.safetensors nor model.safetensors.index.json"):
        from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        from_pretrained(folder)


def test_all_problems_are_told_at_once(copy):
    folder = copy("qwen2")
    tensors = read_tensors(folder)
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    tensors["model.layers.2.input_layernorm.weight"] = np.ones(32, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_tensors(folder, tensors)
    rope = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
    edit_config(folder, hidden_act="relu", rope_parameters=rope, num_key_value_heads=4)
    key = "model.layers.{}.self_attn.{}_proj.{}"
    with problems(
        "hidden_act is 'relu', wanted 'silu'",
        "rope_type is 'dynamic', wanted 'default' or 'llama3'",
        "model.layers.2.input_layernorm.weight is unknown",
        "lm_head.weight is unknown",
        "model.layers.1.self_attn.k_proj.bias is missing",
        *(
            f"{key.format(i, x, 'weight')} has shape (16, 32), wanted (32, 32)"
            for i in range(2)
            for x in "kv"
        ),
        f"{key.format(0, 'k', 'bias')} has shape (16,), wanted (32,)",
        *(f"{key.format(i, 'v', 'bias')} has shape (16,), wanted (32,)" for i in range(2)),
    ):
        from_pretrained(folder)


def test_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="tokenizer.json does not exist"):
        load_tokenizer(tmp_path)
    model = tokenizers.models.WordLevel({"one": 0, "two": 1}, unk_token="one")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("two one two").ids == [1, 0, 1]


def test_packages_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="needs safetensors: pip install safetensors"):
        from_pretrained(FOLDER / "llama")
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ImportError, match="needs tokenizers: pip install tokenizers"):
        load_tokenizer(tmp_path)
