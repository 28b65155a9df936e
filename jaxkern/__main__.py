"""`python -m jaxkern`: versions, GPUs, what is built, and which operations run where."""

import argparse
import importlib
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jax

from jaxkern import _dispatch, _ffi

# The targets that each public operation calls.
_OPS = {
    "decode_step": ("jaxkern.decode_step",),
    "dot_product_attention": ("jaxkern.attention_fwd", "jaxkern.attention_bwd"),
    "fp8_matmul": ("jaxkern.quantize", "jaxkern.scaled_matmul"),
    "fp8_mlp": (
        "jaxkern.quantize",
        "jaxkern.quantize_rms_norm",
        "jaxkern.quantize_swiglu",
        "jaxkern.quantize_swiglu_grad",
        "jaxkern.rms_norm_bwd",
        "jaxkern.scaled_matmul",
    ),
    "quantize": ("jaxkern.quantize", "jaxkern.quantize_four_bit", "jaxkern.row_amax"),
    "quantize_rms_norm": ("jaxkern.quantize_rms_norm",),
    "quantize_swiglu": ("jaxkern.quantize_swiglu",),
    "quantize_swiglu_grad": ("jaxkern.quantize_swiglu_grad",),
    "quantized_matmul": (
        "jaxkern.quantize",
        "jaxkern.quantized_matmul",
        "jaxkern.quantized_matmul_grad",
        "jaxkern.scaled_matmul",
        "jaxkern.weight_to_fp8",
    ),
    "rms_norm": ("jaxkern.rms_norm_fwd", "jaxkern.rms_norm_bwd"),
    "scaled_matmul": ("jaxkern.scaled_matmul",),
}


def report() -> Iterator[tuple[str, str]]:
    """The lines to print, as (name, what is known of it)."""
    for package in ("jaxkern", "jax", "jaxlib", "flax"):
        yield package, _version(package)
    yield "python", platform.python_version()
    yield "driver", _driver(Path("/proc/driver/nvidia/version"))
    for device in (gpus := _gpus()):
        yield f"gpu {device.id}", f"{device.device_kind}, {device.compute_capability}"
    if not gpus:
        yield "gpu", "none that JAX can use"
    yield "kernels", _kernels()
    for op, targets in _OPS.items():
        yield op, f"xla: everywhere; cuda: {_where(targets, gpus)}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver(path: Path) -> str:
    if not path.exists():
        return "none found"
    found = re.search(r"Module.*?(\d+(\.\d+)+)", path.read_text())
    return found[1] if found else "unknown"


def _gpus() -> list[jax.Device]:
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


def _kernels() -> str:
    if reason := _ffi.missing():
        return f"none: {reason}"
    info = importlib.import_module("jaxkern._C").build_info()
    return (
        f"{info['architectures']}, compiled by nvcc {info['cuda']} ({info['nvcc']}), "
        f"XLA FFI {info['ffi_api']}"
    )


def _where(targets: tuple[str, ...], gpus: list[jax.Device]) -> str:
    if _ffi.missing():
        return "not built"
    built = importlib.import_module("jaxkern._C").registrations()
    if absent := [target for target in targets if target not in built]:
        return f"not built ({', '.join(absent)})"
    if not gpus:
        return "built, but there is no GPU"
    return _dispatch.wrong_gpu() or "on the GPUs above"


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m jaxkern", description=__doc__)
    parser.parse_args()
    lines = list(report())
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    main()
