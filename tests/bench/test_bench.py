"""The benchmark's machinery: peers in processes, made ready within an allowance, compared, timed in equal rounds."""

import contextlib
import dataclasses
import importlib.util
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
from fastddpm.bench import lineup, memory, peers, runner, workloads
from fastddpm.bench.entrants import LABELS, precision_of
from fastddpm.bench.figures import ATOL, BatchResult, Equality, PeerResult
from fastddpm.bench.job import make_job
from fastddpm.bench.lineup import Lineup
from fastddpm.bench.process import LocalWorker, WorkerError, WorkerProcess
from fastddpm.bench.settings import Deadline, Settings
from fastddpm.bench.twins import NoTwinError, diffusers_config, random_checkpoint, twin_folder
from fastddpm.bench.worker import Worker, forget_peak, peak_bytes
from fastddpm.checkpoints import load_checkpoint
from fastddpm.nets.unet import UNetConfig
from fastddpm.sampler import Sampler
from tests import tiny
from tests.helpers import wait_until

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
    return dataclasses.replace(Settings(60.0, 3, 1), **changes)


def workload(model, *peers, batches=(2,), steps=(4,), more=()):
    return workloads.Workload("tiny", "a tiny network", batches, steps, peers, more, str(model), cold_s=20.0)


def job_of(model, folder, **changes):
    return make_job(workload(model), folder, **{"threads": 1, **changes})


# --- the same network for both ----------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny", "scale-shift", "heads", "asymmetric"])
def test_twin_computes_the_same(tmp_path, which):
    diffusers = pytest.importorskip("diffusers")
    changes = {
        "tiny": {},
        "scale-shift": {"scale_shift": True, "num_classes": None},
        "heads": {"head_channels": 4, "up_attention": (True, False)},
        "asymmetric": {
            "downsample_padding": "asymmetric",
            "embedding": "cos_sin",
            "embedding_shift": 0.0,
            "mid_scale": 1.3,
        },
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


def test_a_random_network_needs_no_diffusers_and_has_outputs_about_one(tmp_path):
    config = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16], "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4, "attention_head_dim": None, "downsample_padding": 0,
    }  # fmt: skip
    first, again = (load_checkpoint(random_checkpoint(tmp_path / name, config, "fixed_large")) for name in "ab")
    with torch.no_grad():
        out = first.network(torch.randn(4, 3, 8, 8), torch.full((4,), 500))
    assert 0.3 < float(out.std()) < 3 and first.spec.variance == "fixed_large"
    assert torch.equal(first.network.conv_out.weight, again.network.conv_out.weight)
    twin_folder(tmp_path / "twin", first)


def test_peers_draw_the_same_pictures(model, tmp_path):
    """Textbook, engine and diffusers' own pipeline, from the common noise."""
    job = job_of(model, tmp_path)
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
    job = make_job(workloads.choose(["update"], False)[0], tmp_path, threads=1)
    drawn = []
    for name in ("reference", "fastddpm-eager", "diffusers"):
        worker = Worker(name)
        worker.answer({"do": "load", "job": dataclasses.asdict(job)})
        assert worker.answer({"do": "check", "batch": 1, "steps": 10, "out": str(tmp_path / "out.npy")})["ok"]
        drawn.append(np.load(tmp_path / "out.npy"))
    assert Equality.judge(drawn[1], drawn[0], "fp32", True).holds
    assert Equality.judge(drawn[2], drawn[0], "fp32", True).holds


def test_a_missing_package_is_a_line(model, tmp_path, monkeypatch):
    job = job_of(model, tmp_path)
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
    load = {"do": "load", "job": dataclasses.asdict(job_of(model, tmp_path))}
    first, second = (WorkerProcess("reference", tmp_path, 1, {}) for _ in range(2))
    try:
        assert first.ask(load, 60)["compares"]
        assert stops(first.pid)
        out = str(tmp_path / "out.npy")
        answer = first.ask({"do": "check", "batch": 1, "steps": 2, "out": out}, 60)
        assert answer["first_s"] > 0 and np.load(out).shape == (1, 1, tiny.SIDE, tiny.SIDE)
        assert first.ask({"do": "run"}, 60)["seconds"] > 0
        with pytest.raises(WorkerError, match="KeyError"):
            first.ask({"do": "dance"}, 30)
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="signal 9"):
            first.ask({"do": "run"}, 30)
        with pytest.raises(WorkerError, match="no answer"):
            second.ask(load, 0.01)
    finally:
        first.close()
        second.close()


def test_a_worker_in_this_process_answers_alike(model, tmp_path):
    worker = LocalWorker("fastddpm-eager")
    assert worker.ask({"do": "load", "job": dataclasses.asdict(job_of(model, tmp_path))}, 60)["compares"]
    with pytest.raises(WorkerError, match="KeyError"):
        worker.ask({"do": "dance"}, 60)
    worker.close()
    with pytest.raises(WorkerError, match="AttributeError"):
        worker.ask({"do": "run"}, 60)


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


# --- ready, compared, timed -----------------------------------------------------------------------


class FakeWorker:
    """Answers at once, from a list of what is put to it; `slow` peers take longer than they are allowed."""

    asked: list[tuple[str, str]]
    slow: tuple[str, ...] = ()

    def __init__(self, name, *_):
        self.name = name

    def ask(self, request, seconds):
        self.asked.append((self.name, request["do"]))
        if self.name in self.slow:
            time.sleep(seconds)
            raise WorkerError("no answer")
        if request["do"] == "check":
            np.save(request["out"], PICTURES[: request["batch"]])
        return {
            "load": {"load_s": 0.1, "export_s": 0.0, "compares": True}, "run": {"seconds": 0.5},
            "flops": {"flops": 1.0},
            "check": {"first_s": 9.0, "again_s": 1.0, "how": "so"}, "measure": {"measured": {"fp32": 1.0, "copy": 1.0}},
            "memory": {"run_bytes": 1, "whole_bytes": 2}, "outside": {"ms": 0.1},
        }[request["do"]]  # fmt: skip

    def close(self):
        self.asked.append((self.name, "close"))


@pytest.fixture
def asked(monkeypatch):
    """What was put to whom, where all workers are fakes."""
    monkeypatch.setattr(FakeWorker, "asked", [], raising=False)
    monkeypatch.setattr(lineup, "WorkerProcess", FakeWorker)
    return FakeWorker.asked


def result_of(*peers):
    return BatchResult(2, 4, peers=[PeerResult(peer, precision_of(peer)) for peer in peers])


def test_all_are_ready_before_anybody_is_timed_and_rounds_are_shared_equally(model, asked):
    names = ("reference", "fastddpm-eager", "diffusers")
    (result,) = runner.run([workload(model, *names)], settings(looks=False))
    ready = [entry for entry in asked if entry[1] in ("load", "check") and entry[0] != "limits"]
    assert ready == [(name, request) for name in names for request in ("load", "check")]
    runs = [name for name, request in asked if request == "run"]
    assert runs == [*names, *reversed(names), *names]
    assert asked.index(("diffusers", "check")) < asked.index(("reference", "run"))
    assert [peer.seconds for peer in result.batches[0].peers] == [[0.5] * 3] * 3
    assert all(peer.compile_s == 8.0 and peer.ready_s < 5 for peer in result.batches[0].peers)
    assert sorted(name for name, request in asked if request == "close") == sorted([*names, "limits"])


def test_a_peer_that_is_not_ready_in_time_costs_nobody_else_their_turn(model, asked, monkeypatch):
    monkeypatch.setattr(FakeWorker, "slow", ("diffusers",))
    names = ("fastddpm-eager", "diffusers", "reference")
    some = workload(model, *names, batches=(1, 2), steps=(4, 4))
    (result,) = runner.run([some], settings(looks=False, allowance_s=0.2))
    for one in result.batches:
        assert one.find("reference").seconds and one.find("fastddpm-eager").seconds and one.rounds == 3
        assert one.find("diffusers") is None and one.peers[1].note == "left out: not ready within the 0 s allowed"
    assert asked.count(("diffusers", "load")) == 1 and ("diffusers", "close") in asked
    assert len(runner.left_out([result])) == 2


@pytest.mark.parametrize(("seconds", "timed"), [(1000.0, True), (25.0, False)], ids=["time", "no time"])
def test_who_is_not_needed_takes_part_where_time_is_left(model, asked, seconds, timed):
    """Twenty seconds are kept free for the second workload."""
    some = workload(model, "reference", more=("openvino",))
    for result in runner.run([some, dataclasses.replace(some, name="other")], settings(seconds=seconds, looks=False)):
        peers = {peer.peer: peer for peer in result.batches[0].peers}
        assert peers["reference"].seconds
        assert bool(peers["openvino"].seconds) is timed and (peers["openvino"].note == runner.NO_TIME) is not timed


def test_who_always_takes_part_may_have_all_that_is_left(model):
    run = runner.WorkloadRun(workload(model, "reference", more=("openvino",)), settings(), Deadline(100.0))
    assert run.allowed("reference", ahead_s=95.0) == pytest.approx(100.0, abs=1.0)
    assert run.allowed("reference", ahead_s=95.0, rounds_s=30.0) == pytest.approx(70.0, abs=1.0)
    assert run.allowed("openvino", ahead_s=95.0) == 0.0
    assert run.allowed("openvino", ahead_s=30.0) == pytest.approx(70.0, abs=1.0)
    hurried = runner.WorkloadRun(workload(model, "reference"), settings(allowance_s=2.0), Deadline(100.0))
    assert hurried.allowed("reference", ahead_s=30.0) == 2.0


def test_a_slow_machine_keeps_more_time_for_what_comes(model):
    """What got ready took three times as long as usual, and so will the rest."""
    run = runner.WorkloadRun(workload(model, "reference", more=("openvino",)), settings(), Deadline(100.0))
    run.pace.learn("reference", 3 * runner.estimate("reference"))
    assert run.pace.factor == 3.0
    assert run.allowed("openvino", ahead_s=30.0) == 0.0
    run.pace.learn("fastddpm-compiled", 0.1)  # quicker than usual is no promise
    assert run.pace.factor == 1.0


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_processor_without_bf16(model, asked, monkeypatch, has_bf16):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    ((result,),) = [list(runner.run([workload(model, "reference", "fastddpm-eager-bf16")], settings(looks=False)))]
    note = result.batches[0].peers[1].note
    assert ("no instructions for bfloat16" in note) is not has_bf16


def test_workloads_after_the_time_is_up_are_a_line(model, asked):
    (result,) = runner.run([workload(model, "reference")], settings(seconds=0.0))
    assert result.note == runner.NO_TIME and asked == []
    assert runner.left_out([result]) == [f"tiny: {runner.NO_TIME}"]


def test_ready_peers_do_not_fill_the_memory(model, asked, monkeypatch):
    free = iter([10**10, 10**9])
    monkeypatch.setattr(lineup, "memory_available", lambda: next(free))
    (result,) = runner.run([workload(model, "reference", "diffusers")], settings(looks=False))
    assert result.batches[0].find("reference") is not None
    assert "only 1.0 GB of memory would be free" in result.batches[0].peers[1].note
    assert ("diffusers", "close") in asked[: asked.index(("reference", "run"))]


def test_what_was_compiled_is_timed_in_a_second_process(model, asked):
    """The first one holds the compiler's memory too; a third is for the next batch size."""
    some = workload(model, "fastddpm-compiled", "reference", batches=(1, 2), steps=(4, 4))
    (result,) = runner.run([some], settings(looks=False))
    assert asked.count(("fastddpm-compiled", "load")) == 4 and asked.count(("reference", "load")) == 1
    for one in result.batches:
        peer = one.find("fastddpm-compiled")
        assert peer.compile_s == 8.0 and peer.second_s is not None


def test_a_peer_that_draws_something_else_is_not_timed(model, tmp_path, asked):
    one = result_of("reference", "fastddpm-eager", "diffusers")
    with Lineup(job_of(model, tmp_path), tmp_path, settings()) as there:
        for peer in one.peers:
            there.make_ready(peer, 2, 4, 60.0)
        np.save(tmp_path / "diffusers.npy", PICTURES[:2] + 0.01)
        there.judge(one)
        assert [peer.equality.holds for peer in one.peers] == [True, True, False]
        assert "not timed" in one.peers[2].note
        runner.WorkloadRun(workload(model), settings(), Deadline(60)).time_rounds(there, one, 10.0)
    assert [name for name, request in asked if request == "run"].count("diffusers") == 0
    assert one.rounds == 3 and not one.peers[2].seconds


def test_the_steps_alone_are_those_of_a_sample(model):
    """The same final state as `sample`'s, from the same start each time."""
    sampler = Sampler.from_pretrained(model, device="cpu", engine="eager")
    timesteps, labels = [15, 10, 5, 0], torch.tensor([0, 1, 2])
    run = peers.steps_of(sampler, 3, timesteps, labels)
    expected = sampler.sample(3, solver="ddpm", timesteps=timesteps, class_labels=labels, output="raw", progress=False)
    for _ in range(2):
        torch.testing.assert_close(run().clone(), expected, rtol=0.0, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the package openvino")
@pytest.mark.parametrize(
    "runtimes",
    [("openvino", "onnxruntime"), pytest.param(("openvino-bf16",), marks=pytest.mark.slow)],
    ids=["fp32", "bf16"],
)
def test_other_runtimes_draw_the_same_pictures(tmp_path, runtimes):
    pytest.importorskip("diffusers")
    one_level = dataclasses.replace(tiny.UNET, channels=(8,), attention=(True,))  # is exported in half the time
    job = job_of(tiny.save_checkpoint(tmp_path / "model", one_level), tmp_path)
    drawn = {}
    for name in ("reference", *runtimes):
        worker = Worker(name)
        answer = worker.answer({"do": "load", "job": dataclasses.asdict(job)})
        assert answer["ok"], answer
        assert worker.answer({"do": "check", "batch": 3, "steps": 5, "out": str(tmp_path / "out.npy")})["ok"]
        drawn[name] = np.load(tmp_path / "out.npy")
    for name, pictures in drawn.items():
        assert Equality.judge(pictures, drawn["reference"], precision_of(name), True).holds, name


# --- memory -----------------------------------------------------------------------------------------


def test_peak_memory_can_be_forgotten():
    block = np.ones(40_000_000 // 8)
    with_block = peak_bytes()
    del block
    if not forget_peak():
        pytest.skip("the kernel does not let a process reset its peak")
    assert peak_bytes() < with_block - 20_000_000


def test_memory_of_a_long_run_is_bounded(tmp_path, one_thread, monkeypatch):
    """Pictures go to the folder as they are drawn: the second half of the run needs no more than its start."""
    pytest.importorskip("psutil")
    tiny_model = memory.tiny_model(tmp_path / "tiny")
    monkeypatch.setattr(memory, "EVERY_S", 0.02)
    curve = memory.watch(tiny_model, tmp_path / "pictures", 320, batch=16)
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
        (["mnist", "--allowance", "0"], "--allowance must be in"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_gpu_that_is_not_there_is_one_line(monkeypatch, capsys, tmp_path):
    code, out, err = command(monkeypatch, capsys, "--device", "cuda", "--out", tmp_path)
    assert code == 2 and "device must be there, got 'cuda'" in err and err.count("\n") == 1 and not out


@pytest.fixture
def short(monkeypatch, model):
    """The command's run as a short one of a tiny network."""
    peers = ("fastddpm-eager", "reference", "lucidrains")
    monkeypatch.setattr(workloads, "for_model", lambda *_: workload(model, *peers, batches=(1, 3), steps=(4, 2)))
    of = classmethod(lambda cls, *_, **__: settings(seconds=300.0, over_steps=(2, 4)))
    monkeypatch.setattr(Settings, "of", of)


def test_bench_of_a_checkpoint(monkeypatch, capsys, tmp_path, model, one_thread, short):
    """The whole command: files, figures, and a line for what cannot take part, which --strict makes a failure."""
    code, out, err = command(monkeypatch, capsys, model, "--quick", "--out", tmp_path / "bench", "--strict")
    assert code == 1 and "2 left out, the first: tiny, B = 1, lucidrains: no network of similar size" in err
    assert f"not timed: {LABELS['lucidrains']}" in out and "tiny, B = 3" in out and "gets up to 300 s" in out
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
            assert peer["run_bytes"] > 10**7 and peer["ready_s"] > 0
        assert timed["fastddpm-eager"]["how"] == "eager: asked for"
        assert one["ratios"]["fastddpm-eager"]["reference"]["p50"] > 0
    assert set(values["workloads"][0]["batches"][0]["over_steps"]["reference"]) == {"2", "4"}


def descendants(pid):
    """Processes that this one started, and theirs."""
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


def is_worker(pid):
    with contextlib.suppress(OSError):
        return b"fastddpm.bench.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def is_alive(pid):
    """Whether a process could still compute: it is there, and nobody has yet to take note of its end."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_ctrl_c_ends_everything(model, tmp_path, one_thread):
    """While a peer gets ready: exit code 130, one line, and no process is left."""
    options = (model, "--batches", "1", "--out", tmp_path / "bench", "--quiet", "--device", "cpu")
    with subprocess.Popen(tiny.command("bench", *options), stderr=subprocess.PIPE, text=True) as process:
        end, found = time.monotonic() + 120, []
        while not any(map(is_worker, found)) and time.monotonic() < end:
            time.sleep(0.05)
            found = list(descendants(process.pid))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert found and process.returncode == 130 and err.count("\n") == 1 and err.startswith("fastddpm: stopped"), err
    # What was killed is there until somebody has asked for its exit code.
    assert wait_until(lambda: not any(map(is_alive, found)), seconds=10)


@pytest.mark.slow
def test_a_quick_run_keeps_its_time(tmp_path):
    """From empty caches: ours, diffusers and ONNX Runtime are compared at each batch size, within three minutes."""
    began = time.monotonic()
    command = tiny.command("bench", "--quick", "--cold", "--device", "cpu", "--out", tmp_path / "bench")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 200
    values = json.loads((tmp_path / "bench" / "results.json").read_text())
    for one in values["workloads"][0]["batches"]:
        timed = {peer["peer"] for peer in one["peers"] if peer["seconds"]}
        assert {"fastddpm-compiled", "diffusers", "onnxruntime"} <= timed, one["batch"]


def test_profile(monkeypatch, capsys, tmp_path, model):
    arguments = (model, "--profile", "--out", tmp_path / "bench", "--batches", "2")
    code, out, err = command(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert "aten::" in out and "ms per step" in out
    events = json.loads((tmp_path / "bench" / "trace.json").read_text())["traceEvents"]
    assert any("conv" in str(event.get("name")) for event in events)
    assert out.count("%") == 10
