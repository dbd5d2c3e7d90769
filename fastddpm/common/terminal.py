"""Lines for people: the one place where they are printed, whatever the streams can take."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import threading
import unicodedata
from collections.abc import Iterator

_ASCII = {
    "×": "x", "−": "-", "–": "-", "·": "-", "→": "->", "±": "+-", "≤": "<=", "≥": ">=", "β": "beta", "ε": "eps",
    "η": "eta", "σ": "sigma", "ᾱ": "alpha_bar",
}  # fmt: skip
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control characters, invisible ones, half characters, other line ends
NARROW = 60
"""Terminals with fewer columns get lines instead of tables and bars."""
PATIENCE_S = 2.0


def settle_streams() -> None:
    """Make standard output and error safe to write to, whatever whoever started us has made of them.

    A stream that is closed becomes the null device: otherwise the first file that is opened would get its number, and
    what libraries print there. What a stream's encoding lacks is printed as something like it.
    """
    codecs.register_error("fastddpm", _like)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - for the process's whole life
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastddpm")


def _like(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wrong = error.object[error.start : error.end]
    return "".join(_ASCII.get(c) or _decomposed(c) or "?" for c in wrong), error.end


def _decomposed(character: str) -> str:
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()


def clean(text: object) -> str:
    """The text with those characters spelled out that a terminal would obey or not show, such as escapes."""
    return "".join(
        c.encode("unicode_escape").decode() if c != "\n" and unicodedata.category(c) in _HIDDEN else c
        for c in str(text)
    )


def say(text: object) -> None:
    """Print what was asked for, on standard output."""
    print(clean(text))


def tell(text: object) -> None:
    """Print what goes on, on standard error."""
    print(clean(text), file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Whether standard error is there, and a terminal."""
    stream = sys.stderr
    return stream is not None and not stream.closed and stream.isatty()


@contextlib.contextmanager
def patience(text: str) -> Iterator[None]:
    """Say what is going on if the block takes more than a moment."""
    timer = threading.Timer(PATIENCE_S, tell, [f"{text} …"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
