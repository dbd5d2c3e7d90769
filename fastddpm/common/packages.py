"""Packages that are not installed with fastddpm itself."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType


def require(package: str, extra: str) -> ModuleType:
    """Import a package.

    Args:
        package: its name.
        extra: with which of fastddpm's extras it is installed.

    Raises:
        ImportError: it is not there; the message is a line that says how to get it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"needs the package {package}, which is not installed; install fastddpm[{extra}]") from error
