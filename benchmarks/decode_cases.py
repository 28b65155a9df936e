"""The cases of `decode.py`: models by name, and what is done with them."""

from __future__ import annotations

import dataclasses
import re
from typing import ClassVar

from jaxkern.decode.pack import WEIGHTS
from jaxkern.models import Config, RopeScaling

STEPS = 32  # in one compiled function
_WEIGHTS = "|".join(WEIGHTS)


def _llama(factor: float, **sizes) -> Config:
    scaling = RopeScaling(factor, 1.0, 4.0, original_context=8192)
    same = {"vocabulary": 128_256, "head_dim": 64, "context": 131_072, "rope_theta": 5e5}
    return Config(norm_epsilon=1e-5, rope_scaling=scaling, **same | sizes)


def _qwen(**sizes) -> Config:
    same = {"vocabulary": 151_936, "layers": 28, "head_dim": 128, "rope_theta": 1e6}
    return Config(tied_embeddings=True, **same, **sizes)


MODELS = {
    "llama-3.2-1b": _llama(
        32.0, layers=16, width=2048, heads=32, kv_heads=8, hidden=8192, tied_embeddings=True
    ),
    "qwen2.5-1.5b": _qwen(
        width=1536, heads=12, kv_heads=2, hidden=8960, context=32_768, qkv_bias=True
    ),
    "llama-3.1-8b": _llama(
        8.0, layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, hidden=14_336
    ),
    "qwen3-0.6b": _qwen(
        width=1024, heads=16, kv_heads=8, hidden=3072, context=40_960, qk_norm=True
    ),
    "tiny": Config(  # for trying this out
        vocabulary=96, layers=2, width=64, heads=4, kv_heads=2, head_dim=32, hidden=128, context=128
    ),
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, the format of its matrices, and how many sequences there are."""

    model: str
    weights: str
    batch: int

    direction: ClassVar[str]
    pattern: ClassVar[re.Pattern]

    def __post_init__(self):
        if self.model not in MODELS:
            raise ValueError(f"no model {self.model}; there are {', '.join(MODELS)}")
        if self.tokens > self.config.context:
            raise ValueError(
                f"{self.case(self.direction)!r} has {self.tokens} tokens, above the model's "
                f"context {self.config.context}"
            )

    @property
    def config(self) -> Config:
        return MODELS[self.model]

    @property
    def tokens(self) -> int:
        """Of a sequence, at the end."""
        raise NotImplementedError

    def case(self, direction: str) -> str:
        return f"{direction} {self.model} {self.weights} b{self.batch}"


@dataclasses.dataclass(frozen=True)
class Step(Shape):
    """A step for sequences of `context` tokens."""

    context: int

    direction: ClassVar[str] = "decode"
    pattern: ClassVar[re.Pattern] = re.compile(rf"decode (\S+) ({_WEIGHTS}) b([1-9]\d*) ctx(\d+)")

    def __post_init__(self):
        super().__post_init__()
        if self.context < STEPS:
            raise ValueError(f"ctx{self.context} is less than the {STEPS} steps that are taken")

    @property
    def tokens(self) -> int:
        return self.context

    @property
    def start(self) -> int:
        """How many tokens there are before the first of the steps."""
        return self.context - STEPS

    def case(self, direction: str) -> str:
        return f"{super().case(direction)} ctx{self.context}"

    def work(self, direction: str) -> float:
        return weight_bytes(self.config, self.weights)


@dataclasses.dataclass(frozen=True)
class Generation(Shape):
    """`new` tokens that follow prompts of `prompt` tokens."""

    prompt: int
    new: int

    direction: ClassVar[str] = "generate"
    pattern: ClassVar[re.Pattern] = re.compile(
        rf"generate (\S+) ({_WEIGHTS}) b([1-9]\d*) p([2-9]|[1-9]\d+) n([1-9]\d*)"
    )

    @property
    def tokens(self) -> int:
        return self.prompt + self.new

    def case(self, direction: str) -> str:
        return f"{super().case(direction)} p{self.prompt} n{self.new}"

    def work(self, direction: str) -> float:
        return self.batch * self.new


def parse(case: str) -> tuple[str, Shape]:
    """Direction and shape of a case. Raises ValueError if it is spelled otherwise or too large."""
    for kind in (Step, Generation):
        if found := kind.pattern.fullmatch(case):
            model, weights, *sizes = found.groups()
            return kind.direction, kind(model, weights, *map(int, sizes))
    raise ValueError(
        "wanted the form 'decode llama-3.2-1b bf16 b1 ctx256' or "
        f"'generate llama-3.2-1b bf16 b1 p128 n64', got {case!r}"
    )


def weight_bytes(config: Config, weights: str) -> int:
    """Bytes of the weights that a step reads: of the matrices, those that are not bfloat16 with a
    scale for each row, the head among them, and of norms and biases, which are bfloat16.

    Of four bits 16 columns of a row have a byte of scales, or 32 two; not counted are the 8 bytes
    that may follow a block of an odd number of rows.
    """
    layers, width = config.layers, config.width
    qkv = (config.heads + 2 * config.kv_heads) * config.head_dim
    matrices = (
        (layers * qkv, width),
        (layers * width, config.heads * config.head_dim),
        (layers * 2 * config.hidden, width),
        (layers * width, config.hidden),
        (config.vocabulary, width),
    )
    vectors = (2 * layers + 1) * width
    vectors += layers * (qkv * config.qkv_bias + 2 * config.head_dim * config.qk_norm)
    sixteen, scale = {"bf16": (32, 0), "fp8": (16, 4)}.get(weights, (9, 4))  # columns, of a row
    row_bytes = ((rows, columns * sixteen // 16 + scale) for rows, columns in matrices)
    return sum(rows * size for rows, size in row_bytes) + 2 * vectors


_LARGEST_CACHE = 131_072  # tokens: 17 GB for Llama-3.1-8B, and there are two
_SIZES = [(b, ctx) for b in (1, 4, 8, 16) for ctx in (256, 2048, 8192, 32768)]
SHAPES = tuple(
    shape
    for model in ("llama-3.2-1b", "qwen2.5-1.5b", "llama-3.1-8b", "qwen3-0.6b")
    for weights in ("bf16", "fp8", "nvfp4")
    for shape in (
        *(Step(model, weights, b, ctx) for b, ctx in _SIZES if b * ctx <= _LARGEST_CACHE),
        *(Generation(model, weights, 1, 128, new) for new in (64, 1)),
    )
)
QUICK = (
    *(Step("llama-3.2-1b", weights, 1, 256) for weights in ("bf16", "fp8", "nvfp4")),
    *(Generation("llama-3.2-1b", "bf16", 1, 128, new) for new in (64, 1)),
)
