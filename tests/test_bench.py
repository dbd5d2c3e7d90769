"""The benchmark's machinery: what it calls equal, how it counts, and that it times nothing that differs."""

import dataclasses
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastddpm import cli
from fastddpm.bench import memory, runner, workloads
from fastddpm.bench.figures import (
    ATOL,
    BatchResult,
    Equality,
    PeerResult,
)
from fastddpm.bench.process import WorkerError, WorkerProcess, side_by_side
from fastddpm.bench.twins import NoTwinError, diffusers_config, twin_folder
from fastddpm.bench.worker import Worker, forget_peak, peak_bytes
from fastddpm.checkpoints import load_checkpoint
from fastddpm.unet import UNetConfig
from tests import tiny

PICTURES = np.random.default_rng(0).random((3, 1, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def one_thread(monkeypatch):
    """Worker processes as users' machines have them, on one core."""
    for name, value in tiny.environment().items():
        monkeypatch.setenv(name, value)


def settings(**changes):
    return dataclasses.replace(runner.Settings(60.0, 3, 1, jobs=1), **changes)


def workload(model, *peers, batches=(2,), steps=(4,)):
    return workloads.Workload("tiny", "a tiny network", batches, steps, peers, str(model))


# --- the same network for both ----------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny", "scale-shift", "heads", "asymmetric"])
def test_twin_computes_the_same(tmp_path, which):
    diffusers = pytest.importorskip("diffusers")
    changes = {
        "tiny": {},
        "scale-shift": {"scale_shift": True, "num_classes": None},
        "heads": {"head_channels": 4, "up_attention": (True, False)},
        "asymmetric": {"downsample_padding": "asymmetric", "embedding": "cos_sin", "embedding_shift": 0.0},
    }[which]
    config = dataclasses.replace(tiny.UNET, **changes)
    spec = tiny.SPEC if config.num_classes else tiny.unconditional()[1]
    checkpoint = load_checkpoint(tiny.save_checkpoint(tmp_path / "ours", config, spec))
    folder = twin_folder(tmp_path / "theirs", checkpoint)
    twin = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet").eval()
    x, t = torch.randn(2, 1, tiny.SIDE, tiny.SIDE), torch.tensor([3, 17])
    y = torch.tensor([0, 2]) if config.num_classes else None
    with torch.no_grad():
        ours = checkpoint.network(x, t) if y is None else checkpoint.network(x, t, y)
        torch.testing.assert_close(twin(x, t, y).sample, ours, rtol=1e-5, atol=1e-5)
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    torch.testing.assert_close(scheduler.betas, checkpoint.schedule.betas.float())


@pytest.mark.parametrize(
    "changes", [{"embedding": "interleaved"}, {"attention_order": "heads_qkv"}, {"resblock_updown": True},
                {"num_heads": 2}, {"conv_resample": False}], ids=str
)  # fmt: skip
def test_what_diffusers_cannot_run_has_no_twin(changes):
    with pytest.raises(NoTwinError):
        diffusers_config(dataclasses.replace(UNetConfig(), **changes))


def test_peers_draw_the_same_pictures(model, tmp_path):
    """Textbook, engine and diffusers' own pipeline, from the common noise."""
    job = runner.make_job(workload(model), tmp_path, settings())
    drawn = {}
    for name in ("reference", "fastddpm-eager", "diffusers") if job.folder else ("reference", "fastddpm-eager"):
        worker = Worker(name)
        assert worker.answer({"do": "load", "job": dataclasses.asdict(job)})["ok"]
        answer = worker.answer({"do": "check", "batch": 3, "steps": 5, "out": str(tmp_path / "out.npy")})
        assert answer["ok"] and answer["first_s"] > 0
        drawn[name] = np.load(tmp_path / "out.npy")
        assert worker.answer({"do": "outside"})["ms"] > 0
    assert drawn["reference"].std() > 0.01
    for name, pictures in drawn.items():
        np.testing.assert_allclose(pictures, drawn["reference"], atol=1e-5, err_msg=name)


def test_the_update_alone(tmp_path):
    pytest.importorskip("diffusers")
    job = runner.make_job(workloads.FULL[0], tmp_path, settings())
    drawn = []
    for name in ("reference", "fastddpm-eager", "diffusers"):
        worker = Worker(name)
        worker.answer({"do": "load", "job": dataclasses.asdict(job)})
        assert worker.answer({"do": "check", "batch": 1, "steps": 10, "out": str(tmp_path / "out.npy")})["ok"]
        drawn.append(np.load(tmp_path / "out.npy"))
    assert Equality.judge(drawn[1], drawn[0], "fp32", True).holds
    assert Equality.judge(drawn[2], drawn[0], "fp32", True).holds


def test_a_missing_package_is_a_line(model, tmp_path, monkeypatch):
    job = runner.make_job(workload(model), tmp_path, settings())
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    answer = Worker("onnxruntime").answer({"do": "load", "job": dataclasses.asdict(job)})
    assert (
        answer["missing"] and "onnxruntime, which is not installed" in answer["error"] and "\n" not in answer["error"]
    )
    answer = Worker("lucidrains").answer({"do": "load", "job": dataclasses.asdict(job)})
    assert answer["missing"] and "no network of similar size" in answer["error"]


def test_a_defect_of_a_peer_is_a_line():
    answer = Worker("reference").answer({"do": "run"})
    assert not answer["ok"] and not answer["missing"] and answer["error"].startswith("AttributeError")


# --- processes --------------------------------------------------------------------------------------


def stops(pid):
    """Whether a process gets stopped within a second."""
    status = Path(f"/proc/{pid}/stat")
    if not status.exists():
        return True  # this system does not tell
    for _ in range(100):
        if status.read_text().rpartition(")")[2].split()[0] == "T":
            return True
        time.sleep(0.01)
    return False


def test_worker_processes(model, tmp_path, one_thread):
    """Answers come back, an idle worker is stopped, a dead one is reported, a slow one is given up."""
    job = runner.make_job(workload(model), tmp_path, settings())
    load = {"do": "load", "job": dataclasses.asdict(job)}
    first, second = (WorkerProcess("reference", tmp_path, 1, {}) for _ in range(2))
    try:
        assert first.ask(load, 60)["compares"]
        assert stops(first.pid)
        check = {"do": "check", "batch": 1, "steps": 2, "out": str(tmp_path / "{peer}.npy")}
        answers = []
        side_by_side([first], [check, {"do": "run"}], 1, time.monotonic() + 60, lambda _, a: answers.extend(a))
        assert [sorted(answer) for answer in answers] == [["again_s", "first_s", "ok"], ["ok", "seconds"]]
        assert (tmp_path / "reference.npy").exists()
        with pytest.raises(WorkerError, match="KeyError"):
            first.ask({"do": "dance"}, 30)
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="signal 9"):
            first.ask({"do": "run"}, 30)
        gone = []
        side_by_side([second], [load], 1, time.monotonic() - 1, lambda _, error: gone.append(error))
        assert gone[0].postponed
        with pytest.raises(WorkerError, match="no answer"):
            second.ask(load, 0.01)
    finally:
        first.close()
        second.close()


def test_what_a_worker_started_ends_with_it(tmp_path, monkeypatch):
    """A compiler that outlived its worker would slow down whoever is timed next."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/child\nread line\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    worker = WorkerProcess("reference", tmp_path, 1, {})
    end = time.monotonic() + 20
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
        assert time.monotonic() < end
        time.sleep(0.01)
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    worker.close()
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_peer_that_draws_something_else_is_not_timed(model, tmp_path):
    run = runner.WorkloadRun(
        workload(model, "reference", "fastddpm-eager", "diffusers"), settings(), tmp_path, tmp_path
    )
    one = BatchResult(3, 4, peers=[PeerResult(peer, "fp32", first_s=1.0) for peer in run.workload.peers])
    run._loaded = {peer: {"compares": True} for peer in run.workload.peers}
    for peer, pictures in zip(run.workload.peers, (PICTURES, PICTURES, PICTURES + 0.01), strict=True):
        np.save(tmp_path / f"{peer}.npy", pictures)
    run._judge(one)
    assert [peer.equality.holds for peer in one.peers] == [True, True, False]
    assert "not timed" in one.peers[2].note
    timed = []
    run._workers = {
        peer: type("Fake", (), {"ask": lambda self, request, _, peer=peer: timed.append(peer) or {"seconds": 1.0}})()
        for peer in run.workload.peers
    }
    run._time(one, time.monotonic() + 60)
    assert timed == ["reference", "fastddpm-eager", "fastddpm-eager", "reference", "reference", "fastddpm-eager"]
    assert one.rounds == 3


def test_time_runs_out_after_two_rounds(model, tmp_path):
    run = runner.WorkloadRun(workload(model, "reference"), settings(rounds=50), tmp_path, tmp_path)
    one = BatchResult(1, 1, peers=[dataclasses.replace(result_of("reference"), seconds=[])])
    fake = type("Fake", (), {"ask": lambda *_: time.sleep(0.01) or {"seconds": 1.0}})()
    run._workers = {"reference": fake}
    run._time(one, time.monotonic())
    assert one.rounds == 2


# --- memory -----------------------------------------------------------------------------------------


def test_peak_memory_can_be_forgotten():
    block = np.ones(40_000_000 // 8)
    with_block = peak_bytes()
    del block
    if not forget_peak():
        pytest.skip("the kernel does not let a process reset its peak")
    assert peak_bytes() < with_block - 20_000_000


def test_memory_of_a_long_run_is_bounded(tmp_path, one_thread):
    """Pictures go to the folder as they are drawn: the second half of the run needs no more than its start."""
    pytest.importorskip("psutil")
    tiny_model = memory.tiny_model(tmp_path / "tiny")
    curve = memory.watch(tiny_model, tmp_path / "pictures", 320, batch=16, steps=1, every_s=0.02)
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 320
    assert curve.is_bounded, curve.sentence()


def test_growing_memory_is_noticed():
    sizes = [10**8 + n * 10**6 for n in range(100)]
    curve = memory.MemoryCurve(1000, 10, [float(n) for n in range(100)], [10 * (n + 1) for n in range(100)], sizes)
    assert not curve.is_bounded and "NOT bounded" in curve.sentence()
    assert not memory.MemoryCurve(10, 1).is_bounded  # nothing seen is no proof


# --- the command ------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["fastddpm", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "mnist,imagenet"], "--workloads must be among"),
        (["--batches", "1"], "must come with a MODEL"),
        (["mnist", "--workloads", "mnist"], "--workloads must be left out"),
        (["mnist", "--batches", "1,x"], "--batches must be whole numbers"),
        (["mnist", "--batches", "0"], "--batches must be whole numbers"),
        (["--minutes", "0"], "--minutes must be in"),
        (["mnist", "--threads", "0"], "--threads must be at least 1"),
        (["no-such-model-here"], "no-such-model-here"),
        (["--out", "/proc/nowhere/bench"], "/proc/nowhere/bench"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert code == 2 and err.count("\n") == 1 and message in err and not out
    assert list(tmp_path.iterdir()) == []


def test_bench_of_a_checkpoint(monkeypatch, capsys, tmp_path, model, one_thread):
    """The whole command: files, figures, and a line for what cannot take part."""
    peers = ("fastddpm-eager", "reference", "lucidrains")
    monkeypatch.setattr(workloads, "ALL_PEERS", peers)
    monkeypatch.setattr(workloads, "for_model", lambda *_: workload(model, *peers, batches=(1, 3), steps=(4, 2)))
    monkeypatch.setattr(
        runner.Settings, "of", classmethod(lambda cls, *_, **__: settings(seconds=300.0, over_steps=(2, 4), jobs=2))
    )
    code, out, err = command(monkeypatch, capsys, model, "--quick", "--out", tmp_path / "bench", "--threads", "1")
    assert code == 0, err
    assert "skipped lucidrains" in out and "tiny, B = 3" in out
    names = {path.name for path in (tmp_path / "bench").iterdir()}
    assert names == {"results.json", "results.md", "throughput.png", "ratios.png", "steps.png"}
    values = json.loads((tmp_path / "bench" / "results.json").read_text())
    for one in values["workloads"][0]["batches"]:
        assert one["rounds"] == 3 and one["peak_gflops"]["fp32"]["p50"] > 0 and one["copy_gb_s"]["p50"] > 0
        timed = {peer["peer"]: peer for peer in one["peers"] if peer["seconds"]}
        assert set(timed) == {"fastddpm-eager", "reference"}
        for peer in timed.values():
            assert peer["equality"]["holds"] and peer["equality"]["value"] <= ATOL
            assert len(peer["seconds"]) == 3 and peer["gflops"]["p50"] > 0 and peer["outside_ms"] > 0
            assert peer["run_bytes"] > 10**7
        assert one["ratios"]["fastddpm-eager"]["reference"]["p50"] > 0
    assert set(values["workloads"][0]["batches"][0]["over_steps"]["reference"]) == {"2", "4"}


@pytest.mark.slow
def test_what_was_compiled_is_looked_at_in_a_second_process(model, one_thread, monkeypatch):
    """The first one holds the compiler's memory too."""
    monkeypatch.setattr(runner, "OURS", ("fastddpm-compiled",))
    started = []
    start = runner.WorkerProcess
    monkeypatch.setattr(runner, "WorkerProcess", lambda *options: started.append(options[0]) or start(*options))
    (result,) = runner.run([workload(model, "fastddpm-compiled")], settings(seconds=300.0, rounds=1))
    peer = result.batches[0].find("fastddpm-compiled")
    assert started.count("fastddpm-compiled") == 2
    assert 0 < peer.second_s < 60 and peer.run_bytes > 10**7


def test_workers_are_used_again_where_asked(model, one_thread):
    """A quick run keeps a peer's process for the next workload, and ends all of them."""
    two = [dataclasses.replace(workload(model, "reference"), name=name) for name in ("first", "second")]
    pids, results = [], []
    for result in runner.run(two, settings(seconds=200.0, reuse=True, rounds=1)):
        results.append(result)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
        pids.append(set(children.read_text().split()) if children.exists() else set())
    assert [bool(result.batches[0].find("reference")) for result in results] == [True, True]
    assert pids[0] == pids[1]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids[1])


@pytest.mark.slow
def test_a_quick_run_keeps_its_time(tmp_path):
    """The whole of it, as a user starts it; what does not fit into two minutes is left out with a line."""
    began = time.monotonic()
    done = subprocess.run(
        tiny.command("bench", "--quick", "--out", tmp_path / "bench"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 150
    assert {"results.json", "results.md"} <= {path.name for path in (tmp_path / "bench").iterdir()}


def test_profile(monkeypatch, capsys, tmp_path, model):
    arguments = (model, "--profile", "--out", tmp_path / "bench", "--batches", "2")
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert "aten::" in out and "ms per step" in out
    events = json.loads((tmp_path / "bench" / "trace.json").read_text())["traceEvents"]
    assert any("conv" in str(event.get("name")) for event in events)
    assert out.count("%") == 10
