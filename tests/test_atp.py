"""Attribution patching of nodes, AtP* and its edges: against autograd, brute force, and cases made by hand."""

import pytest
import torch
from hypothesis import given, settings

import circuitkit as ck
from circuitkit.errors import MetricError, OptionError
from tests import planted
from tests.families import build
from tests.oracles.gates import gate_slopes
from tests.toys import SHAPES, random_model, random_task


def nodes(model, task, name, **options):
    return ck.score(model, task, name, progress=False, **options)


def close(got, want, rtol=1e-6):
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=rtol * float(want.abs().max()))


@pytest.mark.parametrize("site", ["head", "q", "k", "v", "pattern", "mlp"])
@given(shape=SHAPES)
@settings(max_examples=3, deadline=None)
def test_atp_equals_the_slope_of_a_gate_on_each_node(site, shape):
    model = random_model(shape, attn_only=False)
    task = random_task(model, n=2, length=4)
    got = nodes(model, task, "atp", site=site).values
    close(got, gate_slopes(model, task, site, got.shape[1]).mean(0), 1e-5)


@pytest.mark.parametrize("per_position", [True, False])
@pytest.mark.parametrize("site", ["resid", "head", "v", "pattern"])
def test_atp_is_activation_patching_where_the_model_is_linear(site, per_position):
    model = random_model(linear=True, heads=(4, 2))
    task = random_task(model, n=3, lengths=torch.tensor([6, 4, 6]))
    options = {"site": site, "per_position": per_position}
    got, want = (nodes(model, task, name, **options) for name in ("atp", "activation-patching"))
    assert (got.rows, got.columns) == (want.rows, want.columns)
    assert (got.clean, got.corrupt) == pytest.approx((want.clean, want.corrupt))
    torch.testing.assert_close(got.values, want.values, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(got.stderr, want.stderr, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["atp", "atp-star"])
@pytest.mark.parametrize("site", ["head", "q", "k", "v", "mlp"])
def test_positions_add_up_and_cutting_the_work_changes_nothing(name, site):
    model = random_model(heads=(4, 2), n_layers=3)
    task = random_task(model, n=5)
    whole = nodes(model, task, name, site=site).values
    for options in ({"batch_size": 2}, {"budget": "1KiB"}):
        close(nodes(model, task, name, site=site, **options).values, whole, 1e-5)
    if name == "atp":
        by_position = nodes(model, task, name, site=site, per_position=True).values
        close(by_position.sum(1).reshape(whole.shape), whole, 1e-5)


# Where a family of transformers keeps a head's z (the output projection's input), its projections and its MLP's write.
INNER = {
    "GPT2": ("transformer.h.{}", "attn.c_proj", ("attn.c_attn",), "mlp"),
    "GPTJ": ("transformer.h.{}", "attn.out_proj", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "mlp"),
    "Llama": ("model.layers.{}", "self_attn.o_proj", tuple(f"self_attn.{s}_proj" for s in "qkv"), "mlp"),
    "Gemma2": (
        "model.layers.{}", "self_attn.o_proj", tuple(f"self_attn.{s}_proj" for s in "qkv"),
        "post_feedforward_layernorm",
    ),
}  # fmt: skip


class Inside:
    """One transformers module with plain hooks: no wiring, no replay, no ports."""

    def __init__(self, family, module):
        block, self.out, self.reads, self.mlp = INNER[family]
        self.module = module
        self.blocks = [module.get_submodule(block.format(i)) for i in range(2)]

    def run(self, tokens, edits=(), cut=None):
        """Logits and what passed: z, q, k, v and the MLP's write of each block; edits are (block, what, function)."""
        seen, handles = {}, []

        def tell(i, what, x):
            for where, name, function in edits:
                x = function(x) if (where, name) == (i, what) else x
            x = x if x.requires_grad else x.clone().requires_grad_()
            seen[i, what] = x
            return x.detach() if cut == i and what in ("head", "mlp") else x

        def on_read(i, slot):
            def hook(_m, _a, y):
                if slot:
                    return tell(i, slot, y)
                return torch.cat([tell(i, s, part) for s, part in zip("qkv", y.chunk(3, -1), strict=True)], -1)

            return hook

        for i, block in enumerate(self.blocks):
            z = block.get_submodule(self.out)
            handles.append(z.register_forward_pre_hook(lambda _m, args, i=i: (tell(i, "head", args[0]),)))
            mlp = block.get_submodule(self.mlp)
            handles.append(mlp.register_forward_hook(lambda _m, _a, y, i=i: tell(i, "mlp", y)))
            for slot, name in zip("qkv" if len(self.reads) == 3 else [None], self.reads, strict=True):
                handles.append(block.get_submodule(name).register_forward_hook(on_read(i, slot)))
        try:
            return self.module(tokens).logits, seen
        finally:
            for handle in handles:
                handle.remove()

    def slopes(self, task, tokens, cut=None):
        """What passed, and the metric's gradient there; nothing flows back through what block ``cut`` writes."""
        batch = task.batches[0]
        with torch.enable_grad():
            logits, seen = self.run(tokens, cut=cut)
            picked = logits[torch.arange(len(batch))[:, None], batch.positions]
            value = task.metric(picked, batch).sum()
            found = torch.autograd.grad(value, list(seen.values()), allow_unused=True)
        zero = {key: torch.zeros_like(x) for key, x in seen.items()}
        own = {} if cut is None else {key: z for key, z in zero.items() if key[0] == cut and key[1] in ("head", "mlp")}
        known = {k: zero[k] if g is None else g for k, g in zip(seen, found, strict=True)}
        return {k: x.detach() for k, x in seen.items()}, known | own


@pytest.mark.parametrize("family", sorted(INNER))
def test_atp_and_atp_star_equal_plain_hooks_and_autograd_in_other_families(family):
    module = build(family)
    module.requires_grad_(False)
    task = random_task(ck.load(module), n=2, length=5)
    inside, model, batch = Inside(family, module), ck.load(build(family)), task.batches[0]
    clean, plain = inside.slopes(task, batch.clean)
    corrupt, _ = inside.slopes(task, batch.corrupt)
    cuts = [inside.slopes(task, batch.clean, cut)[1] for cut in (0, 1)]
    for site in ("head", "q", "k", "v", "mlp"):
        got = nodes(model, task, "atp", site=site).values
        n = got.shape[1]
        want = torch.stack([_by_node(clean[i, site] - corrupt[i, site], plain[i, site], n) for i in range(2)])
        close(got, want, 1e-3)
        star = nodes(model, task, "atp-star", site=site).values
        for i in range(2):
            change, what = clean[i, site] - corrupt[i, site], site
            if site in ("q", "k"):
                what, change = "head", _changed_z(inside, batch, i, site, n, clean, corrupt)
            passes = [
                torch.stack([(c * slopes[i, what]).sum() for c in change]) / len(batch)
                if site in ("q", "k") else _by_node(change, slopes[i, what], n)
                for slopes in cuts
            ]  # fmt: skip
            close(star[i], sum(p.abs() for p in passes), 1e-3)  # two blocks: L - 1 = 1


def _by_node(change, slope, n):
    return (change * slope).unflatten(-1, (n, -1)).sum((1, 3)).mean(0)


def _changed_z(inside, batch, i, slot, n, clean, corrupt):
    """z(clean) - z with one query or key corrupt, node by node."""
    found = []
    for node in range(n):

        def swap(x, node=node):
            out = x.unflatten(-1, (n, -1)).clone()
            out[:, :, node] = corrupt[i, slot].unflatten(-1, (n, -1))[:, :, node]
            return out.flatten(-2)

        with torch.no_grad():
            found.append(clean[i, "head"] - inside.run(batch.clean, [(i, slot, swap)])[1][i, "head"])
    return found


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize(
    ("site", "corrupt"), [("q", ["A", "B", "ask B"]), ("k", ["B", "A", "ask A"])], ids=["query", "key"]
)
@pytest.mark.parametrize("per_position", [False, True])
def test_atp_star_sees_through_saturated_attention(n_layers, site, corrupt, per_position):
    model, task = planted.saturated(n_layers), planted.pairs(["A", "B", "ask A"], corrupt)
    options = {"site": site, "per_position": per_position}
    exact, star, linear = (nodes(model, task, n, **options).values for n in ("activation-patching", "atp-star", "atp"))
    assert float(exact[0].abs().max()) > 0.99
    torch.testing.assert_close(star, exact.abs(), rtol=0.01, atol=1e-6)
    assert float(linear.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["local-exact", "atp-star-edges"])
def test_query_edges_see_through_saturated_attention(name):
    model, task = planted.saturated(), planted.pairs(["A", "B", "ask A"], ["A", "B", "ask B"])
    edge = model.graph.edge("input->a0.h0<q>")
    assert float(nodes(model, task, "exact").values[edge]) == pytest.approx(2, rel=1e-3)
    assert float(nodes(model, task, name).values[edge]) == pytest.approx(2, rel=0.01)
    assert abs(float(nodes(model, task, "eap").values[edge])) < 1e-5


def test_dropping_paths_uncovers_effects_that_cancel():
    """Patching the head changes the metric by 1; directly it is worth 2, through layer 1 -2 to first order."""
    model, task = planted.cancelling(), planted.pairs(["A", "B", "ask A"], ["A", "B", "ask B"])
    found = [
        float(nodes(model, task, name, site="head", **options).values[0, 0])
        for name, options in (
            ("activation-patching", {"per_position": False}), ("atp", {}), ("atp-star", {"grad_drop": False}),
            ("atp-star", {}),
        )
    ]  # fmt: skip
    assert found == pytest.approx([1, 0, 0, 2], abs=1e-5)


def test_dropping_paths_uncovers_edges_that_cancel():
    model, task = planted.cancelling(), planted.pairs(["A", "B", "ask A"], ["B", "A", "ask A"])
    edge = model.graph.edge("input->a0.h0<v>")
    found = [
        float(nodes(model, task, name, **options).values[edge])
        for name, options in (
            ("exact", {}), ("eap", {}), ("atp-star-edges", {"grad_drop": False}), ("atp-star-edges", {}),
        )
    ]  # fmt: skip
    assert found == pytest.approx([1, 0, 0, 2], abs=1e-5)


def test_without_grad_drop_edges_are_those_of_local_exact_and_eap():
    model = random_model(heads=(4, 2), gated=True)
    task = random_task(model)
    ours, local, linear = (
        nodes(model, task, name, **options).values
        for name, options in (("atp-star-edges", {"grad_drop": False}), ("local-exact", {}), ("eap", {}))
    )
    softmax = torch.tensor([node.slot in ("q", "k") for node in model.graph.destination_nodes])
    close(ours, torch.where(softmax, local, linear).abs(), 1e-6)


def test_edges_with_grad_drop_are_the_mean_magnitude_over_passes():
    """Each pass is edge attribution on a model in which one block's writes are handed on without a gradient."""
    model = random_model(n_layers=3, heads=(4, 2))
    task = random_task(model)
    got, total = nodes(model, task, "atp-star-edges"), torch.zeros_like(model.graph.mask, dtype=torch.float32)
    for block in range(3):
        parts = [model.module.blocks[block].attn.hook_z, model.module.blocks[block].mlp]
        handles = [p.register_forward_hook(lambda _m, _a, y: y.detach() + 0 * y) for p in parts]
        try:
            total += nodes(model, task, "eap").values.abs()
        finally:
            for handle in handles:
                handle.remove()
    ends = torch.tensor([node.kind == "logits" for node in model.graph.destination_nodes])
    softmax = torch.tensor([node.slot in ("q", "k") for node in model.graph.destination_nodes])
    close(got.values[:, ~softmax], (total / torch.where(ends, 3, 2))[:, ~softmax], 1e-5)
    assert not got.signed and got.n_examples == 4 and (got.stderr >= 0).all() and got.stderr.max() > 0


@pytest.mark.parametrize("name", ["atp", "atp-star", "hisp"])
def test_identical_pairs_score_zero_and_the_sign_follows_the_metric(name):
    model = random_model()
    same = nodes(model, random_task(model, same=True), name)
    assert torch.count_nonzero(same.values) == 0
    scores = nodes(model, random_task(model), name)
    assert scores.signed == (name == "atp")
    assert scores.signed or float(scores.values.min()) >= 0
    assert scores.plot().data[0].type == "heatmap"


@pytest.mark.parametrize("value", ["mean", "position-mean", "zero"])
@pytest.mark.parametrize("site", ["head", "k", "mlp", "pattern"])
def test_other_corrupt_values_are_those_of_activation_patching(value, site):
    """On models in which what follows the site is linear."""
    model = random_model(linear=True)
    if site in ("mlp", "pattern"):
        model = random_model(norm=None, n_layers=1, attn_only=site == "pattern")
    task = random_task(model)
    got, want = (
        nodes(model, task, name, site=site, corrupt_value=value, per_position=False).values
        for name in ("atp", "activation-patching")
    )
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert nodes(model, task, "atp-star", site=site, corrupt_value=value).values.isfinite().all()


@pytest.mark.parametrize("name", ["atp", "atp-star", "hisp"])
def test_metrics_without_a_gradient_and_missing_sites_are_refused(name):
    model = random_model(attn_only=True)
    task = random_task(model)
    with pytest.raises(MetricError, match=r"no useful gradient; .*'activation-patching'"):
        nodes(model, task.with_metric("accuracy"), name)
    with pytest.raises(MetricError, match=r"at the clean run is zero .*'activation-patching'"):
        nodes(model, task.with_metric("kl"), name)
    with pytest.raises(OptionError, match="has no mlp"):
        nodes(model, task, name, site="mlp")
    with pytest.raises(OptionError, match="expected one of"):
        nodes(model, task, name, site="nose")
    with pytest.raises(OptionError, match="corrupt_value"):
        nodes(model, task, name, corrupt_value="mode")
    flat = ck.load("tracr/frac_prevs")
    with pytest.raises(MetricError, match="flat there"):
        nodes(flat, ck.task("tracr", flat, n=4), name)


def test_bfloat16_is_close_to_float32():
    task = random_task(ck.load(build("Llama")), n=2)
    for name in ("atp", "atp-star"):
        got, want = (
            nodes(ck.load(build("Llama", dtype=dtype)), task, name, site="q").values
            for dtype in (torch.bfloat16, torch.float32)
        )
        assert float(torch.corrcoef(torch.stack([got.flatten(), want.flatten()]))[0, 1]) > 0.9
