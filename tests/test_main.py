import sys
import types

import jax
import pytest

from jaxkern import __main__ as main
from jaxkern import _dispatch, _ffi


def module(*targets):
    info = {"architectures": "90a-real", "cuda": "13.0", "nvcc": "PyPI", "ffi_api": "0.3"}
    return types.SimpleNamespace(
        build_info=lambda: info, registrations=lambda: dict.fromkeys(targets)
    )


@pytest.fixture
def built(monkeypatch):
    """Pretends that the module `_C` holds the given targets."""

    def pretend(*targets):
        monkeypatch.setitem(sys.modules, "jaxkern._C", module(*targets))
        monkeypatch.setattr(_ffi, "missing", lambda: None)

    return pretend


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a GPU of the given compute capability."""

    def pretend(capability, reason):
        device = types.SimpleNamespace(id=0, device_kind="GPU X", compute_capability=capability)
        monkeypatch.setattr(main, "_gpus", lambda: [device])
        monkeypatch.setattr(_dispatch, "wrong_gpu", lambda: reason)

    return pretend


def test_prints_versions(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxkern"])
    main.main()
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["jax"] == jax.__version__
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    assert lines["rms_norm"].startswith("xla: everywhere; cuda: ")
    assert {"jaxkern", "jaxlib", "flax", "driver", "kernels", "dot_product_attention"} <= set(lines)


def test_package_that_is_not_there():
    assert main._version("no-such-package-of-ours") == "not installed"


def test_without_kernels(monkeypatch):
    monkeypatch.setattr(_ffi, "missing", lambda: "the reason")
    lines = dict(main.report())
    assert lines["kernels"] == "none: the reason"
    assert lines["rms_norm"] == "xla: everywhere; cuda: not built"


def test_one_family_built(built, monkeypatch):
    built("jaxkern.rms_norm_fwd", "jaxkern.rms_norm_bwd")
    monkeypatch.setattr(main, "_gpus", lambda: [])
    lines = dict(main.report())
    assert lines["kernels"] == "90a-real, compiled by nvcc 13.0 (PyPI), XLA FFI 0.3"
    assert lines["gpu"] == "none that JAX can use"
    assert lines["rms_norm"] == "xla: everywhere; cuda: built, but there is no GPU"
    assert lines["dot_product_attention"] == (
        "xla: everywhere; cuda: not built (jaxkern.attention_fwd, jaxkern.attention_bwd)"
    )


@pytest.mark.parametrize(
    "capability, reason, where", [("9.0", None, "on the GPUs above"), ("8.0", "too old", "too old")]
)
def test_gpu(built, gpu, capability, reason, where):
    built("jaxkern.rms_norm_fwd", "jaxkern.rms_norm_bwd")
    gpu(capability, reason)
    lines = dict(main.report())
    assert lines["gpu 0"] == f"GPU X, {capability}"
    assert lines["rms_norm"] == f"xla: everywhere; cuda: {where}"


@pytest.mark.parametrize(
    "text, version",
    [
        (
            "NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release",
            "580.159.04",
        ),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54  Tue", "535.54"),
        ("something else", "unknown"),
        (None, "none found"),
    ],
)
def test_driver(tmp_path, text, version):
    path = tmp_path / "version"
    if text is not None:
        path.write_text(text)
    assert main._driver(path) == version
