"""The build backend: scikit-build-core, plus the requirements that depend on what is to be built.

Kernels need nanobind, XLA's FFI headers, and nvcc. Where the system has no nvcc, the pinned wheels
from PyPI stand in for it. Without kernels the wheel is pure Python and needs none of these.
"""

import os
import platform
import shutil
import sys

from scikit_build_core import build as _build
from scikit_build_core.build import (  # noqa: F401
    build_sdist,
    get_requires_for_build_sdist,
)

# A newer FFI header is refused by an older runtime: compile against the oldest jaxlib we support.
_KERNEL_REQUIREMENTS = ["nanobind==3.1.0", "jaxlib==0.10.0"]
_NVCC_REQUIREMENTS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
_OFF = {"OFF", "0", "NO", "FALSE", "N"}


def _define(name, config_settings):
    """The value of a CMake variable given by `-C cmake.define.NAME=` or in CMAKE_ARGS, or None."""
    for argument in os.environ.get("CMAKE_ARGS", "").split():
        key, _, value = argument.partition("=")
        if key.split(":")[0] == f"-D{name}":
            return value
    for prefix in ("", "skbuild."):
        value = (config_settings or {}).get(f"{prefix}cmake.define.{name}")
        if value is not None:
            return value
    return None


def _wants_kernels(config_settings):
    chosen = (_define("JAXKERN_KERNELS", config_settings) or "AUTO").upper()
    if chosen == "AUTO":
        return sys.platform == "linux" and platform.machine() == "x86_64"
    return chosen not in _OFF


def _has_system_nvcc():
    return bool(
        os.environ.get("CUDACXX")
        or shutil.which("nvcc")
        or os.access("/usr/local/cuda/bin/nvcc", os.X_OK)
    )


def _requirements(config_settings):
    if not _wants_kernels(config_settings):
        return []
    nvcc = (_define("JAXKERN_NVCC", config_settings) or "AUTO").upper()
    if nvcc == "PYPI" or (nvcc == "AUTO" and not _has_system_nvcc()):
        return _KERNEL_REQUIREMENTS + _NVCC_REQUIREMENTS
    return _KERNEL_REQUIREMENTS


def _settings(config_settings):
    """The caller's settings, made those of a pure-Python wheel when kernels are off."""
    settings = dict(config_settings or {})
    if not _wants_kernels(config_settings):
        settings |= {
            "cmake.define.JAXKERN_KERNELS": "OFF",
            "wheel.platlib": "false",
            "wheel.py-api": "py3",
        }
    return settings


def get_requires_for_build_wheel(config_settings=None):
    """PEP 517 hook."""
    settings = _settings(config_settings)
    return _build.get_requires_for_build_wheel(settings) + _requirements(config_settings)


def get_requires_for_build_editable(config_settings=None):
    """PEP 660 hook."""
    settings = _settings(config_settings)
    return _build.get_requires_for_build_editable(settings) + _requirements(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    """PEP 517 hook."""
    return _build.prepare_metadata_for_build_wheel(metadata_directory, _settings(config_settings))


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    """PEP 660 hook."""
    return _build.prepare_metadata_for_build_editable(
        metadata_directory, _settings(config_settings)
    )


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 517 hook."""
    return _build.build_wheel(wheel_directory, _settings(config_settings), metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 660 hook."""
    return _build.build_editable(wheel_directory, _settings(config_settings), metadata_directory)
