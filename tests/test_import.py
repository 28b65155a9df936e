"""import jaxkern is quick and touches no device."""

import subprocess
import sys

import jaxkern

PROGRAM = """
import time
import jax
start = time.perf_counter()
import jaxkern
seconds = time.perf_counter() - start
import sys
from jax._src import xla_bridge
assert seconds < 0.3, f"import took {seconds:.2f} s"
assert "jaxkern._C" not in sys.modules, "the compiled module is loaded"
assert not xla_bridge._backends, "a backend is initialised"
"""


def test_import_is_quick_and_touches_no_device():
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], check=True)


def test_public_names():
    public = {name for name in dir(jaxkern) if not name.startswith("_")}
    assert {"dot_product_attention", "rms_norm"} <= public
    assert public <= {"dot_product_attention", "rms_norm", "ops", "reference", "testing"}
