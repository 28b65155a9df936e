import fp8_linear
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern import benchmarking

SHAPE = fp8_linear.Shape(64, 32, 48, "bf16", "bf16")


@pytest.fixture(autouse=True)
def on_any_device(monkeypatch):
    monkeypatch.setattr(benchmarking, "l2_cache_bytes", lambda: 1)
    monkeypatch.setattr(fp8_linear, "IMPLEMENTATION", "xla")


def test_spelling():
    shape = fp8_linear.Shape(16384, 4096, 16384, "bf16", "f32")
    assert shape.case("fwd-bwd") == "fwd-bwd m16384 k4096 n16384 bf16 w-f32"
    for shape in fp8_linear.SHAPES:
        assert fp8_linear.Shape.parse(shape.case("fwd")) == ("fwd", shape)
    message = "wanted the form 'fwd-bwd m16384 k4096 n16384 bf16 w-bf16', got 'bwd m1'"
    with pytest.raises(ValueError, match=message):
        fp8_linear.Shape.parse("bwd m1")


def test_operations():
    assert SHAPE.work("fwd") == 4 * 64 * 32 * 48
    assert SHAPE.work("fwd-bwd") == 12 * 64 * 32 * 48


def test_measures_on_any_device(tmp_path):
    """Every provider, against the first one's y and gradients."""
    cases = [SHAPE.case(direction) for direction in fp8_linear.DIRECTIONS]
    arguments = [word for case in cases for word in ("--case", case)]
    arguments += ["--repeats", "2", "--seconds", "0.001", "--commit", "abc"]
    assert fp8_linear.main([*arguments, "--output", str(tmp_path)]) == 0
    [path] = tmp_path.iterdir()
    rows = benchmarking.read_rows(path)
    ours = [name for name in fp8_linear.PROVIDERS if name.startswith("jaxkern")]
    assert len(ours) == 8
    for case in cases:
        found = [(r.provider, r.metric) for r in rows if r.case == case]
        assert set(found) == {
            *((name, metric) for name in fp8_linear.PROVIDERS for metric in ("us", "tflops")),
            *((f"{name} / xla bf16", "ratio") for name in ours),
        }
        assert len(found) == len(set(found))


@pytest.mark.parametrize("name", fp8_linear.PROVIDERS)
@pytest.mark.parametrize("weight_dtype", ["bf16", "f32"])
def test_results_are_the_products_by_the_provider_s_format(name, weight_dtype):
    """y and three gradients, in the dtypes of x and the weights; only `xla bf16` is exact."""
    shape = fp8_linear.Shape(64, 32, 48, "bf16", weight_dtype)
    inputs = fp8_linear.inputs(shape)
    prepare = fp8_linear.fp8_provider(fp8_linear.MAKERS[name], seconds=0.001)
    results = prepare(shape, ["fwd", "fwd-bwd"], inputs, None).results
    (x, w1, w2), dy = inputs.arguments[0], inputs.cotangents[0]
    assert [a.dtype for a in results["fwd-bwd"]] == [a.dtype for a in (x, x, w1, w2)]
    x, w1, w2, dy = (np.asarray(a, np.float64) for a in (x, w1, w2, dy))
    wanted = (x @ w1 @ w2, dy @ w2.T @ w1.T, x.T @ (dy @ w2.T), (x @ w1).T @ dy)
    low, high = (0, 0.01) if name == "xla bf16" else (0.02, 0.12)
    for got, exact in zip(
        (*results["fwd"], *results["fwd-bwd"]), (wanted[0], *wanted), strict=True
    ):
        error = np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact)
        assert low < error < high


def test_flax_s_next_state_is_computed():
    """Which costs time, and would be dropped if nothing asked for it."""
    linears = fp8_linear.flax_linears(SHAPE)
    inputs = fp8_linear.inputs(SHAPE)
    seen = []

    def step(dy, x, w1, w2, state):
        seen.append(state)
        y, pullback = jax.vjp(linears.function, x, w1, w2, state)
        return y, *pullback(dy)

    linears.more(step, inputs.cotangents[0], *inputs.arguments[0])
    first, last = (jnp.stack([jnp.max(a) for a in jax.tree.leaves(s)]) for s in (seen[0], seen[-1]))
    assert not jnp.any(first == last)


def test_products_that_xla_did_not_compile_to_fp8():
    call = f"x = f32[] custom-call(a, b), {fp8_linear.FP8_CALL}\n"
    fp8_linear.check_calls(call * 6, fp8_linear.FP8_CALL, 6)
    with pytest.raises(RuntimeError, match="XLA compiled 5 of 6 products to custom_call_target"):
        fp8_linear.check_calls(call * 5, fp8_linear.FP8_CALL, 6)


def test_a_product_that_is_not_fp8_fails(tmp_path, monkeypatch, capsys):
    """On a GPU; here, where nothing is compiled to cuBLASLt, told that it is one."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    arguments = ["--case", SHAPE.case("fwd"), "--commit", "abc", "--output", str(tmp_path)]
    arguments += ["--providers", "xla bf16,xla fp8,flax fp8", "--seconds", "0.001", "--repeats=2"]
    assert fp8_linear.main(arguments) == 1
    out = capsys.readouterr().out
    for name in ("xla fp8", "flax fp8"):
        assert f"FAILED: {name}: RuntimeError: XLA compiled 0 of 2 products to " in out
    [path] = tmp_path.iterdir()
    assert {row.provider for row in benchmarking.read_rows(path)} == {"xla bf16"}
