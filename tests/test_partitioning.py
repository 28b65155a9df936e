"""The sharding rules, and which mesh axes a kernel call keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

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


def test_rule_of_a_result_with_an_axis_of_its_own():
    text, options = _partitioning._rule([("b0", "c")], [("b0", "c"), ("b0", "d")], [(2, 256)])
    assert text == "b0 c -> b0 c, b0 d"
    assert options == {"need_replication_factors": ("c", "d")}


@pytest.mark.parametrize(
    ("axes", "spec", "shape", "wanted"),
    [
        ((0, 1), P("data", "model"), (2, 4, 8, 4), P("data", None, "model", None)),
        ((0,), P(("data", "model"), None), (2, 4, 32), P(None, None, None)),
        ((1,), P(None, "model"), (8, 8, 4), P(None, "model", None)),
        ((), P("data", "model"), (8, 32), P("data", "model")),
    ],
)
def test_split_axes(axes, spec, shape, wanted):
    """Into blocks of 4; what is sharded over a part of a block becomes whole."""
    kind = jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind, kind), devices=jax.devices("cpu"))
    x = np.arange(8 * 32).reshape(8, 32)
    got = _partitioning.split_axes(jax.device_put(x, NamedSharding(mesh, spec)), axes, 4)
    assert jax.typeof(got).sharding.spec == wanted
    np.testing.assert_array_equal(got, x.reshape(shape))
    np.testing.assert_array_equal(_partitioning.split_axes(jnp.asarray(x), axes, 4), got)


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


@pytest.mark.parametrize(
    "entries",
    [
        (("data",), ()),
        ((), ("model",)),
        (("model",), ("data",)),
        (("data", "model"), ()),
        ((), ("model", "data")),
        ((), ()),
    ],
    ids=str,
)
def test_entries_of_what_the_compiler_says(entries):
    mesh = jax.make_mesh((2, 4), ("data", "model"), devices=jax.devices("cpu"))
    sharding = NamedSharding(mesh, P(*entries))
    assert _partitioning._entries(mesh, sharding, 2) == entries
    nothing = jax.sharding.AbstractMesh((), ())  # where JAX has no names to give
    assert _partitioning._entries(nothing, sharding, 2) == ((), ())
