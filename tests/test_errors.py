"""Wrong calls: each raises at trace time, and says which argument, what it got and wanted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxkern
from jaxkern import _dispatch, _ffi


def attention(q=(2, 6, 4, 64), k=(2, 5, 2, 64), v=None, dtype="bfloat16", **options):
    """A call on arrays of these shapes; options may override query, key and value."""
    shapes = {"query": q, "key": k, "value": k if v is None else v}
    operands = {name: jnp.ones(shape, dtype) for name, shape in shapes.items()}
    return functools.partial(jaxkern.dot_product_attention, **{**operands, **options})


def norm(x=(3, 8), dtype="float32", **options):
    return functools.partial(jaxkern.rms_norm, **{"x": jnp.ones(x, dtype), **options})


def zeros(*shape, dtype="float32"):
    return jnp.zeros(shape, dtype)


WRONG_ARGUMENTS = {
    "query of rank 2": (attention(q=(6, 64)), r"query has shape \(6, 64\), wanted rank 4 .* or"),
    "key of rank 5": (attention(k=(1, 2, 5, 2, 64)), r"key has shape .*, wanted rank 4"),
    "value of rank 1": (attention(v=(64,)), r"value has shape \(64,\), wanted rank 4"),
    "query is a string": (attention(query="q"), "query is a str, wanted an array"),
    "key is None": (attention(key=None), "key is a NoneType, wanted an array"),
    "query is ragged": (attention(query=[[1.0], [2.0, 3.0]]), "query is a list, wanted an array"),
    "integer operands": (attention(dtype="int32"), "query has dtype int32, wanted one of bfloat16"),
    "fp8 operands": (attention(dtype="float8_e4m3fn"), "query has dtype float8_e4m3fn, wanted one"),
    "key of another dtype": (
        attention(key=zeros(2, 5, 2, 64)),
        "query, key and value have dtypes bfloat16, float32 and bfloat16, wanted one",
    ),
    "value of another dtype": (
        attention(value=zeros(2, 5, 2, 64, dtype="float16")),
        "have dtypes bfloat16, bfloat16 and float16, wanted one",
    ),
    "value of another length": (
        attention(v=(2, 4, 2, 64)),
        r"value has shape \(2, 4, 2, 64\), wanted key's \(2, 5, 2, 64\)",
    ),
    "value of another head dim": (attention(v=(2, 5, 2, 32)), "value has shape .*, wanted key's"),
    "key of another batch size": (attention(k=(3, 5, 2, 64)), "key has batch size 3, wanted .* 2"),
    "key without a batch": (attention(k=(5, 2, 64)), "key has batch size 1, wanted query's 2"),
    "key of another head dim": (attention(k=(2, 5, 2, 128)), "key has head dim 128, wanted .* 64"),
    "query heads not a multiple": (
        attention(q=(2, 6, 6, 64), k=(2, 5, 4, 64)),
        "query has 6 heads, which key's 4 do not divide",
    ),
    "more key heads": (attention(k=(2, 5, 8, 64)), "query has 4 heads, which key's 8 do not"),
    "no key heads": (attention(k=(2, 5, 0, 64)), "query has 4 heads, which key's 0 do not divide"),
    "mask of float": (attention(mask=zeros(1, 1, 6, 5)), "mask has dtype float32, wanted bool"),
    "mask of another length": (
        attention(mask=zeros(2, 4, 5, 5, dtype=bool)),
        r"mask has shape \(2, 4, 5, 5\), which does not broadcast to .* = \(2, 4, 6, 5\)",
    ),
    "mask of the key heads": (
        attention(mask=zeros(2, 2, 6, 5, dtype=bool)),
        "mask has shape .*, which does not broadcast",
    ),
    "mask of rank 5": (attention(mask=zeros(1, 1, 1, 6, 5, dtype=bool)), "mask has shape"),
    "bias of bool": (attention(bias=zeros(1, 1, 6, 5, dtype=bool)), "bias has dtype bool, wanted"),
    "bias of another batch size": (attention(bias=zeros(3, 1, 6, 5)), r"bias has shape \(3, 1"),
    "bias of a scalar string": (attention(bias="alibi"), "bias is a str, wanted an array"),
    "query lengths of another shape": (
        attention(query_seq_lengths=jnp.array([1, 2, 3])),
        r"query_seq_lengths has shape \(3,\), wanted \(2,\), one per sequence",
    ),
    "key lengths are a scalar": (
        attention(key_value_seq_lengths=4),
        r"key_value_seq_lengths has shape \(\), wanted \(2,\)",
    ),
    "lengths of float": (
        attention(query_seq_lengths=jnp.array([1.0, 2.0])),
        "query_seq_lengths has dtype float32, wanted an integer dtype",
    ),
    "lengths of bool": (
        attention(key_value_seq_lengths=jnp.array([True, False])),
        "key_value_seq_lengths has dtype bool, wanted an integer dtype",
    ),
    "negative window": (attention(local_window_size=-1), "local_window_size is -1, wanted a non-"),
    "window of three": (
        attention(local_window_size=(1, 2, 3)),
        r"local_window_size is \(1, 2, 3\)",
    ),
    "window of float": (attention(local_window_size=(2.0, 0)), r"local_window_size is \(2.0, 0\)"),
    "window is a string": (attention(local_window_size="all"), "local_window_size is 'all'"),
    "segment ids of another length": (
        attention(q=(2, 5, 4, 64), segment_ids=zeros(2, 6, dtype="int32")),
        r"segment_ids has shape \(2, 6\), wanted \(2, 5\)",
    ),
    "segment ids without the batch": (
        attention(q=(2, 5, 4, 64), segment_ids=zeros(5, dtype="int32")),
        r"segment_ids has shape \(5,\), wanted \(2, 5\)",
    ),
    "segment ids with a batch that query has not": (
        attention(q=(5, 4, 64), k=(5, 2, 64), segment_ids=zeros(1, 5, dtype="int32")),
        r"segment_ids has shape \(1, 5\), wanted \(5,\)",
    ),
    "one array of segment ids for two lengths": (
        attention(segment_ids=zeros(2, 6, dtype="int32")),
        "segment_ids is one array, and query length 6 is not key length 5; wanted a pair",
    ),
    "three arrays of segment ids": (
        attention(segment_ids=(zeros(2, 6, dtype="int32"),) * 3),
        "segment_ids is a tuple of 3, wanted an array or a pair",
    ),
    "segment ids of the key with the query's length": (
        attention(segment_ids=(zeros(2, 6, dtype="int32"),) * 2),
        r"segment_ids\[1\] has shape \(2, 6\), wanted \(2, 5\)",
    ),
    "segment ids of float": (
        attention(q=(2, 5, 4, 64), segment_ids=zeros(2, 5)),
        "segment_ids has dtype float32, wanted an integer dtype",
    ),
    "segment ids of bool": (
        attention(segment_ids=(zeros(2, 6, dtype="int8"), zeros(2, 5, dtype=bool))),
        r"segment_ids\[1\] has dtype bool, wanted an integer dtype",
    ),
    "segment ids of two dtypes": (
        attention(segment_ids=(zeros(2, 6, dtype="int32"), zeros(2, 5, dtype="uint32"))),
        "segment_ids has dtypes int32 and uint32, wanted one",
    ),
    "segment ids are None in a pair": (
        attention(segment_ids=(zeros(2, 6, dtype="int32"), None)),
        r"segment_ids\[1\] is a NoneType, wanted an array",
    ),
    "soft cap of zero": (
        attention(logits_soft_cap=0),
        "logits_soft_cap is 0, wanted a positive Python number",
    ),
    "negative soft cap": (attention(logits_soft_cap=-5.0), "logits_soft_cap is -5.0, wanted a pos"),
    "infinite soft cap": (attention(logits_soft_cap=float("inf")), "logits_soft_cap is inf, want"),
    "nan soft cap": (attention(logits_soft_cap=float("nan")), "logits_soft_cap is nan, wanted a"),
    "soft cap is a string": (attention(logits_soft_cap="5"), "logits_soft_cap is '5', wanted a"),
    "soft cap is a bool": (attention(logits_soft_cap=True), "logits_soft_cap is True, wanted a"),
    "soft cap is an array": (
        attention(logits_soft_cap=jnp.float32(5)),
        "logits_soft_cap is .*5.*, wanted a positive Python number",
    ),
    "unknown alignment": (
        attention(alignment="bottom_left"),
        "alignment is 'bottom_left', wanted 'top_left' or 'bottom_right'",
    ),
    "alignment is a bool": (attention(alignment=True), "alignment is True, wanted 'top_left' or"),
    "deterministic is a string": (
        attention(deterministic="yes"),
        "deterministic is 'yes', wanted True or False",
    ),
    "is_causal is a string": (attention(is_causal="yes"), "is_causal is 'yes', wanted True or"),
    "return_residual is an int": (
        attention(return_residual=2),
        "return_residual is 2, wanted True",
    ),
    "scale is a vector": (attention(scale=jnp.ones(4)), r"scale has shape \(4,\), wanted a scalar"),
    "scale is a string": (attention(scale="0.1"), "scale is '0.1', wanted a real number"),
    "scale is complex": (attention(scale=1j), "scale is 1j, wanted a real number"),
    "unknown implementation": (
        attention(implementation="cudnn"),
        "implementation is 'cudnn', wanted None, one of 'cuda', 'xla', or a sequence of them",
    ),
    "no implementation": (
        attention(implementation=()),
        r"implementation is \(\), wanted None, one",
    ),
    "implementation is a number": (attention(implementation=1), "implementation is 1, wanted"),
    "unknown among several": (
        attention(implementation=("xla", "tpu")),
        r"implementation is \('xla', 'tpu'\), wanted",
    ),
    "x is a scalar": (norm(x=()), r"x has shape \(\), wanted at least one axis"),
    "x of integers": (norm(dtype="int32"), "x has dtype int32, wanted one of bfloat16, float16"),
    "x is None": (functools.partial(jaxkern.rms_norm, None), "x is a NoneType, wanted an array"),
    "scale of another width": (
        norm(scale=zeros(7)),
        r"scale has shape \(7,\), wanted x's last axis \(8,\)",
    ),
    "scale of rank 2": (norm(scale=zeros(1, 8)), r"scale has shape \(1, 8\), wanted x's last"),
    "scale of integers": (norm(scale=zeros(8, dtype="int32")), "scale has dtype int32, wanted one"),
    "epsilon of zero": (norm(epsilon=0), "epsilon is 0, wanted a positive float32"),
    "negative epsilon": (norm(epsilon=-1e-6), "epsilon is -1e-06, wanted a positive float32"),
    "epsilon is zero as float32": (
        norm(epsilon=1e-50),
        "epsilon is 1e-50, wanted a positive float",
    ),
    "epsilon is nan": (norm(epsilon=float("nan")), "epsilon is nan, wanted a positive float32"),
    "epsilon is infinite": (
        norm(epsilon=float("inf")),
        "epsilon is inf, wanted a positive float32",
    ),
    "epsilon is a vector": (
        norm(epsilon=jnp.ones(8)),
        r"epsilon has shape \(8,\), wanted a scalar",
    ),
    "epsilon is a string": (norm(epsilon="tiny"), "epsilon is 'tiny', wanted a positive float32"),
    "norm: unknown implementation": (
        norm(implementation="triton"),
        "rms_norm: implementation is 't",
    ),
}


@pytest.mark.parametrize("case", WRONG_ARGUMENTS)
@pytest.mark.usefixtures("kernels")
def test_wrong_argument(case):
    call, message = WRONG_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_wrong_arguments_are_found_under_jit():
    with pytest.raises(ValueError, match="query has 6 heads, which key's 4 do not divide"):
        jax.eval_shape(
            jaxkern.dot_product_attention,
            jax.ShapeDtypeStruct((1, 2, 6, 64), "float32"),
            *[jax.ShapeDtypeStruct((1, 2, 4, 64), "float32")] * 2,
        )


def test_traced_flag():
    with pytest.raises(ValueError, match="is_causal is .*, wanted True or False"):
        jax.jit(lambda flag: attention(is_causal=flag)())(True)


cuda_attention = functools.partial(attention, implementation="cuda")
cuda_norm = functools.partial(norm, implementation="cuda")

UNSUPPORTED = {
    "bias": (cuda_attention(bias=zeros(1, 1, 6, 5)), "got bias, which only implementation 'xla'"),
    "mask": (cuda_attention(mask=zeros(1, 1, 6, 5, dtype=bool)), "got mask, which only"),
    "float32": (
        cuda_attention(dtype="float32"),
        "query has dtype float32, wanted one of bfloat16, float16",
    ),
    "head dim": (
        cuda_attention(q=(2, 6, 4, 80), k=(2, 5, 2, 80)),
        r"query has head dim 80, wanted one of \(64, 128, 256\)",
    ),
    "scale is an array": (
        cuda_attention(scale=jnp.float32(0.1)),
        "scale is an array, wanted a Python number",
    ),
    "negative scale": (cuda_attention(scale=-0.5), "scale is -0.5, wanted a positive float32"),
    "zero scale": (cuda_attention(scale=0), "scale is 0, wanted a positive float32"),
    "infinite scale": (cuda_attention(scale=float("inf")), "scale is inf, wanted a positive"),
    "scale is zero as float32": (cuda_attention(scale=1e-50), "scale is 1e-50, wanted a positive"),
    "nan scale": (cuda_attention(scale=np.float32("nan")), "scale is nan, wanted a positive"),
    "epsilon is an array": (
        cuda_norm(epsilon=jnp.float32(1e-6)),
        "epsilon is an array, wanted a Python number",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
@pytest.mark.usefixtures("kernels")
def test_unsupported_by_the_kernel(case):
    call, message = UNSUPPORTED[case]
    with pytest.raises(NotImplementedError, match=f"with implementation 'cuda': .*{message}"):
        call()
    with pytest.raises(ExceptionGroup) as group:
        call(implementation=("cuda",))
    assert group.group_contains(NotImplementedError, match=message, depth=1)
    assert call(implementation=("cuda", "xla")) is not None
    assert call(implementation=None) is not None


@pytest.mark.usefixtures("kernels")
def test_float64_norm():
    with jax.enable_x64(), pytest.raises(NotImplementedError, match="x has dtype float64, wanted"):
        norm(dtype="float64", implementation="cuda")()


@pytest.mark.usefixtures("kernels")
def test_segment_ids_of_64_bits():
    """Cut to 32 bits, different ids may become the same."""
    with jax.enable_x64():
        ids = jnp.array([[0, 1 << 32]])
        call = cuda_attention(q=(1, 2, 1, 64), k=(1, 2, 1, 64), segment_ids=ids)
        message = "segment_ids has dtype int64, wanted at most 32 bits"
        with pytest.raises(NotImplementedError, match=message):
            call()
        assert (call(implementation=None, return_residual=True)[1] == 8).all()  # of one key


@pytest.mark.usefixtures("kernels")
def test_traced_soft_cap():
    with pytest.raises(ValueError, match="logits_soft_cap is .*, wanted a positive Python number"):
        jax.jit(lambda cap: attention(logits_soft_cap=cap)())(5.0)


@pytest.mark.usefixtures("kernels")
def test_traced_scale():
    call = functools.partial(cuda_attention, q=(2, 6, 4, 64))
    with pytest.raises(NotImplementedError, match="scale is an array, wanted a Python number"):
        jax.jit(lambda scale: call(scale=scale)())(0.1)


@pytest.mark.parametrize("call", [cuda_attention(), cuda_norm()], ids=["attention", "norm"])
class TestNoKernel:
    """Machines where no kernel can run: "cuda" by name raises, and None is the reference."""

    def check(self, call, message):
        with pytest.raises(NotImplementedError, match=message):
            call()
        with pytest.raises(ExceptionGroup) as group:
            call(implementation=["cuda"])
        assert group.group_contains(NotImplementedError, match=message, depth=1)
        assert call(implementation=None).shape == call(implementation="xla").shape

    def test_kernels_not_built(self, call, monkeypatch):
        def fail(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(_ffi, "import_module", fail)
        monkeypatch.setattr(_ffi, "missing", _ffi.missing.__wrapped__)
        self.check(call, "built without its CUDA kernels; reinstall it from source with `pip")

    def test_kernels_do_not_load(self, call, monkeypatch):
        def fail(name):
            raise ImportError("undefined symbol: PyObject_GetTypeData")

        monkeypatch.setattr(_ffi, "import_module", fail)
        monkeypatch.setattr(_ffi, "missing", _ffi.missing.__wrapped__)
        self.check(call, "the compiled kernels do not load: undefined symbol: PyObject_GetType")

    def test_gpu_too_old(self, call, monkeypatch):
        class Device:
            device_kind = "NVIDIA A100-SXM4-80GB"
            compute_capability = "8.0"

        monkeypatch.setattr(_ffi, "missing", lambda: None)
        monkeypatch.setattr(_dispatch, "wrong_gpu", _dispatch.wrong_gpu.__wrapped__)
        monkeypatch.setattr(_dispatch.jax, "devices", lambda platform: [Device()])
        self.check(call, r"found NVIDIA A100-SXM4-80GB \(8.0\), wanted .* compute capability 9.0")

    @pytest.mark.usefixtures("kernels")
    def test_lowered_for_cpu(self, call):
        message = "with implementation 'cuda' is lowered for cpu, wanted cuda only"
        with pytest.raises(NotImplementedError, match=message):
            call()
        with pytest.raises(NotImplementedError, match=message):
            jax.jit(jax.vmap(lambda _: call()))(jnp.zeros(3))
        with pytest.raises(NotImplementedError, match="is lowered for cpu, cuda, wanted cuda only"):
            jax.export.export(jax.jit(lambda: call()), platforms=["cpu", "cuda"])()


def test_registered_once(monkeypatch):
    """The targets of the compiled module, for the platform that the CUDA plugin looks at."""

    class Module:
        @staticmethod
        def registrations():
            return {"jaxkern.one": 1, "jaxkern.two": 2}

    seen = []
    monkeypatch.setattr(_ffi, "import_module", lambda name: Module)
    monkeypatch.setattr(
        jax.ffi, "register_ffi_target", lambda *args, platform: seen.append((*args, platform))
    )
    assert _ffi.missing.__wrapped__() is None
    assert seen == [("jaxkern.one", 1, "CUDA"), ("jaxkern.two", 2, "CUDA")]


def test_new_gpu_is_fine(monkeypatch):
    class Device:
        device_kind = "NVIDIA H200"
        compute_capability = "9.0"

    monkeypatch.setattr(_dispatch.jax, "devices", lambda platform: [Device()])
    assert _dispatch.wrong_gpu.__wrapped__() is None


def test_no_gpu_is_fine(monkeypatch):
    def fail(platform):
        raise RuntimeError("Unknown backend cuda")

    monkeypatch.setattr(_dispatch.jax, "devices", fail)
    assert _dispatch.wrong_gpu.__wrapped__() is None
