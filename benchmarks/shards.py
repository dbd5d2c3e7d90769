"""What shards cost: beside a plain run, in memory, in reading them again, and on a Ray cluster.

`python -m benchmarks.shards cost|overhead|memory|workers|ray` prints a line of JSON for each measurement.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastddpm.process.method import Method
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.sampler import Sampler
from fastddpm.shards.formats import FORMATS
from fastddpm.shards.gathering import gather_npz
from fastddpm.shards.maker import Maker, Recipe
from fastddpm.shards.part import Part
from fastddpm.shards.plan import Plan
from fastddpm.shards.store import Store
from fastddpm.shards.worker import Unheard, Worker


def digits(steps: int) -> tuple[Sampler, Recipe]:
    """The shipped checkpoint, eager, and 2,000 pictures of it in shards of 1,000."""
    sampler = Sampler.from_pretrained("mnist", device="cpu", engine="eager")
    return sampler, Recipe(Plan(2000), method=Method("ddim", steps), classes=tuple(range(10)), batch_size=50)


def tiny(n: int) -> tuple[Sampler, Recipe]:
    """A network that costs nothing, 3 × 32 × 32, and n pictures of it in shards of 1,000."""

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x / (1 + t.view(-1, 1, 1, 1) / 100)

    sampler = Sampler(network, NoiseSchedule.linear(100), ModelSpec(shape=(3, 32, 32)), device="cpu", engine="eager")
    return sampler, Recipe(Plan(n), method=Method("ddim", 2), batch_size=250)


def taken(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def draw(maker: Maker) -> None:
    """All pictures of a run, which are kept nowhere."""
    ids = range(maker.recipe.plan.n)
    for batch in maker.stream(ids, maker.recipe.labels(ids)):
        assert batch.pictures is not None


def cost(rounds: int, steps: int) -> Iterator[dict[str, object]]:
    """A plain run and one in shards, in turn, of the same pictures."""
    sampler, recipe = digits(steps)
    plain, sharded = [], []
    sampler.sample(50, method=recipe.method, class_labels=0, batch_size=50, progress=False)  # warms up
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as out:
            maker = Maker(sampler, recipe, Store(out))
            plain.append(taken(functools.partial(draw, maker)))
            sharded.append(taken(Worker(maker).run))
    for name, which in (("clock", 0), ("processor", 1)):
        ratios = [b[which] / a[which] for a, b in zip(plain, sharded, strict=True)]
        yield {
            "what": f"cost, {name}", "steps": steps, "plain_s": [a[which] for a in plain],
            "sharded_s": [b[which] for b in sharded], "ratio": statistics.median(ratios),
        }  # fmt: skip


def overhead(rounds: int) -> Iterator[dict[str, object]]:
    """What a shard of 1,000 pictures costs besides drawing it, where drawing costs next to nothing."""
    for form in FORMATS:
        sampler, recipe = tiny(2000)
        recipe = dataclasses.replace(recipe, format=form)
        each = []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as out:
                maker = Maker(sampler, recipe, Store(out))
                plain = taken(functools.partial(draw, maker))
                sharded = taken(Worker(maker).run)
                each.append([500 * (b - a) for a, b in zip(plain, sharded, strict=True)])
        clock, processor = (statistics.median(ms) for ms in zip(*each, strict=True))
        yield {"what": "overhead", "format": form, "clock_ms": clock, "processor_ms": processor, "each": each}


def memory(n: int) -> Iterator[dict[str, object]]:
    """The largest memory of a process that draws, verifies and gathers n pictures."""
    sampler, recipe = tiny(n)
    with tempfile.TemporaryDirectory() as out:
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        maker = Maker(sampler, recipe, Store(f"{out}/shards"))
        Worker(maker).run()
        drawn = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds, processor = taken(lambda: list(maker.set.verify()))
        gathering, _ = taken(lambda: gather_npz(maker.set, Path(out, "all.npz")))
        whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield {
        "what": "memory", "n": n, "before_mib": base / 1024, "drawn_mib": drawn / 1024, "gathered_mib": whole / 1024,
        "verify_s": seconds, "verify_processor_s": processor, "gather_s": gathering,
    }  # fmt: skip


def workers(rounds: int, steps: int) -> Iterator[dict[str, object]]:
    """One and two processes with a thread each, in turn, on the same 2,000 pictures."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for count in (1, 2):
            with tempfile.TemporaryDirectory() as out:
                command = [sys.executable, "-m", "benchmarks.shards", "work", "--steps", str(steps), "--out", out]
                made = [
                    subprocess.Popen(
                        [*command, "--part", f"{i}/{count}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                    )
                    for i in range(count)
                ]
                for process in made:
                    assert process.stdout is not None
                    process.stdout.readline()  # it has imported and loaded
                began = time.perf_counter()
                for process in made:
                    process.communicate(b"go\n")
                times[count].append(time.perf_counter() - began)
    ratios = [one / two for one, two in zip(times[1], times[2], strict=True)]
    yield {
        "what": "workers",
        "steps": steps,
        "seconds": times,
        "speedup": statistics.median(ratios),
        "speedups": ratios,
    }


def work(steps: int, out: str, part: str) -> None:
    """One of the processes of `workers`."""
    torch.set_num_threads(1)
    sampler, recipe = digits(steps)
    recipe = Recipe(Plan(2000, 250), method=recipe.method, classes=recipe.classes, batch_size=50)
    index, count = map(int, part.split("/"))
    maker = Maker(sampler, recipe, Store(out))
    print("ready", flush=True)
    sys.stdin.readline()
    Worker(maker, Part(index, count), look=0.05).run()


def on_ray(n: int) -> Iterator[dict[str, object]]:
    """Shards that are there already, looked at by one actor and here: what handing out one costs."""
    import ray

    from fastddpm.shards.ray_cluster import draw_on_ray

    sampler = Sampler.from_pretrained("mnist", device="cpu", engine="eager")
    recipe = Recipe(Plan(n, 10), method=Method("ddim", 1), classes=tuple(range(10)), batch_size=10)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as out:
        maker = Maker(sampler, recipe, Store(out))
        Worker(maker).run()
        here, _ = taken(lambda: list(maker.set.verify()))
        few = Recipe(Plan(10, 10), method=recipe.method, classes=recipe.classes, batch_size=10)
        one = Store(f"{out}/one")
        Worker(Maker(sampler, few, one)).run()
        starting, _ = taken(lambda: draw_on_ray("auto", sampler, few, one, Unheard(), 1))
        there, _ = taken(lambda: draw_on_ray("auto", sampler, recipe, Store(out), Unheard(), 1))
    shards = len(recipe.plan)
    each = 1000 * (there - starting - here) / (shards - 1)
    yield {"what": "ray", "shards": shards, "here_s": here, "start_s": starting, "ray_s": there, "ms_per_shard": each}


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["cost", "overhead", "memory", "workers", "work", "ray"])
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", default="")
    parser.add_argument("--part", default="0/1")
    chosen = parser.parse_args()
    if chosen.what == "work":
        work(chosen.steps, chosen.out, chosen.part)
        return
    measurements: dict[str, Callable[[], Iterator[dict[str, object]]]] = {
        "cost": lambda: cost(chosen.rounds, chosen.steps),
        "overhead": lambda: overhead(chosen.rounds),
        "memory": lambda: memory(chosen.n),
        "workers": lambda: workers(chosen.rounds, chosen.steps),
        "ray": lambda: on_ray(chosen.n),
    }
    for line in measurements[chosen.what]():
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
