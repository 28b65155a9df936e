"""cmake/backend.py: what a build requires, and the settings that it runs with."""

import importlib.util
import platform
import sys
import types
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "cmake" / "backend.py"
OFF = {"cmake.define.JAXKERN_KERNELS": "OFF"}


@pytest.fixture
def backend(monkeypatch):
    """The backend over a scikit-build-core that only echoes settings, on Linux without nvcc."""
    echo = types.ModuleType("scikit_build_core.build")
    echo.build_sdist = echo.get_requires_for_build_sdist = None
    echo.get_requires_for_build_wheel = lambda settings: ["cmake"]
    echo.get_requires_for_build_editable = lambda settings: ["cmake"]
    echo.build_wheel = lambda directory, settings, metadata: settings
    package = types.ModuleType("scikit_build_core")
    package.build = echo
    monkeypatch.setitem(sys.modules, "scikit_build_core", package)
    monkeypatch.setitem(sys.modules, "scikit_build_core.build", echo)
    spec = importlib.util.spec_from_file_location("backend", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    for name in ("CUDACXX", "CMAKE_ARGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)
    return module


def names(requirements):
    return {requirement.partition("==")[0] for requirement in requirements}


def test_no_system_nvcc(backend):
    required = backend.get_requires_for_build_wheel()
    assert {"cmake", "nanobind", "jaxlib", "nvidia-cuda-nvcc", "nvidia-nvvm"} <= names(required)
    assert all("==" in requirement for requirement in required if requirement != "cmake")
    assert backend.get_requires_for_build_editable() == required


@pytest.mark.parametrize("where", ["CUDACXX", "PATH", "/usr/local/cuda"])
def test_system_nvcc(backend, monkeypatch, where):
    if where == "CUDACXX":
        monkeypatch.setenv("CUDACXX", "/somewhere/nvcc")
    elif where == "PATH":
        monkeypatch.setattr(backend.shutil, "which", lambda name: f"/somewhere/{name}")
    else:
        monkeypatch.setattr(backend.os, "access", lambda path, mode: path.startswith(where))
    assert names(backend.get_requires_for_build_wheel()) == {"cmake", "nanobind", "jaxlib"}
    chosen = backend.get_requires_for_build_wheel({"cmake.define.JAXKERN_NVCC": "PYPI"})
    assert "nvidia-cuda-nvcc" in names(chosen)


def test_kernels_off(backend, monkeypatch):
    assert backend.get_requires_for_build_wheel(OFF) == ["cmake"]
    assert backend.build_wheel("", OFF)["wheel.py-api"] == "py3"
    assert backend.build_wheel("", OFF)["wheel.platlib"] == "false"
    monkeypatch.setenv("CMAKE_ARGS", "-DOTHER=1 -DJAXKERN_KERNELS=off")
    assert backend.get_requires_for_build_wheel() == ["cmake"]
    assert backend.build_wheel("", None)["cmake.define.JAXKERN_KERNELS"] == "OFF"


@pytest.mark.parametrize("system, machine", [("darwin", "x86_64"), ("linux", "aarch64")])
def test_platform_without_kernels(backend, monkeypatch, system, machine):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert backend.get_requires_for_build_wheel() == ["cmake"]
    asked = backend.get_requires_for_build_wheel({"cmake.define.JAXKERN_KERNELS": "ON"})
    assert "nanobind" in names(asked)


def test_settings_are_passed_on(backend):
    assert backend.build_wheel("", {"build-dir": "x"}) == {"build-dir": "x"}
