import attention
import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkern import benchmarking


def cases():
    return [shape.case(d) for shape in attention.SHAPES for d in common.DIRECTIONS]


class TestCases:
    def test_spelling(self):
        shape = attention.Shape(8, 16, 4, 2048, 1024, 128, True, "bf16")
        assert shape.case("fwd") == "fwd b8 n16/4 t2048 s1024 h128 causal bf16"
        assert attention.Shape.parse("bwd b8 n16/4 t2048 s1024 h128 causal bf16") == ("bwd", shape)
        direction, plain = attention.Shape.parse("fwd b1 n2/2 t3 s4 h64 f16")
        assert (plain.causal, plain.dtype) == (False, "f16")

    def test_every_case_can_be_given_back(self):
        assert len(set(cases())) == 48
        for shape in attention.SHAPES:
            for direction in common.DIRECTIONS:
                assert attention.Shape.parse(shape.case(direction)) == (direction, shape)

    @pytest.mark.parametrize(
        "case",
        [
            "fwd b8 n16 t2048 s2048 h128 bf16",
            "forward b8 n16/16 t2048 s2048 h128 bf16",
            "fwd b8 n16/16 t2048 s2048 h128",
            "fwd b8 n16/16 t2048 s2048 h128 f32",
            "fwd b8 n16/16 t2048 s2048 h128 bf16 ",
        ],
    )
    def test_other_spellings_are_refused(self, case):
        with pytest.raises(ValueError, match="wanted the form 'fwd b8 n16/16.*got"):
            attention.Shape.parse(case)

    def test_flops(self):
        full = attention.Shape(2, 3, 1, 5, 7, 64, False, "bf16")
        causal = attention.Shape(2, 3, 1, 5, 7, 64, True, "bf16")
        assert full.work("fwd") == 4 * 2 * 3 * 5 * 7 * 64
        assert full.work("bwd") == 10 * 2 * 3 * 5 * 7 * 64
        assert causal.work("fwd") == 2 * 2 * 3 * 5 * 7 * 64
        assert causal.work("bwd") == 5 * 2 * 3 * 5 * 7 * 64

    def test_quick_cases_cover_both_head_dims(self):
        assert {shape.head_dim for shape in attention.QUICK} == {64, 128}
        assert len(attention.QUICK) <= 4


def run(tmp_path, *arguments):
    return attention.main(
        [*arguments, "--seconds", "0.001", "--output", str(tmp_path), "--commit", "abc"]
    )


def test_measures_on_any_device(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmarking, "l2_cache_bytes", lambda: 1)
    shape = "b1 n4/2 t48 s32 h64 causal bf16"
    providers = ["--providers", "jaxkern xla,jax.nn xla", "--repeats", "2"]
    assert run(tmp_path, "--case", f"fwd {shape}", "--case", f"bwd {shape}", *providers) == 0
    [path] = tmp_path.iterdir()
    rows = benchmarking.read_rows(path)
    assert [(r.case, r.provider, r.metric) for r in rows] == [
        (f"{direction} {shape}", provider, metric)
        for direction in common.DIRECTIONS
        for provider in ("jaxkern xla", "jax.nn xla")
        for metric in ("us", "tflops")
    ]
    assert {(r.family, r.commit) for r in rows} == {("attention", "abc")}
    us = next(r.value for r in rows if r.case.startswith("bwd") and r.metric == "us")
    tflops = next(r.value for r in rows if r.case.startswith("bwd") and r.metric == "tflops")
    assert tflops * us == pytest.approx(5 * 4 * 48 * 32 * 64 / 1e6, rel=1e-3)
    assert "largest quartile spread" in capsys.readouterr().out


def test_large_logits_are_not_for_xla():
    shape = attention.Shape(2, 16, 16, 8192, 8192, 128, False, "bf16")
    with pytest.raises(NotImplementedError, match=r"2\^30 logits"):
        attention.jax_providers(0.1)["jax.nn xla"](shape, ["fwd"], None, None)


def test_list_and_filter(tmp_path, capsys):
    assert run(tmp_path, "--list", "--filter", "^bwd.*t8192.*h64") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        "bwd b2 n32/32 t8192 s8192 h64 bf16",
        "bwd b2 n32/32 t8192 s8192 h64 causal bf16",
    ]
    assert "jax.nn cudnn" in lines[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--filter", "nothing like it"], "--filter 'nothing like it' leaves no case"),
        (["--providers", "jaxkern,cublas"], "--providers: no cublas; there are jaxkern, "),
        (["--case", "fwd"], "--case: wanted the form"),
    ],
)
def test_wrong_options(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(tmp_path, *arguments)
    assert message in capsys.readouterr().err


def test_first_key_head_stands_alone():
    """What PyTorch is checked on: the first key head's slice of every array, also the gradients."""
    shape = attention.Shape(2, 6, 3, 16, 8, 64, True, "bf16")
    keys = iter(jax.random.split(jax.random.key(0), 4))
    sizes = (shape.query_shape, shape.key_shape, shape.key_shape, shape.query_shape)
    *operands, dout = (jax.random.normal(next(keys), size) for size in sizes)

    def attend(query, key, value):
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    def outputs(*operands_and_dout):
        *operands, dout = operands_and_dout
        out, pullback = jax.vjp(attend, *operands)
        return dict(zip(("out", "dquery", "dkey", "dvalue"), (out, *pullback(dout)), strict=True))

    names = ("query", "key", "value")
    everything = dict(zip(names, operands, strict=True), dout=dout) | jax.jit(outputs)(
        *operands, dout
    )
    first = attention._first_key_head(everything, shape)
    assert first["query"].shape == (1, 16, 2, 64) and first["dkey"].shape == (1, 8, 1, 64)
    alone = jax.jit(outputs)(*(first[name] for name in (*names, "dout")))
    for name, array in alone.items():
        np.testing.assert_allclose(array, first[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert not jnp.array_equal(everything["dquery"][1:, :, :2], first["dquery"])
