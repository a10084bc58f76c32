"""Gated recurrent networks that are attention: built by hand (exactly) and trained (to the thresholds of the study)."""

import importlib.util
import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import circuitkit as ck
from circuitkit.analysis.implicit_attention import implicit_attention
from circuitkit.analysis.trilinear import (
    Trilinear,
    fit_trilinear,
    linear_attention_as_gated_rnn,
    trilinear_of_attention,
    with_constant,
)
from circuitkit.analysis.unit_importance import UnitImportance, unit_importance
from circuitkit.errors import OptionError
from circuitkit.models.recurrent.cells.gated_linear import GatedLinear
from circuitkit.models.recurrent.cells.linear_attention import LinearAttention
from circuitkit.models.recurrent.cells.lru import LRU
from circuitkit.resources import resource

ROOT = Path(__file__).parent.parent


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attend(w_q, w_k, w_v, x):
    """Linear attention as a sum over earlier steps, one term at a time."""
    out = torch.zeros(*x.shape[:2], len(w_v), dtype=x.dtype)
    for b, t in product(*map(range, x.shape[:2])):
        for s in range(t + 1):
            out[b, t] += ((w_q @ x[b, t]) @ (w_k @ x[b, s])) * (w_v @ x[b, s])
    return out


@pytest.fixture(scope="module")
def student():
    folder = resource("gated_linear_student")
    about = json.loads((folder / "student.json").read_text())
    nets = GatedLinear(**about["student"]), LinearAttention(**about["teacher"])
    for net, name in zip(nets, ("student", "teacher"), strict=True):
        net.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return *nets, about


@pytest.mark.parametrize(("d", "keys", "values"), [(4, 4, 4), (3, 2, 5), (1, 1, 1)])
def test_the_construction_is_linear_attention(d, keys, values):
    weights = normal(keys, d, seed=1), normal(keys, d, seed=2), normal(values, d, seed=3)
    cell, x = linear_attention_as_gated_rnn(*weights), normal(3, 20, d, seed=4)
    assert cell.hidden_size == keys * values + keys and set(cell.lam.tolist()) == {0.0, 1.0}
    assert float((cell(with_constant(x)).detach() - attend(*weights, x)).abs().max()) < 1e-10
    teacher = trilinear_of_attention(*weights)
    assert float((teacher(x) - attend(*weights, x)).abs().max()) < 1e-10


def planted(cell):
    """Edges whose weight is not zero, from the matrices alone."""
    edges = set()
    for matrix, source, into in (
        (cell.A, "x{}", "l0.h{}<value>"),
        (cell.B, "x{}", "l0.h{}<gate>"),
        (cell.C1, "l0.h{}", "l0.m{}<left>"),
        (cell.C2, "l0.h{}", "l0.m{}<right>"),
        (cell.D, "l0.m{}", "l0.y{}<y_in>"),
    ):
        edges |= {(source.format(u), into.format(v)) for v, u in matrix.nonzero().tolist()}
    carried = {(f"l0.h{u}", f"l0.h{u}<carry>") for u in cell.lam.nonzero().flatten().tolist()}
    return edges | carried | {(f"l0.y{o}", "logits") for o in range(cell.output_size)}


def test_the_construction_s_edges_are_recovered_exactly():
    cell = linear_attention_as_gated_rnn(*(normal(4, 4, seed=seed) for seed in (1, 2, 3)))
    model = ck.load(cell)
    # The constant differs too in the corrupt run, or nothing could be said of its edges.
    clean, corrupt = normal(8, 6, 5, seed=8), normal(8, 6, 5, seed=9)
    task = ck.Task.from_tokens(clean, corrupt, None, target=torch.ones(8, 1, 4), metric="squared-error", vocab=model)
    scores = ck.score(model, task, "exact", progress=False)
    rows, columns = scores.values.nonzero(as_tuple=True)
    found = {(scores.graph.sources[u], scores.graph.destinations[v]) for u, v in zip(rows, columns, strict=True)}
    assert found == planted(cell) and len(found) == 216
    assert float(scores.values[rows, columns].abs().min()) > 1e-6 * float(scores.values.abs().max())


def test_least_squares_finds_the_teacher_s_coefficients():
    weights = normal(3, 4, seed=5), normal(3, 4, seed=6), normal(2, 4, seed=7)
    x = normal(30, 10, 4)
    fitted, truth = fit_trilinear(x, attend(*weights, x)), trilinear_of_attention(*weights)
    torch.testing.assert_close(fitted.coefficients, truth.coefficients, rtol=1e-9, atol=1e-9)
    assert fitted.r2 > 1 - 1e-12 and fitted.cosine(truth) > 1 - 1e-12 and fitted.relative_error(truth) < 1e-9
    again = fit_trilinear(1e4 * x, fitted(1e4 * x))
    assert again.relative_error(truth) < 1e-9


def test_what_is_not_attention_is_not_explained():
    x = normal(200, 10, 3)
    soft = torch.softmax((x @ x.mT).masked_fill(torch.ones(10, 10).triu(1).bool(), -torch.inf), -1) @ x
    assert fit_trilinear(x, soft).r2 < 0.8
    noise = fit_trilinear(x, normal(200, 10, 3, seed=9))
    assert -0.05 < noise.r2 < 0.05


def test_the_trained_student_is_the_teacher_s_attention(student):
    net, teacher, about = student
    x = normal(1000, 20, 4, seed=77, dtype=torch.float32)
    with torch.no_grad():
        got, want = net(with_constant(x)), teacher(x)
    fitted, truth = fit_trilinear(x, got), trilinear_of_attention(teacher.W_q, teacher.W_k, teacher.W_v)
    assert float((got - want).square().mean() / want.var()) <= 5e-4
    assert fitted.r2 >= 0.999 and fitted.cosine(truth) >= 0.999 and fitted.relative_error(truth) < 0.01
    assert about["measured"]["nmse"] <= 5e-4 and about["measured"]["coefficient_cosine"] >= 0.999


def test_units_of_the_student_that_matter_either_keep_or_forget(student):
    net, teacher, _ = student
    x = normal(64, 20, 4, seed=78, dtype=torch.float32)
    found = unit_importance(ck.load(net), with_constant(x), teacher(x).detach())
    assert found.nmse <= 5e-4 and len(found.importance) == 80
    torch.testing.assert_close(found.decay, net.lam.detach())
    _, counted, weighed = found.histogram(10)
    assert float(counted.sum()) == pytest.approx(1) and float(weighed.sum()) == pytest.approx(1)
    ends = weighed[0] + weighed[-1], counted[0] + counted[-1]
    assert ends[0] > 0.9 > ends[1]


def test_importance_is_what_zeroing_a_unit_does(student):
    net, teacher, _ = student
    x = normal(16, 20, 4, seed=79, dtype=torch.float32)
    want = teacher(x).detach()
    found = unit_importance(ck.load(net), with_constant(x), want)
    for unit in (0, 33, 79):
        cut = GatedLinear(5, 80, 64, 4)
        cut.load_state_dict(net.state_dict())
        with torch.no_grad():
            cut.A[unit] = 0
            got = cut(with_constant(x))
        change = float((got - want).square().mean() / want.var(correction=0)) - found.nmse
        assert float(found.importance[unit]) == pytest.approx(change, rel=1e-2, abs=1e-6)


def test_complex_units_are_zeroed_whole():
    torch.manual_seed(0)
    net, x = LRU(3, 4), normal(16, 9, 3, seed=80, dtype=torch.float32)
    want = net(x).detach()
    found = unit_importance(ck.load(net), x, want)
    torch.testing.assert_close(found.decay, net.lam().abs().detach())
    with torch.no_grad():
        net.B_re[2], net.B_im[2] = 0, 0
        change = (net(x) - want).square().mean() / (want - want.mean((0, 1))).square().mean()
    assert float(found.importance[2]) == pytest.approx(float(change), rel=1e-3) and found.nmse < 1e-10


def test_maps_of_the_student_hold_for_every_unit(student):
    maps = implicit_attention(ck.load(student[0].double()), with_constant(normal(2, 20, 4)))["l0"]
    assert maps.error < 1e-12
    student[0].float()


def test_a_short_training_learns():
    spec = importlib.util.spec_from_file_location("train_gated_linear", ROOT / "benchmarks" / "train_gated_linear.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    net, teacher, log = script.train(seed=3, n_updates=200)
    assert script.measure(net, teacher, n=200)["nmse"] < 0.05 and not log
    x = normal(2, 20, 4, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(script.outputs_of(net, with_constant(x)), net(with_constant(x)))
        torch.testing.assert_close(script.attend(teacher, x), teacher(x))


def test_figures():
    form = trilinear_of_attention(normal(3, 4), normal(3, 4, seed=1), normal(2, 4, seed=2))
    assert form.plot().data[0].z.shape == (8, 10)
    figure = form.plot(form)
    assert figure.data[1].x == figure.data[1].y and "cosine 1.00000" in figure.layout.title.text
    units = UnitImportance(("a", "b", "c"), torch.tensor([1.0, 3.0, -1.0]), torch.tensor([0.0, 1.0, 0.4]), 0.1)
    bars = units.plot(bins=4).data
    assert bars[0].y == pytest.approx((1 / 3, 1 / 3, 0, 1 / 3)) and bars[1].y == (0.25, 0, 0, 0.75)


def test_bad_input():
    x, y = normal(2, 5, 3), normal(2, 5, 1)
    with pytest.raises(OptionError, match="one output per step"):
        fit_trilinear(x, y[:, 1:])
    with pytest.raises(OptionError, match="10 steps determine"):
        fit_trilinear(x, y)
    with pytest.raises(OptionError, match="do not depend"):
        fit_trilinear(with_constant(normal(50, 5, 2))[..., [0, 1, 1]], normal(50, 5, 1))
    with pytest.raises(OptionError, match="one size"):
        Trilinear(torch.ones(1, 2, 2, 2)).cosine(Trilinear(torch.ones(1, 3, 3, 3)))
    model = ck.load(GatedLinear(3, 4, 2, 1))
    inputs = normal(2, 5, 3, dtype=torch.float32)
    for wrong in (torch.zeros(2, 5, 1), torch.randn(2, 5, 2)):
        with pytest.raises(OptionError, match="target of shape"):
            unit_importance(model, inputs, wrong)
    with pytest.raises(OptionError, match="'l7'"):
        unit_importance(model, inputs, torch.randn(2, 5, 1), layer="l7")
    with pytest.raises(OptionError, match="step to step"):
        from circuitkit.models.recurrent.cells.selective_ssm import SelectiveSSM

        unit_importance(ck.load(SelectiveSSM(3, 4, 2)), inputs, torch.randn(2, 5, 3))
