"""Parity needs a state that changes sign: the network that can do it, the one that cannot, and the circuit."""

import torch

import circuitkit as ck

SIGNED, SIGMOID = "toys/parity_signed_s0", "toys/parity_nonnegative_s0"


def accuracy(model, length, n=500):
    bits = torch.randint(2, (n, length), generator=torch.Generator().manual_seed(1))
    at = torch.full((n, 1), length - 1)
    with torch.no_grad():
        answer = model.logits(model.record(bits).inputs[-1], at)[:, 0].argmax(-1)
    return float((answer == bits.sum(1) % 2).float().mean())


def test_signed_transitions_count_ten_times_further_than_trained_and_positive_ones_do_not():
    assert accuracy(ck.load(SIGNED), 400) == 1.0
    assert 0.4 < accuracy(ck.load(SIGMOID), 400) < 0.6


def test_the_circuit_is_a_few_loops_whose_unit_changes_sign_with_every_one():
    model = ck.load(SIGNED)
    task = ck.task("parity", model, n=64)
    circuit = ck.score(model, task, "exact", progress=False).top(48)
    result = ck.evaluate(model, task, circuit, progress=False)
    assert result.faithfulness > 0.99 and result.random_faithfulness < 0.2
    edges = set(circuit.edge_names())
    units = {name.split("->")[0].removeprefix("l0.h") for name in edges if name.endswith("->logits")}
    assert len(units) >= 8
    for unit in units:  # input chooses the factor, the factor multiplies the state, the state is kept and read
        loop = {f"input->l0.m{unit}<a>", f"l0.h{unit}->l0.m{unit}<carry>", f"l0.m{unit}->l0.h{unit}<m>"}
        assert loop <= edges
    module, rows = model.module, torch.tensor([int(unit) for unit in units])
    zero, one = (module.cell.W @ module.embedding.weight.T)[rows].detach().T
    assert bool((zero * one < 0).all())


def test_units_that_do_not_change_sign_are_not_needed():
    model = ck.load(SIGNED)
    module, task = model.module, ck.task("parity", model, n=32)
    zero, one = (module.cell.W @ module.embedding.weight.T).detach().T
    flips = [i for i in range(32) if zero[i] * one[i] < 0]
    names = [f"input->l0.m{i}<a>" for i in flips]
    names += [f"l0.h{i}->l0.m{i}<carry>" for i in flips] + [f"l0.m{i}->l0.h{i}<m>" for i in flips]
    names += [f"l0.h{i}->logits" for i in flips]
    only = ck.Circuit.from_edges(model.graph, names)
    assert 8 <= len(flips) < 32
    assert ck.evaluate(model, task, only, progress=False).faithfulness > 0.99
