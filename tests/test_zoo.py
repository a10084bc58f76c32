"""Zoo models give the logits that are stored beside them, on any TransformerLens and on none."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import circuitkit as ck
from circuitkit.errors import OptionError
from circuitkit.models.recurrent.zoo import recurrent_names
from circuitkit.models.zoo import load_zoo, zoo_name, zoo_names

TRANSFORMERS = [name for name in zoo_names() if name not in recurrent_names()]

has_hooked_transformer = pytest.mark.skipif(
    int(version("transformer-lens").split(".")[0]) >= 4, reason="TransformerLens 4 has no HookedTransformer"
)


@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if not n.startswith("tracr/")])
def test_stored_logits_are_reproduced(name):
    model = load_zoo(name)
    check = model.card["check"]
    tokens = torch.tensor([check.get("input", check.get("ids"))])
    with torch.no_grad():
        got = model.module(tokens)[0, -1, :8]
    want = torch.tensor(check.get("last_logits_first8", check.get("hf_last_logits_first8")))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in zoo_names() if n.startswith("tracr/")])
def test_compiled_programs_compute_their_examples(name):
    model = load_zoo(name)
    ids, values = model.card["input_tokens"], model.card["output_values"]
    for example in model.card["examples"]:
        tokens = torch.tensor([[ids[str(t)] for t in example["input"]]])
        with torch.no_grad():
            logits = model.module(tokens)[0, 1:]
        if isinstance(values, str):
            want = torch.tensor(example["output"][1:])
            torch.testing.assert_close(logits[:, 0], want, rtol=0, atol=1e-4)
        else:
            assert [values[str(int(i))] for i in logits.argmax(-1)] == example["output"][1:]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_transformer_of_the_zoo_obeys_the_load_laws(name):
    model = ck.load(name)
    bidirectional = model.card["hooked_transformer_config"].get("attention_dir") == "bidirectional"
    assert model.causal is not bidirectional


@pytest.mark.parametrize("name", recurrent_names())
def test_every_recurrent_network_of_the_zoo_obeys_the_load_laws(name):
    model = ck.load(name)
    assert model.family == "recurrent" and model.name == name and model.card
    assert model.causal is not name.startswith(("word-breaks/", "charlm/"))


def test_stories_in_both_forms_give_the_same_scores():
    models = ck.load("stories260k"), ck.load("stories260k-tl")
    tasks = [ck.task("gender-pronoun", model, n=12) for model in models]
    for method in ("eap", "eap-ig", "clean-corrupted"):
        a, b = (ck.score(m, t, method, progress=False).values for m, t in zip(models, tasks, strict=True))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_short_and_long_names_are_one():
    assert zoo_name("tracr_compiled/hist") == zoo_name("hist") == "tracr/hist"
    assert zoo_name("induction_2layer_attn_only/damaged_control") == "induction/damaged"
    assert zoo_name("gpt2") is None


def test_native_models_need_neither_transformer_lens_nor_transformers():
    code = "import circuitkit as ck, sys; ck.load('tracr/hist'); print('transformer_lens' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@has_hooked_transformer
def test_hooked_transformer_is_accepted_where_it_exists():
    import transformer_lens as lens
    from safetensors.torch import load_file

    from circuitkit.resources import resource

    native = load_zoo("stories260k-tl")
    hooked = lens.HookedTransformer(lens.HookedTransformerConfig(**native.card["hooked_transformer_config"]))
    hooked.load_state_dict(load_file(resource("stories260k", "hooked_transformer.safetensors")), strict=False)
    flags = dict(vars(hooked.cfg))
    model = ck.load(hooked, tokenizer=native.tokenizer)
    tasks = [ck.task("gender-pronoun", m, n=6) for m in (model, native)]
    a, b = (ck.score(m, t, "eap-ig", progress=False) for m, t in zip((model, native), tasks, strict=True))
    assert a.graph.same_as(b.graph)
    torch.testing.assert_close(a.values, b.values, rtol=0, atol=1e-4)
    assert vars(hooked.cfg) == flags


@has_hooked_transformer
@pytest.mark.parametrize(("normalization", "activation"), [("LN", "gelu"), ("LNPre", "relu")])
def test_hooked_transformers_with_layer_norms_obey_the_laws(normalization, activation):
    import transformer_lens as lens

    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=16, n_heads=2, d_head=8, n_ctx=16, d_vocab=20, act_fn=activation, seed=0,
        normalization_type=normalization,
    )  # fmt: skip
    with torch.random.fork_rng():
        module = lens.HookedTransformer(config)
    assert ck.load(module).graph.n_edges > 0


def test_dtype_reaches_the_weights_and_their_wiring():
    model = ck.load("tracr/hist", dtype=torch.float64)
    assert model.wiring.write_sites[1].weight.dtype == torch.float64
    assert ck.load("stories260k", dtype=torch.bfloat16).module.W_E.dtype == torch.bfloat16


def test_options_that_do_not_apply_are_refused():
    with pytest.raises(OptionError, match="no option 'devise'"):
        ck.load("tracr/hist", devise="cpu")
    with pytest.raises(ValueError, match="no option 'device'"):
        ck.load(torch.nn.Linear(1, 1), device="cpu")
