"""Whole models in Flax nnx, and the weights of Hugging Face's."""

from jaxkern.models.config import Config, RopeScaling
from jaxkern.models.hugging_face import from_pretrained, load_tokenizer, read_config
from jaxkern.models.transformer import Transformer

__all__ = [
    "Config",
    "RopeScaling",
    "Transformer",
    "from_pretrained",
    "load_tokenizer",
    "read_config",
]
