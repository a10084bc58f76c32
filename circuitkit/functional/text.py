"""Text as pictures and files can show it."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """Text without characters that files cannot hold or eyes cannot see: controls, lone surrogates, bidi marks.

    >>> visible("a\\x00b\\nc")
    'a␀b⏎c'
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character == "\n":
        return "⏎"
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "␡"
    unseen = unicodedata.category(character) in ("Cc", "Cs") or code in (0x2028, 0x2029) or code & 0xFFFE == 0xFFFE
    if unseen or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return character
