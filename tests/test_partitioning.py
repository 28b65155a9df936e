"""The sharding rules, and which mesh axes a kernel call keeps."""

import pytest

from jaxkern import _partitioning

QUERY, KEY, LSE = ("b0", "t", "n", "h"), ("b0", "s", "k", "h"), ("b0", "n", "t")
MESH = {"data": 2, "model": 4}


@pytest.mark.parametrize(
    ("heads", "key_heads", "rule", "whole", "groups"),
    [
        (4, 4, "b0 t k h, b0 s k h -> b0 t k h, b0 k t", "ths", {}),
        (8, 4, "b0 t (k g) h, b0 s k h -> b0 t (k g) h, b0 (k g) t", "tghs", {"g": 2}),
        (4, 1, "b0 t n h, b0 s k h -> b0 t n h, b0 n t", "thsk", {}),
        (1, 1, "b0 t k h, b0 s k h -> b0 t k h, b0 k t", "ths", {}),
    ],
)
def test_rule_of_attention(heads, key_heads, rule, whole, groups):
    """Factors that must be whole are in order of appearance; none in a compound has size 1."""
    shapes = [(2, 16, heads, 64), (2, 24, key_heads, 64)]
    text, options = _partitioning._rule([QUERY, KEY], [QUERY, LSE], shapes)
    assert text == rule
    assert options == {"need_replication_factors": tuple(whole), **groups}


def test_rule_of_norm():
    x = ("b0", "b1", "w")
    text, options = _partitioning._rule([x, ("w",)], [x, x[:-1]], [(2, 3, 8), (8,)])
    assert text == "b0 b1 w, w -> b0 b1 w, b0 b1"
    assert options == {"need_replication_factors": ("w",)}


@pytest.mark.parametrize(
    ("shapes", "query", "key", "split"),
    [
        pytest.param(
            [(4, 16, 8, 64), (4, 24, 4, 64)],
            ("data", None, "model", None),
            (None, None, None, None),
            {"b0": ("data",), "n": ("model",), "k": ("model",)},
            id="the key follows the query",
        ),
        pytest.param(
            [(4, 16, 8, 64), (4, 24, 4, 64)],
            (None, "data", None, "model"),
            ("data", None, "model", None),
            {"b0": ("data",)},
            id="heads as the query, batch as either",
        ),
        pytest.param(
            [(4, 16, 4, 64), (4, 24, 1, 64)],
            (("data",), None, ("model",), None),
            (None, None, None, None),
            {"b0": ("data",), "n": ("model",)},
            id="one key head is on every device",
        ),
        pytest.param(
            [(4, 16, 8, 64), (4, 24, 2, 64)],
            (None, None, "model", None),
            (None, None, None, None),
            {},
            id="fewer key heads than devices",
        ),
        pytest.param(
            [(3, 16, 8, 64), (3, 24, 4, 64)],
            ("data", None, None, None),
            ("data", None, None, None),
            {},
            id="uneven batch",
        ),
        pytest.param(
            [(8, 16, 8, 64), (8, 24, 4, 64)],
            (None, None, ("model",), None),
            (("data", "model"), None, None, None),
            {"n": ("model",), "k": ("model",)},
            id="a mesh axis is used once",
        ),
    ],
)
def test_split(shapes, query, key, split):
    assert _partitioning._split(MESH, [QUERY, KEY], shapes, [query, key]) == split
