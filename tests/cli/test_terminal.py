"""What people see, whatever the terminal and the streams are."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from fastddpm.checkpoints import CheckpointError, load_checkpoint
from fastddpm.common import terminal
from fastddpm.common.progress import progress_bar
from fastddpm.common.terminal import clean, on_terminal, patience, say, tell
from tests.command_line import good
from tests.networks import tiny_sampler
from tests.tiny import SPEC, command, environment, save_checkpoint

EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2028\udcff\r\x08"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [("plain … × 日本 é 😀", "plain … × 日本 é 😀"), ("two\nlines", "two\nlines"), ("\x1b[31m", "\\x1b[31m"),
     ("\x9b31m", "\\x9b31m"), ("a\rb\x08\x00", "a\\rb\\x08\\x00"), ("\u202egnp", "\\u202egnp"), ("\udcff", "\\udcff")],
    ids=ascii,
)  # fmt: skip
def test_what_a_terminal_would_obey_is_spelled_out(capsys, text, cleaned):
    assert clean(text) == cleaned
    say(text)
    tell(text)
    assert capsys.readouterr() == (cleaned + "\n", cleaned + "\n")


def obeyed(text):
    return set(text) & set("\x1b\x07\x9b\u202e\u2028\r\x08")


@pytest.mark.parametrize("columns", [100, 30])
def test_a_checkpoints_strings_do_not_reach_the_terminal(fastddpm, monkeypatch, tmp_path, columns):
    evil = EVIL.replace("\udcff", "")
    spec = dataclasses.replace(SPEC, class_names=("bar", evil, "2"))
    save_checkpoint(tmp_path / "model", spec=spec, training={"data": evil, evil: 1})
    monkeypatch.setenv("COLUMNS", str(columns))
    out = good(fastddpm("info", tmp_path / "model"))
    assert "\\x1b" in out.replace("\n", "") and not obeyed(out)
    err = fastddpm("sample", tmp_path / "model", "--class-labels", "cat").err
    assert "\\x1b" in err and not obeyed(err)
    assert not obeyed(fastddpm("sample", EVIL).err)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "folder/model.safetensors"])
def test_a_pipe_for_a_checkpoint_is_not_waited_for(tmp_path, name):
    save_checkpoint(tmp_path / "folder")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    signal.alarm(60)  # an open that waits for a writer would wait for ever
    try:
        with pytest.raises(CheckpointError, match=r"model\.\w+ must be a file, got a folder, a pipe or a device"):
            load_checkpoint(tmp_path / "folder" if name.startswith("folder") else tmp_path / name)
    finally:
        signal.alarm(0)


# ---------------------------------------------------------------------- streams


@pytest.mark.parametrize("stream", [None, "closed"])
def test_sampling_needs_no_standard_error(monkeypatch, stream):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", None if stream is None else closed)
    assert not on_terminal()
    assert tiny_sampler().sample(1, class_labels=0, steps=2).shape == (1, 1, 8, 8)


def shell(line, **extra):
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(**extra), timeout=120)


def test_errors_do_not_go_elsewhere_where_standard_error_is_closed():
    done = shell(" ".join(command("nonsense")) + " 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


def test_a_closed_stream_does_not_get_a_files_number():
    """Else what a library prints to standard error would land in the first file that was opened."""
    code = "from fastddpm.common.terminal import settle_streams; settle_streams(); print(open('/dev/null').fileno())"
    assert int(shell(f'"{sys.executable}" -c "{code}" 2>&-').stdout) > 2
    assert shell(" ".join(command("--help")) + " >&-").returncode == 0


def test_streams_of_plain_ascii(tmp_path):
    done = shell(" ".join(command("sample", "--help")), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "") and "DDIM's eta, 0 ... 1: how much noise" in done.stdout
    code = "from fastddpm.common.terminal import settle_streams, say; settle_streams(); say('3 × 4 − 1 ≥ … é 日')"
    assert shell(f'"{sys.executable}" -c "{code}"', PYTHONIOENCODING="ascii").stdout == "3 x 4 - 1 >= ... e ?\n"


# ---------------------------------------------------------------------- narrow terminals


def test_narrow_terminals_get_lines(fastddpm, monkeypatch, tmp_path):
    model = save_checkpoint(tmp_path / "model")
    monkeypatch.setenv("COLUMNS", "20")
    lines = good(fastddpm("info", model)).splitlines()
    assert "- predicts: eps" in lines and "- classes: 3" in lines and "- class names: bar, dot, 2" in lines
    text = good(fastddpm("sample", "--help"))
    assert all(option in text for option in ("--batch-size", "--threshold", "--precision", "-n, --n"))
    monkeypatch.setenv("COLUMNS", "100")
    assert "╭" in good(fastddpm("sample", "--help")) and "╭" in good(fastddpm("info", model))


@pytest.mark.parametrize(("columns", "shown"), [(20, "123/1000 steps"), (100, "sampling 64 pictures")])
def test_the_count_is_shown_at_any_width(monkeypatch, columns, shown):
    monkeypatch.setenv("COLUMNS", str(columns))
    bar = progress_bar("sampling 64 pictures", " · loss 0.1", visible=True)
    bar.add_task("", total=1000, completed=123)
    console = Console(file=io.StringIO(), width=columns)
    console.print(bar.get_renderable())
    text = console.file.getvalue()
    assert shown in text and "123/1000 steps" in text and len(text.splitlines()) == 1


def test_what_ships_is_one_line(fastddpm):
    assert good(fastddpm("info")).splitlines()[-1] == "shipped checkpoints: mnist"


# ---------------------------------------------------------------------- long work


def test_long_work_is_announced_and_short_work_is_not(monkeypatch, capsys):
    with patience("short"):
        pass
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.01)
    with patience("long"):
        time.sleep(0.3)
    assert capsys.readouterr().err == "long …\n"


@pytest.mark.parametrize("name", ["compile", "export"])
def test_compiling_and_exporting_say_what_goes_on(fastddpm, place, monkeypatch, tmp_path, name):
    model = save_checkpoint(tmp_path / "model")
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.01)

    def takes_long(*_, **__):
        time.sleep(0.3)
        raise ValueError("enough")

    target = {"compile": "fastddpm.sampler.Sampler.compile", "export": "fastddpm.export.exporter.export_onnx"}[name]
    monkeypatch.setattr(target, takes_long)
    lines = fastddpm(name, model, *(["a.onnx"] if name == "export" else [])).err.splitlines()
    assert lines[1:] == ["fastddpm: error: enough"] and lines[0].endswith(" …")
    assert {"compile": "batch 64: compiling the step", "export": "exporting the chain"}[name] in lines[0]


# ---------------------------------------------------------------------- surroundings

BARE = """
import sys
EXTRAS = "diffusers", "onnx", "onnxruntime", "onnxscript", "einops", "psutil", "torch_fidelity"
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in EXTRAS:
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
from fastddpm import *
print(Sampler.__name__, "FastDDIMScheduler" in globals())
"""


def test_everything_can_be_imported_without_the_extras():
    done = subprocess.run([sys.executable, "-c", BARE], capture_output=True, text=True, env=environment(), timeout=120)
    assert (done.stdout, done.returncode) == ("Sampler False\n", 0), done.stderr
