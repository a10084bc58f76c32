"""Dictionaries spliced into models: exact outputs, the laws, a literal run in which every latent reads by itself."""

import copy

import pytest
import torch

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.dictionaries.splice import active_latents, splice
from circuitkit.errors import CircuitKitError, OptionError
from circuitkit.evaluation.faithfulness import circuit_metrics
from circuitkit.methods.base import METHODS
from circuitkit.methods.plan import Plan
from tests.families import build, every_family
from tests.oracles.spliced import spliced_run
from tests.toys import random_model, random_task

PLACES = {"transcoder": ("mlp-in", "mlp-out"), "mlp SAE": ("mlp-out", "mlp-out"), "attention SAE": ("attn-out",) * 2}
every_place = pytest.mark.parametrize("place", PLACES)
CHOSEN = [1, 3, 4, 7]


def random_coder(d, n=12, activation="relu", *, k=None, seed=0, dtype=torch.float32, **options):
    coder = SparseCoder(d, n, d, activation=activation, k=k, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in coder.parameters():
        parameter.data = (0.3 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    if coder.threshold is not None:
        coder.threshold.data.abs_()
    return coder


def dictionary(place, layer, coder):
    read, write = PLACES[place]
    return Dictionary(coder, Site(read, layer), (Site(write, layer),))


def output(model, tokens):
    with torch.no_grad(), model.quiet():
        out = model.module(tokens)
    return out if isinstance(out, torch.Tensor) else out.logits


def rows_of(model, layer, kinds=("latent", "error")):
    return [i for i, node in enumerate(model.graph.source_nodes) if node.layer == layer and node.kind in kinds]


@every_family
def test_output_is_the_models_and_every_law_holds(family):
    model = ck.load(build(family))
    task = random_task(model, n=2)
    tokens = task.batches[0].clean
    spliced = model
    for place in PLACES:
        if place != "mlp SAE":
            spliced = splice(spliced, dictionary(place, 1, random_coder(32)), latents=CHOSEN)  # checks the laws
    spliced = splice(spliced, dictionary("mlp SAE", 0, random_coder(32, subtract_b_dec=True)), tokens=tokens)
    own = output(model, tokens)
    assert float((output(spliced, tokens) - own).abs().max()) < 1e-6 * max(1.0, float(own.abs().max()))
    scores = ck.score(spliced, task, "eap", progress=False)
    keep = torch.stack([torch.zeros_like(spliced.graph.mask), spliced.graph.mask])
    clean, values = circuit_metrics(spliced, task, keep, plan=Plan(progress=False), corrupt_value="counterfactual")
    corrupt = task.metric(model.logits(model.record(task.batches[0].corrupt).inputs[-1], task.batches[0].positions),
                          task.batches[0])  # fmt: skip
    torch.testing.assert_close(values[0].float(), corrupt.float(), rtol=1e-4, atol=1e-5)  # no edges: the corrupt run
    torch.testing.assert_close(values[1], clean)  # all edges: the clean one
    assert scores.values[rows_of(spliced, 1)].abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"activation": "topk", "k": 4}, {"activation": "jumprelu"},
                                     {"activation": "gated"}, {"skip": True}], ids=str)  # fmt: skip
@pytest.mark.parametrize("replaced", [False, True])
def test_scores_and_patched_edges_are_those_of_a_literal_run(options, replaced):
    model = random_model()
    task = random_task(model, n=2)
    batch, width = task.batches[0], model.width
    coders = {0: (random_coder(width, dtype=torch.float64, **options), CHOSEN),
              1: (random_coder(width, seed=1, dtype=torch.float64), [0, 2])}  # fmt: skip
    spliced = model
    for layer, (coder, chosen) in coders.items():
        spliced = splice(spliced, dictionary("transcoder", layer, coder), latents=chosen, replace=replaced)
    mask = spliced.graph.mask
    values = {m: ck.score(spliced, task, m, progress=False).values.double() for m in ("eap", "exact")}
    want = {m: torch.zeros_like(v) for m, v in values.items()}

    def run(tokens, corrupt, dial):
        return spliced_run(model.module, tokens, corrupt, dial, coders, replaced)

    def metric(logits, i):
        one = batch.rows(slice(i, i + 1))
        return task.metric(logits[one.positions[0]][None].float(), one)[0]

    sample = mask.nonzero()[:: max(1, int(mask.sum()) // 25)].tolist()
    for i in range(len(batch)):
        nothing = torch.zeros(mask.shape, dtype=torch.float64)
        corrupt = run(batch.corrupt[i], None, nothing)[1].detach()
        dial = nothing.clone().requires_grad_(True)
        clean = metric(run(batch.clean[i], corrupt, dial)[0], i)
        want["eap"] -= torch.autograd.grad(clean, dial)[0] / len(batch)
        for u, v in sample:
            one = nothing.clone()
            one[u, v] = 1
            want["exact"][u, v] += (clean - metric(run(batch.clean[i], corrupt, one)[0], i)).detach() / len(batch)
    torch.testing.assert_close(values["eap"], want["eap"], rtol=1e-4, atol=2e-6)
    if options.get("activation") != "topk":  # there, the literal run judges by each copy which are the largest
        at = tuple(torch.tensor(sample).T)
        torch.testing.assert_close(values["exact"][at], want["exact"][at], rtol=1e-3, atol=2e-5)


@every_place
@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_two_ways_to_run_a_circuit_agree(place, activation):
    model = random_model()
    coder = random_coder(model.width, activation=activation, k=4 if activation == "topk" else None)
    spliced = splice(model, dictionary(place, 0, coder), latents=CHOSEN)
    task = random_task(spliced, n=3)
    batch = task.batches[0]
    keep = torch.rand(4, *spliced.graph.mask.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    # What the error reads decides which latents are among the largest, so cutting only that reader must reach them.
    alone = [i for i, name in enumerate(spliced.graph.destinations) if name.endswith(".error")]
    keep[0] = True
    keep[0][:, alone] = False
    run, corrupt = spliced.record(batch.clean), spliced.record(batch.corrupt).writes
    with torch.no_grad(), spliced.quiet():
        literal = spliced.run_circuits(run, corrupt, keep, batch.positions)
        swept = spliced.sweep(batch.clean, lambda _run: corrupt).logits(keep, batch.positions)
    torch.testing.assert_close(swept, literal, rtol=1e-5, atol=1e-6)


def test_an_identity_dictionary_gives_its_mlps_scores():
    """Latents relu(y) and relu(-y) of a basis are the MLP's output; together they score what it scores, the error 0."""
    model = random_model()
    task, d = random_task(model, n=3), model.width
    coder = SparseCoder(d, 2 * d, d)
    coder.W_enc.data = torch.cat([torch.eye(d), -torch.eye(d)], 1)
    coder.W_dec.data = coder.W_enc.data.T[None].clone()
    for place, name in (("mlp SAE", "m0"), ("attention SAE", "a0")):
        spliced = splice(model, dictionary(place, 0, coder))
        for method, options in (("eap", {}), ("eap-ig", {"steps": 2})):
            fine = ck.score(spliced, task, method, progress=False, **options).values.double()
            whole = ck.score(model, task, method, progress=False, **options).values.double()
            own = [i for i, source in enumerate(model.graph.sources) if source.startswith(name)]
            latents = [i for i in rows_of(spliced, 0) if spliced.graph.sources[i].startswith(name)]
            torch.testing.assert_close(fine[latents].sum(0), whole[own].sum(0), rtol=1e-5, atol=1e-6)
            assert float(fine[latents[-1]].abs().max()) < 1e-6  # the error
            others = [i for i in range(len(fine)) if i not in latents]
            torch.testing.assert_close(fine[others], whole[[i for i in range(len(whole)) if i not in own]],
                                       rtol=1e-5, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "transformer" in method.families])
def test_every_method_runs_on_a_spliced_model_or_says_why_not(name):
    spliced = random_model()
    for place, layer in (("transcoder", 0), ("attention SAE", 1)):
        spliced = splice(spliced, dictionary(place, layer, random_coder(spliced.width)), latents=[0, 3, 5])
    task = random_task(spliced, n=2)
    options = {"steps": 2} if "steps" in (METHODS[name].__kwdefaults__ or {}) else {}
    try:
        scores = ck.score(spliced, task, name, progress=False, **options)
    except CircuitKitError as error:
        assert len(str(error)) > 40
        return
    assert scores.values.isfinite().any()
    if METHODS[name].level == "edge" and not METHODS[name].positions:
        assert not scores.values[~spliced.graph.mask].any()
        assert ck.evaluate(spliced, task, scores.grow(8), progress=False).n_edges in range(1, 9)


def test_the_module_and_the_dictionary_are_as_found():
    model = random_model()
    coder = random_coder(model.width)
    before = copy.deepcopy((model.module.state_dict(), coder.state_dict()))
    modules = list(model.module.modules())
    spliced = splice(model, dictionary("transcoder", 0, coder), latents=CHOSEN)
    task = random_task(spliced, n=2)
    ck.score(spliced, task, "eap", progress=False)
    with pytest.raises(RuntimeError), spliced.quiet():
        raise RuntimeError
    assert list(model.module.modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    after = (model.module.state_dict(), coder.state_dict())
    assert all(torch.equal(a[k], b[k]) for a, b in zip(before, after, strict=True) for k in a)
    assert all(p.requires_grad for p in coder.parameters()) and coder.n_latents == 12
    assert model.graph.sources == random_model().graph.sources


def test_active_latents_are_those_above_zero_somewhere():
    model = random_model()
    coder = random_coder(model.width)
    coder.b_enc.data[5] = -1e6
    tokens = random_task(model, n=2).batches[0].clean
    found = active_latents(model, dictionary("transcoder", 1, coder), tokens)
    assert 5 not in found and len(found) > 3
    assert splice(model, dictionary("transcoder", 1, coder), tokens=tokens).splices[0].chosen == tuple(found)
    coder.b_enc.data[:] = -1e6
    with pytest.raises(OptionError, match="no latent"):
        active_latents(model, dictionary("transcoder", 1, coder), tokens)


@pytest.mark.parametrize(
    ("read", "write", "message"),
    [
        ("resid-pre.0", "resid-pre.0", "whole stream"),
        ("z.0", "z.0", "each head's own map"),
        ("mlp-in.0", "mlp-in.0", "writes nothing"),
        ("mlp-in.0", "mlp-out.1", "of one layer"),
        ("mlp-in.7", "mlp-out.7", "layers 0 to 1"),
        ("mlp-in.0 mlp-out.1", "mlp-in.0 mlp-out.1", "cross-layer"),
    ],
)
def test_dictionaries_of_other_places_are_refused(read, write, message):
    model = random_model()
    writes = tuple(Site.parse(text) for text in write.split())
    coder = SparseCoder(model.width, 4, model.width, n_out=len(writes))
    with pytest.raises(OptionError, match=message):
        splice(model, Dictionary(coder, Site.parse(read.split()[0]), writes))


def test_bad_latents_widths_and_second_splices_are_refused():
    model = random_model()
    good = dictionary("transcoder", 0, random_coder(model.width))
    for latents in ([], [12], [-1]):
        with pytest.raises(OptionError, match="from 0 to 11"):
            splice(model, good, latents=latents)
    with pytest.raises(OptionError, match="reads 5"):
        splice(model, dictionary("transcoder", 0, random_coder(5)))
    with pytest.raises(OptionError, match="already spliced"):
        splice(splice(model, good, latents=[0]), good)
    with pytest.raises(OptionError, match="one of them"):
        splice(model, good, latents=[0], tokens=torch.zeros(1, 3, dtype=torch.long))
