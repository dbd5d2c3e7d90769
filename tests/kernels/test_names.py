"""The folder of kernels has a name that others use too."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code, folder, *path):
    """Run code with folders on the path; returns the last line of what it says."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False,
        env={"PYTHONPATH": ":".join(map(str, path))},
    )  # fmt: skip
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_the_folder_is_imported_under_one_name():
    assert "must be imported as fastddpm.kernels, got kernels" in python("import kernels", ROOT)


@pytest.mark.parametrize("theirs", [False, True], ids=["alone", "beside another package of that name"])
def test_the_folder_is_not_the_package_that_transformers_looks_for(tmp_path, theirs):
    """transformers looks for `kernels` of the Hub, and would fail at ours."""
    if theirs:
        (tmp_path / "kernels.py").write_text("")
    code = "import fastddpm.kernels; from importlib.util import find_spec; print(find_spec('kernels') is not None)"
    assert python(code, tmp_path, ROOT) == str(theirs)
