import dataclasses
import importlib.util
import itertools
import json
from types import SimpleNamespace

import common
import decode
import decode_cases
import decode_model
import jax
import jax.numpy as jnp
import jax_decode
import numpy as np
import pytest
import transformers_generate
from decode_cases import MODELS, Generation, Step
from flax import nnx

from jaxkern import benchmarking
from jaxkern.models import read_config

PROVIDERS = ("jaxkern", "jaxkern xla", "jax")


class TestCases:
    def test_spelling(self):
        step = Step("llama-3.2-1b", "bf16", 1, 256)
        assert step.case("decode") == "decode llama-3.2-1b bf16 b1 ctx256"
        generation = Generation("qwen3-0.6b", "fp8", 4, 128, 64)
        assert generation.case("generate") == "generate qwen3-0.6b fp8 b4 p128 n64"

    def test_every_case_can_be_given_back(self):
        cases = [shape.case(shape.direction) for shape in decode_cases.SHAPES]
        assert len(set(cases)) == len(cases) == 4 * 3 * (14 + 2)
        assert not any("tiny" in case for case in cases)
        for shape, case in zip(decode_cases.SHAPES, cases, strict=True):
            assert decode_cases.parse(case) == (shape.direction, shape)
        assert set(decode_cases.QUICK) < set(decode_cases.SHAPES)

    @pytest.mark.parametrize(
        "case",
        [
            "decode llama-3.2-1b bf16 b1",
            "decode llama-3.2-1b f16 b1 ctx256",
            "decode llama-3.2-1b bf16 b0 ctx256",
            "decode llama-3.2-1b bf16 b1 p128 n64",
            "generate llama-3.2-1b bf16 b1 ctx256",
            "generate llama-3.2-1b bf16 b1 p1 n64",
            "generate llama-3.2-1b bf16 b1 p128 n0",
            "generate llama-3.2-1b bf16 b1 p128 n64 ",
        ],
    )
    def test_other_spellings_are_refused(self, case):
        wanted = "wanted the form 'decode llama-3.2-1b bf16 b1 ctx256' or 'generate .* n64', got "
        with pytest.raises(ValueError, match=wanted + f"'{case}'"):
            decode_cases.parse(case)

    @pytest.mark.parametrize(
        "case, message",
        [
            ("decode gpt-2 bf16 b1 ctx256", "no model gpt-2; there are llama-3.2-1b, "),
            ("decode tiny bf16 b1 ctx31", "ctx31 is less than the 32 steps that are taken"),
            ("decode tiny bf16 b1 ctx129", "'decode tiny bf16 b1 ctx129' has 129 tokens, above "),
            ("generate tiny bf16 b1 p65 n64", "has 129 tokens, above the model's context 128"),
        ],
    )
    def test_impossible_cases(self, case, message):
        with pytest.raises(ValueError, match=message):
            decode_cases.parse(case)


class TestBytes:
    @pytest.mark.parametrize(
        "model, parameters, unread",
        [
            ("llama-3.2-1b", 1_235_814_400, 0),
            ("qwen2.5-1.5b", 1_543_714_304, 0),
            ("llama-3.1-8b", 8_030_261_248, 128_256 * 4096),
            ("qwen3-0.6b", 596_049_920, 0),
        ],
    )
    def test_models_have_as_many_parameters_as_published(self, model, parameters, unread):
        """A step reads all of them but for an embedding that is not the head too."""
        assert decode_cases.weight_bytes(MODELS[model], "bf16") == 2 * (parameters - unread)
        kernels = nnx.eval_shape(
            lambda: nnx.state(decode.Transformer(MODELS[model], rngs=nnx.Rngs(0)), nnx.Param)
        )
        assert sum(x.size for x in jax.tree.leaves(kernels)) == parameters

    def test_of_the_step(self):
        assert Step("llama-3.2-1b", "bf16", 16, 256).work("decode") == 2_471_628_800
        assert Step("qwen2.5-1.5b", "bf16", 1, 8192).work("decode") == 3_087_428_608

    @pytest.mark.parametrize(
        ("name", "weights"),
        [
            *((name, "bf16") for name in decode_model.CONFIGS),
            *(("qwen2", "fp8"), ("qwen3", "fp8")),
            *(("four bits", weights) for weights in ("nvfp4", "mxfp4", "int4")),
        ],
    )
    def test_are_those_of_the_packed_weights(self, name, weights):
        even = dataclasses.replace(decode_model.FOUR_BIT_CONFIGS["llama"], vocabulary=80)
        config = {**decode_model.CONFIGS, "four bits": even}[name]
        model = decode_model.model_of(config, decode_model.random_arrays(config))
        packed = decode.decode.pack_weights(model, weights, keep_rows=False)
        read = packed.norms, packed.qkv_bias, packed.qk_norms, packed.head
        read += packed.qkv, packed.out, packed.gate_up, packed.down
        total = sum(x.nbytes for x in jax.tree.leaves(read))
        assert decode_cases.weight_bytes(config, weights) == total

    def test_generation_counts_tokens(self):
        assert Generation("llama-3.2-1b", "bf16", 4, 128, 64).work("generate") == 256


def plain_weights(config, arrays):
    """Of decode_model's arrays, as jax_decode reads them."""

    def plain(node):
        if not isinstance(node, SimpleNamespace):
            return node
        return {name: plain(child) for name, child in vars(node).items() if child is not None}

    model = decode_model.model_of(config, arrays)
    weights = {"embed": plain(model.embed), "norm": plain(model.norm)}
    weights["blocks"] = {i: plain(block) for i, block in enumerate(model.blocks)}
    return weights | ({} if model.head is None else {"head": plain(model.head)})


class TestPlainJax:
    @pytest.mark.parametrize("name", decode_model.CONFIGS)
    def test_prefill_and_steps_are_the_model(self, name):
        """The tokens that it takes are the likeliest ones, or as likely within rounding."""
        config = decode_model.CONFIGS[name]
        arrays = decode_model.random_arrays(config)
        weights = plain_weights(config, arrays)
        prompt = jax.random.randint(jax.random.key(0), (2, 9), 0, config.vocabulary)
        first, rest = jax_decode.generate(config, weights, prompt, 5)
        tokens = jnp.concatenate([prompt, first[:, None], rest.T], axis=1)
        assert tokens.shape == (2, 14)
        exact = decode_model.forward(config, arrays, tokens)
        logits, _ = jax_decode.prefill(config, weights, prompt, 13)
        assert common.relative_error(logits, exact[:, 8]) < 0.02
        chosen = jnp.take_along_axis(exact[:, 8:13], tokens[:, 9:, None], axis=-1)[..., 0]
        np.testing.assert_array_less(exact[:, 8:13].max(-1) - chosen, 0.1)

    def test_one_token(self):
        config = decode_model.CONFIGS["llama"]
        weights = plain_weights(config, decode_model.random_arrays(config))
        prompt = jnp.zeros((2, 3), jnp.int32)
        [token] = jax_decode.generate(config, weights, prompt, 1)
        assert token.shape == (2,)

    @pytest.mark.parametrize("name", ["qwen2", "qwen3"])
    def test_fp8_weights_are_those_of_jaxkern(self, name):
        config = decode_model.CONFIGS[name]
        arrays = decode_model.random_arrays(config)
        weights = jax_decode.quantized(config, plain_weights(config, arrays), "fp8")
        kernels = [weights["head"], weights["blocks"][1]["down"]]
        wanted = [arrays["head"], arrays["down"][1]]
        packed = decode.decode.pack_weights(decode_model.model_of(config, arrays), "fp8")
        rows = [packed.head.unpack(), jax.tree.map(lambda x: x[1], packed.down.unpack())]
        for kernel, values, exact in zip(kernels, wanted, rows, strict=True):
            assert kernel["kernel"].dtype == jnp.float8_e4m3fn
            np.testing.assert_array_equal(kernel["kernel"].astype(jnp.bfloat16).T, exact.values)
            np.testing.assert_array_equal(kernel["scale"], exact.scale)
            product = exact.values.astype(jnp.float32) * exact.scale[:, None]
            assert 0 < common.relative_error(product, values) < 0.05

    @pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "int4"])
    def test_four_bit_weights_are_those_of_jaxkern(self, format):
        config = decode_model.FOUR_BIT_CONFIGS["qwen3"]
        arrays = decode_model.random_arrays(config)
        weights = jax_decode.quantized(config, plain_weights(config, arrays), format)
        model = decode_model.model_of(config, arrays)
        packed = decode.decode.pack_weights(model, format)
        rows = [packed.head.unpack(), jax.tree.map(lambda x: x[1], packed.down.unpack())]
        for linear, exact in zip(
            [weights["head"], weights["blocks"][1]["down"]], rows, strict=True
        ):
            got = jax_decode.product(jnp.eye(len(linear["kernel"])), linear, jnp.float32).T
            wanted = exact.values.astype(jnp.float32) * exact.scale[:, None]
            np.testing.assert_allclose(got, wanted, rtol=1e-6)


def run(tmp_path, *arguments):
    arguments = [*arguments, "--seconds", "0.001", "--repeats", "2", "--commit", "abc"]
    return decode.main([*arguments, "--output", str(tmp_path)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The cases and the rows of a run with all of JAX's providers."""
    path = tmp_path_factory.mktemp("rows")
    cases = [
        "decode tiny bf16 b2 ctx64",
        "decode tiny fp8 b1 ctx100",
        "generate tiny bf16 b2 p16 n4",
        "generate tiny fp8 b1 p5 n1",
    ]
    options = itertools.chain(*(("--case", case) for case in cases))
    providers = ",".join((*PROVIDERS, "jaxkern cuda"))
    assert run(path, *options, "--providers", providers) == 0
    [file] = path.iterdir()
    return cases, benchmarking.read_rows(file)


@pytest.fixture(scope="module", autouse=True)
def no_kernel():
    """So that it is the same on a machine with a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxkern._ffi.missing", lambda: "there are no kernels")
        yield


def test_measures_on_any_device(measured):
    cases, rows = measured
    metrics = {"decode": "gbps", "generate": "tokens_per_s"}
    assert [(r.family, r.case, r.provider, r.metric) for r in rows] == [
        (direction, case, provider, metric)
        for case in cases
        for direction in (case.split()[0],)
        for provider, metric in (
            *itertools.product(PROVIDERS, ("us", metrics[direction])),
            ("jaxkern / jax", "ratio"),
            ("jaxkern xla / jax", "ratio"),
        )
    ]
    assert {(r.commit, r.date) for r in rows} == {("abc", rows[0].date)}
    assert rows[0].command.startswith("python benchmarks/decode.py --case 'decode tiny bf16 b2")


def test_rates(measured):
    """Of the weights' bytes and a step, and of the new tokens and a call."""
    cases, rows = measured
    figures = {(r.case, r.metric): r.value for r in rows if r.provider == "jax"}
    for case, metric, work in (
        (cases[0], "gbps", decode_cases.weight_bytes(MODELS["tiny"], "bf16") / 1e3),
        (cases[1], "gbps", decode_cases.weight_bytes(MODELS["tiny"], "fp8") / 1e3),
        (cases[2], "tokens_per_s", 2 * 4 * 1e6),
    ):
        assert figures[case, metric] * figures[case, "us"] == pytest.approx(work, rel=1e-3)


def test_a_provider_without_a_kernel_is_skipped(tmp_path, capsys):
    case = "generate tiny bf16 b1 p4 n2"
    assert run(tmp_path, "--case", case, "--providers", "jaxkern cuda,jax") == 0
    why = "dot_product_attention with implementation 'cuda': query has head dim 32, wanted one of"
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("skipped: ")]
    assert line.startswith(f"skipped: jaxkern cuda: {why} ") and line.endswith(case)
    [path] = tmp_path.iterdir()
    assert {row.provider for row in benchmarking.read_rows(path)} == {"jax"}


def test_other_logits_are_not_measured(tmp_path, monkeypatch, capsys):
    """Of the tokens before."""
    right = jax_decode.first_logits

    def wrong(config, weights, cache, tokens, start):
        return right(config, weights, cache, tokens - 1, start)

    monkeypatch.setattr(jax_decode, "first_logits", wrong)
    case = "decode tiny bf16 b2 ctx64"
    assert run(tmp_path, "--case", case, "--providers", "jaxkern,jax") == 1
    assert "FAILED: jax and jaxkern disagree, so nothing is meas" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_list_and_quick(tmp_path, capsys):
    assert run(tmp_path, "--list", "--quick") == 0
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "decode llama-3.2-1b bf16 b1 ctx256",
        "decode llama-3.2-1b fp8 b1 ctx256",
        "decode llama-3.2-1b nvfp4 b1 ctx256",
        "generate llama-3.2-1b bf16 b1 p128 n64",
        "generate llama-3.2-1b bf16 b1 p128 n1",
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--filter", "tiny"], "--filter 'tiny' leaves no case"),
        (["--providers", "jaxkern,vllm"], "--providers: no vllm; there are jaxkern, jaxkern cuda,"),
        (["--case", "decode"], "--case: wanted the form"),
        (["--case", "decode gpt-2 bf16 b1 ctx64"], "--case: no model gpt-2"),
    ],
)
def test_wrong_options(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(tmp_path, *arguments)
    assert message in capsys.readouterr().err


class TestTransformers:
    @pytest.mark.parametrize("name", MODELS)
    def test_has_the_same_model(self, name, tmp_path):
        described = transformers_generate.describe(MODELS[name])
        kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[described["model_type"]]
        raw = described | {"architectures": [f"{kind}ForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert read_config(tmp_path) == MODELS[name]

    def test_measures_generation_in_bf16(self):
        calls = []

        def worker(function, *arguments):
            calls.append((function, arguments))
            return 12.0

        prepare = decode.transformers_provider("transformers", worker, 0.5)
        ready = prepare(Generation("tiny", "bf16", 2, 16, 4), ["generate"], None, None)
        which = "transformers", MODELS["tiny"], (2, 16, 4)
        assert calls == [(transformers_generate.prepare, (*which, 0.5))]
        assert ready.samplers["generate"]() == 12.0
        assert calls[1:] == [(transformers_generate.sample, which)]

    @pytest.mark.parametrize(
        "shape, message",
        [
            (Step("tiny", "bf16", 1, 64), "a step alone is not measured"),
            (Generation("tiny", "fp8", 1, 16, 4), "weights are bf16 only"),
        ],
    )
    def test_skips_others(self, shape, message):
        prepare = decode.transformers_provider("transformers", None, 0.5)
        with pytest.raises(NotImplementedError, match=message):
            prepare(shape, [shape.direction], None, None)

    @pytest.mark.skipif(
        not importlib.util.find_spec("transformers"), reason="transformers is not installed"
    )
    @pytest.mark.parametrize("provider", transformers_generate.OPTIONS)
    @pytest.mark.filterwarnings("default")
    def test_generates(self, provider):
        for sizes in ((2, 8, 4), (1, 8, 1)):
            transformers_generate.prepare(provider, MODELS["tiny"], sizes, 0.001, device="cpu")
            assert transformers_generate.sample(provider, MODELS["tiny"], sizes) > 0
        assert list(transformers_generate._samplers) == [((MODELS["tiny"], sizes), provider)]
