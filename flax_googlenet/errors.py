"""The base of the library's exceptions, and functions that write names, lists and URLs in messages."""

import re
from collections.abc import Iterable


class GoogLeNetError(Exception):
    """The base of every exception that the library raises on purpose; the message says what is wrong and what to do."""


_SURROGATES = r"\ud800-\udfff"
"""Surrogates. Python reads a byte of a file name that is not UTF-8 as the surrogate U+DC00 plus the byte (PEP 383)."""

_STEERING = rf"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069{_SURROGATES}"
"""Control characters, line separators, and the characters that change the direction of text (Bidi_Control).

``str.isprintable`` refuses more: all spaces but one, the joiners in Persian words and in emoji, and every character
that is newer than this Python.
"""


def printable(text: str) -> str:
    r"""Return the text on one line, with every character escaped that could control a terminal or change other text.

    Such characters are written as ``\x1b`` or ``\u202e``, and a byte of a file name that is not UTF-8 as ``\xe9``.
    """
    return re.sub(f"[{_STEERING}]", _escape, text)


def listing(names: Iterable[str], most: int = 5) -> str:
    """Return the first ``most`` names, joined by commas, with dots if there are more."""
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
    """Return the text as Unicode that every file can hold, with surrogates escaped as ``printable`` does."""
    return re.sub(f"[{_SURROGATES}]", _escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    is_byte = code < 0x80 or 0xDC80 <= code <= 0xDCFF
    return f"\\x{code & 0xFF:02x}" if is_byte else f"\\u{code:04x}"


def install_advice(extra: str) -> str:
    """Return the advice to install an extra of the project, such as ``train``."""
    return f'install flax-googlenet with its extra "{extra}": pip install "flax-googlenet[{extra}]"'
