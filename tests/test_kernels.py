"""Every kernel equals its reference. Runs on a GPU, or on the CPU under TRITON_INTERPRET=1."""

import math

import cachekit_kernels as kernels
import pytest
import torch
from cachekit_kernels import _polynomial, reference
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
import cachekit_kernels._triton as cachekit_triton
from cachekit_kernels._triton import _operator, _residual

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not kernels.runs_on(torch.zeros((), device=DEVICE)), reason="needs a GPU or TRITON_INTERPRET=1"),
    # Of the interpreter of Triton 3.6, which NumPy 2.4 makes an error of.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = _residual.BLOCK
SHAPES = [
    *((0,), (1,), (1, 1, 1), (2, 0, 5), (3, 1013)),
    *((1, BLOCK - 1), (1, BLOCK), (2, BLOCK + 1), (2, 5, _residual.CHANNELS + 1)),
]


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that nobody has written to is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def draw(shape, dtype=torch.float32, seed=0, strided=False):
    made = torch.randn(shape[::-1] if strided else shape, generator=torch.Generator().manual_seed(seed))
    made = made.to(DEVICE, dtype)
    return made.permute(*reversed(range(made.ndim))) if strided and made.ndim else made


def several(count, shape, dtype=torch.float32, strided=False):
    return [draw(shape, dtype, seed, strided) for seed in range(count)]


def close(found, wanted):
    """Elements to the last bit of their dtype; sums, added in another order than the reference's, to 1e-5."""
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if one.dtype == torch.float32 else {}
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_norm(shape, dtype, strided):
    output, base, before = several(3, shape, dtype, strided)
    for rows in (False, True):
        found = kernels.residual_norm(output, base, before, rows=rows)
        wanted = reference.residual_norm(output, base, before, rows=rows)
        assert torch.equal(found[0], wanted[0])
        close(found[1:], wanted[1:])
        close(kernels.residual_change(wanted[0], before, rows=rows), wanted[1:])
        again = kernels.residual_norm(output, base, before, rows=rows)
        assert all(torch.equal(*pair) for pair in zip(found, again, strict=True)), "deterministic"


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_ratio(shape, dtype, strided):
    residual, before = several(2, shape, dtype, strided)
    before = before.clone()
    before[..., :: 3 if before.ndim == 1 else 1][:1] = 0  # a token that was nothing
    close([kernels.norm_ratio(residual, before)], [reference.norm_ratio(residual, before)])


@pytest.mark.parametrize("place", [0, 5, -1])
def test_a_nan_is_one_in_the_sums_it_belongs_to(place):
    output, base, before = several(3, (2, 1013))
    output[1, place] = math.nan
    _, change, size = kernels.residual_norm(output, base, before, rows=True)
    assert change.isnan().tolist() == [False, True] and not size.isnan().any()
    before[0, place] = math.nan
    _, change, size = kernels.residual_norm(output, base, before, rows=True)
    assert change.isnan().all() and size.isnan().tolist() == [True, False]
    assert kernels.norm_ratio(output, base).isnan() and kernels.norm_ratio(base, before).isnan()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("order", range(_polynomial.MOST + 2))
@pytest.mark.parametrize("dtypes", [*((kind, kind) for kind in DTYPES), (torch.bfloat16, torch.float32)])
def test_polynomials(dtypes, order, strided):
    for shape in [(), (0,), (3, 113), (_operator.ELEMENTS - 1,), (_operator.ELEMENTS,), (2, _operator.ELEMENTS + 1)]:
        value, *factors = several(order + 2, shape, dtypes[0], strided)
        factors = [factor.to(dtypes[1]) for factor in factors]
        offsets = torch.tensor([2.0, 3.0, 0.0, 4.0, 5.0], device=DEVICE)[: max(order, 1)]
        for update, spacing in ((kernels.taylor_update, offsets[0]), (kernels.newton_update, offsets)):
            wanted = reference.taylor_update(factors, value, spacing)
            close(update(factors, value, spacing), wanted)
            offsetaway = [factor.contiguous().clone() for factor in factors]
            made = update(offsetaway, value, spacing, donate=True)
            assert [one.data_ptr() for one in made] == [one.data_ptr() for one in offsetaway]
            close(made, wanted)
        for dtype in (None, torch.bfloat16):
            for name, offset in (("taylor_predict", offsets[0]), ("newton_predict", offsets)):
                found = getattr(kernels, name)(factors, offset, dtype=dtype)
                close([found], [getattr(reference, name)(factors, offset, dtype=dtype)])


@settings(max_examples=40, deadline=None)
@given(
    degree=st.integers(0, 3),
    gaps=st.lists(st.integers(1, 6), min_size=5, max_size=5),
    ahead=st.integers(0, 5),
    coefficients=st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4),
)
def test_newton_is_exact_on_polynomials_of_its_degree(degree, gaps, ahead, coefficients):
    def at(step):
        return sum(c * (step / 10) ** i for i, c in enumerate(coefficients[: degree + 1]))

    steps = [float(sum(gaps[:i])) for i in range(len(gaps))]
    differences = [torch.zeros(3, device=DEVICE) for _ in range(degree + 1)]
    for n, step in enumerate(steps):
        seen = steps[:n][::-1][:degree]
        spacing = torch.tensor([step - before for before in seen] + [0.0] * (max(degree, 1) - len(seen)), device=DEVICE)
        differences = kernels.newton_update(differences, torch.full((3,), at(step), device=DEVICE), spacing)
    offsets = torch.tensor([steps[-1] + ahead - node for node in steps[::-1]], device=DEVICE)
    found = kernels.newton_predict(differences, offsets)
    torch.testing.assert_close(found, torch.full_like(found, at(steps[-1] + ahead)), atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_guidance_delta(shape, dtype, strided):
    cond, low, high = draw(shape, dtype, 0, strided), *several(2, shape, strided=strided)
    weights = torch.tensor([0.7, -1.3], device=DEVICE)
    for first in (False, True):
        found = kernels.guidance_delta(cond, low, high, weights, cond_first=first)
        close([found], [reference.guidance_delta(cond, low, high, weights, cond_first=first)])
        assert torch.equal(found.chunk(2)[0 if first else 1] if shape[0] else cond, cond)


X = (3, 37)
CALLS = {
    "residual_norm": lambda: (*several(3, X), True),
    "residual_change": lambda: (*several(2, X), False),
    "norm_ratio": lambda: (*several(2, X),),
    "differences": lambda: (several(3, X), draw(X), torch.tensor(2.0, device=DEVICE)),
    "differences_": lambda: (several(3, X), draw(X), torch.tensor([2.0, 3.0], device=DEVICE)),
    "polynomial": lambda: (several(3, X), torch.tensor(2.0, device=DEVICE), torch.bfloat16, True),
    "guidance_delta": lambda: (*several(3, X), torch.tensor([1.0, 2.0], device=DEVICE), False),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_opcheck(name):
    torch.use_deterministic_algorithms(False)  # what it compares with is another allocation
    torch.library.opcheck(getattr(torch.ops.cachekit, name).default, CALLS[name]())


def _seen(call, context):
    """The operators of ours that whoever watches sees while it runs."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    if context == "mode":
        with Watch():
            call()
    elif context == "traced":
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda: call(), tracing_mode="real")()
        seen += [str(node.target) for node in graph.graph.nodes]
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:  # in 2.11 it warns without
            call()
        seen += [event.key for event in profile.key_averages()]
    return [name for name in seen if name.startswith("cachekit")]


@pytest.mark.parametrize("name", [name for name in CALLS if not name.endswith("_")])
def test_who_traces_sees_an_operator_and_nobody_else_pays_for_one(name):
    """The way through the dispatcher takes the host longer than the device needs for a large tensor."""
    arguments, made = CALLS[name](), getattr(cachekit_triton, name)
    for context in ("mode", "traced"):
        assert _seen(lambda: made(*arguments), context) == [f"cachekit.{name}.default"], context
    assert _seen(lambda: made(*arguments), None) == []
    wanted = torch.utils._pytree.tree_leaves(getattr(torch.ops.cachekit, name)(*arguments))
    found = torch.utils._pytree.tree_leaves(made(*arguments))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# A batch is what torch's own fallback makes of rows one by one, which 2.15 says.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_transform_of_functions_sees_the_operator():
    one, other = several(2, X)
    rows = torch.vmap(lambda a, b: cachekit_triton.residual_change(a, b, False))(one, other)
    torch.testing.assert_close(rows, cachekit_triton.residual_change(one, other, True).T.unsqueeze(-1))


def test_a_gradient_flows_where_there_is_no_formula_for_a_kernel():
    base, residual = (draw((2, 3)).requires_grad_() for _ in range(2))
    total = base + residual
    kernels.guidance_delta(total, residual, residual, torch.ones(2, device=DEVICE)).sum().backward()
    torch.testing.assert_close(base.grad, torch.full_like(base, 2.0))
    torch.testing.assert_close(residual.grad, torch.full_like(residual, 4.0))


def test_misfits_are_named():
    with pytest.raises(ValueError, match=r"residual_norm: `reference` is \[2, 4\].*`output` is \[2, 3\]"):
        kernels.residual_norm(draw((2, 3)), draw((2, 3)), draw((2, 4)))
    with pytest.raises(ValueError, match=r"`factors\[1\]` is \[4\]"):
        kernels.taylor_update([draw((3,)), draw((4,))], draw((3,)), torch.tensor(1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_token_that_is_no_number_over_one_of_zeros_is_seen(value):
    residual, before = torch.zeros(3, 2, device=DEVICE), torch.zeros(3, 2, device=DEVICE)
    assert kernels.norm_ratio(residual, before) == 3 == reference.norm_ratio(residual, before)
    residual[1, 0] = value
    for ratio in (kernels.norm_ratio, reference.norm_ratio):
        torch.testing.assert_close(ratio(residual, before).item(), value, equal_nan=True)


def test_what_is_too_short_is_refused():
    """A kernel would read on behind its end."""
    factors, value = several(3, (4,)), draw((4,))
    for steps in (torch.ones(1, device=DEVICE), torch.ones(1, 2, device=DEVICE)):
        with pytest.raises(ValueError, match="`spacing`"):
            kernels.taylor_update(factors, value, steps)
        with pytest.raises(ValueError, match="`offsets`"):
            kernels.newton_predict(factors, steps)
    with pytest.raises(ValueError, match="`weights`"):
        kernels.guidance_delta(value, value, value, torch.ones(1, device=DEVICE))
