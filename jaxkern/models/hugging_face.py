"""Models of Hugging Face: their config.json, safetensors and tokenizer.json, from a folder."""

import functools
import importlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxkern.models.config import Config, RopeScaling
from jaxkern.models.transformer import Transformer

if TYPE_CHECKING:
    import tokenizers

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
DTYPES = ("BF16", "F16", "F32")
SIZES = {
    "vocabulary": "vocab_size",
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "context": "max_position_embeddings",
}
SCALING = {
    "factor": "factor",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
    "original_context": "original_max_position_embeddings",
}

Path = tuple[str | int, ...]  # of a parameter in a Transformer
Shapes = Mapping[str, tuple[int, ...]]  # of tensors in a checkpoint, by name


def read_config(folder: str | os.PathLike) -> Config:
    """The `Config` that config.json in `folder` describes.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: an architecture or settings that `Transformer` does not have; lists them all.
    """
    config, problems = _parse_config(folder)
    _raise_all(folder, problems)
    return config


def load_tokenizer(folder: str | os.PathLike) -> "tokenizers.Tokenizer":
    """The tokenizer that tokenizer.json in `folder` describes.

    Raises:
        FileNotFoundError: there is no tokenizer.json.
        ImportError: the package tokenizers is not installed.
    """
    path = pathlib.Path(folder, "tokenizer.json")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    return _package("tokenizers").Tokenizer.from_file(str(path))


def from_pretrained(
    folder: str | os.PathLike, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, **options: Any
) -> Transformer:
    """The model in `folder`: a Llama 3, Qwen2.5 or Qwen3 as Hugging Face's transformers saves it.

    Everything is checked before any weight is read. Weights are read one parameter at a time, so
    the host never holds a second copy of the model.

    Args:
        folder: has config.json and either model.safetensors or model.safetensors.index.json with
            the files that it names.
        dtype: of parameters.
        **options: of `Transformer`: recipe, attention_fn, implementation, ...

    Returns:
        The model, on JAX's default device.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: an architecture or settings that `Transformer` does not have; files that are
            missing; tensors that are missing, unknown, misshapen or of other dtypes than float32,
            bfloat16 and float16. Lists them all.
        ImportError: the package safetensors is not installed.
    """
    config, problems = _parse_config(folder)
    files, headers, more = _read_headers(folder)
    problems += more
    if config is not None and files:
        sources = dict(_sources(config))
        wanted = functools.reduce(dict.__or__, sources.values())
        problems += _compare(headers, wanted)
    _raise_all(folder, problems)

    model = nnx.eval_shape(
        lambda: Transformer(config, param_dtype=dtype, rngs=nnx.Rngs(0), **options)
    )
    graph, parameters = nnx.split(model)
    parameters = nnx.to_flat_state(parameters)

    def read(path: Path) -> jax.Array:
        tensors = [jnp.asarray(files[name].get_tensor(name)) for name in sources[path]]
        whole = jnp.concatenate(tensors).astype(dtype)
        return whole.T if path[-1] == "kernel" else whole

    loaded = [(path, variable.replace(read(path))) for path, variable in parameters]
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _package(name: str) -> ModuleType:
    """An optional dependency."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"jaxkern.models needs {name}: pip install {name}") from error


def _raise_all(folder: str | os.PathLike, problems: Iterable[str]) -> None:
    """Raises ValueError where there are problems."""
    if problems:
        raise ValueError("\n  ".join([f"{os.fspath(folder)} cannot be loaded:", *problems]))


def _parse_config(folder: str | os.PathLike) -> tuple[Config | None, list[str]]:
    """What config.json describes, and what `Transformer` lacks for it.

    The former is None where it cannot be told.
    """
    raw = json.loads(pathlib.Path(folder, "config.json").read_text())
    problems = []

    def demand(name: str, wanted: Any, default: Any, given: Mapping[str, Any] = raw) -> Any:
        value = given.get(name, default)
        if value != wanted:
            problems.append(f"{name} is {value!r}, wanted {wanted!r}")

    architectures = raw.get("architectures")
    architecture = architectures[0] if architectures else None
    if architecture not in ARCHITECTURES:
        problems.append(f"architectures is {architectures!r}, wanted one of {ARCHITECTURES}")
    demand("hidden_act", "silu", "silu")
    demand("quantization_config", None, None)
    if architecture != "Qwen2ForCausalLM":  # Which has a bias for qkv and never looks.
        demand("attention_bias", False, False)
    demand("mlp_bias", False, False)
    if _has_windows(raw):
        problems.append("sliding windows are in use, wanted full attention in all layers")

    # As transformers 5 writes it, or those before.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        problems.append(f"rope_type is {kind!r}, wanted 'default' or 'llama3'")
    demand("partial_rotary_factor", 1.0, raw.get("partial_rotary_factor", 1.0), rope)
    needed = [name for name in SIZES.values() if name not in raw]
    needed += [name for name in SCALING.values() if kind == "llama3" and name not in rope]
    problems += [f"{name} is missing" for name in needed]
    if needed:
        return None, problems

    sizes = {ours: raw[theirs] for ours, theirs in SIZES.items()}
    head_dim = sizes["width"] // max(1, sizes["heads"])
    if architecture == "Qwen3ForCausalLM":
        head_dim = 128
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(**{ours: rope[theirs] for ours, theirs in SCALING.items()})
    try:
        config = Config(
            **sizes,
            kv_heads=raw.get("num_key_value_heads") or sizes["heads"],
            head_dim=raw.get("head_dim") or head_dim,
            rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10_000.0)),
            rope_scaling=scaling,
            norm_epsilon=raw.get("rms_norm_eps", 1e-6),
            tied_embeddings=raw.get("tie_word_embeddings", False),
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
        )
    except ValueError as error:
        return None, [*problems, str(error)]
    return (config if architecture in ARCHITECTURES else None), problems


def _has_windows(raw: Mapping[str, Any]) -> bool:
    """Whether a layer's attention is local, as transformers' configurations of Qwen decide it."""
    if (kinds := raw.get("layer_types")) is not None:
        return any(kind != "full_attention" for kind in kinds)
    if not raw.get("use_sliding_window") or raw.get("sliding_window", 4096) is None:
        return False
    return raw.get("max_window_layers", 28) < raw.get("num_hidden_layers", 0)


def _read_headers(folder: str | os.PathLike) -> tuple[dict, dict, list[str]]:
    """Of each tensor its open file and its (shape, dtype), and what is wrong with the files."""
    safe_open = _package("safetensors").safe_open
    whole, index = (
        pathlib.Path(folder, name) for name in ("model.safetensors", "model.safetensors.index.json")
    )
    if whole.exists():
        paths = [whole]
    elif index.exists():
        names = json.loads(index.read_text())["weight_map"].values()
        paths = [pathlib.Path(folder, name) for name in sorted(set(names))]
    else:
        return {}, {}, [f"there is neither {whole.name} nor {index.name}"]
    files, headers, problems = {}, {}, []
    for path in paths:
        if not path.exists():
            problems.append(f"{path.name} is missing, which {index.name} names")
            continue
        file = safe_open(path, "numpy")
        for name in file.keys():
            header = file.get_slice(name)
            files[name], headers[name] = file, (tuple(header.get_shape()), header.get_dtype())
    return files, headers, problems


def _compare(headers: Mapping[str, tuple[tuple[int, ...], str]], wanted: Shapes) -> list[str]:
    """How the tensors of a checkpoint differ from those wanted."""
    problems = [f"{name} is missing" for name in wanted if name not in headers]
    for name, (shape, dtype) in headers.items():
        if name.endswith("rotary_emb.inv_freq"):  # Old checkpoints have what the config says.
            continue
        if name not in wanted:
            problems.append(f"{name} is unknown")
            continue
        if shape != wanted[name]:
            problems.append(f"{name} has shape {shape}, wanted {wanted[name]}")
        if dtype not in DTYPES:
            problems.append(f"{name} has dtype {dtype}, wanted one of {DTYPES}")
    return problems


def _sources(config: Config) -> Iterable[tuple[Path, Shapes]]:
    """Each parameter of a Transformer and the tensors it is made of.

    They follow each other along their first axis. Kernels are transposed then.
    """
    c = config
    query, key, width = c.heads * c.head_dim, c.kv_heads * c.head_dim, (c.width,)
    yield ("embed", "embedding"), {"model.embed_tokens.weight": (c.vocabulary, c.width)}
    yield ("norm", "scale"), {"model.norm.weight": width}
    if not c.tied_embeddings:
        yield ("head", "kernel"), {"lm_head.weight": (c.vocabulary, c.width)}
    for i in range(c.layers):
        theirs = f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        qkv = {f"{attention}.{x}_proj": n for x, n in (("q", query), ("k", key), ("v", key))}
        ours = {
            ("attention_norm", "scale"): {f"{theirs}.input_layernorm.weight": width},
            ("qkv", "kernel"): {f"{name}.weight": (n, c.width) for name, n in qkv.items()},
            ("out", "kernel"): {f"{attention}.o_proj.weight": (c.width, query)},
            ("mlp_norm", "scale"): {f"{theirs}.post_attention_layernorm.weight": width},
            ("gate_up", "kernel"): {
                f"{mlp}.{x}_proj.weight": (c.hidden, c.width) for x in ("gate", "up")
            },
            ("down", "kernel"): {f"{mlp}.down_proj.weight": (c.width, c.hidden)},
        }
        if c.qkv_bias:
            ours["qkv", "bias"] = {f"{name}.bias": (n,) for name, n in qkv.items()}
        if c.qk_norm:
            ours["query_norm", "scale"] = {f"{attention}.q_norm.weight": (c.head_dim,)}
            ours["key_norm", "scale"] = {f"{attention}.k_norm.weight": (c.head_dim,)}
        for path, tensors in ours.items():
            yield ("blocks", i, *path), tensors
