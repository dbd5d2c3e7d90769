"""Runs the tests of `interpreter/` in a process of their own.

Triton decides when a kernel is decorated whether it is to be interpreted, so the variable must be set before the
package is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreter"


def test_interpreted_kernels(request):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, env=environment, cwd=request.config.rootpath, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, f"the interpreter's tests failed:\n{run.stdout}{run.stderr}"
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout


def test_they_are_not_collected_outside_the_interpreter(request):
    """In this session, that is: in a run of the whole suite this looks at all of it."""
    assert not [item.nodeid for item in request.session.items if FOLDER in item.path.parents]
