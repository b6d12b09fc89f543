"""The base of the library's exceptions, and how messages write names, lists and URLs."""

import re
from collections.abc import Iterable


class GoogLeNetError(Exception):
    """The base of every exception that the library raises on purpose; the message says what to do."""


_SURROGATES = r"\ud800-\udfff"
"""Halves of pairs. Python reads a byte of a file name that is not UTF-8 as one, U+DC00 plus the byte (PEP 383)."""

_STEERING = rf"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069{_SURROGATES}"
"""Control characters, line separators, and the characters of Unicode's property Bidi_Control, which turn text around.

``str.isprintable`` refuses more: all spaces but one, the joiners in Persian words and in emoji, and every character
that is newer than this Python.
"""


def printable(text: str) -> str:
    r"""Returns the text on one line, and without anything that steers a terminal, a page or a spreadsheet.

    Such characters are written as ``\x1b`` or ``\u202e``, and a byte of a file name that is not UTF-8 as ``\xe9``.
    """
    return re.sub(f"[{_STEERING}]", _escape, text)


def listing(names: Iterable[str], most: int = 5) -> str:
    """Return the first few names for a message, with dots if there are more."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def url_without_secrets(url: str) -> str:
    """Return the scheme, host and path of a URL, without the parts that can hold a user, a password or a signature.

    If the host is not valid, for example because a password has a slash that is not escaped, only the scheme is left.
    """
    scheme, separator, rest = url.partition("://")
    host, slash, path = re.split("[?#]", rest)[0].partition("/")
    host = host.rpartition("@")[2]
    is_host = re.fullmatch(r"([\w.-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?", host)
    if not is_host or (":" in host and "@" in rest.rpartition(host)[2]):
        return f"{scheme}://..."
    return f"{scheme}{separator}{host}{slash}{path}"


def well_formed(text: str) -> str:
    """Returns the text as Unicode that every file can hold: halves of pairs are written as in ``printable``."""
    return re.sub(f"[{_SURROGATES}]", _escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    is_byte = code < 0x80 or 0xDC80 <= code <= 0xDCFF
    return f"\\x{code & 0xFF:02x}" if is_byte else f"\\u{code:04x}"


def install_advice(extra: str) -> str:
    """Return how to install what an optional part of the project needs."""
    return f'install flax-googlenet with its extra "{extra}": in a clone by pip install -e ".[{extra}]"'
