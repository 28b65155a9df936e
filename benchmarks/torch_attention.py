"""PyTorch's attention for `attention.py`, which runs these functions in a process of their own.

So PyTorch's CUDA libraries and allocator never meet JAX's, and if it fails the run goes on. Arrays
come and go as [B,T,N,H]; bf16 and f16 travel as their int16 bits.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxkern import benchmarking

BACKENDS = {"torch cudnn": "CUDNN_ATTENTION", "torch flash2": "FLASH_ATTENTION"}
DTYPES = {"bf16": "bfloat16", "f16": "float16"}

_inputs: dict[Any, list] = {}
_samplers: dict[tuple[str, str], benchmarking.Sampler] = {}


def start() -> None:
    """Imports PyTorch and wakes the GPU. Raises NotImplementedError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise NotImplementedError("PyTorch sees no GPU")
    torch.zeros((), device="cuda")


def prepare(
    backend: str,
    shape: Any,
    directions: tuple[str, ...],
    sets: int,
    seconds: float,
    first: dict[str, Any],
    device: str = "cuda",
) -> float:
    """Makes the samplers of a backend on a shape, and forgets those of other shapes.

    `first` holds the operands and the expected results of the first batch entry and key head. The
    operands are written over that part of the first set of inputs; returned is the largest relative
    Frobenius error there.
    """
    import torch
    import torch.nn.attention

    dtype = getattr(torch, DTYPES[shape.dtype])
    kernel = getattr(torch.nn.attention.SDPBackend, BACKENDS[backend])
    known = {name: torch.from_numpy(a).view(dtype).to(device) for name, a in first.items()}
    if shape not in _inputs:
        _inputs.clear()
        _samplers.clear()
        _inputs[shape] = [_operands(shape, dtype, device) for _ in range(sets)]
        for tensor, name in zip(_inputs[shape][0], ("query", "key", "value", "dout"), strict=True):
            part = known[name].transpose(1, 2)
            tensor.data[:1, : part.shape[1]] = part
    operands = _inputs[shape]

    def forward(query, key, value, _=None):
        with torch.nn.attention.sdpa_kernel(kernel):
            return torch.nn.functional.scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=shape.causal,
                enable_gqa=shape.heads != shape.kv_heads,
            )

    def backward(out, query, key, value, dout):
        return torch.autograd.grad(out, (query, key, value), dout, retain_graph=True)

    def wait(_):
        if device == "cuda":
            torch.cuda.synchronize()

    sampler = functools.partial(benchmarking.Sampler, wait=wait, seconds=seconds)
    results = {}
    if "fwd" in directions:
        constants = [tuple(t.detach() for t in four) for four in operands]
        results["out"] = forward(*constants[0])
        _samplers[backend, "fwd"] = sampler(forward, constants)
    if "bwd" in directions:
        pairs = [(forward(*four), *four) for four in operands]
        gradients = backward(*pairs[0])
        results |= zip(("dquery", "dkey", "dvalue"), gradients, strict=True)
        _samplers[backend, "bwd"] = sampler(backward, pairs)
    errors = []
    for name, result in results.items():
        wanted = known[name].transpose(1, 2).float()
        got = result[:1, : wanted.shape[1]].float()
        errors.append(((got - wanted).norm() / wanted.norm()).item())
    return max(errors, key=lambda error: (error != error, error))


def _operands(shape: Any, dtype: Any, device: str) -> tuple:
    """Query, key, value and cotangent as [B,N,T,H] views of [B,T,N,H] tensors."""
    import torch

    def normal(size, differentiable):
        tensor = torch.randn(size, dtype=dtype, device=device).transpose(1, 2)
        return tensor.requires_grad_(differentiable)

    query, key = shape.query_shape, shape.key_shape
    return normal(query, True), normal(key, True), normal(key, True), normal(query, False)


def sample(backend: str, direction: str) -> float:
    return _samplers[backend, direction]()
