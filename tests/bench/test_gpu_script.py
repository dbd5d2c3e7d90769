"""`benchmarks/gpu.sh`: its dry run on the CPU, so that the first run on a GPU does not end at a typo."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.tiny import environment

ROOT = Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as patch:  # the repository's root is on no path while tests run
    patch.syspath_prepend(ROOT)
    from benchmarks import gpu, gpu_section


def script(*arguments, **extra):
    return subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", *map(str, arguments)], capture_output=True, text=True, check=False,
        env=environment(PYTHON=sys.executable, **extra),
    )  # fmt: skip


def ended(outcomes):
    return [(one.section, one.ok) for one in outcomes]


def test_each_section_has_a_function_and_a_part_of_the_time():
    assert list(gpu_section.RUN) == list(gpu.SHARES) and abs(sum(gpu.SHARES.values()) - 1) < 1e-9
    assert gpu.limits(["kernels", "trace"], 1.8) == pytest.approx({"kernels": 66, "trace": 42})


def test_the_script_runs_a_section(tmp_path):
    """In a folder of another name, from elsewhere, with nothing on PYTHONPATH."""
    done = script(tmp_path / "a b", "--dry", "--only", "ceiling", PYTHONPATH="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("| ceiling | ok | ")
    found = json.loads((tmp_path / "a b" / "ceiling.json").read_text())
    assert found["ok"] and found["dry"] and found["copy_gb_s"] > 0
    assert "TFLOP/s" in (tmp_path / "a b" / "ceiling.txt").read_text()
    assert json.loads((tmp_path / "a b" / "summary.json").read_text())[0]["ok"]


@pytest.mark.slow
def test_the_script_runs_every_section(tmp_path):
    done = script(tmp_path, "--dry", "--minutes", 30)
    assert done.returncode == 0, done.stdout + done.stderr
    table = done.stdout.splitlines()[-len(gpu.SHARES) :]
    assert [line.split(" | ")[0][2:] for line in table] == list(gpu.SHARES) and all("| ok |" in line for line in table)
    for name in gpu.SHARES:
        assert json.loads((tmp_path / f"{name}.json").read_text())["ok"] and (tmp_path / f"{name}.txt").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["host_ms"] > 0
    assert json.loads((tmp_path / "chrome_trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    "arguments, says",
    [(["--only", "doctor,nothing"], "--only must name sections among doctor, tests"),
     (["--minutes", "0"], "--minutes must be in 0.1"), ([], "--dry runs in miniature on the CPU")],
    ids=["section", "minutes", "no GPU"],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, capsys, arguments, says):
    if not arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stopped:
        gpu.main([str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- sections that go wrong -----------------------------------------------------------------------

WRITES = "import json, sys; json.dump(dict(ok=True, says='well | done'), open(sys.argv[1] + '/{}.json', 'w'))"
COMMANDS = {
    "doctor": "raise SystemExit('out of luck')",
    "tests": WRITES.format("tests") + "; import time; time.sleep(600)",
    "kernels": "print('half a'); print('reason'); raise SystemExit(3)",
    "trace": WRITES.format("trace"),
}


def run(out, monkeypatch, minutes):
    monkeypatch.setattr(gpu, "SHARES", {"doctor": 0.2, "tests": 0.2, "kernels": 0.2, "trace": 0.4})
    monkeypatch.setattr(gpu, "GRACE_S", 0.5)
    monkeypatch.setattr(gpu, "command", lambda name, out, *_: [sys.executable, "-S", "-c", COMMANDS[name], str(out)])
    return gpu.run(list(COMMANDS), out, minutes, dry=True)


def test_a_section_that_fails_or_takes_too_long_stops_no_other(tmp_path, monkeypatch):
    (tmp_path / "kernels.json").write_text('{"ok": true, "says": "of an earlier run"}')
    outcomes = run(tmp_path, monkeypatch, 0.1)
    assert ended(outcomes) == [("doctor", False), ("tests", False), ("kernels", False), ("trace", True)]
    assert outcomes[0].says == "exit code 1: out of luck" and outcomes[2].says == "exit code 3: reason"
    assert "that it may take; by then: well | done" in outcomes[1].says and outcomes[1].seconds < 30
    assert gpu.report(outcomes).splitlines()[-1].endswith(r"well \| done |")


def test_what_a_section_started_ends_with_it(tmp_path):
    code = """if True:
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
        open(sys.argv[1] + "/pid", "w").write(str(child.pid))
        time.sleep(600)"""
    (outcome,) = gpu.run_stage({"trace": [sys.executable, "-S", "-c", code, str(tmp_path)]}, tmp_path, 2)
    assert not outcome.ok
    child = int((tmp_path / "pid").read_text())
    assert gone(child)


def gone(process):
    """Whether a process ends, or is there only for its parent to be noticed, within some seconds."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    return False


def test_tests_of_a_gpu_are_found():
    files = gpu_section.marked_files()
    assert "tests/kernels/test_gpu.py" in files and "tests/engines/test_gpu_path.py" in files
    assert "tests/cli/test_cli.py" not in files and all((ROOT / name).exists() for name in gpu_section.DRY_TESTS)


def test_what_compiles_the_same_is_compiled_once(monkeypatch):
    monkeypatch.setattr(gpu_section.importlib.util, "find_spec", lambda name: None)
    alone = gpu_section.compilations(dry=False)
    assert ("cifar10", "fastddpm-compiled-bf16", 512) in alone
    assert not [peer for _, peer, _ in alone if "graph" in peer or peer.startswith("diffusers")]
