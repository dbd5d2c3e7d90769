"""Times, peaks, kernels and a GPU's sections: on this machine's clock, and through fakes of what only a GPU has."""

import dataclasses
import json
import time

import pytest
import torch

from fastddpm.bench import cases, kernels, peaks, sections
from fastddpm.bench.arithmetic import arithmetic
from fastddpm.bench.cases import Case, Contender, Effort
from fastddpm.bench.timing import Clock, in_turn, replayed
from fastddpm.engines.gpu import WARM_UPS

# --- in turn --------------------------------------------------------------------------------------


def test_rounds_go_there_and_back():
    order = []
    taken = in_turn({name: lambda name=name: order.append(name) or 1.0 for name in "abc"}, 3)
    assert "".join(order) == "abccbaabc" and taken == {name: [1.0] * 3 for name in "abc"}


def test_who_drops_out_has_no_figures_and_stops_nobody():
    answers = iter([1.0, None])
    taken = in_turn({"a": lambda: next(answers), "b": lambda: 2.0}, 4)
    assert taken == {"b": [2.0] * 4}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 3), (float("inf"), 50)], ids=["short", "long"])
def test_rounds_end_with_the_time_but_there_are_three(seconds, rounds):
    numbers = []
    taken = in_turn({"a": lambda: time.sleep(0.001) or 1.0}, 50, seconds=seconds, before=numbers.append)
    assert len(taken["a"]) == rounds and numbers == list(range(rounds))


# --- clocks ---------------------------------------------------------------------------------------


def test_a_cpu_s_time_is_read_off_the_wall():
    clock = Clock.of("cpu")
    assert clock.name == "wall" and 20 <= clock.spent(lambda: time.sleep(0.02)) < 2000


class FakeGpu:
    """A GPU's time line: what is called is put on it, and takes its time only when somebody waits."""

    def __init__(self):
        self.ms, self.log = 0.0, []

    def work(self, ms):
        self.ms += ms

    def event(self, enable_timing=False):
        gpu = self

        class Event:
            reached = None

            def record(self):
                self.at = gpu.ms

            def synchronize(self):
                self.reached = True

            def elapsed_time(self, other):
                if not (enable_timing and other.reached):
                    raise RuntimeError("Both events must be completed before calculating elapsed time.")
                return other.at - self.at

        return Event()

    def stream(self):
        return type("Stream", (), {"wait_stream": lambda _, other: self.log.append("wait")})()


@pytest.fixture
def gpu(monkeypatch):
    import contextlib

    fake = FakeGpu()
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "Stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())

    class Graph:
        def __init__(self):
            self.calls = []

        def replay(self):
            fake.log.append("replay")
            fake.work(sum(self.calls))

    @contextlib.contextmanager
    def capture(graph):
        work, fake.work = fake.work, graph.calls.append  # capturing computes nothing
        try:
            yield
        finally:
            fake.work = work

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    return fake


def test_a_gpu_s_time_is_read_off_events(gpu):
    clock = Clock.of("cuda")
    assert clock.name == "events"
    assert clock.spent(lambda: gpu.work(3.5)) == 3.5
    assert clock.spent(lambda: time.sleep(0.01)) == 0.0  # not the host's


def test_captured_calls_are_replayed_as_one_launch(gpu):
    seen = []
    replay = replayed(lambda i: seen.append(i) or gpu.work(2.0), 4, "cuda")
    assert seen == [0, 1, 2, 3] * (WARM_UPS + 1) and gpu.ms == 2.0 * 4 * WARM_UPS
    assert Clock.of("cuda").spent(replay) == 8.0 and gpu.log[-1] == "replay" and len(seen) == 4 * (WARM_UPS + 1)


def test_calls_on_a_cpu_are_a_loop():
    seen = []
    replayed(seen.append, 3, "cpu")()
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_float32_on_a_gpu_means_what_the_precision_says(precision):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    with arithmetic(precision, "cuda"):
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is (precision == "tf32")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before


# --- peaks ----------------------------------------------------------------------------------------


def test_peaks_are_measured_anew(monkeypatch):
    found = peaks.Peaks("cpu", dry=True)
    assert set(found.measure(["fp32", "bf16"])) == {"fp32", "bf16", "copy"}
    speeds = iter([3.0, 9.0, 5.0])
    monkeypatch.setattr(peaks.Peaks, "speed", lambda *_: next(speeds))
    assert found.product("fp32", repeats=3) == 9.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_products_are_of_random_data_and_count_their_arithmetic(precision):
    mm, convolution = peaks.Peaks("cpu", dry=True).products(precision)
    assert mm.flop == 2 * 64**3 and convolution.flop == 2 * 16**2 * 8**2
    for product in (mm, convolution):
        out = product.call()
        assert (
            out.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32) and float(out.float().std()) > 0.1
        )


# --- cases ----------------------------------------------------------------------------------------


def case_of(*calls, **options):
    names = ("ours", "textbook", "other")
    contenders = tuple(Contender(name, call, **options) for name, call in zip(names, calls, strict=False))
    return Case("case", (2,), contenders, moved=1000, buffers=2)


def test_what_computes_something_else_is_not_timed():
    called = []

    def wrong(i):
        called.append(i)
        return torch.ones(2) + 2 * cases.TOLERANCE

    with pytest.raises(ValueError, match=r"case, 2: ours must compute what textbook does, got a difference of 2e-05"):
        cases.measure(case_of(wrong, lambda i: torch.ones(2)), "cpu", Effort(3, 2))
    assert len(called) == 2
    with pytest.raises(ValueError, match="nan"):
        cases.compare(case_of(lambda i: torch.full((2,), torch.nan), lambda i: torch.ones(2)))


def test_figures_of_a_case(gpu, monkeypatch):
    """On the (fake) GPU: per call, from replays, over the copy's speed, and ratios to ours."""

    def taking(ms):
        return lambda i: gpu.work(ms) or torch.ones(2)

    result = cases.measure(case_of(taking(2.0), taking(4.0)), "cuda", Effort(3, 5), copy_gb_s=1e-3)
    ours, textbook = result["contenders"]
    assert result["clock"] == "events" and ours["replayed"]
    assert ours["ms"] == {"p20": 2.0, "p50": 2.0, "p80": 2.0} and textbook["times_ours"]["p50"] == 2.0
    assert ours["gb_s"] == pytest.approx(1000 / 2e-3 / 1e9) and ours["of_copy"] == pytest.approx(0.5)
    assert "500" not in cases.table([result]) and "50%" in cases.table([result])
    called = cases.measure(case_of(taking(2.0), taking(4.0), captured=False), "cuda", Effort(3, 5))
    assert not called["contenders"][0]["replayed"] and called["contenders"][0]["ms"]["p50"] == 2.0


def test_calls_go_round_the_buffers():
    seen = []
    case = case_of(lambda i: seen.append(i) or torch.ones(2), lambda i: torch.ones(2))
    cases.measure(case, "cpu", Effort(1, 4))
    assert seen == [0, 0] + 2 * [0, 1, 0, 1]  # first, compared, warm-up, one round


@pytest.mark.parametrize("name", ["p_sample, noise given", "q_sample, bytes, noise made", "add_group_norm, alone"])
def test_a_kernel_that_computes_something_else_is_noticed(name, monkeypatch):
    """The update, the noising and the norm, each with a tiny error."""

    def broken(function):
        def call(*args, **options):
            result = function(*args, **options)
            (args[0].x if result is None else result[-1 if "norm" in name else 0]).add_(1e-3)
            return result

        return call

    for kernel in ("p_sample", "q_sample", "add_group_norm"):
        monkeypatch.setattr(kernels, kernel, broken(getattr(kernels, kernel)))
    (make,) = (make for key, make in kernels.makers("cpu", dry=True).items() if key.startswith(name))
    with pytest.raises(ValueError, match="must compute what"):
        cases.compare(make())


# --- sections -------------------------------------------------------------------------------------


def plain(values):
    """Checks that values are JSON with numbers that are numbers."""
    return json.loads(json.dumps(values, allow_nan=False))


def test_peaks_section():
    found = plain(sections.measure_peaks("cpu", dry=True))
    assert found["copy_gb_s"] > 0 and set(found["product_gflop_s"]) == {"fp32", "bf16"} and "TFLOP/s" in found["text"]


def test_kernels_section_runs_every_case(monkeypatch):
    found = plain(sections.measure_kernels("cpu", dry=True))
    assert found["failed"] == [] and [case["case"] for case in found["cases"]] == [
        key.rpartition(", ")[0] for key in kernels.makers("cuda", dry=True)
    ]
    names = {row["name"] for case in found["cases"] for row in case["contenders"]}
    assert {"p_sample", "q_sample", "add_group_norm", "textbook, torch.compile"} <= names


def test_a_case_that_fails_stops_no_other(monkeypatch):
    def fail():
        raise RuntimeError("out of registers\nand more")

    made = {"bad": fail, "good": lambda: case_of(lambda i: torch.ones(2), lambda i: torch.ones(2))}
    monkeypatch.setattr(kernels, "makers", lambda *_: made)
    found = sections.measure_kernels("cpu", dry=True)
    assert found["failed"] == ["bad: RuntimeError: out of registers"] and len(found["cases"]) == 1
    assert "failed: bad" in found["text"]


def test_steps_section(monkeypatch):
    """Ours in two precisions, diffusers, diffusers under torch.compile and the textbook, in one process.

    `test_bench.py` has them in processes of their own, each of which imports everything anew.
    """
    pytest.importorskip("diffusers")
    settings = sections._settings
    monkeypatch.setattr(
        sections, "_settings", lambda *given: dataclasses.replace(settings(*given), local=True, side_by_side=1)
    )
    found = plain(sections.measure_steps("cpu", sections.networks(dry=True), dry=True))
    for one in found["networks"][0]["batches"]:
        timed = {peer["peer"] for peer in one["peers"] if peer["seconds"]}
        assert timed == set(sections.DRY[0].peers) - {"fastddpm-graph-bf16"} and one["rounds"] == 3
        assert all(peer["images_per_s"]["ddim_50"] > 0 for peer in one["peers"] if peer["seconds"])
    assert len(found["left_out"]) == 2 and "CUDA graphs are for GPUs" in found["left_out"][0]
    assert found["table"].count("\n| tiny, bf16") == 2 and found["table"] in found["text"]


def test_what_compiles_can_be_compiled_ahead():
    pytest.importorskip("diffusers")
    wanted = sections.compilations()
    assert ("cifar10", "fastddpm-graph-bf16", 512) in wanted and ("celebahq256", "diffusers-reduced-tf32", 8) in wanted
    network, peer, batch = sections.compilations(dry=True)[0]
    done = plain(sections.compile_ahead("cpu", network, peer, batch, dry=True))
    assert done["seconds"] > 0 and done["error"] == "" and (done["peer"], done["batch"]) == (peer, batch)
    failed = sections.compile_ahead("cpu", "tiny", "fastddpm-graph-bf16", 1, dry=True)
    assert failed["seconds"] is None and failed["error"] == "CUDA graphs are for GPUs"


def test_a_step_is_taken_apart(tmp_path):
    found = plain(sections.take_apart("cpu", tmp_path, dry=True))
    assert found["launches"] > 100 and found["busy_ms"] > 0 and found["wall_ms"] > 0
    assert 0 < found["convolutions"] < 1 and len(found["kernels"]) == 10
    assert json.loads((tmp_path / "chrome_trace.json").read_text())["traceEvents"]
    assert "convolutions are" in found["text"]
