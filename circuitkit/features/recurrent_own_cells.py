"""How stages of circuitkit's own cells are linear with one factor of each product held; see `recurrent_cells`.

Held are keys and queries of fast weights, ``right`` and ``gate`` of gated linear recurrences, and the matrix that the
input chooses in a bilinear one.
"""

from __future__ import annotations

import torch

from circuitkit.features.recurrent_cells import Here, Term, frozen_form
from circuitkit.models.recurrent.cells.inputs import outer


@frozen_form("value", "gate", "carry")
def _gated_linear(here: Here) -> list[Term]:
    kept = here.probe({"carry": here.ones("carry")})["kept"]
    return [here.term("value", here["gate_pre"]), here.term("carry", kept)]


@frozen_form("left", "right")
def _product(here: Here) -> list[Term]:
    return [here.term("left", here["right_pre"])]


@frozen_form("gate", "value")
def _factored(here: Here) -> list[Term]:
    return [here.term("value", here["gate_pre"])]


@frozen_form("a", "carry")
def _bilinear(here: Here) -> list[Term]:
    a, n = here["a"] if "a" in here.at else here["a_pre"], here.stage.slot("carry").size
    return [here.term("carry", a if a.shape[1] == n else a.unflatten(1, (1, n, n)))]


@frozen_form("in", "carry")
def _complex(here: Here) -> list[Term]:
    """lam h as a real map: two by two for each unit."""
    parts = []
    for which in range(2):
        unit = torch.zeros_like(here.ones("carry")).unflatten(1, (-1, 2))
        unit[..., which] = 1
        parts.append(here.probe({"carry": unit.flatten(1)})["kept"].unflatten(1, (-1, 2)))
    return [here.term("in", here.ones("in")), here.term("carry", torch.stack(parts, -1))]


@frozen_form("k", "v", "carry")
def _fast_weights(here: Here) -> list[Term]:
    return [here.term("v", here["k_pre"][:, None, :, None]), here.term("carry", here.ones("carry"))]


@frozen_form("k", "v", "beta", "carry")
def _delta_rule(here: Here) -> list[Term]:
    k, beta = here["k"], here["beta"]
    eye = torch.eye(k.shape[1], dtype=k.dtype, device=k.device)
    kept = eye - beta[..., None] * k[:, :, None] * k[:, None, :]
    return [here.term("v", (beta * k)[:, None, :, None]), here.term("carry", kept[:, None])]


@frozen_form("memory", "q")
def _query(here: Here) -> list[Term]:
    q = here["q"] if "q" in here.at else here["q_pre"]
    return [here.term("memory", q[:, None, None, :])]


@frozen_form("delta", "B", "value", "carry")
def _selective(here: Here) -> list[Term]:
    new = outer(here["delta"], here["B_pre"]).unflatten(1, (here["delta"].shape[1], -1, 1))
    return [here.term("value", new), here.term("carry", here["a_bar"])]


@frozen_form("memory", "C", "skip", "z")
def _selective_read(here: Here) -> list[Term]:
    skip = here.probe({"skip": here.ones("skip"), "z": here.ones("z")})
    D = skip["g"] / skip["gate"]
    C = (here["gate"][:, :, None] * here["C_pre"][:, None, :])[:, :, None, :]
    return [here.term("memory", C), here.term("skip", D * here["gate"])]
