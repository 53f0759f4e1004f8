"""Adam's sums by torch's fused kernel and one operation at a time: the same, whatever the memory looks like."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surefoot.optim import directions

SHAPES = ((), (0,), (7,), (1, 5), (5, 1), (4, 6), (3, 1, 4), (2, 3, 4, 5))
AWKWARD = torch.tensor([0.0, -0.0, 1e-30, 1e30, float("inf"), float("-inf"), float("nan")])


def laid_out(tensor, order):
    """The same values, the axes lying in memory in that order."""
    places = sorted(range(tensor.ndim), key=lambda axis: order[axis])
    back = [places.index(axis) for axis in range(tensor.ndim)]
    return tensor.permute(places).contiguous().permute(back)


def moved(tensors, betas, eps, amsgrad, steps):
    """The updates and the state after some steps."""
    m, v, largest, *grads = tensors
    updates = [
        directions.adam_(g, m, v, betas, step, eps, largest if amsgrad else None)
        for step, g in enumerate(grads, start=1)
    ]
    return [*updates, m, v, largest]


@st.composite
def given_tensors(draw):
    """State and gradients, each laid out in its own way or all alike."""
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from((torch.float32, torch.float64)))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    orders = st.permutations(range(len(shape)))
    common = draw(st.none() | orders)
    tensors = [torch.zeros(shape, dtype=dtype) for _ in range(3)]
    tensors += [torch.randn(shape, generator=random, dtype=dtype) for _ in range(3)]
    return [laid_out(tensor, draw(orders) if common is None else common) for tensor in tensors]


@given(tensors=given_tensors(), amsgrad=st.booleans(), beta1=st.sampled_from((0.0, 0.9)))
def test_one_pass_and_many_give_the_same(tensors, amsgrad, beta1):
    """Betas given as tensors are what the kernel does not take."""
    betas, eps = (beta1, 0.99), 1e-8
    own = [tensor.clone() for tensor in tensors]
    found = moved(tensors, betas, eps, amsgrad, 3)
    one_by_one = tuple(torch.tensor(beta, dtype=torch.float64) for beta in betas)
    expected = moved(own, one_by_one, eps, amsgrad, 3)
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride() or a.numel() < 2 or 1 in a.shape
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_what_is_not_finite_or_overflows_comes_out_alike(eps):
    """An overflowed v stays infinite, so that the weight stands still; a NaN stays one."""
    start = [torch.zeros(7) for _ in range(3)]
    grads = [AWKWARD.clone(), torch.ones(7), AWKWARD.flip(0)]
    found = moved([t.clone() for t in (*start, *grads)], (0.9, 0.99), eps, False, 3)
    one_by_one = (torch.tensor(0.9), torch.tensor(0.99))
    expected = moved([t.clone() for t in (*start, *grads)], one_by_one, eps, False, 3)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0.0, equal_nan=True)
    assert found[4][3].isinf()
    assert found[1][3] == 0


def test_the_kernel_is_used_where_it_serves(monkeypatch):
    """It is the faster by far; without it nothing but the time would tell."""
    calls = []
    kernel = directions._fused_adam_
    monkeypatch.setattr(directions, "_fused_adam_", lambda *a, **k: (calls.append(1), kernel(*a, **k)))
    plain = [torch.zeros(4, 6).mT for _ in range(3)]
    moved([*plain, torch.ones(4, 6).mT], (0.9, 0.99), 1e-8, False, 1)
    assert len(calls) == 1
    moved([*plain, torch.ones(6, 4)], (0.9, 0.99), 1e-8, False, 1)  # another layout
    moved([*plain, torch.ones(4, 6).mT], (torch.tensor(0.9), 0.99), 1e-8, False, 1)
    assert len(calls) == 1


def test_torchs_defaults_do_not_matter():
    """The kernel is told the number of steps by a tensor, which in bfloat16 would be rounded and on a GPU be refused."""
    tensors = [torch.zeros(5), torch.zeros(5), torch.zeros(5), torch.arange(5.0)]
    expected = directions.adam_(tensors[3], tensors[0].clone(), tensors[1].clone(), (0.9, 0.999), 257, 1e-8)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = directions.adam_(tensors[3], *tensors[:2], (0.9, 0.999), 257, 1e-8)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("g", "error"),
    [
        (torch.ones(2, 3, dtype=torch.float64), "dtype"),
        (torch.ones(2, 3, device="meta"), "device"),
        (torch.ones(5, 3), "size"),
        (torch.ones(3, 2), "size"),
        (torch.ones(2, 4), "size"),
    ],
)
def test_a_gradient_unlike_the_state_is_refused(g, error):
    """As when a model is cast, moved, grown or pruned in the middle of training; the kernel would read what is not there."""
    m, v = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(RuntimeError, match=error):
        directions.adam_(g, m, v, (0.9, 0.9), 1, 1e-8)
    assert not m.any()
    assert not v.any()


@pytest.mark.parametrize("g", [torch._neg_view(torch.ones(4)), torch._efficientzerotensor((4,))])
def test_tensors_that_are_not_what_their_memory_says(g):
    found = directions.adam_(g, torch.zeros(4), torch.zeros(4), (0.9, 0.9), 1, 1e-8)
    expected = directions.adam_(g.clone() + 0, torch.zeros(4), torch.zeros(4), (0.9, 0.9), 1, 1e-8)
    assert torch.equal(found, expected)


def test_compiled():
    torch.compiler.reset()
    g = torch.tensor([1.0, -2.0, 0.0])
    states = [[torch.zeros(3), torch.zeros(3)] for _ in range(2)]
    functions = directions.adam_, torch.compile(directions.adam_, backend="aot_eager", fullgraph=True)
    found = [f(g, *state, (0.9, 0.99), 1, 1e-8) for f, state in zip(functions, states, strict=True)]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(states[1], states[0])
