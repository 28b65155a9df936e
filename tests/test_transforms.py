"""Each op under each transform of JAX, through the whole stack of a kernel call, on the CPU."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import custom_calls

import jaxkern
from jaxkern.testing import random_normal

pytestmark = pytest.mark.usefixtures("kernels")

T, S, N, K, H = 5, 6, 2, 1, 64


def attention(query, key, value, implementation=None):
    return jaxkern.dot_product_attention(
        query, key, value, is_causal=True, implementation=implementation, return_residual=True
    )


def masked_attention(query, key, value, implementation=None):
    """With masks that no transform sees."""
    *lead, t, _, _ = query.shape
    s = key.shape[-3]
    return jaxkern.dot_product_attention(
        query,
        key,
        value,
        local_window_size=(3, 1),
        alignment="bottom_right",
        key_value_seq_lengths=np.full(np.prod(lead, dtype=int), s - 1),
        segment_ids=tuple(np.broadcast_to(np.arange(n) // 3, (*lead, n)) for n in (t, s)),
        logits_soft_cap=3.0,
        deterministic=True,
        implementation=implementation,
        return_residual=True,
    )


def norm(x, scale, implementation=None):
    return (jaxkern.rms_norm(x, scale, implementation=implementation),)


OPS = {"attention": attention, "masked": masked_attention, "norm": norm}
STEMS = {"attention": "attention", "masked": "attention", "norm": "rms_norm"}


def operands(op, *lead, lengths=(T, S)):
    """Operands with leading axes; the norm's scale has none."""
    if op == "norm":
        return tuple(random_normal(1, (*lead, 3, 32), (32,), dtype="bfloat16"))
    t, s = lengths
    shapes = (*lead, t, N, H), (*lead, s, K, H), (*lead, s, K, H)
    return tuple(random_normal(1, *shapes, dtype="bfloat16"))


def loss(op, *args, implementation=None):
    results = OPS[op](*args, implementation=implementation)
    return sum(jnp.sin(r.astype(jnp.float32)).sum() for r in results)


def gradient(op, implementation=None):
    function = functools.partial(loss, op, implementation=implementation)
    return jax.value_and_grad(function, tuple(range(len(operands(op)))))


def assert_equal(got, wanted, atol=2e-2):
    """Within a few units of bfloat16."""
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        np.testing.assert_allclose(g, w, rtol=2e-2, atol=atol)


each_op = pytest.mark.parametrize("op", OPS)


@each_op
@pytest.mark.parametrize("lead", [(), (2,)], ids=["no batch", "batch"])
def test_value_and_gradient_are_the_reference_s(op, lead):
    args = operands(op, *lead)
    wanted = gradient(op, "xla")(*args)
    assert_equal(gradient(op)(*args), wanted)
    assert_equal(jax.jit(gradient(op))(*args), wanted)


@each_op
def test_path_of_the_kernel_is_the_one_tested(op):
    assert custom_calls(gradient(op), *operands(op, 2)) == {
        f"{STEMS[op]}_fwd": 1,
        f"{STEMS[op]}_bwd": 1,
    }


AXES = [
    (op, axes)
    for op, count in (("attention", 3), ("masked", 3), ("norm", 2))
    for axes in itertools.product([None, 0], repeat=count)
    if axes != (None,) * count
]


@pytest.mark.parametrize(("op", "axes"), AXES)
def test_vmap(op, axes):
    """Every combination of mapped operands, in values and gradients."""
    single, many = operands(op), operands(op, 3)
    if op == "norm":
        many = (many[0], jnp.stack([many[1], 2 * many[1], -many[1]]))
    args = [m if axis == 0 else s for s, m, axis in zip(single, many, axes, strict=True)]
    got = jax.vmap(gradient(op), axes)(*args)
    wanted = [
        gradient(op, "xla")(*(x if a is None else x[i] for x, a in zip(args, axes, strict=True)))
        for i in range(3)
    ]
    assert_equal(got, jax.tree.map(lambda *x: jnp.stack(x), *wanted))


@each_op
def test_gradient_of_vmap(op):
    """The gradient of an operand that is not mapped is the sum over the mapped axis."""
    args = operands(op, 3)
    axes = (0, None) if op == "norm" else (0, None, None)
    args = (args[0], *(a if op == "norm" else a[0] for a in args[1:]))

    def summed(implementation, *args):
        each = functools.partial(loss, op, implementation=implementation)
        return jax.vmap(each, axes)(*args).sum()

    got, wanted = (
        jax.grad(summed, tuple(range(1, 1 + len(args))))(i, *args) for i in (None, "xla")
    )
    assert_equal(got, wanted)


@each_op
def test_vmap_of_the_backward_pass_alone(op):
    """Several cotangents for one forward pass, as in jax.jacrev."""
    args = operands(op, 2)
    pullbacks = [jax.vjp(lambda *a: OPS[op](*a, implementation=i), *args) for i in (None, "xla")]  # noqa: B023
    results = pullbacks[0][0]
    cotangents = tuple(
        random_normal(i, (3, *r.shape), dtype=r.dtype)[0] for i, r in enumerate(results)
    )
    got, wanted = (jax.vmap(pullback)(cotangents) for _, pullback in pullbacks)
    assert_equal(got, wanted)


@each_op
def test_vmap_of_vmap(op):
    """Over different axes, the inner one not at the front, and one operand each left out."""
    args = operands(op, 2, 3)
    if op == "norm":
        scales = jnp.stack([args[1], 2 * args[1]])
        for inner, outer, scale in (
            ((1, None), (0, None), args[1]),
            ((1, None), (0, 0), scales),
            ((0, 0), (1, None), scales),
        ):
            got, wanted = (
                jax.vmap(jax.vmap(gradient(op, i), inner), outer)(args[0], scale)
                for i in (None, "xla")
            )
            assert_equal(got, wanted)
        return
    query, key, value = args
    got, wanted = (
        jax.vmap(jax.vmap(gradient(op, i), (2, None, 0)), (0, 0, None))(
            jnp.moveaxis(query, 1, 3), key[:, 0], value[0]
        )
        for i in (None, "xla")
    )
    assert_equal(got, wanted)


@each_op
def test_scan_while_and_cond(op):
    args = operands(op, 2) if op == "norm" else operands(op, 2, lengths=(T, T))

    def step(x, implementation):
        rest = args[1:]
        return x + OPS[op](x, *rest, implementation=implementation)[0]

    def scanned(x, implementation):
        def body(x, _):
            return step(x, implementation), None

        return jax.lax.scan(body, x, None, length=3)[0].astype(jnp.float32).sum()

    def conditional(x, implementation):
        new = jax.lax.cond(x[0, 0, 0].sum() > -1e3, lambda x: step(x, implementation), jnp.sin, x)
        return new.astype(jnp.float32).sum()

    def looped(x, implementation):
        return jax.lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, step(c[1], implementation)), (0, x)
        )[1]

    for function in (jax.value_and_grad(scanned), jax.value_and_grad(conditional), looped):
        got, wanted = (jax.jit(function, static_argnums=1)(args[0], i) for i in (None, "xla"))
        assert_equal(got, wanted, atol=0.1)


NAMES = {
    "attention": ("jaxkern_attention_out", "jaxkern_attention_lse"),
    "rms_norm": ("jaxkern_rms_norm_rstd",),
}


@each_op
@pytest.mark.parametrize(
    ("policy", "forward_calls"),
    [(None, 2), ("dots", 2), ("names", 1), ("names and dots", 1)],
)
def test_remat_by_name_does_not_run_the_kernel_again(op, policy, forward_calls):
    policies = jax.checkpoint_policies
    names = policies.save_only_these_names(*NAMES[STEMS[op]])
    policy = {
        None: None,
        "dots": policies.dots_saveable,
        "names": names,
        "names and dots": policies.save_from_both_policies(names, policies.dots_saveable),
    }[policy]
    args = operands(op, 2)

    def linear_loss(*args):  # whose gradient needs no output of the op
        return sum(r.astype(jnp.float32).sum() for r in OPS[op](*args))

    def value_and_grad(function):
        return jax.value_and_grad(function, tuple(range(len(args))))

    function = value_and_grad(jax.checkpoint(linear_loss, policy=policy))
    stem = STEMS[op]
    assert custom_calls(function, *args) == {f"{stem}_fwd": forward_calls, f"{stem}_bwd": 1}
    assert_equal(function(*args), value_and_grad(linear_loss)(*args))


def test_remat_by_name_in_a_scan_over_layers():
    """Two kernel calls in the program, one in the forward and one in the backward loop body."""
    query, key, value = operands("attention", 2, lengths=(T, T))
    policy = jax.checkpoint_policies.save_only_these_names(*NAMES["attention"])

    def run(x, policy):
        @functools.partial(jax.checkpoint, policy=policy)
        def layer(x, _):
            return x + attention(jnp.sin(x), key, value)[0], None

        return jax.lax.scan(layer, x, None, length=3)[0].astype(jnp.float32).sum()

    kept = jax.grad(functools.partial(run, policy=policy))
    assert custom_calls(kept, query) == {"attention_fwd": 1, "attention_bwd": 1}
    again = jax.grad(functools.partial(run, policy=None))
    assert custom_calls(again, query) == {"attention_fwd": 2, "attention_bwd": 1}
    assert_equal(kept(query), again(query))


@each_op
def test_pmap(op):
    args = operands(op, 4, 2)
    devices = jax.devices("cpu")[:4]
    axes = (0, None) if op == "norm" else (0, 0, 0)
    got = jax.pmap(gradient(op), in_axes=axes, devices=devices)(*args)
    assert_equal(jax.device_get(got), jax.vmap(gradient(op, "xla"), axes)(*args))


@each_op
def test_donation(op):
    args = operands(op, 2)
    wanted = OPS[op](*args, implementation="xla")[0]
    donated = args[0] + 0
    got = jax.jit(lambda *args: OPS[op](*args)[0], donate_argnums=0)(donated, *args[1:])
    assert donated.is_deleted()
    assert_equal(got, wanted)


@each_op
def test_unused_results_have_no_gradient(op):
    """Only the log-sum-exp used, and then only the output."""
    args = operands(op, 2)
    for i in range(len(OPS[op](*args))):
        got, wanted = (
            jax.grad(lambda *a: OPS[op](*a, implementation=name)[i].astype(jnp.float32).sum())(  # noqa: B023
                *args
            )
            for name in (None, "xla")
        )
        assert_equal(got, wanted)


@each_op
def test_cotangents_of_another_dtype(op):
    args = operands(op, 2)
    results, pullback = jax.vjp(lambda *a: OPS[op](*a), *args)
    cotangents = pullback(tuple(jnp.ones_like(r) for r in results))
    assert [c.dtype for c in cotangents] == [a.dtype for a in args]


@each_op
def test_second_derivatives_are_refused(op):
    args = operands(op, 2)

    def first(*args):
        return jax.grad(functools.partial(loss, op))(*args).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="can be differentiated once, in reverse mode"):
        jax.grad(first)(*args)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(functools.partial(loss, op), args, args)


@each_op
def test_reference_has_all_derivatives(op):
    args = tuple(a.astype("float32") for a in operands(op, 2))
    function = functools.partial(loss, op, implementation="xla")
    _, tangent = jax.jvp(jax.grad(function), args, args)
    eps = 1e-2
    up, down = (jax.grad(function)(*(a * (1 + e) for a in args)) for e in (eps, -eps))
    np.testing.assert_allclose(tangent, (up - down) / (2 * eps), atol=2e-2)
