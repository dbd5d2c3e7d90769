"""How the command line ends when something is wrong: one line, and an exit code."""

from __future__ import annotations

import errno
import os
import sys

from fastddpm.common.terminal import tell

USER_ERRORS = (ValueError, TypeError, OSError, OverflowError, FloatingPointError)
REMEDIES = {
    errno.ENOENT: "check the path",
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there or choose another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may use"),
    errno.ENAMETOOLONG: "choose a shorter name",
}
INTERRUPTED = 130
DEBUG_VARIABLE = "FASTDDPM_TRACEBACK"


class Stopped(Exception):
    """Ctrl-C, with a word on how to go on; the library for options would swallow a KeyboardInterrupt's."""


def report(error: BaseException) -> int:
    """Print one line about `error` on standard error.

    Set the environment variable FASTDDPM_TRACEBACK to see the traceback instead.

    Returns:
        The exit code: 2 for bad input, 130 for Ctrl-C.

    Raises:
        BaseException: `error` itself, if it is a defect of the program and not of its input.
    """
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        tell(_one_line(f"fastddpm: stopped{error}"))
        return INTERRUPTED
    if os.environ.get(DEBUG_VARIABLE):
        raise error
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has seen enough; keep the interpreter from complaining about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    message = _message(error)
    if message is None:
        raise error
    tell(f"fastddpm: error: {message}")
    return 2


def _message(error: BaseException) -> str | None:
    """What to say about an error of the input; None for a defect of the program."""
    usage = getattr(error, "format_message", None)
    if callable(usage):  # an unknown option, a number that is none: the library for options words it
        return f"{_one_line(usage())} (fastddpm --help explains)"
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
        return "not enough memory for this request; use a smaller --batch-size or fewer pictures"
    if isinstance(error, OSError) and error.strerror is not None:
        remedy = REMEDIES.get(error.errno or 0, "choose another place")
        return f"{error.filename or 'writing'}: {error.strerror.lower()}; {remedy}"
    if isinstance(error, USER_ERRORS):
        return _one_line(str(error)) or type(error).__name__
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())
