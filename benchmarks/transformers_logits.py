"""transformers' logits for `decode_accuracy.py`, which runs these functions in a process of their
own."""

from __future__ import annotations

import os

import numpy as np
from transformers_generate import describe

from jaxkern.models import Config


def start() -> None:
    """Imports transformers."""
    import transformers  # noqa: F401


def save(config: Config, folder: str) -> None:
    """A model with random weights, in bfloat16."""
    import torch
    import transformers

    torch.manual_seed(0)
    described = transformers.AutoConfig.for_model(**describe(config))
    model = transformers.AutoModelForCausalLM.from_config(described, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def logits(folder: str, tokens: np.ndarray, dtype: str, device: str) -> str:
    """A file of the logits [B, T, V], float32, after each token of prompts [B, T]."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = model.to(device).eval()
    with torch.inference_mode():
        results = [
            model(torch.from_numpy(prompt).long().to(device)[None]).logits.float().cpu().numpy()
            for prompt in tokens
        ]
    path = os.path.join(folder, f"{dtype}.npy")
    np.save(path, np.concatenate(results))
    return path
