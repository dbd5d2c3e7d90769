"""`--class-labels`: which classes the pictures are of, in turn."""

from __future__ import annotations

from fastddpm.process.spec import ModelSpec

_NAMED = 5


def class_cycle(spec: ModelSpec, text: str, model: str) -> list[int] | None:
    """The labels that the ids go through in turn, or None for no labels.

    A name counts before a number. Where some class has another class's number for a name, numbers would be read
    either way: there only names count.

    Args:
        spec: The network's conventions.
        text: "all", "none", or names and numbers with commas between.
        model: The checkpoint as it was given, for the message.

    Raises:
        ValueError: If the classes are not understood or the network has none.
    """
    if text == "none" or (text == "all" and spec.num_classes is None):
        return None
    if spec.num_classes is None:
        raise ValueError(f"--class-labels must be left out, got {text!r}: the network has no classes")
    if text == "all":
        return [label for label in range(spec.num_classes) if label != spec.null_class]
    numbers = {str(label): label for label in range(spec.num_classes)}
    names = {name: label for label, name in enumerate(spec.class_names or ())}
    by_number = all(numbers.get(name, label) == label for name, label in names.items())
    known = {**numbers, **names} if by_number else names
    chosen = [part.strip() for part in text.split(",")]
    unknown = next((part for part in chosen if _plain(part) not in known), None)
    if unknown is not None:
        raise ValueError(_message(spec, unknown, by_number, model))
    return [known[_plain(part)] for part in chosen]


def _plain(part: str) -> str:
    """A number without leading zeros, and any other name as it is."""
    return part.lstrip("0") or "0" if part.isascii() and part.isdigit() else part


def _message(spec: ModelSpec, got: str, by_number: bool, model: str) -> str:
    ways = ["all"] + (["none"] if spec.null_class is not None else [])
    numbers = [str(label) for label in range(spec.num_classes or 0)]
    if by_number:
        ways.append(f"numbers in 0 … {numbers[-1]}")
    names, hint = list(spec.class_names or ()), "pick some of these"
    if names and names != numbers:
        more = len(names) > _NAMED
        ways.append(f"names ({', '.join(names[:_NAMED])}{' …' if more else ''})")
        hint = f"fastddpm info {model} lists them" if more else hint
    return (
        f"--class-labels must be {', '.join(ways[:-1])} or {ways[-1]}, with commas between several, got {got!r}; {hint}"
    )
