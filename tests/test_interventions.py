"""Interventions on components and latents: literal direct effects, held norms and patterns, generation."""

import pytest
import torch

import circuitkit as ck
from circuitkit.dictionaries.splice import splice
from circuitkit.errors import GraphError, OptionError
from circuitkit.models.interventions import Intervention, generate, intervening
from tests.families import build, every_family
from tests.test_splice import CHOSEN, dictionary, output, random_coder
from tests.toys import random_model, random_task


def transcoded(model, dtype=torch.float64):
    for layer in range(2):
        coder = random_coder(model.width, seed=layer, dtype=dtype)
        model = splice(model, dictionary("transcoder", layer, coder), latents=CHOSEN)
    return model


def tokens_of(model):
    return random_task(model, n=2).batches[0].clean


def literal_direct_effect(model, tokens, node, amount, position):
    """Logits and layer 1's pre-activations, changed through the stream and through attention's values alone."""
    module, coders = model.module, [one.part for one in model.splices]
    patterns, streams = {}, {}
    hooks = []
    for i, block in enumerate(module.blocks):
        hooks += [block.attn.hook_pattern.register_forward_hook(lambda _m, _a, y, i=i: patterns.__setitem__(i, y)),
                  block.register_forward_pre_hook(lambda _m, a, i=i: streams.__setitem__(i, a[0])),
                  block.hook_resid_mid.register_forward_hook(lambda _m, _a, y, i=i: streams.__setitem__((i, "mid"), y)),
                  module.ln_final.register_forward_pre_hook(lambda _m, a: streams.__setitem__("end", a[0]))
                  ]  # fmt: skip
    output(model, tokens)
    for hook in hooks:
        hook.remove()

    def normed(change, at, ln):
        return change * torch.rsqrt(streams[at].square().mean(-1, keepdim=True) + ln.eps) * ln.w

    change = torch.zeros_like(streams[1])
    change[:, position] = amount * coders[0].W_dec[0, CHOSEN.index(node)]
    block = module.blocks[1]
    values = torch.einsum("btd,hde->bhte", normed(change, 1, block.ln1), block.attn.W_V)
    moved = torch.einsum("bhqk,bhke->bhqe", patterns[1], values)
    change = change + torch.einsum("bhqe,hed->bqd", moved, block.attn.W_O)
    pre = normed(change, (1, "mid"), block.ln2) @ coders[1].W_enc
    return normed(change, "end", module.ln_final) @ module.unembed.W_U, pre


@pytest.mark.parametrize("position", [1, 3])
def test_constrained_in_all_layers_is_the_direct_effect(position):
    model = transcoded(random_model())
    tokens = tokens_of(model)
    before = model.intervene([], tokens)
    after = model.intervene([Intervention("m0.f3", 2.5, "add", position)], tokens, constrained=[0, 1])
    with torch.no_grad():
        logits, pre = literal_direct_effect(model, tokens, 3, 2.5, position)
    torch.testing.assert_close(after.logits - before.logits, logits, rtol=1e-6, atol=1e-7)
    for i, latent in enumerate(CHOSEN):
        got = after.read(f"m1.f{latent}") - before.read(f"m1.f{latent}")
        torch.testing.assert_close(got[..., 0], pre[..., i], rtol=1e-6, atol=1e-7)
    assert float(logits[:, position:].abs().max()) > 1e-3 and not logits[:, :position].any()


@every_family
def test_held_runs_are_the_models_own_and_answer_in_proportion(family):
    model = transcoded(ck.load(build(family)), torch.float32)
    tokens = tokens_of(model)
    clean = output(model, tokens).float()
    if family == "GPTJ":  # the bridge gives its patterns, but does not use them
        with pytest.raises(OptionError, match="changes nothing"):
            model.intervene([], tokens, frozen=True)
        return
    size = float(clean.abs().max())
    for options in ({}, {"frozen": True}, {"constrained": [0, 1]}):
        assert float((model.intervene([], tokens, **options).logits - clean).abs().max()) < 2e-6 * max(size, 1)

    def effect(amount, **options):
        return model.intervene([Intervention("m0.f3", amount, "add", 2)], tokens, **options).logits - clean

    one, cap = effect(1.0, constrained=[0, 1]), family == "Gemma2"  # whose final soft cap bends the logits
    torch.testing.assert_close(effect(3.0, constrained=[0, 1]), 3 * one, rtol=0.2 if cap else 1e-3, atol=1e-4)
    assert float(one.abs().max()) > 1e-3
    assert float((effect(3.0) - 3 * one).abs().max()) > 1e-3  # free: norms and MLPs answer
    assert float((effect(3.0, frozen=True) - 3 * one).abs().max()) > 1e-4  # frozen: MLPs do
    assert float((effect(3.0, frozen=True) - effect(3.0)).abs().max()) > 1e-4


def test_set_scale_and_add_write_what_they_say():
    model = transcoded(random_model())
    tokens = tokens_of(model)
    clean = model.intervene([], tokens)
    run = model.intervene([Intervention("m0.f3", 4.0, positions=1), Intervention("m0.f4", 2.0, "scale"),
                           Intervention("a0.h1", torch.ones(4), "add", slice(2, None)),
                           Intervention("m0.f3", 1.0, "add", [0, 1])], tokens)  # fmt: skip
    want = clean.written("m0.f3").clone()
    want[:, 1] = 4
    want[:, :2] += 1
    # Latents read what the head wrote, so only positions before it are untouched.
    torch.testing.assert_close(run.written("m0.f3")[:, :2], want[:, :2])
    torch.testing.assert_close(run.written("m0.f4")[:, :2], 2 * clean.written("m0.f4")[:, :2])
    torch.testing.assert_close(run.written("a0.h1")[:, 2:], clean.written("a0.h1")[:, 2:] + 1)
    torch.testing.assert_close(run.written("a0.h0"), clean.written("a0.h0"))


def test_a_head_set_to_its_corrupt_value_is_activation_patching():
    model = random_model()
    task = random_task(model, n=3)
    batch = task.batches[0]
    patched = ck.score(model, task, "activation-patching", site="head", per_position=False, progress=False)
    other = model.intervene([], batch.corrupt)
    for layer in range(2):
        change = Intervention(f"a{layer}.h1", other.written(f"a{layer}.h1"))
        logits = model.intervene([change], batch.clean).logits
        picked = [task.metric(torch.stack([x[i, batch.positions[i]] for i in range(len(batch))]).float(), batch)
                  for x in (model.intervene([], batch.clean).logits, logits)]  # fmt: skip
        assert float((picked[0] - picked[1]).mean()) == pytest.approx(float(patched.values[layer, 1]), abs=1e-5)


def test_generation_is_the_literal_greedy_loop_and_open_ends_go_on():
    model = transcoded(random_model())
    tokens = tokens_of(model)[:, :3]
    want = tokens
    for _ in range(3):
        want = torch.cat([want, output(model, want)[:, -1:].argmax(-1)], 1)
    assert torch.equal(generate(model, tokens, 3), want)
    always = Intervention("m1.f4", 30.0, positions=slice(2, None))
    late = Intervention("m1.f4", 30.0, positions=4)
    steered, later = generate(model, tokens, 3, [always]), generate(model, tokens, 3, [late])
    assert torch.equal(later[:, :5], want[:, :5])  # position 4 is first read when token 5 is chosen
    again = tokens
    for _ in range(3):
        with intervening(model, [always]):
            again = torch.cat([again, model.module(again)[:, -1:].argmax(-1)], 1)
    assert torch.equal(steered, again) and not torch.equal(steered, want)


def test_hooks_are_gone_after_an_error():
    model = transcoded(random_model())
    tokens = tokens_of(model)
    before = output(model, tokens)
    with pytest.raises(RuntimeError), intervening(model, [Intervention("m0.f3", 5.0)]):
        raise RuntimeError
    with pytest.raises(RuntimeError):
        model.intervene([Intervention("a0.h0", torch.ones(17))], tokens)
    assert torch.equal(output(model, tokens), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())


def test_bad_interventions_are_refused():
    model = random_model()
    tokens = tokens_of(model)
    with pytest.raises(GraphError, match="no writer"):
        model.intervene([Intervention("m0.f3", 1.0)], tokens)
    with pytest.raises(GraphError, match="no reader"):
        model.intervene([], tokens).read("m9")
    with pytest.raises(OptionError, match="set, scale, add"):
        Intervention("m0", 1.0, "multiply")
    with pytest.raises(OptionError, match="NaN"):
        Intervention("m0", float("nan"))
    with pytest.raises(OptionError, match="the input has"):
        model.intervene([Intervention("m0", 1.0, positions=99)], tokens)
    with pytest.raises(OptionError, match="layers from 0 to 1"):
        model.intervene([], tokens, constrained=[2])
    with pytest.raises(OptionError, match="reads at most"):
        generate(model, tokens, 10_000)
