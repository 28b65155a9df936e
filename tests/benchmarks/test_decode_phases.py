"""benchmarks/decode_phases.py, of which only the GPU shows the rest."""

import decode_phases
import pytest

PRINTED = """\
llama-3.2-1b b1 ctx192 greedy: 589.6 us, 4.19 TB/s
with attention   take   wait
  qkv             7.2   32.0
  gate_up         0.0    6.4
without it       take   wait
  qkv             7.5   27.1
"""


def test_parts():
    assert dict(decode_phases.parts_of(PRINTED)) == {
        "with attention qkv take": 7.2,
        "with attention qkv wait": 32.0,
        "with attention gate_up wait": 6.4,
        "without it qkv take": 7.5,
        "without it qkv wait": 27.1,
    }


@pytest.mark.parametrize("case", ["decode llama", "generate llama-3.2-1b bf16 b1 p128 n64"])
def test_cases(case, capsys):
    with pytest.raises(SystemExit):
        decode_phases.main(["--case", case])
    assert "--case: " in capsys.readouterr().err
