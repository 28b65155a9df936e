"""The installed package as a file: what it ships, what it links, how it imports."""

import importlib.util
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from jaxkern.__main__ import _OPS

SYSTEM_LIBRARIES = {"ld-linux-x86-64.so.2", "libc.so.6", "libgcc_s.so.1", "libstdc++.so.6"}

module_spec = importlib.util.find_spec("jaxkern._C")
needs_kernels = pytest.mark.skipif(module_spec is None, reason="built without kernels")
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")


def python(code):
    """What a new Python prints; -P, so that it imports what this one does and not the directory."""
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def readelf(*options):
    command = ["readelf", "--wide", *options, module_spec.origin]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout


@needs_kernels
def test_module_imports_before_jax():
    code = f"""
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("_C", {module_spec.origin!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
assert "jax" not in sys.modules
import jax
for name, handler in module.registrations().items():
    jax.ffi.register_ffi_target(name, handler, platform="CUDA")
print(jax.numpy.ones(2).sum(), *module.registrations())
"""
    total, *names = python(code).split()
    assert total == "2.0"
    assert set(names) == {target for targets in _OPS.values() for target in targets}


@needs_kernels
def test_targets_are_capsules_of_handlers():
    module = importlib.import_module("jaxkern._C")
    for target in module.registrations().values():
        assert type(target).__name__ == "PyCapsule"


@needs_kernels
def test_build_info():
    info = importlib.import_module("jaxkern._C").build_info()
    assert info["architectures"] == "90a-real"
    assert info["nvcc"] in ("system", "PyPI")
    assert info["ffi_api"] == "0.3"  # the oldest supported jaxlib's: a newer one fails to register
    assert int(info["cuda"].split(".")[0]) >= 12


@needs_kernels
@needs_readelf
def test_links_only_system_libraries():
    needed = {
        line.split("[")[1].rstrip("]")
        for line in readelf("--dynamic").splitlines()
        if "(NEEDED)" in line
    }
    assert "libc.so.6" in needed
    assert needed <= SYSTEM_LIBRARIES


@needs_kernels
@needs_readelf
def test_exports_only_its_entry_point():
    rows = [line.split() for line in readelf("--dyn-syms").splitlines() if " DEFAULT " in line]
    defined = [row[7] for row in rows if row[6] != "UND"]
    assert defined == ["PyInit__C"]


def test_ships_no_sources():
    try:
        files = metadata.files("jaxkern")
    except metadata.PackageNotFoundError:
        pytest.skip("jaxkern is not installed")
    suffixes = {Path(file).suffix for file in files}
    assert ".py" in suffixes
    assert not suffixes & {".cu", ".cuh", ".cc", ".h", ".txt", ".cmake"}


def test_import_adds_little_to_importing_jax():
    code = """
import time, jax
start = time.perf_counter()
import jaxkern
print(time.perf_counter() - start)
"""
    assert min(float(python(code)) for _ in range(3)) < 0.3
