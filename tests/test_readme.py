"""The README's snippets run, and print what they say."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) == 5


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet, capsys, monkeypatch):
    monkeypatch.chdir(README.parent)
    exec(compile(snippet, str(README), "exec"), {})
    printed = re.findall(r"print\(.*#\s*(.*)", snippet)
    assert printed
    assert capsys.readouterr().out.splitlines() == printed
