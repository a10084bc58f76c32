"""The recurrent networks of the zoo do what the README beside their arrays says they do."""

from __future__ import annotations

import csv
import math
import re
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import circuitkit as ck
from circuitkit.errors import FormatError, OptionError, UnknownName
from circuitkit.models.recurrent import zoo
from circuitkit.models.recurrent.cells.encoder_decoder_gru import EncoderDecoderGRU
from circuitkit.models.recurrent.net import RecurrentNet
from circuitkit.models.recurrent.pooled_lstm import PooledLSTM, pooled_network
from circuitkit.models.recurrent.stepper import run_network
from circuitkit.models.recurrent.zoo import build, recurrent_names
from circuitkit.resources import resource
from circuitkit.runs.pipeline import find

HEADLINES = (
    "How to build a small web server in an afternoon",
    "The best new restaurants in London this summer",
    "Why does my computer make this sound when I turn it on?",
    "What is the best way to learn a new language?",
    "My dog loves the snow more than anything else",
    "Google is making a new phone for people who hate phones",
    "This is what happens when you leave a pizza in the oven",
    "A simple guide to the history of the internet",
)
MEASURED = "bits_per_char_on_7530_chars_of_hacker_news_titles"


@cache
def net(name: str) -> nn.Module:
    return build(name)[0]


def card(name: str) -> dict:
    return build(name)[2]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def run(name: str, inputs: Tensor) -> Tensor:
    return net(name)(inputs)


def test_every_array_file_of_the_folders_has_a_name_and_a_card() -> None:
    names = recurrent_names()
    assert (
        len(set(names)) == len(names) == sum(len(list(resource(f).glob("*.safetensors"))) for f in zoo.FOLDERS.values())
    )
    assert {"g2p/gru", "charlm/lstm", "word-breaks/thai_h15", "2afc/rnn", "second-largest/length_2"} <= set(names)
    for name in names:
        module, _, about = build(name)
        assert not module.training and isinstance(about, dict) and about


def test_building_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build("g2p/gru")
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnknownName, match="second-largest/length_2"):
        build("second-largest/length_9")


def test_arrays_of_another_network_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.FOLDERS, "2afc", "rnn_second_largest_handmade")
    with pytest.raises(FormatError, match="does not hold the arrays"):
        build("2afc/length_2")


@pytest.mark.parametrize("length, least", [(2, 1.0), (3, 0.9999)])
def test_hand_made_networks_find_the_second_largest(length: int, least: float) -> None:
    x = torch.randn(20_000, length, 1, generator=rng())
    said = run(f"second-largest/length_{length}", x)[:, -1].argmax(-1)
    want = x[..., 0].argsort(1, descending=True)[:, 1]
    assert (said == want).double().mean() >= least


@cache
def dictionary() -> list[tuple[str, list[list[str]], list[str]]]:
    with resource("gru_g2p", "test_words.tsv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    return [(word, [p.split() for p in sounds.split(" | ")], said.split()) for word, sounds, said in rows]


def spelled(about: dict, word: str, sounds: list[str]) -> list[int]:
    """Letters, </s>, <s> and the sounds but for </s>, as ids of the joint table."""
    letter, sound = about["graphemes"].index, about["phonemes"].index
    return [*map(letter, word), 2, *(about["first_phoneme"] + i for i in (2, *map(sound, sounds)))]


def test_g2p_says_what_the_readme_counts() -> None:
    """Read with the stored predictions as input: greedy decoding says the same where every next sound is that one."""
    about = card("g2p/gru")
    rows = dictionary()
    assert len(rows) == 1500
    ids = [spelled(about, word, said) for word, _, said in rows]
    width = max(map(len, ids))
    logits = run("g2p/gru", torch.tensor([row + [0] * (width - len(row)) for row in ids]))
    right = plain = 0
    for (word, sounds, said), out in zip(rows, logits.argmax(-1).tolist(), strict=True):
        start = len(word) + 1
        ends = [] if len(said) == 20 else [3]
        assert out[start : start + len(said) + len(ends)] == [*map(about["phonemes"].index, said), *ends], word
        right += said in sounds
        plain += unstressed(said) in map(unstressed, sounds)
    assert right / 1500 == pytest.approx(0.688, abs=0.0005)
    assert plain / 1500 == pytest.approx(0.733, abs=0.0005)


def unstressed(sounds: list[str]) -> list[str]:
    return [sound.rstrip("012") for sound in sounds]


def test_g2p_decodes_its_examples_greedily() -> None:
    about = card("g2p/gru")
    for word, want in about["check"].items():
        said: list[str] = []
        while len(said) < 20:
            best = int(run("g2p/gru", torch.tensor([spelled(about, word, said)]))[0, -1].argmax())
            if best == 3:
                break
            said.append(about["phonemes"][best])
        assert said == want


def test_charlm_predicts_headlines_at_least_as_well_as_its_readme_says() -> None:
    """Its 200 news titles are not ours to ship; on these easier ones of our own it needs 1.47 bits, not 2.56."""
    about = card("charlm/lstm")
    ids, start, window = about["characters"], about["characters"]["<s>"], about["window"]
    rows, answers = [], []
    for line in HEADLINES:
        tokens = [start, *(ids[c] for c in line), start]
        for i in range(1, len(tokens)):
            seen = tokens[max(0, i - window) : i]
            rows.append([0] * (window - len(seen)) + seen)
            answers.append(tokens[i])
    logits = run("charlm/lstm", torch.tensor(rows))
    assert torch.equal(logits[:, 0], logits[:, -1]), "every step shows the window's output"
    bits = nn.functional.cross_entropy(logits[:, -1], torch.tensor(answers)) / math.log(2)
    assert float(bits) == pytest.approx(1.472, abs=0.005) and float(bits) < about["measured"][MEASURED]
    assert (logits[:, -1].argmax(-1) == torch.tensor(answers)).double().mean() > about["measured"]["top1_accuracy"]


@pytest.mark.parametrize("name", ["thai_h15", "thai_h27", "burmese_h27"])
def test_word_breaks_stand_where_the_card_says(name: str) -> None:
    about = card(f"word-breaks/{name}")
    text = about["check"]["text"]
    ids = torch.tensor([[about["characters"].get(c, about["unknown_character_index"]) for c in text]])
    p = run(f"word-breaks/{name}", ids).softmax(-1)[0]
    classes = "".join(about["classes"][i] for i in p.argmax(-1).tolist())
    assert classes == about["check"]["classes"]
    said = "".join(
        "|" * (i > 0 and c in "BS") + letter for i, (letter, c) in enumerate(zip(text, classes, strict=True))
    )
    assert said == about["check"]["segmented"]
    assert float(p.amax(-1).mean()) == pytest.approx(about["check"]["mean_top_probability"], abs=1e-3)


def test_two_choice_network_is_always_right() -> None:
    n, draw = 400, rng()
    onset, duration = torch.randint(0, 101, (n, 1), generator=draw), torch.randint(25, 76, (n, 1), generator=draw)
    steps = torch.arange(200)
    shown = ((steps >= onset) & (steps < onset + duration)).float()
    right = torch.randint(2, (n,), generator=draw)
    coherence = torch.tensor([0.1, 0.3, 0.5, 0.7])[torch.arange(n) % 4]
    x = shown[..., None].repeat(1, 1, 2)
    x[torch.arange(n), :, right] += coherence[:, None] * shown
    assert int((run("2afc/rnn", x)[:, -1].argmax(-1) == right).sum()) == 400


@pytest.mark.parametrize(
    "name, correlation, within",
    [("full_rank_n100", 0.996, 0.002), ("rank1_n512", 0.987, 0.003), ("rank1_linear_readout_fails", 0.28, 0.05)],
)
def test_phase_memory_correlates_as_published(name: str, correlation: float, within: float) -> None:
    n, steps, draw = 128, 400, rng()
    phase, wait, lasts = (torch.rand(n, 1, generator=draw) for _ in range(3))
    time = torch.arange(steps) * 0.002
    reference = 2 * math.pi * (8 * time + phase)
    begin, end = 0.125 + 0.125 * wait, 0.25 + 0.125 * wait + 0.05 * lasts
    stimulus = torch.arange(n) % 2
    x = torch.zeros(n, steps, 3)
    x[..., 0] = reference.sin()
    x[torch.arange(n), :, 2 - stimulus] = ((time >= begin) & (time < end)).float()
    offsets = torch.tensor(card(f"phase-memory/{name}")["phase_offsets_cycles"])
    target = (reference + 2 * math.pi * offsets[stimulus][:, None]).sin()
    after = time >= end
    out = run(f"phase-memory/{name}", x)[..., 0]
    found = torch.corrcoef(torch.stack((out[after], target[after])))[0, 1]
    assert float(found) == pytest.approx(correlation, abs=within)


TOYS = [name for name in recurrent_names() if name.startswith("toys/")]


def trial(task: str, n: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, written anew here and not taken from the script that trained the networks."""
    draw = rng(7)
    if task == "parity":
        bits = torch.randint(2, (n, length), generator=draw)
        return bits, torch.stack([bits[:, : t + 1].sum(1) % 2 for t in range(length)], 1)
    if task == "integrator":
        x = 0.6 * torch.randn(n, length, 1, generator=draw)
        return x, torch.stack([x[:, : t + 1].sum(1) / 5 for t in range(length)], 1)
    x = (torch.rand(n, length, 3, generator=draw) < 0.1) * (2.0 * torch.randint(2, (n, length, 3), generator=draw) - 1)
    x[:, 0] = 2.0 * torch.randint(2, (n, 3), generator=draw) - 1
    kept = [x[:, 0]]
    for t in range(1, length):
        kept.append(torch.where(x[:, t] == 0, kept[-1], x[:, t]))
    return x, torch.stack(kept, 1)


@pytest.mark.parametrize("name", TOYS)
def test_toys_do_their_task(name: str) -> None:
    task, cell, _ = name.removeprefix("toys/").split("_")
    x, y = trial(task, 400, 25)
    out = run(name, x)
    if task == "integrator":
        assert 1 - float((out - y).var() / y.var()) >= 0.998
        return
    hits = out.argmax(-1) == y if task == "parity" else out.sign() == y.sign()
    accuracy = float(hits.double().mean())
    assert accuracy < 0.65 if cell == "nonnegative" else accuracy > 0.995
    assert card(name)["measured"]


def test_a_gate_without_signs_cannot_count_parity() -> None:
    x, y = trial("parity", 200, 400)
    signed, other = (run(f"toys/parity_{kind}_s0", x).argmax(-1) == y for kind in ("signed", "nonnegative"))
    assert signed.all()
    assert float(other.double().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("name", [name for name in TOYS if "flip-flop" in name])
@torch.no_grad()
def test_flip_flops_rest_in_eight_states(name: str) -> None:
    module = net(name)
    x, y = trial("flip-flop", 64, 25)
    _, last = module.cell(x)
    states, _ = module.cell(torch.zeros(64, 400, 3), last)
    assert torch.equal(module.readout(states[:, -1]).sign(), y[:, -1])
    assert float((states[:, -1] - states[:, -2]).abs().max()) < 1e-3
    assert len(module.readout(states[:, -1]).sign().unique(dim=0)) == 8


def test_a_net_is_its_parts_in_a_row() -> None:
    table = nn.Embedding(6, 3)
    chain = RecurrentNet(nn.LSTM(3, 4, batch_first=True, bidirectional=True), 2, table)
    ids = torch.randint(6, (5, 7), generator=rng())
    assert torch.equal(chain(ids), chain.readout(chain.cell(table(ids))[0]))
    assert RecurrentNet(nn.GRU(3, 4, batch_first=True), 2, bias=False).readout.bias is None


def test_a_net_refuses_cells_that_do_not_fit() -> None:
    with pytest.raises(OptionError, match="batch_first=True"):
        RecurrentNet(nn.GRU(3, 4), 2)
    with pytest.raises(OptionError, match="gives 5 numbers, the cell reads 3"):
        RecurrentNet(nn.GRU(3, 4, batch_first=True), 2, nn.Embedding(6, 5))


def test_encoder_then_decoder_are_two_torch_grus() -> None:
    cell = EncoderDecoderGRU(4, 5).double()
    x = torch.randn(3, 9, 4, generator=rng()).double()
    x[..., -1] = (torch.arange(9) >= 5).double()
    h, want = torch.zeros(3, 5).double(), []
    for t in range(9):
        h = (cell.enc if t < 5 else cell.dec)(x[:, t, :-1], h)
        want.append(h)
    torch.testing.assert_close(cell(x), torch.stack(want, 1), rtol=0, atol=1e-14)


def test_pooled_network_is_its_module() -> None:
    module = PooledLSTM(7, width=3, hidden=4).double()
    network = pooled_network(module)
    ids = torch.randint(7, (2, 6), generator=rng())
    with torch.no_grad():
        values = run_network(network, module.embedding(ids))
        out = module.readout(torch.cat([values[name] for name in network.features], -1))
        torch.testing.assert_close(out, module(ids), rtol=0, atol=1e-12)
    assert not network.causal


@pytest.mark.parametrize("name", ["2afc/rnn", "charlm/lstm", "g2p/gru", "word-breaks/thai_h15"])
def test_no_name_of_a_unit_could_be_that_of_another(name: str) -> None:
    network = zoo.load_recurrent(name).network
    assert not [write.name for write in network.writes if write.name[-1].isdigit()]


@pytest.mark.parametrize(
    ("name", "task", "clean", "right"),
    [
        ("g2p/gru", "silent-letters", r"[a-z]( [a-z])+ </s> <s>( [A-Z]+)+", r"[A-Z]{2}1"),
        ("charlm/lstm", "next-character", r"(<s>)?[\w ,-]+ [(\[][\w ]+", r"[)\]]"),
        ("word-breaks/thai_h15", "word-break", r"[\u0e00-\u0e7f]+", "B"),
    ],
)
def test_inputs_and_answers_are_shown_in_symbols(name: str, task: str, clean: str, right: str) -> None:
    model = zoo.load_recurrent(name)
    assert len(model.card["symbols"]) == model.d_vocab
    circuit = find(model, ck.task(task, model, n=8), method="eap", edges=5, progress=False)
    said = circuit.meta["example"]
    assert re.fullmatch(clean, said["clean"]) and re.fullmatch(right, said["right"]), said
    assert not re.search(r"\d{2}", said["clean"]), said
