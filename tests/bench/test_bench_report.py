"""What the benchmark calls equal, how it counts, and the files and tables that it writes."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastddpm.bench import bars, hardware, memory, plots, report, summary, workloads
from fastddpm.bench.entrants import LABELS, PEERS, precision_of
from fastddpm.bench.figures import (
    ATOL,
    PSNR_DB,
    BatchResult,
    Equality,
    PeerResult,
    Quantiles,
    WorkloadResult,
    as_json,
    images_per_s,
    paired_ratio,
    psnr,
)
from fastddpm.bench.live import View
from fastddpm.bench.peers import count_flops

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("publish", ROOT / "benchmarks" / "publish.py")
tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tables)
PICTURES = np.random.default_rng(0).random((3, 1, 8, 8)).astype(np.float32)


# --- equality ---------------------------------------------------------------------------------------


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


# --- figures ----------------------------------------------------------------------------------------


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
        peer.summarise(2, batch, flop, [10.0, 10.0, 10.0])
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


def test_images_per_second_are_arithmetic_from_a_step():
    assert images_per_s(16, 2.0) == {"ddpm_1000": 8.0, "ddim_50": 160.0}
    peer = measured("cifar10", batch=8, diffusers=(1.0, 2.0, 4.0)).batches[0].peers[0]
    assert peer.images_per_s["ddpm_1000"] == pytest.approx(8 / 1000)


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
    assert not any("alone" in what for what in found)
    served = measured("mnist", 16, fastddpm_compiled=(1.2, 1.2), fastddpm_openvino=(1.0, 1.0), openvino=(1.1, 1.1))
    both = [bar for bar in bars.judge([served]) if "the best" in bar.what]
    assert [(bar.what.split(": ")[1].split(" against")[0], bar.met) for bar in both] == [
        ("against OpenVINO, the best", True), ("own engine alone", False),
    ]  # fmt: skip
    ours = fast.batches[0].find("fastddpm-compiled")
    ours.second_s = 6.0
    low = result_of("fastddpm-compiled-bf16", 1.0, 1.0)
    low.equality = Equality("psnr", 41.0, 30.0, True)
    fast.batches[0].peers.append(low)
    found |= {bar.what: bar for bar in bars.judge([fast])}
    assert not found["mnist, B = 1: from a new process to its first pictures, package found"].met
    assert found["mnist, B = 1: pictures in bf16, median PSNR"].met
    assert bars.judge([measured("mnist", 1, fastddpm_eager=(1.0,), diffusers=(3.5,))]) == []
    assert bars.judge([slow, fast], "cuda") == []
    assert all(isinstance(row["met"], bool) for row in bars.rows(found.values()))


def test_flops_are_counted_without_computing():
    linear = torch.nn.Linear(10, 20)
    assert count_flops(linear, torch.zeros(3, 10)) == 2 * 3 * 10 * 20
    assert linear.weight.device.type == "cpu"


# --- files ------------------------------------------------------------------------------------------


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
    written = report.write(tmp_path, results, hardware.describe(1), {"cold": False}, curve)
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


STANDARD = (*workloads.FULL, *workloads.QUICK, *workloads.ON_GPU, *workloads.QUICK_ON_GPU)


def test_every_peer_has_a_label_and_a_class():
    assert {peer for workload in STANDARD for peer in workload.everyone} <= set(LABELS) <= set(PEERS)
    for standard in STANDARD:
        assert len(standard.batches) == len(standard.steps) and all(1000 % steps == 0 for steps in standard.steps)


@pytest.mark.parametrize("kind", ["full", "quick"])
def test_ours_and_the_main_libraries_always_take_part_on_a_cpu(kind):
    wanted = {"fastddpm-compiled", "diffusers", "onnxruntime"} | ({"openvino"} if kind == "full" else set())
    for workload in workloads.standard(kind == "quick", "cpu"):
        expected = {"fastddpm-compiled", "diffusers"} if workload.is_update else wanted
        assert expected <= set(workload.peers), workload.name


def test_a_gpu_gets_larger_batches_in_all_engines_and_precisions():
    found = {workload.name: workload for workload in workloads.choose([], False, "cuda")}
    assert found["cifar10"].batches == (1, 16, 128, 512) and found["celebahq256"].batches == (1, 8, 32)
    for workload in found.values():
        for low in ("tf32", "bf16"):
            assert {f"fastddpm-{engine}-{low}" for engine in ("eager", "compiled", "graph")} <= set(workload.peers)
            assert {f"diffusers-{low}", f"diffusers-reduced-{low}"} <= set(workload.peers)
        assert {"reference", "reference-tf32"} <= set(workload.peers)


# --- the README's tables --------------------------------------------------------------------------

MACHINE = {
    "threads": 2, "processor": "Made-up", "instructions": "AVX", "versions": {"torch": "2.13.0", "numpy": "2"},
    "date": "2026-01-02T03:04:05", "commit": None, "gpu": "Made-up 80 GB",
}  # fmt: skip


def test_table_of_a_cpu():
    others = {"diffusers": (3.0, 3.0), "onnxruntime": (2.0, 2.0), "openvino_bf16": (0.2, 0.2), "reference": (0.1, 0.1)}
    digits = measured("mnist", 1, fastddpm_compiled=(1.0, 1.0), **others)
    digits.batches += measured("mnist", 64, fastddpm_compiled=(1.0, 1.0)).batches  # nobody to compare with
    results = [
        digits,
        measured("cifar10", 8, fastddpm_compiled_bf16=(0.5, 0.5), **others),
        measured("update", 1, flop=0.0, fastddpm_eager=(0.001, 0.001), diffusers=(0.004, 0.004)),
    ]
    assert summary.cpu_rows(results) == [
        ("shipped digits (1.9 M), fp32, 1 picture", "500", "1500", "1000 (ONNX Runtime)", "3.00×", "2.00×"),
        ("the same, 8 pictures", "250", "1500 in fp32", "100 (OpenVINO)", "6.00×", "0.40×"),
        ("the update alone, noise made inside, 1×3×32×32", "0.5 (eager)", "2 (`DDPMScheduler.step`)", "", "4.00×", ""),
    ]
    lines = summary.text(results, MACHINE, "cpu").splitlines()
    assert len({line.count("|") for line in lines[:-2]}) == 1 and lines[-2] == ""
    assert lines[-1].startswith("Made-up (AVX), 2 threads, PyTorch 2.13.0; 2026-01-02, commit unknown")
    assert summary.text([measured("mnist", 1, diffusers=(1.0,))], MACHINE, "cpu") == ""


def test_table_of_a_gpu(tmp_path):
    ours = {"fastddpm_graph_bf16": (1.0,), "fastddpm_eager_bf16": (2.0,)}
    results = [measured("cifar10", 16, flop=1e12, **ours, diffusers_bf16=(4.0,), diffusers=(1.0,))]
    (row,) = summary.gpu_rows(results)
    assert row[:4] == ("CIFAR-10 U-Net (35.7 M), bf16, 16", "500 (cuda graph)", "2000", "")
    assert row[5:8] == ("4.00×", "", "0.032, 0.64") and row[8].startswith("32")
    (path,) = summary.write(tmp_path, results, MACHINE, "cuda")
    assert path.name == "table-gpu.md" and "One Made-up 80 GB" in path.read_text()


@pytest.mark.parametrize("kind", tables.KINDS)
def test_readme_shows_the_committed_table(kind):
    committed = ROOT / tables.committed(kind)
    assert tables.shown((ROOT / "README.md").read_text(), kind) == (
        committed.read_text() if committed.exists() else None
    )


def test_publishing_a_table(tmp_path):
    results, root = tmp_path / "results", tmp_path / "root"
    results.mkdir()
    (root / "docs").mkdir(parents=True)
    with pytest.raises(ValueError, match="must hold a table, got none"):
        tables.publish(results, root)
    (results / "table-cpu.md").write_text("| new |\n\nA machine.\n")
    (root / "README.md").write_text("no place for it\n")
    with pytest.raises(ValueError, match="README.md must have a line"):
        tables.publish(results, root)
    assert not (root / "docs" / "benchmarks").exists()
    (root / "README.md").write_text(f"before\n<!-- docs/benchmarks/cpu.md -->\n| old |\n{tables.END}\nafter\n")
    assert tables.publish(results, root) == ["docs/benchmarks/cpu.md"]
    assert (root / "docs/benchmarks/cpu.md").read_text() == "| new |\n\nA machine.\n"
    readme = (root / "README.md").read_text()
    assert readme == f"before\n<!-- docs/benchmarks/cpu.md -->\n| new |\n\nA machine.\n{tables.END}\nafter\n"


# --- what people see ------------------------------------------------------------------------------


def test_quiet_shows_nothing(capsys):
    from rich.console import Console

    with View(Console(), quiet=True) as view:
        view.on_event("x", 1, "reference", "first run")
        view.say("something")
        view.bars([bars.Bar("x", "1", "2", 1.0, 2.0)])
    assert capsys.readouterr().out == ""


def test_results_are_plain_data():
    json.dumps(as_json(measured("x", diffusers=(1.0,))), allow_nan=False)
