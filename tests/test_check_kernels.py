"""tools/check_kernels.py on listings written here."""

import importlib.util
import re
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "tools" / "check_kernels.py"
SPEC = importlib.util.spec_from_file_location("check_kernels", PATH)
check_kernels = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check_kernels)

SASS = """
arch = sm_90a
		Function : _ZN7jaxkern15a_fwd_sm90_kernelE
        /*0a10*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0a20*/                   QGMMA.64x128x32.F32.E4M3.E5M2 R24, gdesc[UR8], R24 ;
		Function : _ZN7jaxkern8b_kernelE
        /*0a10*/                   FFMA R2, R2, R3, R4 ;
		Function : _ZN7jaxkern23decode_step_sm90_kernelE
        /*0a10*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
"""
RESOURCES = """
 Function _ZN7jaxkern15a_fwd_sm90_kernelE:
  REG:168 STACK:0 SHARED:17664 LOCAL:0
 Function _ZN7jaxkern8b_kernelE:
  REG:32 STACK:0 SHARED:0 LOCAL:0
"""
LOG = "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"


def test_good_kernels():
    assert check_kernels.tensor_core_counts(SASS) == {
        "_ZN7jaxkern15a_fwd_sm90_kernelE": 2,
        "_ZN7jaxkern8b_kernelE": 0,
        "_ZN7jaxkern23decode_step_sm90_kernelE": 1,
    }
    assert check_kernels.problems(SASS, RESOURCES, LOG) == []


@pytest.mark.parametrize(
    "sass, resources, log, problem",
    [
        ("", RESOURCES, LOG, "there are no kernels"),
        (re.sub("[HQ]GMMA", "HMMA", SASS), RESOURCES, LOG, "no wgmma"),
        (SASS.replace("HMMA", "FFMA"), RESOURCES, LOG, "decode_step_sm90_kernelE has no mma"),
        (SASS + "arch = sm_80\n", RESOURCES, LOG, "wanted sm_90a alone"),
        (
            SASS,
            RESOURCES.replace("STACK:0 SHARED:0", "STACK:24 SHARED:0"),
            LOG,
            "24 bytes of stack",
        ),
        (SASS, RESOURCES, LOG.replace("0 bytes spill loads", "20 bytes spill loads"), "20 bytes"),
        (SASS, RESOURCES, "ptxas warning : Registers are spilled to local memory", "spilled"),
        (SASS, RESOURCES, "ptxas info : (C7510) Potential Performance Loss: wgmma", "C7510"),
    ],
)
def test_bad_kernels(sass, resources, log, problem):
    found = check_kernels.problems(sass, resources, log)
    assert any(problem in line for line in found), found
