"""What every test shares: the markers' skip logic and hypothesis' profile."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Processes side by side get a thread each, and so do those that they start; PyTorch looks when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import typer.main
from hypothesis import settings

from tests.command_line import Result

# A shell that starts us in the background has Ctrl-C ignored, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# First calls compile, import and allocate, so a deadline per example would only measure the machine. The quick tests
# are the same everywhere; the slow ones look for new examples each time.
settings.register_profile("quick", max_examples=40, deadline=None, print_blob=True, derandomize=True)
settings.register_profile("slow", max_examples=200, deadline=None, print_blob=True)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled steps of the user's must not decide what the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDDPM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def single_thread() -> Iterator[None]:
    """PyTorch on one thread, as on the machine of least cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def parser(app: typer.Typer, markup: str | None, make: Callable[[typer.Typer], object]) -> object:
    """The command line's parser: making it takes longer than most commands of the tests."""
    return make(app)


@pytest.fixture
def fastddpm(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], single_thread: None
) -> Callable[..., Result]:
    """Run the command line in this process."""
    from fastddpm import cli

    make = typer.main.get_command
    monkeypatch.setattr(typer.main, "get_command", lambda app: parser(app, app.rich_markup_mode, make))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FASTDDPM_TRACEBACK", raising=False)

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["fastddpm", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Result(ended.value.code, *capfd.readouterr())

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("slow" if config.getoption("--slow") else "quick")


DEAR = (
    "kernels/test_interpreter.py", "export/test_onnx_export.py", "bench/test_bench.py",
    "checkpoints/test_lucidrains.py",
    "cli/test_cli.py", "kernels/test_aot.py", "test_sampler.py", "engines/test_gpu_path.py", "test_readme.py",
    "kernels/test_group_norm.py", "test_shipped.py", "engines/test_ahead_of_time.py", "test_docs.py",
    "export/test_onnx_cli.py", "train/test_training.py", "checkpoints/test_dialect_files.py", "kernels/test_lazy.py",
)  # fmt: skip
"""The files that take longest, the longest first: they are begun first, so that processes side by side end together."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    begun = {Path(__file__).parent / name: place for place, name in enumerate(DEAR)}
    items.sort(key=lambda item: begun.get(item.path, len(DEAR)))
    if not torch.cuda.is_available():
        _skip(items, "gpu", "needs a GPU that torch can use")
    if not config.getoption("--slow"):
        _skip(items, "slow", "slow; run it with --slow")


def _skip(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))
