"""Learned masks: the slope they follow, what they recover, and how they stop, go on and refuse."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.errors import FormatError, MetricError, OptionError
from circuitkit.functional import sparsity
from circuitkit.functional.metrics import METRICS, Metric
from circuitkit.functional.stats import auroc
from circuitkit.methods import learning
from circuitkit.methods.learning import edge_number
from circuitkit.methods.minibatches import Minibatches
from circuitkit.methods.plan import Plan
from circuitkit.tasks.base import Task
from tests.families import build, every_family
from tests.oracles.literal import literal_metric, literal_writes
from tests.toys import SHAPES, random_model, random_task

LEARNED = ("edge-pruning", "matryoshka", "subnetwork-probing", "ugs")
each_method = pytest.mark.parametrize("name", LEARNED)
QUIET = Plan(progress=False)


def score(model, task, name, **options):
    return ck.score(model, task, name, **{"progress": False, "warm_start": None, **options})


def small(name, **options):
    """A model, a task and options with which ten steps take a moment."""
    return random_model(), random_task(random_model(), n=5), {"steps": 10, "examples": 3, **options}


# --- formulas


@pytest.mark.parametrize("logit", [-3.0, -0.5, 0.0, 2.0])
def test_the_expected_size_is_how_often_a_hard_concrete_mask_is_open(logit):
    noise = sparsity.uniform_noise((200_000,), torch.Generator().manual_seed(0)).double()
    mask = sparsity.hard_concrete(torch.full((200_000,), logit, dtype=torch.float64), noise)
    want = float(sparsity.chance_open(torch.tensor(logit, dtype=torch.float64)))
    assert float((mask > 0).double().mean()) == pytest.approx(want, abs=4e-3)
    assert mask.min() >= 0 and mask.max() <= 1 and (mask == 0).any() and (mask == 1).any()


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_the_gradient_of_a_uniform_window_is_unbiased(width):
    """For a loss that is linear in every single item, the mean loss of masks is the loss of the chances."""
    generator, n = torch.Generator().manual_seed(0), 400_000
    weights = torch.randn(4, 4, generator=generator).double().triu(1)
    logits = torch.tensor([-1.5, 0.2, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def loss(mask):
        return torch.einsum("...i,ij,...j->...", mask, weights, mask) + mask @ weights.sum(0)

    mask = sparsity.uniform_window(logits, sparsity.uniform_noise((n, 4), generator).double(), width)
    torch.testing.assert_close(mask.mean(0), logits.sigmoid(), atol=4e-3, rtol=0)
    got = torch.autograd.grad(loss(mask).mean(), logits)[0]
    want = torch.autograd.grad(loss(logits.sigmoid()), logits)[0]
    torch.testing.assert_close(got, want, atol=8e-3, rtol=0)


@given(seed=st.integers(0, 99), k=st.floats(0.6, 11.4), temperature=st.sampled_from([0.3, 1.0]))
@settings(max_examples=10, deadline=None)
def test_a_soft_top_k_adds_up_to_k_with_the_gradient_of_its_formula(seed, k, temperature):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 12, generator=generator, dtype=torch.float64).requires_grad_(True)
    size = torch.tensor([k, 12 - k], dtype=torch.float64)
    soft = sparsity.soft_top_k(logits, size, temperature)
    torch.testing.assert_close(soft.sum(-1), size)
    assert torch.autograd.gradcheck(lambda x: sparsity.soft_top_k(x, size, temperature), logits)
    hard, half = (sparsity.nested(logits, size, torch.full((2,), h).double(), temperature) for h in (1.0, 0.5))
    kept = hard.detach() > 0.5
    torch.testing.assert_close(hard, kept.double())
    torch.testing.assert_close(half, (hard + soft) / 2)
    assert torch.equal(kept.sum(-1), size.round())
    assert all(logits[i][kept[i]].min() >= logits[i][~kept[i]].max() for i in range(2) if 0 < kept[i].sum() < 12)
    weights = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    slopes = [torch.autograd.grad((mask * weights).sum(), logits, retain_graph=True)[0] for mask in (soft, hard, half)]
    assert torch.equal(slopes[0], slopes[1]) and torch.equal(slopes[0], slopes[2])


def test_a_lagrangian_is_zero_on_its_goal_and_its_multipliers_climb_while_it_is_missed():
    size = torch.tensor(50.0, requires_grad=True)
    multipliers = torch.tensor([1.0, 2.0], requires_grad=True)
    slopes = torch.autograd.grad(sparsity.lagrangian(size, 20, multipliers), [size, multipliers])
    assert float(slopes[0]) > 0 and bool((slopes[1] > 0).all())
    assert sparsity.lagrangian(size, 50, multipliers).item() == 0


# --- the slope


@given(shape=SHAPES, seed=st.integers(0, 9), per_example=st.booleans())
@settings(max_examples=8, deadline=None)
def test_the_slope_equals_autograd_through_the_literal_dials(shape, seed, per_example):
    model = random_model(shape)
    task, generator = random_task(model, n=4), torch.Generator().manual_seed(seed)
    rows = torch.tensor([2, 0, 3])
    keep = torch.rand(3 if per_example else 1, *model.graph.mask.shape, generator=generator).double().expand(3, -1, -1)
    loss, got = Minibatches(model, task, QUIET, "counterfactual").slope(rows, keep)
    batch, mask, total = task.batches[0], model.graph.mask, 0.0
    for place, i in enumerate(rows.tolist()):
        corrupt = literal_writes(model.module, batch.corrupt[i, : int(batch.lengths[i])], model.graph)
        dial = torch.where(mask, 1 - keep[place], 0.0).requires_grad_(True)
        value = -literal_metric(model.module, task, batch, i, corrupt, dial) / len(rows)
        want = torch.where(mask, -torch.autograd.grad(value, dial)[0], 0.0)
        torch.testing.assert_close(got[place], want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
        total += value.item()
    assert loss == pytest.approx(total, rel=1e-6)


def test_examples_of_several_lengths_kept_or_recorded_anew_give_the_same_slope():
    model = random_model()
    whole = random_task(model, n=5)
    batch = whole.batches[0]
    short = replace(batch.rows(slice(0, 2)), clean=batch.clean[:2, :4], corrupt=batch.corrupt[:2, :4])
    short = replace(short, lengths=short.lengths.clamp(max=4), positions=short.positions.clamp(max=3))
    task = replace(whole, batches=(short, batch))
    rows, keep = torch.tensor([6, 0, 1, 3]), torch.rand(4, *model.graph.mask.shape).double()
    want = Minibatches(model, task, QUIET, "counterfactual").slope(rows, keep)
    for plan in (replace(QUIET, budget=1024), replace(QUIET, batch_size=1)):
        loss, slope = Minibatches(model, task, plan, "counterfactual").slope(rows, keep)
        assert loss == pytest.approx(want[0])
        torch.testing.assert_close(slope, want[1])


def test_running_out_of_memory_halves_the_work_and_changes_nothing(monkeypatch):
    model = random_model()
    data = Minibatches(model, random_task(model), QUIET, "counterfactual")
    rows, keep = torch.arange(4), torch.rand(4, *model.graph.mask.shape).double()
    want, chunk = data.slope(rows, keep), Minibatches._chunk

    def scarce(self, part, each, keep):
        if len(each) > 1:
            raise MemoryError
        return chunk(self, part, each, keep)

    monkeypatch.setattr(Minibatches, "_chunk", scarce)
    loss, slope = data.slope(rows, keep)
    assert loss == pytest.approx(want[0])
    torch.testing.assert_close(slope, want[1])


# --- what is found


@each_method
def test_the_induction_circuit_is_recovered(name):
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=32)
    options = {"target": 3} if name == "edge-pruning" else {}
    scores = ck.score(model, task, name, steps=250 if name == "subnetwork-probing" else 100, progress=False, **options)
    known = model.graph.edge_mask(task.known)
    if name == "subnetwork-probing":  # edges between the right nodes
        assert not (known & ~scores.own().mask).any() and len(scores.own()) <= 7
        return
    assert torch.equal(scores.top(3).mask, known)
    assert auroc(scores.values[model.graph.mask], known[model.graph.mask]) == 1.0
    assert name != "edge-pruning" or torch.equal(scores.selected, known)


@each_method
def test_a_compiled_program_is_recovered_under_zero_ablation(name):
    model = ck.load("tracr/hist")
    task = ck.task("tracr", model, n=24)
    options = {"target": len(task.known)} if name == "edge-pruning" else {}
    scores = score(model, task, name, steps=60, corrupt_value="zero", **options)
    assert torch.equal(scores.top(len(task.known)).mask, model.graph.edge_mask(task.known))


@pytest.mark.slow
def test_learned_masks_beat_eap_ig_on_held_out_pairs_of_the_story_model():
    model = ck.load("stories260k")
    task, other = (ck.task("gender-pronoun", model, n=64, seed=seed) for seed in (0, 1))
    base = ck.evaluate(model, other, ck.score(model, task, "eap-ig", progress=False).top(34), progress=False)
    scores = ck.score(model, task, "matryoshka", progress=False)
    assert ck.evaluate(model, other, scores.top(34), progress=False).faithfulness > base.faithfulness


@each_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_architectures_and_dtypes_run(name, dtype):
    model = ck.load(build("Gemma2", dtype=dtype), check=False)
    task = _tokens(model)
    before = [p.clone() for p in model.module.parameters()]
    scores = score(model, task, name, steps=2, examples=2)
    assert scores.values.dtype == torch.float32 and 0 < float(scores.values.max()) <= 1
    assert (scores.values[~model.graph.mask] == 0).all()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.module.parameters(), strict=True))


@every_family
def test_every_family_runs(family):
    model = ck.load(build(family))
    scores = score(model, _tokens(model), "matryoshka", steps=2, examples=2)
    assert torch.count_nonzero(scores.values) > 0.7 * model.graph.n_edges, "slopes near rounding count as none"


def _tokens(model, n=3, length=6):
    clean, corrupt = torch.randint(model.d_vocab, (2, n, length), generator=torch.Generator().manual_seed(0))
    return Task.from_tokens(clean, corrupt, clean[:, 0], (clean[:, 0] + 1) % model.d_vocab)


@each_method
def test_what_stands_in_the_padding_does_not_matter(name):
    model = random_model(causal=True)
    task = random_task(model, lengths=torch.tensor([6, 3, 4, 6]))
    batch = task.batches[0]
    padding = torch.arange(6) >= batch.lengths[:, None]
    sides = {side: getattr(batch, side).masked_fill(padding, 7) for side in ("clean", "corrupt")}
    other = replace(task, batches=(replace(batch, **sides),))
    got, want = (score(model, t, name, steps=5, examples=3).values for t in (other, task))
    torch.testing.assert_close(got, want)


@each_method
def test_the_scale_of_the_metric_does_not_matter(name):
    model, task, options = small(name)
    base = METRICS["logit-diff"]
    scaled = replace(task, metric=Metric("scaled", lambda x, b: 100 * base.function(x, b), base.needs))
    got, want = (score(model, t, name, objective="task", **options).values for t in (scaled, task))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --- stopping and going on


def interrupt_at(monkeypatch, call, error=KeyboardInterrupt):
    """Break off at a call of `Minibatches.slope`; the first two measure what removing everything costs."""
    slope, calls = Minibatches.slope, []

    def broken(self, rows, keep):
        calls.append(1)
        if len(calls) == call:
            raise error
        return slope(self, rows, keep)

    monkeypatch.setattr(Minibatches, "slope", broken)


@each_method
def test_an_interrupted_run_goes_on_to_the_same_bits(name, tmp_path, monkeypatch):
    model, task, options = small(name)
    want = score(model, task, name, **options)
    options["checkpoint"] = str(tmp_path / "run.safetensors")
    for call, step in ((2 + 4, 3), (2 + 3, 5)):
        with monkeypatch.context() as patch:
            interrupt_at(patch, call)
            with pytest.raises(KeyboardInterrupt) as caught:
                score(model, task, name, **options)
        assert f"step {step} of 10 is kept" in caught.value.__notes__[0]
    got = score(model, task, name, **options)
    assert torch.equal(got.values, want.values)
    assert want.selected is None or torch.equal(got.selected, want.selected)
    monkeypatch.setattr(learning, "_step", None)  # a finished file needs no step
    assert torch.equal(score(model, task, name, **options).values, want.values)


@each_method
def test_every_step_draws_other_examples_and_masks_and_every_seed_too(name, monkeypatch):
    model, task, options = small(name)
    seen, slope = [], Minibatches.slope

    def watch(self, rows, keep):
        seen.append((rows.clone(), keep.clone()))
        return slope(self, rows, keep)

    monkeypatch.setattr(Minibatches, "slope", watch)
    for seed in (0, 1):
        score(model, task, name, **options, seed=seed)
    steps = seen[2:12] + seen[14:]
    assert len(steps) == 20 and all(len(set(rows.tolist())) == 3 for rows, _ in steps)
    assert len({tuple(rows.tolist()) for rows, _ in steps}) > 10
    masks = [mask for _, keep in steps for mask in keep]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 50
    assert all(bool(((mask >= 0) & (mask <= 1)).all()) for mask in masks)


def test_checkpoints_are_written_on_the_way(tmp_path, monkeypatch):
    """So a process that is killed, and cannot write a last one, loses little."""
    model, task, options = small("ugs", checkpoint=str(tmp_path / "run.safetensors"))
    monkeypatch.setattr(learning, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(learning, "_save_anyway", lambda *_: None)
    interrupt_at(monkeypatch, 2 + 8, RuntimeError("killed"))
    with pytest.raises(RuntimeError, match="killed"):
        score(model, task, "ugs", **options)
    monkeypatch.undo()
    steps, step = [], learning._step
    monkeypatch.setattr(learning, "_step", lambda *args: steps.append(args[-1].step) or step(*args))
    score(model, task, "ugs", **options)
    assert steps == [7, 8, 9]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lr": 0.2}, "its lr is 0.1, here it is 0.2"),
        ({"price": 2.0}, "its price is 0.0035, here it is 2.0"),
        ({"seed": 1}, "its seed is 0, here it is 1"),
        ({"steps": 20}, "its steps is 10"),
        ({"objective": "task"}, "its task is"),
        ({"warm_start": "exact"}, "its warm_start is None, here it is 'exact'"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, says, tmp_path):
    model, task, options = small("ugs", checkpoint=str(tmp_path / "run"))
    score(model, task, "ugs", **options)
    with pytest.raises(OptionError, match=says):
        score(model, task, "ugs", **{**options, **change})
    with pytest.raises(OptionError, match="its model is"):
        score(random_model(seed=3), task, "ugs", **options)


def test_a_file_that_is_no_checkpoint_is_refused_and_left_alone(tmp_path):
    model, task, options = small("ugs")
    good, scores, bad = (tmp_path / name for name in ("good", "scores.safetensors", "bad"))
    score(model, task, "ugs", **options, checkpoint=str(good)).save(scores)
    torch.save({"a": 1}, bad)
    for content in (bad.read_bytes(), good.read_bytes()[:-100], b"", scores.read_bytes()):
        bad.write_bytes(content)
        with pytest.raises(FormatError, match="bad"):
            score(model, task, "ugs", **options, checkpoint=str(bad))
        assert bad.read_bytes() == content
    with pytest.raises(FormatError):
        score(model, task, "ugs", **options, checkpoint=str(tmp_path))


def test_an_error_stays_itself_where_the_checkpoint_cannot_be_written(tmp_path, monkeypatch):
    model, task, options = small("ugs")
    (tmp_path / "file").write_text("")
    interrupt_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt) as caught:
        score(model, task, "ugs", **options, checkpoint=str(tmp_path / "file" / "run"))
    assert "could not be written" in caught.value.__notes__[0]


# --- starting and refusing


def test_a_warm_start_takes_scores_a_file_or_a_method(tmp_path):
    model, task, options = small("ugs", steps=1, lr=1e-9)
    ranking = ck.score(model, task, "exact", progress=False)
    ranking.save(tmp_path / "scores.safetensors")
    starts = (ranking, str(tmp_path / "scores.safetensors"), "exact")
    got = [score(model, task, "ugs", **options, warm_start=start).values for start in starts]
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])
    mask = model.graph.mask
    order, strength = got[0][mask].argsort(), ranking.values[mask].abs()
    assert (strength[order].diff() >= 0).all(), "the ranking's order is the order of the first logits"
    assert torch.unique(score(model, task, "ugs", **options).values[mask]).numel() <= 2


def test_a_warm_start_that_is_none_is_refused():
    model, task, options = small("ugs")
    for start in ("no-method", 3):
        with pytest.raises(OptionError, match="expected an edge method"):
            score(model, task, "ugs", **options, warm_start=start)
    other = ck.score(random_model(n_layers=1), random_task(random_model(n_layers=1)), "eap", progress=False)
    with pytest.raises(OptionError, match="another graph"):
        score(model, task, "ugs", **options, warm_start=other)


@each_method
def test_divergence_says_at_which_step_and_what_to_do(name):
    model, task, options = small(name, objective="task")
    base = METRICS["logit-diff"]

    def steep(logits, batch):  # finite, but with an infinite slope where the logits are those of the whole model
        values = base.function(logits, batch)
        return values + (0 * values).abs().sqrt()

    task = replace(task, metric=Metric("steep", steep, base.needs))
    with pytest.raises(MetricError, match=f"{name} diverged at step 1 of 10.*lower lr"):
        score(model, task, name, **options)


def test_runs_and_metrics_that_are_not_finite_or_flat_are_refused():
    model, task, options = small("ugs", objective="task")
    infinite = Metric("infinite", lambda x, b: x[:, 0, 0] / 0, ("right",))
    with pytest.raises(MetricError, match="not finite"):
        score(model, replace(task, metric=infinite), "ugs", **options)
    constant = Metric("constant", lambda x, b: x.detach()[:, 0, 0], ("right",))
    with pytest.raises(MetricError, match="does not depend on the logits"):
        score(model, replace(task, metric=constant), "ugs", **options)
    with pytest.raises(MetricError, match="no useful gradient"):
        score(model, task.with_metric("accuracy"), "ugs", **options)
    assert score(model, task.with_metric("accuracy"), "ugs", **options | {"objective": None}).values.max() > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ugs", {"steps": 0}),
        ("ugs", {"lr": -1.0}),
        ("ugs", {"lr": float("inf")}),
        ("ugs", {"examples": 0}),
        ("ugs", {"price": 0.0}),
        ("ugs", {"corrupt_value": "nothing"}),
        ("edge-pruning", {"target": 0}),
        ("edge-pruning", {"target": 1.0}),
        ("edge-pruning", {"target": 10**6}),
        ("edge-pruning", {"warmup": 2.0}),
        ("matryoshka", {"smallest": 0.0}),
        ("matryoshka", {"noise": -1.0}),
        ("matryoshka", {"temperature": 0.0}),
        ("subnetwork-probing", {"price": -1.0}),
    ],
)
def test_options_out_of_range_are_refused(name, options):
    model, task, common = small(name)
    with pytest.raises(OptionError, match=next(iter(options))):
        score(model, task, name, **common | options)


def test_a_target_is_a_number_or_a_share():
    assert [edge_number("target", value, 50) for value in (7, 0.5, 0.001)] == [7, 25, 1]


def test_an_interrupted_command_says_where_its_work_is_kept(tmp_path, monkeypatch, capfd):
    from circuitkit.cli.commands import main
    from circuitkit.methods import learning

    steps = []

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    step = learning._step
    monkeypatch.setattr(learning, "_step", interrupted)
    monkeypatch.chdir(tmp_path)
    words = "find induction/trained induction-letters --method edge-pruning --n 4 --steps 9 --checkpoint kept --out run"
    assert main([*words.split(), "--no-progress"]) == 130
    assert "step 2 of 9 is kept in kept" in capfd.readouterr().err
    assert not (tmp_path / "run").exists() and (tmp_path / "kept").exists()


def test_edge_pruning_takes_the_shortest_circuit_where_its_target_is_less_than_a_path():
    model = ck.load("induction/trained")
    task = ck.task("induction-letters", model, n=16)
    scores = ck.score(model, task, "edge-pruning", steps=60, progress=False)
    assert len(scores.own()) > 0, "two per cent of 12 edges is no edge at all"
