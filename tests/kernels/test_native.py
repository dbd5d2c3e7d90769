"""C kernels: compiled once, kept, and made again when what was kept is not what was made or does not load."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastddpm.kernels import native
from fastddpm.kernels.kept import CacheWarning, keep, private_folder, sealed
from fastddpm.kernels.native import NativeError, load
from tests.cache_folders import cache, give_away

__all__ = ["cache"]

if all(shutil.which(name) is None for name in ("cc", "gcc", "clang")):
    pytest.skip("no C compiler", allow_module_level=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return 42; }\n")
    return path


@pytest.fixture
def builds(cache, monkeypatch) -> list[str]:
    """The compiler's outputs so far."""
    made = []
    run = native.subprocess.run

    def counted(command, **options):
        if "-fopenmp" in command:
            made.append(command[-1])
        return run(command, **options)

    monkeypatch.setattr(native.subprocess, "run", counted)
    return made


def load_anew(source: Path, functions: tuple[str, ...] = ("answer",)):
    """The library as another process loads it, which has no private folder with what this one made."""
    native.load_library.cache_clear()
    shutil.rmtree(private_folder())
    return load(source, functions)


def the_file(cache: Path) -> Path:
    (path,) = cache.glob("answer-*.so")
    return path


def test_it_is_compiled_once(cache, source, builds):
    assert [load_anew(source).answer() for _ in range(2)] == [42, 42]
    assert len(builds) == 1 and os.listdir(cache) == [the_file(cache).name]


def test_another_source_is_another_library(cache, source, builds):
    load_anew(source)
    source.write_text("int answer(void) { return 43; }\n")
    assert load_anew(source).answer() == 43 and len(builds) == 2


def cut_short(content):
    return content[:5000]


def flipped(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def no_library(content):
    return b"hello"


@pytest.mark.parametrize("damage", [cut_short, flipped, no_library])
def test_a_damaged_library_is_not_loaded_but_made_again(cache, source, builds, damage):
    load_anew(source)
    path = the_file(cache)
    content = path.read_bytes()
    path.unlink()  # this process has the file mapped
    path.write_bytes(damage(content))
    with pytest.warns(CacheWarning, match="was damaged and is removed"):
        assert load_anew(source).answer() == 42
    assert len(builds) == 2
    assert load_anew(source).answer() == 42 and len(builds) == 2


def compiled(folder: Path, text: str) -> bytes:
    (folder / "other.c").write_text(text)
    subprocess.run(["cc", "-shared", "-o", str(folder / "other"), str(folder / "other.c")], check=True)
    return (folder / "other").read_bytes()


def plant(cache: Path, content: bytes) -> Path:
    """Put something else in the place of the library that was kept, with a name that fits its content."""
    path = the_file(cache)
    path.unlink()
    made = private_folder() / "made"
    made.write_bytes(content)
    return keep(sealed(made, path.name.rsplit("-", 1)[0], ".so"))


def others(path, monkeypatch):
    path.chmod(path.stat().st_mode | 0o022)


@pytest.mark.parametrize("change", [others, give_away])
@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_others_could_have_written_is_not_loaded(cache, source, builds, monkeypatch, change, which):
    load_anew(source)
    planted = plant(cache, compiled(source.parent, "int answer(void) { return 666; }"))
    assert load_anew(source).answer() == 666  # what the owner put there is believed
    change(planted if which == "file" else cache, monkeypatch)
    with pytest.warns(CacheWarning, match="alone, got one that"):
        assert load_anew(source).answer() == 42
    assert planted.exists()


@pytest.mark.parametrize("text", [None, "int question(void) { return 6 * 9; }"], ids=["no library", "another function"])
def test_a_sound_library_that_does_not_load_is_made_again_and_stays(cache, source, builds, text):
    load_anew(source)
    planted = plant(cache, b"hello" if text is None else compiled(source.parent, text))
    assert load_anew(source).answer() == 42 and planted.exists()
    made = len(builds)
    assert load_anew(source).answer() == 42 and len(builds) == made


def test_a_cache_that_nothing_may_be_executed_from(cache, source, builds, monkeypatch):
    def refuse(path, **options):
        if Path(path).parent == cache:
            raise OSError("failed to map segment from shared object")
        return ctypes_cdll(path)

    ctypes_cdll = native.ctypes.CDLL
    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    assert [load_anew(source).answer() for _ in range(2)] == [42, 42]


FAILURES = {
    "the compiler": ("int answer(void) { return }", "answer.c: must be compiled and loaded, got from .*answer.c"),
    "loading": ("extern int x; int answer(void) { return x; }", "answer.c: must be .* undefined symbol: x"),
    "a function": ("int question(void) { return 0; }", "answer.c: must be .* undefined symbol: answer"),
}


@pytest.mark.parametrize("text, message", FAILURES.values(), ids=FAILURES)
def test_what_cannot_be_had_is_said_and_not_tried_again(cache, source, builds, text, message):
    source.write_text(text)
    for _ in range(2):
        with pytest.raises(NativeError, match=message) as caught:
            load(source, ("answer",))
        assert "\n" not in str(caught.value)
    assert len(builds) == 1


def test_a_kept_library_needs_no_compiler(cache, source, monkeypatch):
    load_anew(source)
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert load_anew(source).answer() == 42
    source.write_text("int answer(void) { return 43; }\n")
    with pytest.raises(NativeError, match="no C compiler; install gcc"):
        load_anew(source)


def test_a_missing_source(cache, tmp_path):
    with pytest.raises(NativeError, match="none.c: must be compiled and loaded, got .*No such file"):
        load(tmp_path / "none.c", ())


def test_without_a_cache_it_is_compiled_for_this_process(cache, source, builds):
    cache.write_text("a file")
    with pytest.warns(CacheWarning, match="must be a folder, got a file"):
        assert load_anew(source).answer() == 42
    assert len(builds) == 1
