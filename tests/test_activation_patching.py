"""Activation patching against a literal run in which one activation is replaced by hand."""

import math

import pytest
import torch

import circuitkit as ck
from circuitkit.errors import OptionError
from circuitkit.models.sites import SITES
from tests.toys import random_model, random_task


def patched_metric(model, task, i, site, layer, node, positions, donor, base):
    """The metric of example i of a plain forward pass in which hooks replace one activation."""
    batch = task.batches[0]
    sides = {"clean": batch.clean, "corrupt": batch.corrupt}
    length = int(batch.lengths[i])
    seen = {}
    block = model.module.blocks[min(layer, len(model.module.blocks) - 1)]
    final = layer == len(model.module.blocks)
    at = {
        "head": block.attn.hook_z, "q": block.attn.hook_q, "k": block.attn.hook_k, "v": block.attn.hook_v,
        "pattern": block.attn.hook_pattern, "mlp": getattr(block, "mlp", None), "resid": block,
        "neuron": block.mlp.hook_hidden if hasattr(block, "mlp") else None,
    }[site]  # fmt: skip

    def keep(_module, args, out=None):
        seen["x"] = (args[0] if out is None else out).clone()

    def replace(_module, args, out=None):
        x = (args[0] if out is None else out).clone()
        for p in positions:
            if site == "pattern":
                x[:, node, p] = seen["x"][:, node, p]
            elif site == "neuron":
                x[:, p, 5 * node : 5 * node + 5] = seen["x"][:, p, 5 * node : 5 * node + 5]
            elif x.dim() == 4:
                x[:, p, node] = seen["x"][:, p, node]
            else:
                x[:, p] = seen["x"][:, p]
        return x if out is not None else (x,)

    def run(tokens, hook):
        if site == "resid" and not final:
            handle = at.register_forward_pre_hook(hook)
        else:
            handle = at.register_forward_hook(hook)
        try:
            with torch.no_grad():
                return model.module(tokens)
        finally:
            handle.remove()

    run(sides[donor][i : i + 1, :length], keep)
    logits = run(sides[base][i : i + 1, :length], replace)
    return task.metric(logits[0][batch.positions[i]][None], batch.rows(torch.tensor([i])))[0]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("per_position", [True, False])
def test_effects_equal_a_literal_run(site, direction, per_position):
    model = random_model(heads=(4, 2), gated=True, n_layers=2)
    model = model.split_mlps(5) if site == "neuron" else model
    task = random_task(model, n=3, lengths=torch.tensor([6, 4, 6]))
    got = ck.score(
        model, task, "activation-patching", site=site, direction=direction, per_position=per_position, progress=False
    )
    donor, base = ("corrupt", "clean") if direction == "noising" else ("clean", "corrupt")
    sign = 1 if direction == "noising" else -1
    nodes = {"resid": 1, "mlp": 1, "k": 2, "v": 2, "neuron": 2}.get(site, 4)
    layers = 3 if site == "resid" else 2
    for layer in range(layers):
        for node in range(nodes):
            for column in range(6 if per_position else 1):
                effects = []
                for i, length in enumerate([6, 4, 6]):
                    positions = [column - (6 - length)] if per_position else range(length)
                    if positions[0] < 0:
                        continue
                    whole = patched_metric(model, task, i, site, layer, node, [], donor, base)
                    changed = patched_metric(model, task, i, site, layer, node, positions, donor, base)
                    effects.append(float(sign * (whole - changed)))
                if per_position:
                    value = got.values[layer * nodes + node, column]
                else:
                    value = got.values[layer, node]
                assert float(value) == pytest.approx(sum(effects) / len(effects), abs=1e-6)


def test_swapping_the_whole_stream_transfers_the_whole_effect_in_both_directions():
    model = random_model()
    task = random_task(model)
    for direction in ("noising", "denoising"):
        got = ck.score(
            model, task, "activation-patching", direction=direction, per_position=False, progress=False
        ).normalised
        torch.testing.assert_close(got, torch.ones_like(got), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", ["mean", "position-mean", "zero"])
def test_other_corrupt_values_differ_and_are_finite(value):
    model = random_model()
    task = random_task(model)
    got = ck.score(model, task, "activation-patching", site="head", corrupt_value=value, progress=False)
    paired = ck.score(model, task, "activation-patching", site="head", progress=False)
    assert torch.isfinite(got.values).all() and not torch.allclose(got.values, paired.values)


def test_zero_ablation_of_a_head_equals_zero_ablation_of_its_pattern():
    model = random_model()
    task = random_task(model)
    a, b = (
        ck.score(
            model, task, "activation-patching", site=s, corrupt_value="zero", per_position=False, progress=False
        ).values
        for s in ("head", "pattern")
    )
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_labels_and_shape_suit_the_usual_pictures():
    model = random_model()
    task = random_task(model)
    by_position = ck.score(model, task, "activation-patching", progress=False)
    by_head = ck.score(model, task, "activation-patching", site="head", per_position=False, progress=False)
    assert (by_position.rows, by_position.columns[-1]) == (("L0", "L1", "final"), "end")
    assert (by_head.rows, by_head.columns) == (("L0", "L1"), ("H0", "H1"))
    assert by_head.plot().data[0].type == "heatmap"
    assert not math.isnan(by_head.clean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "nose"}, "expected one of resid"),
        ({"direction": "up"}, "expected 'noising'"),
        ({"corrupt_value": "mode"}, "expected one of counterfactual"),
        ({"direction": "denoising", "corrupt_value": "zero"}, "must be 'counterfactual'"),
        ({"sites": "head"}, "has no option 'sites'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    model = random_model()
    with pytest.raises(OptionError, match=message):
        ck.score(model, random_task(model), "activation-patching", progress=False, **options)


def test_a_site_that_the_model_lacks_is_refused():
    model = random_model(attn_only=True)
    with pytest.raises(OptionError, match="has no mlp"):
        ck.score(model, random_task(model), "activation-patching", site="mlp", progress=False)


def test_patterns_that_a_model_shows_but_does_not_use_are_refused():
    from tests.families import build

    model = ck.load(build("GPTJ"))
    with pytest.raises(OptionError, match="GPTJForCausalLM changes nothing"):
        ck.score(model, random_task(model), "activation-patching", site="pattern", progress=False)
