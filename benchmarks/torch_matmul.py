"""PyTorch's products for `quantized_matmul.py`, which runs these functions in a process of its own:
of bfloat16 matrices, and of bfloat16 by int4 in groups of 128."""

from __future__ import annotations

import functools
from typing import Any

from jaxkern import benchmarking

GROUP, INNER_TILES = 128, 8

_samplers: dict[str, benchmarking.Sampler] = {}


def start() -> None:
    """Imports PyTorch and wakes the GPU. Raises NotImplementedError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("PyTorch sees no GPU")
    torch.zeros((), device="cuda")


def prepare(name: str, m: int, n: int, k: int, sets: int, seconds: float) -> float:
    """Makes the sampler of a provider and forgets that of another shape.

    Returned is the relative Frobenius error of its first product against one in float32.
    """
    import torch

    _samplers.pop(name, None)
    torch.cuda.empty_cache()
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    make, multiply = {"torch bf16": (_plain, torch.matmul), "torch int4": (_int4, _by_int4)}[name]
    weights, exact = zip(*(make(n, k, first=i == 0) for i in range(sets)), strict=True)
    wanted = x.float() @ exact[0].float()
    graph, results = torch.cuda.CUDAGraph(), []
    multiply(x, weights[0])  # loads what is loaded lazily
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        results += [multiply(x, weight) for weight in weights]
    wait = functools.partial(_wait, x, weights)
    _samplers[name] = benchmarking.Sampler(
        graph.replay, [()], wait=wait, seconds=seconds, steps=sets
    )
    return ((results[0].float() - wanted).norm() / wanted.norm()).item()


def _plain(n: int, k: int, first: bool) -> tuple[Any, Any]:
    """A weight, and what it stands for as [k, n]."""
    import torch

    w = torch.randn(n, k, dtype=torch.bfloat16, device="cuda").T
    return w, w


def _int4(n: int, k: int, first: bool) -> tuple[Any, Any]:
    import torch

    codes = torch.randint(0, 16, (n, k), dtype=torch.int32, device="cuda")
    scale = torch.rand(k // GROUP, n, dtype=torch.bfloat16, device="cuda") + 0.5
    packed = torch.ops.aten._convert_weight_to_int4pack(
        (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), INNER_TILES
    )
    scales = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()
    exact = (codes.T.float() - 8) * scale.repeat_interleave(GROUP, 0) if first else None
    return (packed, scales), exact


def _by_int4(x: Any, weight: tuple[Any, Any]) -> Any:
    import torch

    packed, scales = weight
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def _wait(*_: Any) -> None:
    """Keeps its arguments, which a graph does not."""
    import torch

    torch.cuda.synchronize()


def sample(name: str) -> float:
    return _samplers[name]()
