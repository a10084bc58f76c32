"""Silent e: a last letter that is not heard but changes the vowel before it."""

from __future__ import annotations

from circuitkit.tasks.base import Task, Vocabulary, task
from circuitkit.tasks.draw import choose, generator
from circuitkit.tasks.spelling import SoundPair, check_spells, next_sounds

# By the vowel with and without the e: words without their last letter. Chosen so that ``g2p/gru`` is right on both.
STEMS = {
    ("EY1", "AE1"): """
        mat rat hat fat cap tap can pan man van lan wag rag sag cag dat gat lat pat plan grad glad fad mad dam gam
        lam tam nam jad cad bad trad shad spad scrap grat slat stat skat plat crat gal lak bak cas bas ban fam flam
    """,
    ("OW1", "AA1"): "hop mop cop not rot cod rod nod rob lob slop mod dop pop rop scop trop glob prob dot tot vot",
    ("AY1", "IH1"): """
        bit kit sit win pin fin din rip hid rid pip prim spin twin strip shin slim grim tim dim rim mil slid glid
        whit spit quit trip wip lin min vin smil til fil bid tid sid lim chim crim
    """,
    ("UW1", "AH1"): "tub tun rud lub rub plum flut brut jut dud nud",
}
SOUNDS = {"ch": ("CH",), "sh": ("SH",), "wh": ("W",), "qu": ("K", "W"), "c": ("K",), "h": ("HH",), "j": ("JH",)}


@task("silent-letters")
def silent_letters(model: Vocabulary, *, n: int = 64, seed: int = 0) -> Task:
    """``mate`` against ``mats``: after M comes EY1 where the word ends in e, and AE1 where it ends in s.

    The silent e is in the clean word of about half of the pairs, and in the corrupt word of the others. Sounds before
    the vowel are given (teacher forcing); read is what follows them.

    Args:
        model: a network that reads letters and gives sounds: ``g2p/gru``.
        n: how many pairs.
        seed: seed of the generator that draws them.

    Raises:
        TaskError: if the network is no such network, or there are fewer than n pairs.
    """
    check_spells(model)
    rows = []
    for (silent, plain), stems in STEMS.items():
        for stem in stems.split():
            rows.append(SoundPair(f"{stem}e", f"{stem}s", onset(stem), silent, plain))
            rows.append(SoundPair(f"{stem}s", f"{stem}e", onset(stem), plain, silent))
    return next_sounds(model, "silent-letters", choose(rows, n, generator(seed)))


def onset(stem: str) -> tuple[str, ...]:
    """Sounds of the letters before the last vowel of a stem.

    >>> onset("strip"), onset("quit"), onset("shin")
    (('S', 'T', 'R'), ('K', 'W'), ('SH',))
    """
    letters, sounds = stem[:-2], list[str]()
    while letters:
        size = 2 if letters[:2] in SOUNDS else 1
        sounds += SOUNDS.get(letters[:size], (letters[:size].upper(),))
        letters = letters[size:]
    return tuple(sounds)
