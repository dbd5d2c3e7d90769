"""The package as users get it: wheel, sdist, editable install, pins, and what files may not say."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "fastddpm", "kernels", "export")
LINKED = ("kernels", "export")
DATA = ("py.typed", "*.c", "*.h", "*.json", "*.safetensors", "*.md", "*.png")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """The command's output; its errors are the test's message."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


# --- wheel and sdist ------------------------------------------------------------------------------


def sources() -> set[str]:
    """Every file that the wheel must hold, named as in the wheel, found by walking the folders themselves."""
    folders = {"fastddpm": ROOT / "fastddpm"} | {f"fastddpm/{name}": ROOT / name for name in LINKED}
    found = set()
    for prefix, folder in folders.items():
        for pattern in ("*.py", *DATA):
            for path in folder.rglob(pattern):
                inside = path.relative_to(folder)
                if prefix == "fastddpm" and inside.parts[0] in LINKED:
                    continue  # whether rglob follows links depends on Python's version
                found.add(f"{prefix}/{inside.as_posix()}")
    return found


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources in a folder of their own: building leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("sources")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a wheel or an sdist with the installed backend, so that no network is needed."""
    script = f"import setuptools.build_meta as b; print(b.build_{kind}({str(out)!r}))"
    return out / run(sys.executable, "-c", script, cwd=source).splitlines()[-1]


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", copied, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_exactly_the_sources(wheel: Path) -> None:
    assert files_in(wheel) == sources()


def test_wheel_has_one_top_level_name(wheel: Path) -> None:
    assert {name.split("/")[0] for name in files_in(wheel)} == {"fastddpm"}


def test_wheel_has_the_kernels_the_export_package_and_the_typing_marker(wheel: Path) -> None:
    expected = {"fastddpm/kernels/__init__.py", "fastddpm/export/__init__.py", "fastddpm/py.typed"}
    assert expected <= files_in(wheel)


def test_wheel_has_the_shipped_checkpoint(wheel: Path) -> None:
    folder = "fastddpm/pretrained/mnist"
    assert {f"{folder}/{name}" for name in ("config.json", "model.safetensors", "README.md")} <= files_in(wheel)


def test_wheel_from_the_sdist_is_the_same(copied: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", copied, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert files_in(build("wheel", unpacked, tmp_path)) == files_in(wheel)


def test_wheel_imports_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import fastddpm, fastddpm.kernels, fastddpm.export\n"
        "print(fastddpm.kernels.__file__)"
    )
    assert run(sys.executable, "-c", script, tmp_path, cwd=tmp_path).strip().startswith(str(tmp_path))


# --- the links and the guards ---------------------------------------------------------------------


@pytest.mark.parametrize("name", LINKED)
def test_link_is_relative_and_stands_in_for_the_folder(name: str) -> None:
    link = ROOT / "fastddpm" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name / "__init__.py").is_file()


@pytest.mark.parametrize("name", LINKED)
def test_importing_under_another_name_raises(name: str) -> None:
    spec = importlib.util.spec_from_file_location(
        name, ROOT / name / "__init__.py", submodule_search_locations=[str(ROOT / name)]
    )
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=f"fastddpm.{name}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# --- the installed package ------------------------------------------------------------------------


def test_installed_package_is_this_one(tmp_path: Path) -> None:
    where = run(sys.executable, "-c", "import fastddpm; print(fastddpm.__file__)", cwd=tmp_path).strip()
    assert Path(where) == ROOT / "fastddpm" / "__init__.py"
    assert metadata.version("fastddpm") == PROJECT["version"]


@pytest.mark.parametrize("name", LINKED)
def test_installation_adds_no_top_level_name(name: str, tmp_path: Path) -> None:
    script = "import importlib.util as u, sys\nspec = u.find_spec(sys.argv[1])\nprint(spec.origin if spec else None)"
    assert not run(sys.executable, "-c", script, name, cwd=tmp_path).startswith(str(ROOT))


@pytest.mark.parametrize("command", ["module", "script"])
def test_command_line_answers_from_the_repository_root(command: str) -> None:
    script = Path(sys.executable).with_name("fastddpm")
    prefix = {"module": (sys.executable, "-m", "fastddpm"), "script": (script,)}[command]
    out = run(*prefix, "--help")
    assert "sample" in out and "train" in out and "info" in out


# --- pins -----------------------------------------------------------------------------------------


def pins() -> dict[str, Version]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            assert canonicalize_name(name) not in found, f"{name} is pinned twice"
            found[canonicalize_name(name)] = Version(version)
    return found


def declared(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for with these extras, the package itself left out."""
    texts = [*PROJECT["dependencies"]]
    for extra in extras:
        texts += PROJECT["optional-dependencies"][extra]
    return [r for r in map(Requirement, texts) if r.name != "fastddpm"]


TEST, DOCS = ("bench", "test"), ("docs",)  # what `make test` and `make docs` install


def closure(*extras: str) -> dict[str, Requirement]:
    """Every distribution that the declared ones need here, each with one requirement that asks for it."""
    seen: dict[str, Requirement] = {}
    todo = declared(*extras)
    while todo:
        asked = todo.pop()
        if asked.marker and not any(asked.marker.evaluate({"extra": e}) for e in ("", *asked.extras)):
            continue
        name = canonicalize_name(asked.name)
        if name in seen:
            continue
        seen[name] = asked
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *asked.extras)):
                needed.marker = None
                todo.append(needed)
    return seen


@pytest.fixture(params=[TEST, DOCS], ids=["test", "docs"])
def needed(request: pytest.FixtureRequest) -> dict[str, Requirement]:
    if request.param is DOCS and importlib.util.find_spec("mkdocs") is None:
        pytest.skip("make docs has not installed mkdocs here")
    return closure(*request.param)


def test_every_dependency_is_pinned(needed: dict[str, Requirement]) -> None:
    assert sorted(set(needed) - set(pins())) == []


def test_pins_are_what_is_installed(needed: dict[str, Requirement]) -> None:
    wanted = pins()
    installed = {name: Version(metadata.version(name)) for name in needed}
    # A local part such as +cpu tells builds of one version apart, and the pins leave the build open.
    different = {n: (str(v), str(wanted[n])) for n, v in installed.items() if Version(v.public) != wanted[n]}
    assert different == {}


@pytest.mark.parametrize("requirement", declared(*TEST, *DOCS), ids=lambda r: r.name)
def test_lower_bound_admits_the_pin(requirement: Requirement) -> None:
    assert [s.operator for s in requirement.specifier] == [">="], "one honest lower bound, nothing else"
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_installed_set_is_consistent() -> None:
    check = (sys.executable, "-m", "pip", "--disable-pip-version-check", "check")
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=False)
    # These `make` installs alone; see the test extra in pyproject.toml.
    alone = ("denoising-diffusion-pytorch ", "torch-fidelity ")
    assert [line for line in done.stdout.splitlines() if " requires " in line and not line.startswith(alone)] == []


def test_build_backend_is_pinned() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]
    for requirement in map(Requirement, table["requires"]):
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


# --- what tracked files may not say ---------------------------------------------------------------

# A developer's own folders. An installed system's paths (/usr/bin/env, /dev/null) are fine.
DEVELOPERS_PATH = re.compile(r"(?<![\w.~$}/])/(?:root|home|work|Users|tmp|mnt|opt|workspace)/[\w.-]")
ADDRESS_OF_A_REGISTRY = re.compile(r"--(?:extra-)?index-url|--find-links")


def tracked_text_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    paths = [ROOT / name for name in listed if name]
    return [p for p in paths if p.is_file() and not p.is_symlink() and b"\0" not in p.read_bytes()]


@pytest.mark.parametrize("pattern", [DEVELOPERS_PATH, ADDRESS_OF_A_REGISTRY], ids=["path", "registry"])
def test_tracked_files_name_no_developers_machine(pattern: re.Pattern[str]) -> None:
    offending = []
    for path in tracked_text_files():
        if path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                offending.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert offending == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("data in /home/ann/mnist", True),
        ("'/tmp/x'", True),
        ("#!/usr/bin/env bash", False),
        ("samples/tmp/x", False),
        ("/work", False),
    ],
)
def test_the_pattern_finds_developers_paths(text: str, found: bool) -> None:
    assert bool(DEVELOPERS_PATH.search(text)) is found
