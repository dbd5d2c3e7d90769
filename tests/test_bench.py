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
from fastddpm.bench import bars, machine, memory, plots, report, runner, workloads
from fastddpm.bench.figures import (
    ATOL,
    PSNR_DB,
    BatchResult,
    Equality,
    PeerResult,
    Quantiles,
    WorkloadResult,
    as_json,
    paired_ratio,
    psnr,
)
from fastddpm.bench.live import View
from fastddpm.bench.peers import Limits, count_flops
from fastddpm.bench.process import WorkerError, WorkerProcess, side_by_side
from fastddpm.bench.twins import NoTwinError, diffusers_config, twin_folder
from fastddpm.bench.worker import LABELS, PEERS, Worker, forget_peak, peak_bytes, precision_of
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


# --- equality -------------------------------------------------------------------------------------


def test_equal_pictures_pass_and_others_do_not():
    assert Equality.judge(PICTURES, PICTURES, "fp32", True).holds
    assert Equality.judge(PICTURES + 0.5 * ATOL, PICTURES, "fp32", True).holds
    one = PICTURES.copy()
    one[2, 0, 7, 7] += 2 * ATOL
    assert not Equality.judge(one, PICTURES, "fp32", True).holds


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("compares", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pictures_that_are_not_finite_never_pass(bad, compares, precision):
    one = PICTURES.copy()
    one[0, 0, 0, 0] = bad
    verdict = Equality.judge(one, PICTURES, precision, compares)
    assert not verdict.holds and "not finite" in str(verdict)


def test_pictures_of_another_shape_do_not_pass():
    assert not Equality.judge(PICTURES[:2], PICTURES, "fp32", True).holds


def test_bfloat16_is_judged_by_psnr():
    def shifted(db):
        return PICTURES + 10 ** (-db / 20)

    assert psnr(shifted(40), PICTURES) == pytest.approx(40, abs=0.01)
    assert Equality.judge(shifted(PSNR_DB + 1), PICTURES, "bf16", True).holds
    assert not Equality.judge(shifted(PSNR_DB - 1), PICTURES, "bf16", True).holds
    assert Equality.judge(PICTURES, PICTURES, "bf16", True).value is None  # infinite is no JSON


# --- figures --------------------------------------------------------------------------------------


def test_ratios_are_within_a_round():
    """A machine that is ten times slower in one round does not move a ratio."""
    assert paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == Quantiles(2.0, 2.0, 2.0)


def result_of(peer, *seconds, **more):
    equality = Equality("none" if peer == "lucidrains" else "largest difference", None, None, True)
    return PeerResult(peer, precision_of(peer), equality, seconds=list(seconds), first_s=9.0, again_s=1.0, **more)


def measured(name, batch=1, flop=4e9, **seconds):
    """A result with these peers (`_` for `-`), of runs of two steps."""
    one = BatchResult(batch, 2, 3, [result_of(peer.replace("_", "-"), *times) for peer, times in seconds.items()])
    for peer in one.peers:
        peer.summarise(2, flop * batch, [10.0, 10.0, 10.0])
        peer.run_bytes = 10**8
    one.peak_gflops = {"fp32": Quantiles.of([10.0])}
    one.copy_gb_s = Quantiles.of([20.0])
    one.compare()
    return WorkloadResult(name, name, flop, 0.0, [one])


def test_speed_is_the_network_s_arithmetic_over_the_whole_step():
    peer = measured("cifar10", diffusers=(1.0, 2.0, 4.0)).batches[0].peers[0]
    assert peer.ms_per_step.p50 == pytest.approx(1000.0)  # two steps in two seconds
    assert peer.gflops.p50 == pytest.approx(4.0)  # 8 GFLOP in two seconds
    assert peer.of_peak.p50 == pytest.approx(0.4)
    assert peer.compile_s == 8.0


def test_the_best_peer_runs_the_same_network_in_the_same_precision():
    one = measured("x", fastddpm_eager=(3.0,), lucidrains=(0.1,), openvino_bf16=(0.2,), diffusers=(2.0,)).batches[0]
    assert one.fastest("fp32", ours=False).peer == "diffusers"
    assert one.fastest("fp32", ours=True).peer == "fastddpm-eager"
    assert one.fastest("bf16", ours=True) is None
    assert set(one.ratios["fastddpm-eager"]) == {"lucidrains", "openvino-bf16", "diffusers"}


def test_targets():
    slow = measured("cifar10", 8, fastddpm_compiled=(1.0, 1.0), diffusers=(1.1, 1.1), onnxruntime=(1.3, 1.3))
    fast = measured("mnist", 1, fastddpm_compiled=(1.0, 1.0), diffusers=(3.5, 3.5))
    slow.batches[0].peers[0].outside_ms, slow.batches[0].peers[0].outside_share = 5.0, 0.01
    found = {bar.what: bar for bar in bars.judge([slow, fast])}
    assert not found["cifar10, B = 8, fp32: against diffusers DDPMPipeline"].met
    best = found["cifar10, B = 8, fp32: against diffusers DDPMPipeline, the best"]
    assert best.met and best.value == pytest.approx(1.1)
    assert found["mnist, B = 1, fp32: against diffusers DDPMPipeline"].met
    assert found["cifar10, B = 8: share outside the network"].met
    assert found["cifar10, B = 8, fp32: of the matrix product's speed"].value == pytest.approx(6.4)
    assert found["cifar10, B = 8: memory, fastddpm, compiled"].met
    assert not any("bf16" in what for what in found)
    ours = fast.batches[0].find("fastddpm-compiled")
    ours.second_s = 6.0
    low = result_of("fastddpm-compiled-bf16", 1.0, 1.0)
    low.equality = Equality("psnr", 41.0, 30.0, True)
    fast.batches[0].peers.append(low)
    found |= {bar.what: bar for bar in bars.judge([fast])}
    assert not found["mnist, B = 1: from a new process to its first pictures, package found"].met
    assert found["mnist, B = 1: pictures in bf16, median PSNR"].met
    assert bars.judge([measured("mnist", 1, fastddpm_eager=(1.0,), diffusers=(3.5,))]) == []
    assert all(isinstance(row["met"], bool) for row in bars.rows(found.values()))


def test_flops_are_counted_without_computing():
    linear = torch.nn.Linear(10, 20)
    assert count_flops(linear, torch.zeros(3, 10)) == 2 * 3 * 10 * 20
    assert linear.weight.device.type == "cpu"


def test_the_machine_s_limits_are_numbers():
    limits = Limits()
    assert limits.gemm("fp32", repeats=1) > 0.1
    assert limits.copy(repeats=1) > 0.1


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def results():
    one = measured("cifar10", 8, fastddpm_compiled=(1.0, 1.1), diffusers=(2.0, 2.0), reference=(2.1, 2.2))
    one.batches[0].over_steps = {"diffusers": {"5": 1.0, "10": 2.0}}
    left = PeerResult("openvino", "fp32", note="needs the package openvino")
    one.batches[0].peers.append(left)
    return [
        one,
        measured("update", flop=0.0, diffusers=(1.0,)),
        WorkloadResult("celebahq256", "x", note="no diffusers"),
    ]


def test_files_hold_hardware_versions_and_figures(tmp_path, results):
    curve = memory.MemoryCurve(100, 10, [0.0, 1.0, 2.0], [10, 50, 100], [10**8] * 3)
    written = report.write(tmp_path, results, machine.describe(1), {"cold": False}, curve)
    values = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values["machine"]["versions"]["torch"] == torch.__version__.split("+")[0] or values["machine"]["versions"]
    peer = values["workloads"][0]["batches"][0]["peers"][0]
    assert set(peer["ms_per_step"]) == {"p20", "p50", "p80"} and peer["compile_s"] == 8.0
    assert values["workloads"][0]["batches"][0]["ratios"]["fastddpm-compiled"]["diffusers"]["p50"] > 1
    text = (tmp_path / "results.md").read_text()
    assert "needs the package openvino" in text and "no diffusers" in text and "100 pictures into a folder" in text
    assert (tmp_path / "memory.csv").read_text().splitlines()[1] == "0.00,10,100000000"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows if "fastddpm, compiled" in line and "GFLOP" not in line}) <= 2
    assert {path.name for path in written} == {"results.json", "results.md", "memory.csv"}


def test_plots(tmp_path, results):
    pytest.importorskip("matplotlib")
    curve = memory.MemoryCurve(100, 10, [0.0, 1.0], [10, 100], [10**8] * 2)
    written = plots.draw_all(tmp_path, results, curve)
    assert {path.name for path in written} == {"throughput.png", "ratios.png", "steps.png", "memory.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_no_figures_no_plots(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.draw_all(tmp_path, [WorkloadResult("x", "x", note="skipped")]) == []


def test_every_peer_has_a_label_and_a_class():
    named = {peer for workload in (*workloads.FULL, *workloads.QUICK) for peer in workload.peers}
    assert named <= set(LABELS) <= set(PEERS)
    for standard in (*workloads.FULL, *workloads.QUICK):
        assert len(standard.batches) == len(standard.steps) and all(1000 % steps == 0 for steps in standard.steps)


# --- the same network for both --------------------------------------------------------------------


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


# --- processes ------------------------------------------------------------------------------------


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


# --- memory ---------------------------------------------------------------------------------------


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


# --- the command ----------------------------------------------------------------------------------


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


def test_quiet_shows_nothing(capsys):
    from rich.console import Console

    with View(Console(), quiet=True) as view:
        view.on_event("x", 1, "reference", "first run")
        view.say("something")
        view.bars([bars.Bar("x", "1", "2", 1.0, 2.0)])
    assert capsys.readouterr().out == ""


def test_results_are_plain_data():
    json.dumps(as_json(measured("x", diffusers=(1.0,))), allow_nan=False)
