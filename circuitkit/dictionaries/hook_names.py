"""Which hook name of other libraries is which site.

Names that mean different tensors in different models (``hook_mlp_in``, ``ln2.hook_normalized`` before the gain,
``hook_resid_mid``) are not guessed: the user says which site is meant.
"""

from __future__ import annotations

import re

from circuitkit.dictionaries.base import Site
from circuitkit.errors import FormatError

# The first name of each kind is the one that is written.
NAMES = {
    "resid-pre": ("hook_resid_pre", "hook_in"),
    "resid-post": ("hook_resid_post", "hook_out"),
    "attn-out": ("hook_attn_out", "attn.hook_out"),
    "mlp-in": ("mlp.hook_in", "ln2.hook_normalized"),
    "mlp-out": ("hook_mlp_out", "mlp.hook_out"),
    "z": ("attn.hook_z", "attn.o.hook_in"),
}
_KINDS = {name: kind for kind, names in NAMES.items() for name in names}


def site_of_hook(name: str, where: str) -> Site:
    """The site that a hook name means.

    Raises:
        FormatError: for a name that is not known, or not the same tensor in every model.

    >>> str(site_of_hook("blocks.3.hook_resid_post", "cfg.json")), str(site_of_hook("state.l0.h", "cfg.json"))
    ('resid-post.3', 'state.l0.h')
    """
    if name.startswith("state."):
        return Site.parse(name)
    match = re.fullmatch(r"(?:blocks|layers|h)\.(\d+)\.(.+)", name)
    kind = _KINDS.get(match[2]) if match else None
    if match is None or kind is None:
        known = ", ".join(names[0] for names in NAMES.values())
        raise FormatError(
            f"{where} names the hook {name[:80]!r}, which is no site that is known ({known}); "
            "say which is meant with read=Site(kind, layer) (and writes=...)"
        )
    return Site(kind, int(match[1]))


def hook_of_site(site: Site) -> str:
    """The hook name that is written for a site.

    >>> hook_of_site(Site("mlp-in", 2)), hook_of_site(Site("state", 0, "l0.h"))
    ('blocks.2.mlp.hook_in', 'state.l0.h')
    """
    return str(site) if site.kind == "state" else f"blocks.{site.layer}.{NAMES[site.kind][0]}"
