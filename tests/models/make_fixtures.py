"""Makes the tiny models of this folder and their logits by Hugging Face's transformers.

    pip install torch transformers safetensors
    python tests/models/make_fixtures.py

In each of llama/, qwen2/ and qwen3/: config.json, random float32 weights, tokens.npy and the
float32 logits.npy that transformers computes of them on the CPU.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent
LENGTH = 48
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
# Of a head's eight frequencies, one stays, two are mixed and five stretched.
SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPE = {"rope_type": "default", "rope_theta": 1_000_000.0}
MODELS = {
    "llama": transformers.LlamaConfig(
        **SIZES, head_dim=16, rms_norm_eps=1e-5, rope_parameters=SCALING, tie_word_embeddings=False
    ),
    "qwen2": transformers.Qwen2Config(**SIZES, rope_parameters=ROPE, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(
        **SIZES, head_dim=12, rope_parameters=ROPE, tie_word_embeddings=False
    ),
}


def make(name: str, config: transformers.PretrainedConfig) -> None:
    """Writes the folder `name`; weights of the llama in two shards."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    config.dtype = "float32"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # Norms are made of ones and biases of zeros.
                mean = 0.0 if parameter_name.endswith("bias") else 1.0
                parameter.normal_(mean, 0.3)
    model.eval()
    model.save_pretrained(folder, max_shard_size="56KB" if name == "llama" else "1GB")
    (folder / "generation_config.json").unlink()
    tokens = torch.randint(config.vocab_size, (2, LENGTH))
    with torch.no_grad():
        logits = model(tokens).logits
    np.save(folder / "tokens.npy", tokens.numpy().astype(np.uint8))
    np.save(folder / "logits.npy", logits.numpy())


if __name__ == "__main__":
    torch.manual_seed(0)
    for name, config in MODELS.items():
        make(name, config)
