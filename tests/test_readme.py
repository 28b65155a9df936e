"""The README's snippet runs."""

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_snippet(capsys):
    [snippet] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(snippet, str(README), "exec"), {})
    printed = re.search(r"print\(.*#\s*(.*)", snippet)[1]
    assert capsys.readouterr().out.strip() == printed
