"""transformers' generate for `decode.py`, which runs these functions in a process of their own.

A model has random weights of its own. "transformers" has a static cache, for which generate
compiles the decoding forward pass by itself; "transformers eager" has neither.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxkern import benchmarking
from jaxkern.models import Config
from jaxkern.models.hugging_face import SCALING, SIZES

OPTIONS = {"transformers": {"cache_implementation": "static"}, "transformers eager": {}}

_models: dict[Config, Any] = {}
_samplers: dict[tuple[Any, str], benchmarking.Sampler] = {}


def describe(config: Config) -> dict[str, Any]:
    """What config.json says of such a model."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {theirs: getattr(scaling, ours) for ours, theirs in SCALING.items()}
        rope["rope_type"] = "llama3"
    return {
        "model_type": "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama",
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied_embeddings,
    }


def prepare(
    provider: str,
    config: Config,
    sizes: tuple[int, int, int],
    seconds: float,
    device: str = "cuda",
) -> None:
    """Makes the sampler of a provider for a model and (batch, prompt, new), and forgets others."""
    import torch
    import transformers

    case = config, sizes
    if all(known != case for known, _ in _samplers):
        _samplers.clear()
        torch.compiler.reset()  # else it would compile for any size what it sees in a second one
    if config not in _models:
        _models.clear()
        described = transformers.AutoConfig.for_model(**describe(config), eos_token_id=None)
        with torch.device(device):
            _models[config] = transformers.AutoModelForCausalLM.from_config(
                described, dtype=torch.bfloat16
            ).eval()
    batch, prompt, new = sizes
    tokens = torch.randint(config.vocabulary, (batch, prompt), device=device)
    generate = functools.partial(
        _models[config].generate,
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        do_sample=False,
        **OPTIONS[provider],
    )

    def wait(_):
        if device == "cuda":
            torch.cuda.synchronize()

    def call():
        generated = generate()
        wait(generated)
        return generated

    if (got := call().shape[1]) != prompt + new:
        raise RuntimeError(f"generate gave {got - prompt} tokens, wanted {new}")
    _samplers[case, provider] = benchmarking.Sampler(call, [()], wait=wait, seconds=seconds)


def sample(provider: str, config: Config, sizes: tuple[int, int, int]) -> float:
    return _samplers[(config, sizes), provider]()
