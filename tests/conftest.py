"""Eight CPU devices for every test, and the GPU for those marked `gpu`."""

import os

import jax
import pytest

from jaxkern import _dispatch, _ffi

if "cpu" in os.environ.get("JAX_PLATFORMS", "cpu"):
    jax.config.update("jax_num_cpu_devices", 8)


def _has_gpu():
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return False
    return any(d.compute_capability == _dispatch.COMPUTE_CAPABILITY for d in devices)


if not _has_gpu():  # most of the time goes to XLA's compiler there: a fifth less
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def device(request):
    """The device that a test's arrays are on."""
    wants_gpu = request.node.get_closest_marker("gpu") is not None
    if wants_gpu and not _has_gpu():
        pytest.skip(f"needs a GPU of compute capability {_dispatch.COMPUTE_CAPABILITY}")
    with jax.default_device(jax.devices("cuda" if wants_gpu else "cpu")[0]):
        yield


@pytest.fixture
def kernels(monkeypatch):
    """Take the path of the kernels, also where they are not built: on a CPU it ends in the
    reference, and lowering for CUDA ends in the custom calls."""
    _ffi.missing()  # registers them where they are
    monkeypatch.setattr(_ffi, "missing", lambda: None)
    monkeypatch.setattr(_dispatch, "wrong_gpu", lambda: None)
