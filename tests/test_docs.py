"""The pages of docs/: their code and commands run, their links lead somewhere, their lists are those of the code."""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import tomllib

import pytest
import typer.main
import yaml

import fastddpm
from fastddpm.kernels.operands import COLUMNS
from tests.pages import PAGES, ROOT, Block, blocks, run_command, run_python, save_mnist

PYTHON = [block for page in PAGES for block in blocks(page, "python")]
SHELL = [block for page in PAGES for block in blocks(page, "sh")]
SLOW = ("fastddpm export",)
REFERENCE = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name == "reference")
OPTIONAL = ("diffusers", "onnx", "onnxruntime")


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


# --- code and commands ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python(block, place, single_thread):
    if block.why_not:
        compile(block.text, str(block), "exec")
        return
    for package in OPTIONAL:
        if re.search(rf"^(?:import|from) {package}\b", block.text, re.M):
            pytest.importorskip(package)
    run_python(block.text, str(block))


@pytest.fixture
def data(place):
    """Random pictures in MNIST's format in `mnist/`, which the pages train on, and the digits that they edit."""
    save_mnist(place / "mnist")
    for name in ("two.png", "seven.png", "mask.png"):
        shutil.copy(ROOT / "docs" / "images" / "editing" / name, place)


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, marks=pytest.mark.slow) if any(c.startswith(SLOW) for c in b.commands) else b for b in SHELL],
    ids=str,
)
def test_commands(block, place, data, fastddpm):
    for command in block.commands:
        program, *words = shlex.split(command)
        if not block.why_not:
            run_command(command, fastddpm)
        elif program == "fastddpm":
            parses(words)
        else:
            assert (ROOT / program).is_file() and os.access(ROOT / program, os.X_OK)


def parses(words):
    """The command line knows the command and its options."""
    from fastddpm.cli import app

    name, *rest = words
    command = typer.main.get_command(app).commands[name]
    if hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    command.make_context(name, rest)


@pytest.mark.parametrize("command", ["sample mnist --stepps 3", "sample mnist --solver euler", "bench --batches"])
def test_a_wrong_command_does_not_parse(command):
    with pytest.raises(Exception, match=r"(?i)no such option|is not one of|requires an argument"):
        parses(command.split())


def test_what_is_not_run_says_why():
    for block in (*PYTHON, *SHELL):
        assert block.why_not == "" or len(block.why_not) > 20, block


def test_blocks_are_found_with_their_reasons(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n\n<!-- not run: needs a GPU -->\n```python\nx = 1\n```\n\n```python\ny = 2\n```\n")
    first, second = blocks(page, "python")
    assert first == Block(page, 3, "python", "x = 1\n", "needs a GPU")
    assert second == Block(page, 8, "python", "y = 2\n", "")


# --- links and pages ------------------------------------------------------------------------------


def anchor(heading):
    """The anchor that mkdocs makes of a heading."""
    plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, wanted = target.partition("#")
        goal = page.parent / path if path else page
        assert goal.is_file(), f"{page.name}: {target}"
        if wanted:
            headings = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), re.M)
            assert wanted in map(anchor, headings), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation_once():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry if isinstance(entry, list) else entry.values()
        return [page for value in values for page in pages(value)]

    nav = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(nav) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in PAGES)


def test_included_files_exist():
    for page in PAGES:
        for name in re.findall(r'^--8<-- "(.*)"$', page.read_text(encoding="utf-8"), re.M):
            assert (ROOT / name).is_file(), f"{page}: {name}"


# --- lists that must not go stale -----------------------------------------------------------------


def test_rooms_are_those_of_the_contract():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [contract] = [c for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers"]
    rows = re.findall(r"^\| (`.*?`) \|", text_of("rooms.md"), re.M)
    assert [" | ".join(re.findall(r"`(\w+)`", row)) for row in rows] == contract["layers"]


def test_columns_are_those_of_a_table():
    section = text_of("how-it-works.md").partition("## The table")[2].partition("## The step")[0]
    named = [name for row in re.findall(r"^\| (`.*?`) \|", section, re.M) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(COLUMNS)


def test_engines_and_precisions_are_those_there_are():
    from typing import get_args

    from fastddpm.engines.choose import EngineName
    from fastddpm.engines.precision import Precision

    rows = re.findall(r"^\| `(\w+)` \|", text_of("engines.md"), re.M)
    assert rows == [*get_args(EngineName), *get_args(Precision)]


def test_checks_are_those_of_the_doctor():
    from fastddpm.doctor.checks import CHECKS

    rows = re.findall(r"^\| (`.*?`) \|", text_of("doctor.md"), re.M)
    assert [name for row in rows for name in re.findall(r"`(.*?)`", row)] == [check.name for check in CHECKS]


def test_the_reference_has_every_public_name():
    public = [name for name in dir(fastddpm) if name in fastddpm.__all__ or name.startswith("Fast")]
    public.remove("__version__")
    missing = [name for name in public if not re.search(rf"^::: fastddpm\.{name}$", REFERENCE, re.M)]
    assert missing == []


@pytest.mark.parametrize("name", re.findall(r"^::: ([\w.]+)$", REFERENCE, re.M))
def test_what_the_reference_names_exists_and_is_documented(name):
    module, _, attribute = name.rpartition(".")
    if attribute.startswith("Fast"):
        pytest.importorskip("diffusers")
    assert getattr(importlib.import_module(module), attribute).__doc__


def every_command(group, prefix=""):
    """The commands of a group by name, and after them those of the groups within it."""
    groups = {name: command for name, command in group.commands.items() if hasattr(command, "commands")}
    for name, command in group.commands.items():
        if name not in groups:
            yield prefix + name, command
    for name, command in groups.items():
        yield from every_command(command, f"{prefix}{name} ")


def test_the_command_line_s_page_has_every_command_and_option():
    from fastddpm.cli import app

    spec = importlib.util.spec_from_file_location("command_line", ROOT / "docs" / "command_line.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.on_page_markdown(text_of("reference/command-line.md"))
    sections = {part.split("\n")[0]: part for part in page.split("\n## fastddpm ")[1:]}
    commands = dict(every_command(typer.main.get_command(app)))
    assert list(sections) == list(commands)
    for name, command in commands.items():
        for parameter in command.params:
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert not option.startswith("-") or option in sections[name], f"{name}: {option}"
