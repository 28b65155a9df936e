"""Eight CPU devices for every test, and the GPU for those marked `gpu`."""

import collections
import itertools
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


def pytest_addoption(parser):
    parser.addoption(
        "--sample",
        type=int,
        metavar="N",
        help="N cases of each test function at most, with as many of the values of its parameters "
        "as they can have",
    )
    parser.addoption(
        "--pairs",
        action="store_true",
        help="cases of each test function that have, of every two of its parameters, each value of "
        "one with each of the other, instead of all combinations",
    )


def pytest_collection_modifyitems(config, items):
    count, pairs = config.getoption("sample"), config.getoption("pairs")
    if count is None and not pairs:
        return
    functions = collections.defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    chosen = {item for cases in functions.values() for item in _sample(cases, count, pairs)}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]


def _sample(cases, count, pairs):
    def values(case):  # by identity: the combinations of a grid share the objects of its axes
        params = case.callspec.params if hasattr(case, "callspec") else {}
        return sorted((name, id(value)) for name, value in params.items())

    def wanted(case):
        singles = [(value,) for value in values(case)]
        return {*singles, *(itertools.combinations(values(case), 2) if pairs else ())}

    has = {case: wanted(case) for case in cases}
    missing = set().union(*has.values())
    chosen = []
    while not chosen or (missing and len(chosen) < (count or len(cases))):
        chosen.append(max(cases, key=lambda case: len(has[case] & missing)))
        missing -= has[chosen[-1]]
    return chosen


@pytest.fixture(autouse=True)
def device(request):
    """The device that a test's arrays are on."""
    wants_gpu = request.node.get_closest_marker("gpu") is not None
    if wants_gpu and not _has_gpu():
        pytest.skip(f"needs a GPU of compute capability {_dispatch.COMPUTE_CAPABILITY}")
    with jax.default_device(jax.devices("cuda" if wants_gpu else "cpu")[0]):
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """Lets go of what JAX has compiled for a module of tests: every function has several mappings
    of memory, of which Linux gives a process 65,530, and XLA crashes when there are no more."""
    yield
    jax.clear_caches()


@pytest.fixture
def kernels(monkeypatch):
    """Take the path of the kernels, also where they are not built: on a CPU it ends in the
    reference, and lowering for CUDA ends in the custom calls."""
    _ffi.missing()  # registers them where they are
    monkeypatch.setattr(_ffi, "missing", lambda: None)
    monkeypatch.setattr(_dispatch, "wrong_gpu", lambda: None)
