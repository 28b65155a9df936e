"""Which implementation runs: the meaning of the `implementation` argument."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxkern import _ffi

IMPLEMENTATIONS = ("cuda", "xla")

COMPUTE_CAPABILITY = "9.0"


class Choice(NamedTuple):
    """kernel: use the kernel where the computation is lowered for CUDA; fallback: and the
    reference elsewhere."""

    kernel: bool
    fallback: bool


def choose(op: str, implementation: str | Sequence[str] | None, unsupported: str | None) -> Choice:
    """Resolve `implementation` for one call of the public function `op`.

    `unsupported` says why the kernel cannot take these arguments, or is None. The reference takes
    everything.

    Raises:
      ValueError: an unknown name, or no name.
      NotImplementedError: "cuda", and the kernel cannot run this call.
      ExceptionGroup: a sequence of which no name can.
    """
    names = _names(op, implementation)
    if "cuda" not in names:
        return Choice(kernel=False, fallback=True)
    reason = unsupported or _ffi.missing() or wrong_gpu()
    if names[0] == "xla" or (reason is not None and "xla" in names):
        return Choice(kernel=False, fallback=True)
    if reason is None:
        return Choice(kernel=True, fallback="xla" in names)
    error = NotImplementedError(f"{op} with implementation 'cuda': {reason}")
    if isinstance(implementation, str):
        raise error
    raise ExceptionGroup(f"{op}: no implementation of {list(names)} takes this call", [error])


def as_static(option: Any) -> Any:
    """`option` as a hashable value: a sequence as a tuple."""
    is_sequence = isinstance(option, Sequence) and not isinstance(option, str)
    return tuple(option) if is_sequence else option


def _names(op: str, implementation: str | Sequence[str] | None) -> tuple[str, ...]:
    if implementation is None:
        return IMPLEMENTATIONS
    many = isinstance(implementation, Sequence) and not isinstance(implementation, str)
    names = tuple(implementation) if many else (implementation,)
    if not names or any(name not in IMPLEMENTATIONS for name in names):
        raise ValueError(
            f"{op}: implementation is {implementation!r}, wanted None, one of "
            f"{', '.join(map(repr, IMPLEMENTATIONS))}, or a sequence of them"
        )
    return names


@functools.cache
def wrong_gpu() -> str | None:
    """Why no GPU of this process can run the kernels, or None.

    A process without a GPU is fine: it may lower for another machine.
    """
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return None
    found = sorted({f"{d.device_kind} ({d.compute_capability})" for d in devices})
    if any(d.compute_capability == COMPUTE_CAPABILITY for d in devices):
        return None
    return (
        f"found {', '.join(found)}, wanted a GPU of compute capability {COMPUTE_CAPABILITY} (H100, "
        "H200, GH200)"
    )


@functools.cache
def has_blackwell() -> bool:
    """Whether all GPUs of this process multiply blocks of NVFP4 themselves: compute capability 10
    and 12."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return False
    return all(d.compute_capability.split(".")[0] in ("10", "12") for d in devices)


_cuda_only_p = Primitive("jaxkern_cuda_only")
_cuda_only_p.def_abstract_eval(lambda x, **_: x)


def cuda_only(x: jax.Array, op: str) -> jax.Array:
    """x, in a computation that can be lowered for CUDA only."""
    return _cuda_only_p.bind(x, op=op)


def _refuse(context, x, *, op):
    platforms = ", ".join(context.module_context.platforms)
    raise NotImplementedError(
        f"{op} with implementation 'cuda' is lowered for {platforms}, wanted cuda only; "
        "implementation None uses the reference on other platforms"
    )


mlir.register_lowering(_cuda_only_p, _refuse)
mlir.register_lowering(_cuda_only_p, lambda context, x, *, op: [x], platform="cuda")
