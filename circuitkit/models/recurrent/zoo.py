"""Recurrent networks that ship with circuitkit, rebuilt from their arrays; sources and licences are under ``data/``.

Each builder makes a plain ``nn.Module``. Where it is an embedding, recurrent layers and a linear read-out in a row,
that is all; where it is not, the `Network` is given too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from circuitkit.errors import FormatError, UnknownName
from circuitkit.models.recurrent.cells.bilinear import DiagonalBilinear
from circuitkit.models.recurrent.cells.encoder_decoder_gru import EncoderDecoderGRU
from circuitkit.models.recurrent.cells.rate import RateRNN
from circuitkit.models.recurrent.ends import Ends
from circuitkit.models.recurrent.model import RecurrentModel
from circuitkit.models.recurrent.net import RecurrentNet
from circuitkit.models.recurrent.parts import Network
from circuitkit.models.recurrent.pooled_lstm import PooledLSTM, pooled_network
from circuitkit.models.recurrent.wrap import recurrent_model
from circuitkit.resources import resource

Arrays = dict[str, Tensor]
Card = dict[str, Any]
Built = tuple[nn.Module, Network | None]
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
FOLDERS = {
    "2afc": "rnn_2afc",
    "charlm": "lstm_charlm",
    "g2p": "gru_g2p",
    "phase-memory": "rnn_phase_memory",
    "second-largest": "rnn_second_largest_handmade",
    "toys": "recurrent_toys",
    "word-breaks": "bilstm_word_breaks",
}
LINES = {
    "2afc": "rate network, {n_rec} units, of PsychRNN; task two-choice",
    "charlm": "embedding, two LSTMs, 128 units each, and a pooling over steps, of textgenrnn; task next-character",
    "g2p": "GRU encoder and decoder, 256 units each, of g2p_en; tasks silent-letters, c-before-e",
    "phase-memory": "rate network, {n_rec} units, {what}, of Pals et al. 2024; task stimulus-phase",
    "second-largest": "relu RNN made by hand, {units} units, of alg_zoo; task second-largest",
    "toys": "{cell}, {hidden_size} units; task {task}",
    "word-breaks": "bidirectional LSTM, {units} units, of Unicode; {fits}",
}
SHORT = {"2afc/weights": "2afc/rnn", "charlm/weights": "charlm/lstm", "g2p/weights": "g2p/gru"}
CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    "RNN": lambda size, hidden: nn.RNN(size, hidden, batch_first=True),
    "GRU": lambda size, hidden: nn.GRU(size, hidden, batch_first=True),
    "LSTM": lambda size, hidden: nn.LSTM(size, hidden, batch_first=True),
    "signed DiagonalBilinear": partial(DiagonalBilinear, signed=True, normalise=True),
    "non-negative DiagonalBilinear": partial(DiagonalBilinear, signed=False, normalise=True),
}


def recurrent_names() -> tuple[str, ...]:
    """Full names: ``g2p/gru``, ``second-largest/length_2``, ``toys/flip-flop_tanh_s0``, ...

    >>> [name for name in recurrent_names() if name.startswith("phase-memory")]
    ['phase-memory/full_rank_n100', 'phase-memory/rank1_linear_readout_fails', 'phase-memory/rank1_n512']
    """
    names = []
    for short, folder in FOLDERS.items():
        found = sorted(path.stem for path in resource(folder).glob("*.safetensors"))
        names += [SHORT.get(f"{short}/{stem}", f"{short}/{stem}") for stem in found]
    return tuple(names)


def line(name: str) -> str:
    """What a network of the zoo is, in one line: architecture, units, source, and the tasks that fit.

    >>> line("word-breaks/thai_h15")
    'bidirectional LSTM, 15 units, of Unicode; task word-break'
    """
    short, stem = name.split("/")[0], _path(name).stem
    card = _json(_path(name).with_suffix(".json"))
    more = {
        "phase-memory": lambda: {"what": f"rank {card['rank']}" if card["rank"] else "full rank"},
        "second-largest": lambda: {"units": card["keys"]["rnn.weight_hh_l0"][0]},
        "word-breaks": lambda: {
            "units": stem.partition("_h")[2],
            "fits": "task word-break" if stem.startswith("thai") else "for Burmese, which no task is about",
        },
    }
    return LINES[short].format(**card, **more.get(short, dict)())


def _path(name: str) -> Path:
    """Where the arrays of a network of the zoo are."""
    stem = {full: key for key, full in SHORT.items()}.get(name, name).split("/")[1]
    return resource(FOLDERS[name.split("/")[0]], f"{stem}.safetensors")


def build(name: str) -> tuple[nn.Module, Network | None, Card]:
    """A network of the zoo by its full name.

    Returns:
        The module, in evaluation mode; its `Network` where the module is no chain of an embedding, recurrent layers
        and a linear read-out, else None; and its card.

    Raises:
        UnknownName: for any other name.
        FormatError: if the card cannot be read, or the arrays are not those of this network.
    """
    from safetensors.torch import load_file

    if name not in recurrent_names():
        raise UnknownName(f"{name!r} is no recurrent network of the zoo; it has {', '.join(recurrent_names())}")
    short = name.split("/")[0]
    path = _path(name)
    card = _json(path.with_suffix(".json"))
    # Modules draw random weights before they get their own: the user's random state is none of that.
    with torch.random.fork_rng(devices=[]):
        try:
            module, network = BUILDERS[short](load_file(path), card)
        except (KeyError, RuntimeError) as error:
            raise FormatError(f"{path.name} does not hold the arrays of {name!r}: {error}") from error
    return module.eval(), network, card


def load_recurrent(name: str, *, device: Any = None, dtype: Any = None) -> RecurrentModel:
    """A network of the zoo, ready to be analysed; ``device`` and ``dtype`` as for `circuitkit.load`."""
    module, network, card = build(name)
    module = module.to(device=device, dtype=dtype)
    if network is None:
        model = recurrent_model(module, name=name)
    else:
        ends = Ends(module.embedding, module.readout, module)  # type: ignore[arg-type]
        model = RecurrentModel(module, network, ends, name=name, d_vocab=module.embedding.num_embeddings)  # type: ignore[union-attr,arg-type]
        model.d_vocab_out = model.d_vocab
    model.card = card  # its symbols are what token ids, and outputs, stand for
    return model


def _json(path: Path) -> Card:
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, json.JSONDecodeError) as error:
        raise FormatError(f"the model card {path.name} cannot be read: {error}") from error


def _filled(module: nn.Module, arrays: Arrays, names: dict[str, str] | None = None) -> nn.Module:
    """The module with its weights, whose names begin otherwise in the file."""
    for theirs, ours in (names or {}).items():
        arrays = {ours + key.removeprefix(theirs) if key.startswith(theirs) else key: v for key, v in arrays.items()}
    module.load_state_dict(arrays)
    return module


def _second_largest(arrays: Arrays, card: Card) -> Built:
    hidden, size = arrays["rnn.weight_ih_l0"].shape
    rnn = nn.RNN(size, hidden, nonlinearity="relu", bias=False, batch_first=True)
    net = RecurrentNet(rnn, len(arrays["linear.weight"]), bias=False)
    return _filled(net, arrays, {"rnn.": "cell.", "linear.": "readout."}), None


def _word_breaks(arrays: Arrays, card: Card) -> Built:
    table = nn.Embedding(*arrays["embedding.weight"].shape)
    hidden = arrays["lstm.weight_hh_l0"].shape[1]
    lstm = nn.LSTM(table.embedding_dim, hidden, bidirectional=True, batch_first=True)
    net = RecurrentNet(lstm, len(card["classes"]), table)
    card["symbols"] = _symbols(card["characters"], table.num_embeddings)
    card["output_symbols"] = list(card["classes"])
    return _filled(net, arrays, {"lstm.": "cell.", "output.": "readout."}), None


def _phase_memory(arrays: Arrays, card: Card) -> Built:
    size, units = arrays["w_inp"].shape
    rank = card["rank"] or None
    linear = card["output_nonlinearity_g"] == "identity"
    made: Literal["r", "h"] = "h" if linear else "r"
    cell = RateRNN(size, units, card["alpha"], nonlinearity=card["nonlinearity"], rank=rank, output=made)
    scale = arrays["w_out_scale"] / (1 if rank is None else units)
    weights = {
        "cell.W_in": (arrays["w_inp_scale"] * arrays["w_inp"]).T,
        "cell.b": torch.zeros(units),
        "cell.start": arrays["x0"].flatten(),
        "readout.weight": (scale * arrays["w_out"]).T,
    }
    recurrent = {"cell.W": arrays["w_rec"]} if rank is None else {"cell.m": arrays["m"], "cell.n": arrays["n"].T}
    return _filled(RecurrentNet(cell, 1, bias=False), weights | recurrent), None


def _two_choice(arrays: Arrays, card: Card) -> Built:
    cell = RateRNN(card["n_in"], card["n_rec"], card["alpha"], nonlinearity="relu")
    net = RecurrentNet(cell, card["n_out"])
    weights = {
        "cell.W": arrays["W_rec"] * arrays["rec_connectivity"],
        "cell.W_in": arrays["W_in"] * arrays["input_connectivity"],
        "cell.b": arrays["b_rec"],
        "cell.start": arrays["init_state"][0],
        "readout.weight": arrays["W_out"] * arrays["output_connectivity"],
        "readout.bias": arrays["b_out"],
    }
    return _filled(net, weights), None


def _g2p(arrays: Arrays, card: Card) -> Built:
    letters, phonemes = arrays["enc_emb"], arrays["dec_emb"]
    # One table for both: phonemes follow the letters, and the last column is the phase.
    table = torch.cat((nn.functional.pad(letters, (0, 1)), nn.functional.pad(phonemes, (0, 1), value=1.0)))
    cell = EncoderDecoderGRU(table.shape[1], arrays["enc_w_hh"].shape[1])
    net = RecurrentNet(cell, len(arrays["fc_w"]), nn.Embedding(*table.shape))
    weights = {
        f"cell.{part}.{kind}_{of}": arrays[f"{part}_{kind[0]}_{of}"]
        for part in ("enc", "dec")
        for kind in ("weight", "bias")
        for of in ("ih", "hh")
    }
    weights |= {"embedding.weight": table, "readout.weight": arrays["fc_w"], "readout.bias": arrays["fc_b"]}
    card["first_phoneme"] = len(letters)
    card["symbols"], card["output_symbols"] = card["graphemes"] + card["phonemes"], card["phonemes"]
    return _filled(net, weights), None


def _character_model(arrays: Arrays, card: Card) -> Built:
    n_tokens, width = arrays["embedding.weight"].shape
    module = PooledLSTM(n_tokens, width, arrays["rnn1.weight_hh_l0"].shape[1])
    arrays = arrays | {"attention.weight": arrays["attention.W"].T}
    del arrays["attention.W"]
    _filled(module, arrays, {"output.": "readout."})
    card["characters"] = _json(resource("lstm_charlm", "vocab.json"))
    card["symbols"] = _symbols(card["characters"], n_tokens, padding="")
    return module, pooled_network(module)


def _symbols(ids: dict[str, int], n: int, padding: str = UNKNOWN) -> list[str]:
    """The character of each id; id 0 is padding where no character has it."""
    of_id = {number: character for character, number in ids.items()}
    return [of_id.get(i, UNKNOWN if i else padding) for i in range(n)]


def _toy(arrays: Arrays, card: Card) -> Built:
    size, hidden = card["input_size"], card["hidden_size"]
    cell = CELLS[card["cell"]](size, hidden)
    table = nn.Embedding(size, size) if "embedding.weight" in arrays else None
    return _filled(RecurrentNet(cell, card["n_out"], table), arrays), None


BUILDERS: dict[str, Callable[[Arrays, Card], Built]] = {
    "2afc": _two_choice,
    "charlm": _character_model,
    "g2p": _g2p,
    "phase-memory": _phase_memory,
    "second-largest": _second_largest,
    "toys": _toy,
    "word-breaks": _word_breaks,
}
