"""SHIFT on a planted model: two words say the label, two louder ones an attribute that only goes along with it."""

import pytest
import torch

from circuitkit.analysis.shift import Examples, embedding_control, rank_features, shift, train_probe
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.dictionaries.splice import splice
from circuitkit.errors import OptionError
from circuitkit.models.probed import probed
from circuitkit.models.tl_layout import native_model

WORDS, D = 16, 12  # token 0 is empty; 1-4 say the label (two words for each, of opposite sign), 5-8 the attribute


def planted():
    """Word pairs are +-e_k, so no linear probe tells them apart; the MLP's neurons |e_k| write what they mean."""
    generator = torch.Generator().manual_seed(0)
    config = {"n_layers": 1, "d_model": D, "d_head": 4, "n_heads": 1, "n_ctx": 8, "d_vocab": WORDS, "d_mlp": 8}
    weights = native_model(config, _zeros(config), name="empty").module.state_dict()
    for k in range(4):
        weights["embed.W_E"][1 + 2 * k, k], weights["embed.W_E"][2 + 2 * k, k] = 1.0, -1.0
        for i, sign in ((2 * k, 1.0), (2 * k + 1, -1.0)):
            weights["blocks.0.mlp.W_in"][k, i] = sign
            weights["blocks.0.mlp.W_out"][i, 4 + k] = 0.5 if k < 2 else 2.0
    weights["embed.W_E"][9:, 4:8] = 0.5 * torch.randn(WORDS - 9, 4, generator=generator)  # noise of other words
    return native_model(config, weights, name="planted")


def _zeros(config):
    from circuitkit.models.native import NativeConfig, NativeTransformer

    return NativeTransformer(NativeConfig.from_dict(config)).state_dict()


def examples(n, *, balanced, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return torch.randint(high, (n,), generator=generator)

    label = draw(2).bool()
    spurious = draw(2).bool() if balanced else label
    tokens = torch.randint(9, WORDS, (n, 6), generator=generator)
    tokens[:, 1] = 1 + 2 * label.int() + draw(2)
    tokens[:, 4] = 5 + 2 * spurious.int() + draw(2)
    return Examples(tokens, label, spurious)


def spliced():
    """The MLP's own neurons as a transcoder: latents 0-3 are about the label, 4-7 about the attribute."""
    model = planted()
    coder = SparseCoder(D, 8, D)
    mlp = model.module.blocks[0].mlp
    coder.W_enc.data, coder.W_dec.data = mlp.W_in.data.clone(), mlp.W_out.data.clone()[None]
    return splice(model, Dictionary(coder, Site("mlp-in", 0), (Site("mlp-out", 0),)))


TRAIN, TEST = examples(400, balanced=False, seed=1), examples(400, balanced=True, seed=2)


def test_features_and_the_control_both_repair_the_probe():
    model = spliced()
    found = shift(model, TRAIN, TEST, lambda names: [n for n in names if int(n[4:]) >= 4], layer=0)
    assert list(found.ranked)[:4] == sorted(list(found.ranked)[:4], key=lambda n: -abs(found.ranked[n]))
    assert {int(n[4:]) for n in list(found.ranked)[:4]} == {4, 5, 6, 7}  # the loud attribute ranks first
    assert all(v > 0 for n, v in found.ranked.items() if int(n[4:]) >= 4)
    assert set(found.ablated) == {"m0.f4", "m0.f5", "m0.f6", "m0.f7"}
    assert found.before.spurious > 0.9 and found.before.worst < 0.5
    assert abs(found.after.spurious - 0.5) < 0.1 and found.after.label > found.before.label
    assert found.retrained.label > 0.7 and found.retrained.worst > found.before.worst + 0.3

    control = embedding_control(model, TRAIN, TEST, lambda names: [n for n in names if int(n) in range(5, 9)], layer=0)
    assert {int(n) for n in list(control.ranked)[:4]} == {5, 6, 7, 8}
    assert control.before == found.before
    assert control.retrained.label == pytest.approx(found.retrained.label, abs=0.03)  # words alone do as well here


def test_effects_on_the_probe_are_literal_ablations_where_the_path_is_linear():
    """Each latent's part of the probe's signed logit is f_i W_dec[i] . w, averaged over positions and examples."""
    model = spliced()
    probe = train_probe(model, TRAIN, 0)
    effects = rank_features(model, probe, TRAIN, steps=3)
    x = model.module.embed.W_E[TRAIN.tokens]
    coder = model.splices[0].coder
    with torch.no_grad():
        parts = coder.encode(x).mean(1) * (coder.W_dec[0] @ probe.weight)
        want = ((2.0 * TRAIN.label - 1)[:, None] * parts).mean(0)
    rows = [effects.rows.index(f"m0.f{i}") for i in range(8)]
    torch.testing.assert_close(effects.values[rows, 0], want, rtol=1e-5, atol=1e-6)
    logits = probe(_mean(model, TRAIN.tokens))
    assert effects.clean == pytest.approx(float(((2.0 * TRAIN.label - 1) * logits).mean()), rel=1e-5)


def _mean(model, tokens):
    from circuitkit.analysis.shift import mean_stream

    return mean_stream(model, tokens, 0)


def test_bad_input_is_refused():
    model = spliced()
    one = Examples(TRAIN.tokens, torch.ones(400, dtype=torch.bool), TRAIN.spurious)
    with pytest.raises(OptionError, match="one label"):
        train_probe(model, one, 0)
    with pytest.raises(OptionError, match="four groups"):
        shift(model, TRAIN, TRAIN, lambda names: [], layer=0)
    with pytest.raises(OptionError, match="the judge named 'm9'"):
        shift(model, TRAIN, TEST, lambda names: ["m9"], layer=0)
    with pytest.raises(OptionError, match="layers 0 to 0"):
        probed(model, 1, torch.zeros(D))
    with pytest.raises(OptionError, match="stream's width"):
        probed(model, 0, torch.zeros(3))
