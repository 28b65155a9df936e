"""Attention, forward and backward, beside the other ways to compute it in JAX and PyTorch.

    python benchmarks/attention.py                          every case, every provider found
    python benchmarks/attention.py --quick                  a few cases, in seconds
    python benchmarks/attention.py --filter '^bwd.*h128'    some cases
    python benchmarks/attention.py --case 'fwd b1 n8/2 t4096 s4096 h128 causal bf16'

FLOPs: 4*B*N*T*S*H forward, half if causal, 2.5 times that backward; with a window or documents, for
the queries and keys that see each other.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import sys
from collections.abc import Mapping

import common
import jax
import jax.numpy as jnp
import numpy as np
import torch_attention

import jaxkern


@dataclasses.dataclass(frozen=True)
class Shape:
    """One attention problem, in jax.nn's letters: query [B,T,N,H], key and value [B,S,K,H]."""

    batch: int
    heads: int
    kv_heads: int
    query_length: int
    key_length: int
    head_dim: int
    causal: bool
    dtype: str
    window: int = 0  # keys before a query's own that it sees; 0: all
    documents: int = 0  # packed into each sequence, of uneven lengths; 0: the sequence is one

    _PATTERN = re.compile(
        r"(fwd|bwd) b(\d+) n(\d+)/(\d+) t(\d+) s(\d+) h(\d+)( causal)?"
        r"(?: window(\d+))?(?: documents(\d+))? (bf16|f16)"
    )

    @classmethod
    def parse(cls, case: str) -> tuple[str, Shape]:
        """Direction and shape of a case. Raises ValueError if it is spelled otherwise."""
        found = cls._PATTERN.fullmatch(case)
        if not found:
            raise ValueError(
                f"wanted the form 'fwd b8 n16/16 t2048 s2048 h128 causal bf16', got {case!r}"
            )
        direction, *sizes, causal, window, documents, dtype = found.groups()
        masks = int(window or 0), int(documents or 0)
        return direction, cls(*map(int, sizes), bool(causal), dtype, *masks)

    def case(self, direction: str) -> str:
        causal = " causal" if self.causal else ""
        window = f" window{self.window}" if self.window else ""
        documents = f" documents{self.documents}" if self.documents else ""
        return (
            f"{direction} b{self.batch} n{self.heads}/{self.kv_heads} t{self.query_length} "
            f"s{self.key_length} h{self.head_dim}{causal}{window}{documents} {self.dtype}"
        )

    @property
    def masked(self) -> bool:
        """Whether more than a causal mask hides keys."""
        return bool(self.window or self.documents)

    def work(self, direction: str) -> float:
        lengths = np.diff(self.boundaries).astype(float)
        pairs = (lengths**2).sum() if self.documents else self.query_length * self.key_length
        pairs *= 0.5 if self.causal else 1.0
        if self.window:
            pairs = self.query_length * (self.window + 1) - self.window * (self.window + 1) / 2
        flops = 4 * self.batch * self.heads * pairs * self.head_dim
        return flops * (2.5 if direction == "bwd" else 1.0)

    @property
    def boundaries(self) -> np.ndarray:
        """Where documents begin, and the end of the last."""
        lengths = np.resize(_LENGTHS, max(self.documents, 1)).cumsum()
        return np.rint(np.r_[0, lengths] / lengths[-1] * self.query_length).astype(int)

    @property
    def document_of(self) -> np.ndarray:
        """[T] the number of a token's document."""
        return np.repeat(np.arange(max(self.documents, 1)), np.diff(self.boundaries))

    @property
    def query_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.query_length, self.heads, self.head_dim

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.key_length, self.kv_heads, self.head_dim


# Relative lengths of packed documents.
_LENGTHS = (700, 2300, 900, 3877, 1223, 3345, 2655, 1384)

# (batch, heads, kv heads, length, head dim), each with and without a causal mask
_SIZES = (
    (32, 16, 16, 512, 128),
    (16, 16, 16, 1024, 128),
    (8, 16, 16, 2048, 128),
    (4, 16, 16, 4096, 128),
    (2, 16, 16, 8192, 128),
    (1, 16, 16, 16384, 128),
    (2, 32, 8, 8192, 128),
    (16, 32, 32, 1024, 64),
    (8, 32, 32, 2048, 64),
    (2, 32, 32, 8192, 64),
    (8, 8, 8, 2048, 256),
    (2, 8, 8, 8192, 256),
)
SHAPES = tuple(
    Shape(batch, heads, kv_heads, length, length, head_dim, causal, "bf16")
    for batch, heads, kv_heads, length, head_dim in _SIZES
    for causal in (False, True)
)
MASKED = tuple(
    Shape(1, 2048 // h, 2048 // h, 16384, 16384, h, True, "bf16", window, documents)
    for h in (64, 128)
    for window, documents in ((1024, 0), (2048, 0), (4096, 0), (0, 8))
)
QUICK = tuple(s for s in SHAPES if s.query_length == 2048 and s.head_dim <= 128)


def inputs(shape: Shape) -> common.Inputs:
    dtype = common.DTYPES[shape.dtype]
    return common.normal_inputs(
        (shape.query_shape, shape.key_shape, shape.key_shape),
        (dtype,) * 3,
        (shape.query_shape, dtype),
    )


def _jaxkern(implementation: str, **options):
    def make(shape: Shape):
        segments = shape.document_of if shape.documents else None
        return functools.partial(
            _attend_segments,
            segments=segments,
            is_causal=shape.causal,
            local_window_size=_window(shape),
            implementation=implementation,
            **options,
        )

    return make


def _attend_segments(query, key, value, segments, **options):
    if segments is not None:
        options["segment_ids"] = jnp.broadcast_to(segments, query.shape[:2])
    return jaxkern.dot_product_attention(query, key, value, **options)


def _window(shape: Shape) -> tuple[int, int] | None:
    return (shape.window, 0) if shape.window else None


def _jax_nn(implementation: str):
    def make(shape: Shape):
        logits = shape.batch * shape.heads * shape.query_length * shape.key_length
        if implementation == "xla" and logits > 2**30:
            raise NotImplementedError("it would keep more than 2^30 logits")

        def attend(query, key, value):
            mask = None
            if shape.documents:  # jax.nn has nothing better than a T x S mask
                ids = jnp.asarray(shape.document_of)
                mask = (ids[:, None] == ids)[None, None]
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                is_causal=shape.causal,
                local_window_size=_window(shape),
                implementation=implementation,
            )

        return attend

    return make


def _deterministic(seconds: float) -> common.Provider:
    """The backward alone: the forward always is."""
    both = common.jax_provider(_jaxkern("cuda", deterministic=True), seconds)

    def prepare(shape, directions, inputs, expected):
        if "bwd" not in directions:
            raise NotImplementedError("the forward is the same")
        return both(shape, ["bwd"], inputs, expected and {"bwd": expected["bwd"]})

    return prepare


def _separate(seconds: float) -> common.Provider:
    """A call for each document, of arrays that are cut before."""

    def make(shape: Shape):
        attend = functools.partial(
            jaxkern.dot_product_attention, is_causal=shape.causal, implementation="cuda"
        )
        return lambda query, key, value: tuple(map(attend, query, key, value))

    def prepare(shape, directions, inputs, expected):
        if not shape.documents:
            raise NotImplementedError("there is one document")

        def cut(x):
            return tuple(jnp.split(x, shape.boundaries[1:-1], axis=1))

        parts = common.Inputs(
            [tuple(map(cut, arrays)) for arrays in inputs.arguments],
            [cut(x) for x in inputs.cotangents],
        )
        prepared = common.jax_provider(make, seconds)(shape, directions, parts, None)
        join = functools.partial(jnp.concatenate, axis=1)
        results = {
            direction: join(x) if direction == "fwd" else tuple(map(join, x))
            for direction, x in prepared.results.items()
        }
        error = common.relative_error(results, expected or results)
        return common.Prepared(prepared.samplers, error, results)

    return prepare


@functools.partial(jax.jit, static_argnums=1)
def _first_key_head(arrays: dict[str, jax.Array], shape: Shape) -> dict[str, jax.Array]:
    """The first batch entry and key head, with the query heads that share it."""
    group = shape.heads // shape.kv_heads
    return {
        name: array[:1, :, : group if array.shape[2] == shape.heads else 1]
        for name, array in arrays.items()
    }


class TorchWorker:
    """PyTorch in a process of its own. It makes its own inputs of the same sizes and is compared on
    the first batch entry and key head, which no other head influences.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._worker = common.Worker(torch_attention.start)

    def provider(self, backend: str) -> common.Provider:
        def prepare(shape, directions, inputs, expected):
            if expected is None:
                raise NotImplementedError("there is no JAX provider to compare with")
            if shape.window or shape.documents:
                raise NotImplementedError("windows and documents are not compared")
            arrays = dict(zip(("query", "key", "value"), inputs.arguments[0], strict=True))
            arrays["dout"] = inputs.cotangents[0]
            if "fwd" in expected:
                arrays["out"] = expected["fwd"]
            if "bwd" in expected:
                arrays |= zip(("dquery", "dkey", "dvalue"), expected["bwd"], strict=True)
            first = _first_key_head(arrays, shape)
            error = self._worker(
                torch_attention.prepare,
                backend,
                shape,
                tuple(directions),
                len(inputs.arguments),
                self._seconds,
                {name: np.asarray(array).view(np.int16) for name, array in first.items()},
            )
            return common.Prepared(
                {direction: self._sampler(backend, direction) for direction in directions},
                error,
            )

        return prepare

    def _sampler(self, backend: str, direction: str):
        return lambda: self._worker(torch_attention.sample, backend, direction)

    def close(self) -> None:
        self._worker.close()


def jax_providers(seconds: float) -> dict[str, common.Provider]:
    makers = {
        "jaxkern": _jaxkern("cuda"),
        "jax.nn cudnn": _jax_nn("cudnn"),
        "jax.nn xla": _jax_nn("xla"),
        "jaxkern xla": _jaxkern("xla"),
    }
    providers = {name: common.jax_provider(make, seconds) for name, make in makers.items()}
    extra = {"jaxkern deterministic": _deterministic, "jaxkern separate": _separate}
    return providers | {name: make(seconds) for name, make in extra.items()}


TORCH_PROVIDERS = ("torch cudnn", "torch flash2")
OWN_PROVIDERS = ("jaxkern deterministic", "jaxkern separate")
DEFAULT_PROVIDERS = ("jaxkern", "jax.nn cudnn", "jax.nn xla", *OWN_PROVIDERS, *TORCH_PROVIDERS)


def main(argv: list[str]) -> int:
    parser = common.options("Attention, forward and backward, side by side.")
    chosen = parser.parse_args(argv)
    selected = common.select(parser, chosen, SHAPES + MASKED, QUICK)
    known: Mapping[str, common.Provider] = jax_providers(chosen.seconds)
    torch = importlib.util.find_spec("torch") is not None
    default = [name for name in DEFAULT_PROVIDERS if torch or name not in TORCH_PROVIDERS]
    if chosen.list:
        return common.print_list(selected, default)
    worker = None
    if torch and (not chosen.providers or "torch" in chosen.providers):
        worker = TorchWorker(chosen.seconds)
        known |= {name: worker.provider(name) for name in TORCH_PROVIDERS}
    try:
        providers = common.pick_providers(parser, chosen.providers, known, default)
        common.share_memory()
        run = common.start_run(parser, "attention.py", argv, ["torch"] if worker else [])
        family = common.Family("attention", "tflops", inputs, baseline="jax.nn cudnn")
        return common.Comparison(family, providers, run, chosen).measure(selected)
    finally:
        if worker:
            worker.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
