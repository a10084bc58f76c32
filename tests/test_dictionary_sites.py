"""Sites of every family against hooks of the user's own module, and dictionaries that do not fit."""

from dataclasses import replace

import pytest
import torch

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sites import activations, activations_at, check_fits, site_width
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import OptionError
from tests.families import build, every_family
from tests.toys import random_model

KINDS = ("resid-pre", "resid-post", "attn-out", "mlp-in", "mlp-out", "z")
TOKENS = torch.randint(97, (3, 7), generator=torch.Generator().manual_seed(0))


def hugging_face_parts(module, tokens, layer):
    """What the user's own module has at each site, by its own names."""
    core = next(getattr(module, name) for name in ("transformer", "gpt_neox", "model") if hasattr(module, name))
    block = (core.h if hasattr(core, "h") else core.layers)[layer]
    attention = next(getattr(block, n) for n in ("attn", "attention", "self_attn") if hasattr(block, n))
    attention_out = next(m for n, m in attention.named_modules() if n in ("c_proj", "dense", "out_proj", "o_proj"))
    behind_attention, behind_mlp = attention, block.mlp
    if hasattr(block, "pre_feedforward_layernorm"):  # Gemma: a norm follows, and what it gives is added to the stream
        behind_attention, behind_mlp = block.post_attention_layernorm, block.post_feedforward_layernorm
    seen = {}

    def keep(name, side):
        def hook(_module, args, kwargs_or_output, output=None):
            value = (args[0] if args else kwargs_or_output["hidden_states"]) if side == "in" else kwargs_or_output
            seen[name] = (value if isinstance(value, torch.Tensor) else value[0]).detach()

        return hook

    handles = [
        block.register_forward_pre_hook(keep("resid-pre", "in"), with_kwargs=True),
        block.register_forward_hook(keep("resid-post", "out")),
        behind_attention.register_forward_hook(keep("attn-out", "out")),
        attention_out.register_forward_pre_hook(keep("z", "in"), with_kwargs=True),
        block.mlp.register_forward_pre_hook(keep("mlp-in", "in"), with_kwargs=True),
        behind_mlp.register_forward_hook(keep("mlp-out", "out")),
    ]
    with torch.no_grad():
        module(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@every_family
def test_sites_are_what_the_module_computes(family):
    module = build(family)
    model = ck.load(module)
    for layer in (0, 1):
        want = hugging_face_parts(module, TOKENS, layer)
        sites = [Site(kind, layer) for kind in KINDS]
        for site, got in zip(sites, activations_at(model, sites, TOKENS), strict=True):
            torch.testing.assert_close(got, want[site.kind], rtol=1e-4, atol=1e-5, msg=lambda m, s=site: f"{s}: {m}")
            assert got.shape[-1] == site_width(model, site) and not got.requires_grad


def test_writes_add_up_to_the_stream_in_our_own_transformer():
    for gated in (False, True):
        model = random_model(gated=gated, heads=(4, 2))
        tokens = TOKENS % model.d_vocab
        before, after, attention, mlp = activations_at(
            model, [Site(kind, 1) for kind in ("resid-pre", "resid-post", "attn-out", "mlp-out")], tokens[:, :6]
        )
        torch.testing.assert_close(before + attention + mlp, after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp-in", "mlp-out"])
def test_an_mlp_of_neurons_has_the_same_sites(kind):
    for family in ("GPT2", "Llama", "Gemma2"):
        model = ck.load(build(family))
        whole, split = (activations(m, Site(kind, 1), TOKENS) for m in (model, model.split_mlps()))
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)


def test_recurrent_states_are_the_module_s():
    module = torch.nn.LSTM(4, 6, num_layers=2, batch_first=True)
    model, x = ck.load(module), torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    want = module(x)[0].detach()
    torch.testing.assert_close(activations(model, Site("state", 1, "l1.h"), x), want, rtol=1e-5, atol=1e-6)
    assert site_width(model, Site("state", 0, "l0.h")) == 6
    for site in (Site("state", 0, "l7.h"), Site("mlp-in", 0)):
        with pytest.raises(OptionError, match=r"state\.l0\.h"):
            activations(model, site, x)


def test_sites_that_are_not_there():
    with pytest.raises(OptionError, match="layers 0 to 1"):
        activations(random_model(), Site("resid-pre", 2), TOKENS)
    with pytest.raises(OptionError, match="no mlp-out"):
        activations(random_model(attn_only=True), Site("mlp-out", 0), TOKENS)
    with pytest.raises(OptionError, match="transformer"):
        activations(random_model(), Site("state", 0, "l0.h"), TOKENS)


def test_the_model_is_left_as_it_was():
    module = build("GPT2").train()
    model = ck.load(module)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()]
    activations(model, Site("attn-out", 0), TOKENS)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()] == hooks
    assert module.training and all(p.requires_grad and p.grad is None for p in module.parameters())


def test_a_dictionary_of_another_model_layer_or_width_is_refused():
    model = random_model()
    site = Site("resid-post", 0)
    good = Dictionary(SparseCoder(model.width, 5, model.width), site, (site,), model.name)
    check_fits(good, model)
    check_fits(replace(good, model=""), model)
    check_fits(replace(good, model=f"someone/{model.name}".upper()), model)
    wide = SparseCoder(model.width + 1, 5, model.width + 1)
    for bad, message in (
        (replace(good, model="gpt2"), "was trained on 'gpt2'"),
        (replace(good, coder=wide), f"reads {model.width + 1} numbers"),
        (replace(good, read=Site("mlp-in", 7)), "layers 0 to 1"),
        (replace(good, writes=(Site("mlp-out", 4),)), "layers 0 to 1"),
    ):
        with pytest.raises(OptionError, match=message):
            check_fits(bad, model)
