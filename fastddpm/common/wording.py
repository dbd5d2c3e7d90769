"""Words of messages."""

from __future__ import annotations


def first_line(error: BaseException, most: int = 200) -> str:
    """What an error says in its first line, cut to so many characters; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def named(error: BaseException, most: int = 200) -> str:
    """An error's type and its first line, cut to so many characters; its type alone if it says nothing."""
    kind, line = type(error).__name__, first_line(error, most)
    return kind if line == kind else f"{kind}: {line}"


def counted(n: int, noun: str) -> str:
    """How many there are of something: "1 picture", "2 pictures"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def in_a_line(error: BaseException, most: int = 160) -> str:
    """All that an error says, in one line, cut to so many characters."""
    return " ".join(str(error).split())[:most]
