"""Gate gradients against gates that are really built, and Michel et al.'s own quantity."""

import pytest
import torch
from hypothesis import given, settings

import circuitkit as ck
from circuitkit.errors import OptionError
from tests.oracles.gates import gate_slopes
from tests.toys import SHAPES, random_model, random_task


@pytest.mark.parametrize("site", ["head", "q", "k", "v", "mlp"])
@given(shape=SHAPES)
@settings(max_examples=2, deadline=None)
def test_scores_equal_gates_differentiated_by_autograd(site, shape):
    model = random_model(shape, attn_only=False)
    task = random_task(model, n=3, lengths=torch.tensor([5, 5, 5]), length=5)
    raw = ck.score(model, task, "hisp", site=site, normalise=False, progress=False)
    want = gate_slopes(model, task, site, raw.values.shape[1]).abs().mean(0)
    torch.testing.assert_close(raw.values.double(), want, rtol=1e-5, atol=1e-6 * float(want.max()))
    got = ck.score(model, task, "hisp", site=site, progress=False).values.double()
    size = want.norm(dim=1, keepdim=True)
    alive = size[:, 0] > 1e-12  # saturated attention leaves nothing but rounding to normalise
    torch.testing.assert_close(got[alive], (want / size)[alive], rtol=1e-5, atol=1e-5)


def test_with_zero_it_is_the_gradient_of_a_head_mask():
    """Michel et al.: the expected magnitude of dM/dm for a mask m that multiplies each head, by finite differences."""
    model = random_model(heads=(4, 4))
    task, eps = random_task(model, n=3), 1e-5
    got = ck.score(model, task, "hisp", corrupt_value="zero", normalise=False, progress=False).values
    batch, scale = task.batches[0], torch.ones(2, 4, dtype=torch.float64)

    def metric():
        handles = [
            block.attn.hook_z.register_forward_hook(lambda _m, _a, z, s=scale[i]: z * s[:, None])
            for i, block in enumerate(model.module.blocks)
        ]
        try:
            with torch.no_grad():
                logits = model.module(batch.clean)
            return task.metric(logits[torch.arange(3)[:, None], batch.positions], batch)
        finally:
            for handle in handles:
                handle.remove()

    for layer in range(2):
        for head in range(4):
            values = []
            for sign in (1, -1):
                scale[layer, head] = 1 + sign * eps
                values.append(metric())
            scale[layer, head] = 1
            want = float(((values[0] - values[1]) / (2 * eps)).abs().mean())
            assert float(got[layer, head]) == pytest.approx(want, rel=1e-4, abs=1e-7)


def test_layers_have_norm_one_and_a_layer_without_effect_stays_zero():
    model = random_model(n_layers=3, heads=(4, 4))
    model.module.blocks[1].attn.W_O.data.zero_()
    scores = ck.score(model, random_task(model), "hisp", progress=False)
    assert scores.values.square().sum(1).tolist() == pytest.approx([1, 0, 1])
    assert not scores.signed and scores.stderr.isfinite().all()


@pytest.mark.parametrize("site", ["resid", "pattern", "nose"])
def test_only_nodes_can_be_gated(site):
    model = random_model()
    with pytest.raises(OptionError, match="expected one of head, q, k, v, mlp"):
        ck.score(model, random_task(model), "hisp", site=site, progress=False)
