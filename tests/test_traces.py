"""Forward-mode traces against autograd through time: gradients, edge scores, and what they hold in memory."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.errors import MetricError, OptionError
from circuitkit.functional.traces import Reading, Received, trace_gradients, trace_scores
from circuitkit.models.recurrent.cells.base import Place, cell_of
from circuitkit.models.recurrent.cells.gated_linear import GatedLinear
from circuitkit.models.recurrent.cells.lru import LRU
from circuitkit.models.recurrent.parts import FEATURES, Network, Write
from circuitkit.models.recurrent.stepper import run_network

CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
MAKE = {"lru": lambda: LRU(3, 6, 2), "gated": lambda: GatedLinear(3, 6, 4, 2)}
each_cell = pytest.mark.parametrize("name", MAKE)
each_dtype = pytest.mark.parametrize("dtype", CLOSE)


def a_case(name, dtype, seed=0, steps=50):
    torch.manual_seed(seed)
    module = MAKE[name]().to(dtype)
    clean, corrupt = torch.randn(2, 4, steps, 3, dtype=dtype)
    goal = torch.randn(4, steps, 2, dtype=dtype)
    goal[:, ::3] = 0.0
    return module, clean, corrupt, goal


def parts_of(module, x, goal):
    """The metric ``sum over steps of sin(y) . goal``, step by step, without goals at every third step."""

    def objective(t, h):
        if t % 3 == 0:
            return None
        y = module.read(h, x[:, t]) if isinstance(module, LRU) else module.read(h)
        return (y.sin() * goal[:, t]).sum()

    return objective


def metric(outputs, goal):
    return (outputs.sin() * goal).sum()


def steps_of(module, x):
    return (module.received(x_t) for x_t in x.unbind(1))


def relative(got, want):
    return float((got - want).detach().abs().max() / want.detach().abs().max())


@each_cell
@each_dtype
def test_gradients_are_autograds(name, dtype):
    module, x, _, goal = a_case(name, dtype)
    found = trace_gradients(
        module.lam() if name == "lru" else module.lam, steps_of(module, x), parts_of(module, x, goal)
    )
    if name == "gated":
        pairs = {"lam": found.lam, "A": found.weights["value"], "B": found.weights["gate"]}
    else:  # from lam and gamma B on to the parameters that they are made of
        names = ("nu_log", "theta_log", "gamma_log", "B_re", "B_im")
        made = torch.autograd.grad(
            (module.lam(), module.drive()),
            [getattr(module, n) for n in names],
            (found.lam, found.weights["in"]),
        )
        pairs = dict(zip(names, made, strict=True))
    wanted = torch.autograd.grad(metric(module(x), goal), [getattr(module, n) for n in pairs])
    for (parameter, got), want in zip(pairs.items(), wanted, strict=True):
        assert relative(got, want) < CLOSE[dtype], parameter


def collapsed_by_autograd(module, clean, corrupt, goal):
    """Scores of a network's edges from the gradient at every pre-activation: the literal formula of ``eap``."""
    write = Write("input", 3)
    described = cell_of(module).describe(module, Place(0, (write,)))
    network = Network(write, described.blocks, described.features)
    probes = {
        slot: clean.new_zeros(*clean.shape[:2], slot.size, requires_grad=True)
        for _, stage in network.stages
        for slot in stage.slots
    }
    values = run_network(network, clean, probes=probes)
    other = run_network(network, corrupt)
    slopes = dict(
        zip(
            probes,
            torch.autograd.grad(
                metric(values[FEATURES], goal), list(probes.values()), materialize_grads=True, allow_unused=True
            ),
            strict=True,
        )
    )
    stage, scores = network.blocks[0].stages[0], {}
    for link in stage.links:
        slot = stage.slot(link.slots[0])
        gap = (values[link.source] - other[link.source]).detach()
        if link.lag:
            gap = torch.cat((torch.zeros_like(gap[:, :1]), gap[:, :-1]), 1)
            each = (gap * slopes[slot]).sum(1)
            scores["carry"] = each.unflatten(1, (slot.n, slot.width)).sum(-1)
        else:
            each = torch.einsum("bti, btj, ji -> bji", gap, slopes[slot], link.weight().detach())
            scores[slot.name] = each.unflatten(1, (slot.n, slot.width)).sum(2)
    return scores


@each_cell
@each_dtype
def test_scores_are_those_of_collapsed_edges(name, dtype):
    module, clean, corrupt, goal = a_case(name, dtype)
    gated = name == "gated"
    weights = {"value": module.A, "gate": module.B} if gated else {"in": module.drive()}
    found = trace_scores(
        module.lam if gated else module.lam(),
        weights,
        steps_of(module, clean),
        steps_of(module, corrupt),
        parts_of(module, clean, goal),
    )
    want = collapsed_by_autograd(module, clean, corrupt, goal)
    if not gated:  # the pre-activation of the carry is h itself: lam is in the step, not in the link
        assert set(want) == {"in", "carry"}
    assert relative(found.carry, want.pop("carry")) < CLOSE[dtype]
    assert set(want) == set(found.edges)
    for path, scores in want.items():
        assert relative(found.edges[path], scores) < CLOSE[dtype], path


@given(seed=st.integers(0, 10_000), steps=st.integers(1, 12), name=st.sampled_from(sorted(MAKE)))
@settings(max_examples=15, deadline=None)
def test_scores_of_equal_runs_are_zero_and_turn_their_sign_for_a_linear_path(seed, steps, name):
    module, clean, corrupt, goal = a_case(name, torch.float64, seed, steps + 1)
    lam = module.lam if name == "gated" else module.lam()
    weights = {"value": module.A, "gate": module.B} if name == "gated" else {"in": module.drive()}
    parts = parts_of(module, clean, goal)
    runs = {"clean": clean, "corrupt": corrupt, "mirrored": 2 * clean - corrupt}

    def scores(other):
        return trace_scores(lam, weights, steps_of(module, clean), steps_of(module, runs[other]), parts)

    assert all((edges == 0).all() for edges in scores("clean").edges.values())
    assert (scores("clean").carry == 0).all()
    forth, back = scores("corrupt"), scores("mirrored")
    for path in weights:
        assert torch.allclose(forth.edges[path], -back.edges[path], rtol=0, atol=1e-9)


@given(lam=st.floats(-1.0, 1.0), x=st.lists(st.floats(-3, 3), min_size=1, max_size=8))
@settings(max_examples=30, deadline=None)
def test_one_unit_by_hand(lam, x):
    """M = h(T): dM/dW = sum lam^(T-t) x(t), dM/dlam = sum (T-t) lam^(T-t-1) x(t)."""
    numbers = torch.tensor(x, dtype=torch.float64)
    last = len(x) - 1
    steps = [Received(v.view(1, 1), {"W": Reading(v.view(1, 1))}) for v in numbers]
    found = trace_gradients(
        torch.tensor([lam], dtype=torch.float64), steps, lambda t, h: h.sum() if t == last else None
    )
    back = [last - t for t in range(len(x))]
    by_weight = sum(lam**k * v for k, v in zip(back, x, strict=True))
    by_lam = sum(k * lam ** (k - 1) * v for k, v in zip(back, x, strict=True) if k)
    assert float(found.weights["W"]) == pytest.approx(by_weight, abs=1e-12)
    assert float(found.lam) == pytest.approx(by_lam, abs=1e-12)


def test_nothing_of_the_callers_graph_is_kept():
    module, x, _, goal = a_case("gated", torch.float32)
    found = trace_gradients(module.lam, steps_of(module, x), parts_of(module, x, goal))
    assert not found.lam.requires_grad and module.lam.grad is None
    with torch.no_grad():
        again = trace_gradients(module.lam, steps_of(module, x), parts_of(module, x, goal))
    assert torch.equal(found.lam, again.lam)


def test_what_cannot_be_used_is_refused():
    module, clean, corrupt, goal = a_case("lru", torch.float32)
    with pytest.raises(OptionError, match="no steps"):
        trace_gradients(module.lam(), [], parts_of(module, clean, goal))
    with pytest.raises(MetricError, match="depends on the state"):
        trace_gradients(module.lam(), steps_of(module, clean), lambda t, h: None)
    with pytest.raises(MetricError, match="depends on the state"):
        trace_gradients(module.lam(), steps_of(module, clean), lambda t, h: torch.ones(()))
    with pytest.raises(OptionError, match="number of steps"):
        short = steps_of(module, corrupt[:, :-1])
        trace_scores(module.lam(), {}, steps_of(module, clean), short, parts_of(module, clean, goal))


PEAK = """
import sys, torch
from circuitkit.evaluation.cost import measured
from circuitkit.functional.traces import trace_gradients
from circuitkit.models.recurrent.cells.lru import LRU

torch.set_num_threads(1)
torch.manual_seed(0)
module, steps = LRU(32, 64), int(sys.argv[1])

def numbers(n):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        yield torch.randn(4, 32, generator=generator)

def by_traces(n):
    with torch.no_grad():
        return trace_gradients(module.lam(), map(module.received, numbers(n)), lambda t, h: h.real.square().sum()).lam

def by_autograd(n):
    lam, h, total = module.lam(), 0, 0
    for x in numbers(n):
        h = lam * h + module.received(x).total
        total = total + h.real.square().sum()
    return torch.autograd.grad(total, lam)[0]

way = {"traces": by_traces, "autograd": by_autograd}[sys.argv[2]]
way(5)  # what is loaded and allocated once
print(measured(lambda: way(steps), torch.device("cpu"))[1].peak_bytes)
"""


def peak(steps, way):
    """Bytes above what was held before, in a fresh process."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(steps), way], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_is_flat_over_the_sequence():
    short, long = peak(1_000, "traces"), peak(10_000, "traces")
    assert long - short < 1_000_000  # 9,000 states of 4 x 64 complex numbers alone are 18 MB
    assert peak(1_000, "autograd") > short + 10_000_000
