"""Dictionaries to files and back: SAELens's own classes, literal coders of the other trainers, damaged files."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.formats import load_dictionaries, load_dictionary, save_dictionary
from circuitkit.dictionaries.hook_names import NAMES, hook_of_site, site_of_hook
from circuitkit.dictionaries.sparse_coder import ACTIVATIONS, SparseCoder
from circuitkit.errors import CircuitKitError, FormatError, OptionError

RESID, MLP_IN, MLP_OUT = Site("resid-post", 1), Site("mlp-in", 1), Site("mlp-out", 1)
X = 2 * torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(9))
D, N = 6, 11


def random_coder(activation, *, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"k": 3} | options if activation in ("topk", "batchtopk") else options
    coder = SparseCoder(D, N, D, activation=activation, **options)
    for name, parameter in coder.named_parameters():
        value = torch.randn(parameter.shape, generator=generator) * 0.5
        parameter.data = value.abs() if name == "threshold" else value
    return coder.requires_grad_(False)


def sae_of(activation):
    return Dictionary(random_coder(activation, subtract_b_dec=True), RESID, (RESID,), "toy", {"licence": "MIT"})


def transcoder_of(activation, skip=False):
    return Dictionary(random_coder(activation, skip=skip), MLP_IN, (MLP_OUT,), "toy")


def same_weights(one, other):
    left, right = dict(one.named_parameters()), dict(other.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


ALL = [
    *(sae_of(activation) for activation in ACTIVATIONS),
    *(transcoder_of(activation, skip) for activation in ACTIVATIONS for skip in (False, True)),
    Dictionary(random_coder("jumprelu", n_out=3), MLP_IN, tuple(Site("mlp-out", i) for i in (1, 2, 3)), "toy"),
    Dictionary(random_coder("relu", subtract_b_dec=True), Site("state", 0, "l0.h"), (Site("state", 0, "l0.h"),)),
]


@pytest.mark.parametrize("dictionary", ALL, ids=lambda d: f"{d.kind}-{d.coder.activation}-{d.read}")
def test_our_folder_comes_back_bit_for_bit(dictionary, tmp_path):
    back = load_dictionary(save_dictionary(dictionary, tmp_path / "new" / "one"))
    assert same_weights(back.coder, dictionary.coder)
    assert (back.read, back.writes, back.model, dict(back.card)) == (
        dictionary.read, dictionary.writes, dictionary.model, dict(dictionary.card),
    )  # fmt: skip
    assert back.coder.activation == dictionary.coder.activation and back.coder.k == dictionary.coder.k
    assert torch.equal(back.coder(X), dictionary.coder(X))


SAVED = [
    ("standard", sae_of("relu")),
    ("topk", sae_of("topk")),
    ("jumprelu", sae_of("batchtopk")),
    ("jumprelu", sae_of("jumprelu")),
    ("gated", sae_of("gated")),
    ("transcoder", transcoder_of("relu")),
    ("skip_transcoder", transcoder_of("relu", True)),
    ("jumprelu_transcoder", transcoder_of("jumprelu")),
    ("jumprelu_transcoder", transcoder_of("batchtopk")),
    ("jumprelu_skip_transcoder", transcoder_of("jumprelu", True)),
]


@pytest.mark.parametrize(("architecture", "dictionary"), SAVED)
def test_sae_lens_loads_what_we_save_and_says_the_same(architecture, dictionary, tmp_path):
    from sae_lens import SAE

    save_dictionary(dictionary, tmp_path, format="sae-lens")
    sae = SAE.load_from_disk(tmp_path)
    assert sae.cfg.architecture() == architecture
    torch.testing.assert_close(sae.encode(X), dictionary.coder.encode(X), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae(X), dictionary.coder(X)[..., 0, :], rtol=1e-6, atol=2e-6)
    back = load_dictionary(tmp_path)
    assert same_weights(back.coder, dictionary.coder)
    assert (back.read, back.writes, back.model) == (dictionary.read, dictionary.writes, "toy")


def sae_lens_object(architecture, **options):
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    kind, config = get_sae_class(architecture)
    names = {"hook_name": "blocks.1.hook_resid_post", "model_name": "toy"}
    if "transcoder" in architecture:
        names = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out", "model_name": "toy"}
        options |= {"d_out": D, "apply_b_dec_to_input": False}
    sae = kind(config(d_in=D, d_sae=N, metadata=SAEMetadata(**names), **options))
    generator = torch.Generator().manual_seed(4)
    for name, parameter in sae.named_parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.dtype) * 0.5
        parameter.data = value.abs() if name == "threshold" else value
    return sae.eval()


ARCHITECTURES = ["standard", "topk", "jumprelu", "gated", "transcoder", "skip_transcoder", "jumprelu_transcoder",
                 "jumprelu_skip_transcoder"]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sae_lens_s_own_give_bit_equal_outputs_after_the_round_trip(architecture, dtype, tmp_path):
    from sae_lens import SAE

    sae = sae_lens_object(architecture, dtype=dtype, **({"k": 4} if architecture == "topk" else {}))
    sae.save_model(tmp_path / "theirs")
    ours = load_dictionary(tmp_path / "theirs")
    again = SAE.load_from_disk(save_dictionary(ours, tmp_path / "ours", format="sae-lens"))
    x = X.to(sae.dtype)
    with torch.no_grad():
        assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))
        torch.testing.assert_close(ours.coder(x)[..., 0, :], sae(x), rtol=1e-6, atol=2e-6)
    assert same_weights(load_dictionary(sae).coder, ours.coder)


@torch.no_grad()
def test_topk_that_goes_by_decoder_norms_and_inputs_without_b_dec():
    for options in ({"k": 4, "rescale_acts_by_decoder_norm": True}, {"k": 4, "apply_b_dec_to_input": False}):
        sae = sae_lens_object("topk", **options)
        ours = load_dictionary(sae).coder
        torch.testing.assert_close(ours.encode(X), sae.encode(X), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(X)[..., 0, :], sae(X), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_matryoshka_and_batchtopk_as_sae_lens_saves_them(tmp_path):
    from sae_lens.registry import get_sae_training_class

    for architecture in ("batchtopk", "matryoshka_batchtopk"):
        kind, config = get_sae_training_class(architecture)
        options = {"matryoshka_widths": [4, N]} if "matryoshka" in architecture else {}
        sae = kind(config(d_in=D, d_sae=N, k=3, **options))
        sae.topk_threshold.fill_(0.3)
        sae.save_inference_model(str(tmp_path / architecture))
        ours = load_dictionary(tmp_path / architecture, read=RESID)
        assert ours.coder.activation == "jumprelu" and torch.unique(ours.coder.threshold).numel() == 1
        sae.save_model(tmp_path / f"{architecture}-training")
        with pytest.raises(FormatError, match="save_inference_model"):
            load_dictionary(tmp_path / f"{architecture}-training", read=RESID)


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "layer_norm", "covariance_whitening"])
def test_rescaled_inputs_are_refused_by_name(normalize):
    with pytest.raises(FormatError, match=normalize):
        load_dictionary(sae_lens_object("standard", normalize_activations=normalize))


def test_what_sae_lens_cannot_hold_is_refused(tmp_path):
    for dictionary in (transcoder_of("topk"), transcoder_of("gated"), ALL[-2]):
        with pytest.raises(OptionError, match="circuitkit"):
            save_dictionary(dictionary, tmp_path / "no", format="sae-lens")
        assert not (tmp_path / "no").exists()
    with pytest.raises(OptionError, match="sae-lens"):
        save_dictionary(sae_of("relu"), tmp_path, format="pickle")


def traced_tensors(generator, *, threshold=False, skip=False):
    made = {"W_enc": (N, D), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)} | ({"W_skip": (D, D)} if skip else {})
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in made.items()}
    return tensors | ({"activation_function.threshold": torch.rand(N, generator=generator)} if threshold else {})


@pytest.mark.parametrize(("threshold", "skip"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_transcoder_of_circuit_tracer(threshold, skip, tmp_path):
    t = traced_tensors(torch.Generator().manual_seed(0), threshold=threshold, skip=skip)
    save_file(t, tmp_path / "layer_2.safetensors")
    ours = load_dictionary(tmp_path / "layer_2.safetensors")
    pre = X @ t["W_enc"].T + t["b_enc"]
    f = pre.relu() * (pre > t["activation_function.threshold"] if threshold else 1.0)
    want = f @ t["W_dec"] + t["b_dec"] + (X @ t["W_skip"].T if skip else 0.0)
    torch.testing.assert_close(ours.coder(X)[..., 0, :], want)
    assert (str(ours.read), str(ours.writes[0])) == ("mlp-in.2", "mlp-out.2")
    assert load_dictionary(tmp_path, read=Site("mlp-in", 2)).read == ours.read
    with pytest.raises(OptionError, match="another site"):
        load_dictionary(tmp_path / "layer_2.safetensors", read=Site("mlp-in", 1))


def test_a_cross_layer_transcoder_of_circuit_tracer(tmp_path):
    layers, generator = 3, torch.Generator().manual_seed(1)
    encoders = [torch.randn(N, D, generator=generator) for _ in range(layers)]
    decoders = [torch.randn(N, layers - i, D, generator=generator) for i in range(layers)]
    biases = [(torch.randn(N, generator=generator), torch.randn(D, generator=generator)) for _ in range(layers)]
    for i in range(layers):
        enc = {f"W_enc_{i}": encoders[i], f"b_enc_{i}": biases[i][0], f"b_dec_{i}": biases[i][1]}
        save_file(enc, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": decoders[i]}, tmp_path / f"W_dec_{i}.safetensors")
    (tmp_path / "config.yaml").write_text(
        "model_name: toy\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    )
    x = torch.randn(layers, 7, D, generator=generator)
    want = torch.stack([b for _, b in biases])[:, None].repeat(1, 7, 1)
    for i in range(layers):
        f = (x[i] @ encoders[i].T + biases[i][0]).relu()
        for j in range(i, layers):
            want[j] += f @ decoders[i][:, j - i]
    got = torch.zeros_like(want)
    for i, dictionary in enumerate(load_dictionaries(tmp_path)):
        assert dictionary.model == "toy" and [site.layer for site in dictionary.writes] == list(range(i, layers))
        got[i:] += dictionary.coder(x[i]).transpose(0, 1)
    torch.testing.assert_close(got, want)
    assert load_dictionary(tmp_path, read=Site("mlp-in", 1)).coder.n_out == 2
    with pytest.raises(OptionError, match="load_dictionaries"):
        load_dictionary(tmp_path)
    with pytest.raises(OptionError, match="layers 0 to 2"):
        load_dictionary(tmp_path, read=Site("mlp-in", 5))


def test_a_hook_that_means_different_tensors_is_not_guessed(tmp_path):
    save_file(traced_tensors(torch.Generator().manual_seed(0)), tmp_path / "layer_2.safetensors")
    (tmp_path / "config.yaml").write_text("feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n")
    with pytest.raises(FormatError, match="hook_resid_mid"):
        load_dictionary(tmp_path / "layer_2.safetensors")
    assert load_dictionary(tmp_path / "layer_2.safetensors", read=Site("mlp-in", 2)).read == Site("mlp-in", 2)


@pytest.mark.parametrize("transcode", [False, True])
def test_a_coder_of_sparsify(transcode, tmp_path):
    generator, folder = torch.Generator().manual_seed(0), tmp_path / "layers.1.mlp"
    t = {name: torch.randn(shape, generator=generator) for name, shape in
         {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}.items()}  # fmt: skip
    t |= {"W_skip": torch.randn(D, D, generator=generator)} if transcode else {}
    folder.mkdir()
    save_file(t, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "k": 3, "activation": "topk", "transcode": transcode}))
    ours = load_dictionary(folder)
    x = X if transcode else X - t["b_dec"]
    values, index = (x @ t["encoder.weight"].T + t["encoder.bias"]).relu().topk(3)
    f = torch.zeros(*X.shape[:2], N).scatter(-1, index, values)
    want = f @ t["W_dec"] + t["b_dec"] + (X @ t["W_skip"].mT if transcode else 0.0)
    torch.testing.assert_close(ours.coder(X)[..., 0, :], want)
    assert (str(ours.read), str(ours.writes[0])) == ("mlp-in.1" if transcode else "mlp-out.1", "mlp-out.1")


LEARNED = {
    "AutoEncoder": ({"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "bias": (D,)}, "relu"),
    "AutoEncoderNew": (
        {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "decoder.bias": (D,)}, "relu",
    ),
    "GatedAutoEncoder": (
        {"encoder.weight": (N, D), "gate_bias": (N,), "mag_bias": (N,), "r_mag": (N,), "decoder.weight": (D, N),
         "decoder_bias": (D,)}, "gated",
    ),
    "BatchTopKSAE": (
        {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.weight": (D, N), "b_dec": (D,), "threshold": ()},
        "jumprelu",
    ),
    "MatryoshkaBatchTopKSAE": ({"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": ()},
                               "jumprelu"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEARNED)
def test_a_dictionary_of_dictionary_learning(kind, tmp_path):
    shapes, activation = LEARNED[kind]
    generator = torch.Generator().manual_seed(0)
    t = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(t | {"k": torch.tensor(3)} if "TopK" in kind else t, tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "layer": 3, "submodule_name": "resid_post_layer_3", "lm_name": "toy"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    ours = load_dictionary(tmp_path)
    encoder = t["W_enc"] if "W_enc" in t else t["encoder.weight"].T
    decoder = t["W_dec"] if "W_dec" in t else t["decoder.weight"].T
    b_dec = next(t[name] for name in ("bias", "b_dec", "decoder_bias", "decoder.bias") if name in t)
    pre = (X if kind == "AutoEncoderNew" else X - b_dec) @ encoder
    if kind == "GatedAutoEncoder":
        f = (pre + t["gate_bias"] > 0) * (t["r_mag"].exp() * pre + t["mag_bias"]).relu()
    else:
        f = (pre + t["b_enc" if "b_enc" in t else "encoder.bias"]).relu()
        f = f * (f > t["threshold"]) if "threshold" in t else f
    torch.testing.assert_close(ours.coder(X)[..., 0, :], f @ decoder + b_dec)
    assert (ours.coder.activation, str(ours.read), ours.model) == (activation, "resid-post.3", "toy")


def test_a_pickle_is_never_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was executed",))

    torch.save({"encoder.weight": Trap()}, tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder", "layer": 0,
                                                      "submodule_name": "resid_post_layer_0"}}))  # fmt: skip
    with pytest.raises(FormatError, match="more than tensors"):
        load_dictionary(tmp_path)


def truncate(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-40])


def poison(folder):
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["W_enc"][0, 0] = math.nan
    save_file(tensors, path)
    forget_hash(folder)


def reshape(folder):
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    save_file(tensors | {"b_enc": tensors["b_enc"][:-1].clone()}, path)
    forget_hash(folder)


def forget_hash(folder):
    from circuitkit.dictionaries.weights import sha256_of

    path, weights = next(folder.glob("*.json")), next(folder.glob("*.safetensors"))
    config = json.loads(path.read_text())
    (config if "schema" in config else config["metadata"])["weights_sha256"] = sha256_of(weights)
    path.write_text(json.dumps(config))


def other_weights(folder):
    path = next(folder.glob("*.safetensors"))
    save_file({name: t + 1 for name, t in load_file(path).items()}, path)


def half_json(folder):
    path = next(folder.glob("*.json"))
    path.write_text(path.read_text()[:30])


DAMAGE = {
    truncate: "truncated", poison: "NaN", reshape: "b_enc", other_weights: "written together",
    half_json: "JSON",
}  # fmt: skip


@pytest.mark.parametrize("format", ["circuitkit", "sae-lens"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_folders_are_refused(damage, format, tmp_path):
    save_dictionary(sae_of("relu"), tmp_path, format=format)
    damage(tmp_path)
    with pytest.raises(FormatError, match=DAMAGE[damage]):
        load_dictionary(tmp_path)


def test_wrong_sites_and_sources_are_refused(tmp_path):
    folder = save_dictionary(sae_of("relu"), tmp_path / "one", format="sae-lens")
    with pytest.raises(OptionError, match="another site"):
        load_dictionary(folder, read=Site("resid-post", 2))
    with pytest.raises(OptionError, match="another site"):
        load_dictionary(folder, writes=Site("mlp-out", 1))
    own = save_dictionary(transcoder_of("relu"), tmp_path / "two")
    with pytest.raises(OptionError, match="other sites"):
        load_dictionary(own, writes=Site("mlp-out", 2))
    for source in (tmp_path / "none", "none", tmp_path, 3):
        with pytest.raises(CircuitKitError):
            load_dictionary(source)
    broken = sae_of("relu")
    broken.coder.W_enc[0, 0] = math.inf
    with pytest.raises(FormatError, match="W_enc"):
        save_dictionary(broken, tmp_path / "three")


def test_a_newer_file_says_so(tmp_path):
    path = save_dictionary(sae_of("relu"), tmp_path) / "dictionary.json"
    path.write_text(path.read_text().replace("circuitkit.dictionary/1", "circuitkit.dictionary/2"))
    with pytest.raises(FormatError, match="newer"):
        load_dictionary(tmp_path)


def test_hook_names_both_ways():
    for kind, names in NAMES.items():
        for name in names:
            assert site_of_hook(f"blocks.3.{name}", "x") == Site(kind, 3)
        assert site_of_hook(hook_of_site(Site(kind, 2)), "x") == Site(kind, 2)


def test_a_folder_of_dictionaries_comes_back_by_layer(tmp_path):
    for layer in (2, 0, 1):
        site = Site("resid-post", layer)
        coder = random_coder("relu", seed=layer, subtract_b_dec=True)
        save_dictionary(Dictionary(coder, site, (site,)), tmp_path / f"l{layer}")
    assert [d.read.layer for d in load_dictionaries(tmp_path)] == [0, 1, 2]
    with pytest.raises(FormatError, match="no dictionaries"):
        load_dictionaries(tmp_path / "l0" / "none")
