"""import jaxkern is quick, touches no device, and shows what it has."""

import subprocess
import sys

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
assert "flax" not in sys.modules, "flax is loaded"
assert not xla_bridge._backends, "a backend is initialised"
print(*sorted(name for name in dir(jaxkern) if not name.startswith("_")))
"""


def test_import():
    run = [sys.executable, "-W", "error", "-c", PROGRAM]
    result = subprocess.run(run, check=True, capture_output=True, text=True)
    functions = {"dot_product_attention", "fp8_matmul", "quantize", "quantize_weight", "rms_norm"}
    functions |= {"fp8_mlp", "quantize_rms_norm", "quantize_swiglu", "quantize_swiglu_grad"}
    functions |= {"scaled_matmul", "quantized_matmul", "pack_weight", "blackwell_scales"}
    folders, types = {"ops", "reference"}, {"PackedWeight", "QuantizedArray", "QuantizedWeight"}
    assert set(result.stdout.split()) == functions | folders | types
