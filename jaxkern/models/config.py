"""What decides the shape and the function of a transformer of the Llama family."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's scaling of rotary frequencies, for contexts longer than trained on at first.

    Wavelengths shorter than original_context / high_frequency_factor stay, those longer than
    original_context / low_frequency_factor are stretched by `factor`, those in between by a mix.

    Source: `rope_scaling` of type "llama3" in Hugging Face's transformers.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int

    def __post_init__(self):
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not 0 < low < high:
            raise ValueError(
                f"low_frequency_factor must be positive and below high_frequency_factor {high}, "
                f"got {low}"
            )
        for name in ("factor", "original_context"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Config:
    """A decoder of the Llama family: Llama 3, Qwen2.5 (qkv_bias), Qwen3 (qk_norm)."""

    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # width inside the MLP
    context: int  # the longest sequence
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_epsilon: float = 1e-6
    tied_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False  # an RMSNorm over each head of query and key, before they are rotated

    def __post_init__(self):
        sizes = ("vocabulary", "layers", "width", "heads", "kv_heads", "head_dim", "hidden")
        for name in (*sizes, "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} do not divide heads {self.heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even to be rotated, got {self.head_dim}")
