"""Every command and every line of Python in the README runs, and the files that it names exist."""

import dataclasses
import re

import pytest

from tests.pages import ROOT, blocks, run_command, run_python, save_mnist
from tests.tiny import SPEC, UNET, save_checkpoint

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [command for block in blocks(ROOT / "README.md", "sh") for command in block.commands]
PYTHON = [block.text for block in blocks(ROOT / "README.md", "python")]
SLOW = ("compile", "bf16", "fastddpm export", "python -m fastddpm.kernels.report", "export_onnx")
"""What other tests do with smaller networks, or more closely: engines/test_ahead_of_time.py and test_surroundings.py,
export/test_onnx_cli.py, kernels/test_report.py, and for Python the test below."""


def marked(examples):
    return [pytest.param(text, marks=pytest.mark.slow) if any(s in text for s in SLOW) else text for text in examples]


def fewer(command):
    """The command with three pictures."""
    return re.sub(r"--n \d+", "--n 3", command)


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["make sample", "make test"]


@pytest.mark.parametrize("command", marked(COMMANDS))
def test_command(command, place, fastddpm):
    save_mnist(place / "mnist")
    run_command(fewer(command), fastddpm)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != fewer(command)])
def test_command_with_all_pictures(command, place, fastddpm):
    run_command(command, fastddpm)


@pytest.mark.parametrize("code", marked(PYTHON), ids=[code.splitlines()[-1][:30] for code in PYTHON])
def test_python(code, place, single_thread):
    run_python(code, "README.md")


def test_the_network_of_one_s_own_may_have_any_shape():
    [code] = [code for code in PYTHON if "ModelSpec(shape=(3, 16, 16))" in code]
    run_python(code.replace("3, 16, 16", "3, 7, 9"), "README.md")


def test_the_export_of_a_smaller_network(place, single_thread):
    pytest.importorskip("onnxruntime")
    [code] = [code for code in PYTHON if "export_onnx" in code]
    spec = dataclasses.replace(SPEC, num_classes=10, null_class=10, class_names=None)
    unet = dataclasses.replace(UNET, num_classes=11, channels=(8,), attention=(True,))
    save_checkpoint(place / "small", unet, spec)
    names = run_python(code.replace('"mnist"', '"small"'), "README.md")
    assert names["images"].shape == (10, *SPEC.shape)


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        headings = re.findall(r"^## (.*)$", README, re.M)
        anchors = ["#" + heading.lower().replace(" ", "-") for heading in headings]
        assert target.startswith("https://") or target in anchors or (ROOT / target).exists(), target
