"""Commands run in the test's own process, and how they should end."""

import dataclasses


@dataclasses.dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def good(result):
    """The output of a command that ended well, and without a word on standard error but for the engine that ran.

    A line that asks for patience (…) depends on how quick the machine is.
    """
    words = [line for line in result.err.splitlines() if not line.startswith("engine: ") and not line.endswith(" …")]
    assert (result.code, words) == (0, [])
    return result.out


def refused(result, *phrases):
    """Exit code 2 and one line that says all of `phrases`."""
    assert result.code == 2, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastddpm: error: ") and len(lines[0]) > 40, result.err
    for phrase in phrases:
        assert phrase in result.err
    return True


def files(folder):
    """Everything in a folder, as sorted names."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
