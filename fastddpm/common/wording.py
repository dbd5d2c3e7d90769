"""Words of messages."""

from __future__ import annotations


def first_line(error: BaseException, most: int = 200) -> str:
    """What an error says in its first line, cut to so many characters; its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]


def counted(n: int, noun: str) -> str:
    """How many there are of something: "1 picture", "2 pictures"."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def in_a_line(error: BaseException, most: int = 160) -> str:
    """All that an error says, in one line, cut to so many characters."""
    return " ".join(str(error).split())[:most]
