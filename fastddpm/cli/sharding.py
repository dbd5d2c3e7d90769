"""Sharding: what `fastddpm sample --shards` was asked for, beside what every drawing is asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch

from fastddpm.cli.drawing import Drawing, Outputs
from fastddpm.cli.errors import Stopped
from fastddpm.cli.shard_bar import ShardBar
from fastddpm.shards.formats import FormatName
from fastddpm.shards.maker import Maker, Recipe
from fastddpm.shards.part import local_gpu, parse_part, part_of
from fastddpm.shards.plan import Plan
from fastddpm.shards.store import Store
from fastddpm.shards.worker import Done, Worker


def sharding_of(
    out: str | None,
    shard_size: int | None,
    format: FormatName | None,
    part: str | None,
    ray: str | None,
    cpus_per_worker: int | None,
    files: Mapping[str, object],
) -> Sharding | None:
    """The options about shards; None where no shards are asked for.

    Raises:
        ValueError: options do not go together, or one is out of range.
    """
    mine = {
        "--shard-size": shard_size,
        "--format": format,
        "--part": part,
        "--ray": ray,
        "--cpus-per-worker": cpus_per_worker,
    }
    if out is None:
        if given := [name for name, value in mine.items() if value is not None]:
            raise ValueError(f"{given[0]} must be given with --shards, got it alone; name the place of the shards")
        return None
    if given := [name for name, value in files.items() if value is not None]:
        raise ValueError(f"--shards must be given without {given[0]}, got both; `fastddpm shards gather` joins shards")
    if ray is not None and part is not None:
        raise ValueError("--part must be left out with --ray, got both; Ray says which actor draws what")
    if cpus_per_worker is not None and (ray is None or cpus_per_worker < 1):
        raise ValueError(
            f"--cpus-per-worker must be at least 1, and given with --ray, got {cpus_per_worker}; correct it"
        )
    return Sharding(out, 1000 if shard_size is None else shard_size, format or "npz", part, ray, cpus_per_worker)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The options of `fastddpm sample` that are about shards; see there."""

    out: str
    shard_size: int
    format: FormatName
    part: str | None
    ray: str | None
    cpus_per_worker: int | None

    def device(self, asked: str | None) -> str | None:
        """Where this process samples, unless it was told: on the GPU that its launcher has picked for it.

        Raises:
            ValueError: there are fewer GPUs than processes.
        """
        if asked is not None:
            return asked
        if self.ray is not None:
            return "cpu"  # here the network is only read; Ray's actors sample
        return local_gpu(os.environ, torch.cuda.device_count())

    def run(self, drawing: Drawing) -> list[str]:
        """Draw what is missing.

        Returns:
            A line to tell.

        Raises:
            ValueError: an option is out of range, or another run is there.
            OSError: the place cannot be written or read.
            Stopped: on Ctrl-C.
        """
        drawing.check(Outputs(None, None, None, None))
        recipe = self._recipe(drawing)
        store = Store(self.out)
        try:
            done = self._on_ray(drawing, recipe, store) if self.ray is not None else self._here(drawing, recipe, store)
        except KeyboardInterrupt:
            raise Stopped("; the same command continues") from None
        return [_told(self.out, done, len(recipe.plan))]

    def _recipe(self, drawing: Drawing) -> Recipe:
        cycle = drawing.cycle()
        return Recipe(
            Plan(drawing.n, self.shard_size, drawing.first_id),
            self.format,
            drawing.method,
            None if cycle is None else tuple(cycle),
            drawing.guidance,
            drawing.seed,
            drawing.batch_size,
            {"model": drawing.model, "flags": dict(drawing.flags)},
        )

    def _here(self, drawing: Drawing, recipe: Recipe, store: Store) -> Done:
        part = parse_part(self.part) if self.part is not None else part_of(os.environ)
        maker = Maker(drawing.sampler, recipe, store, share=part.count or 1)
        with ShardBar(recipe.plan.n, quiet=drawing.quiet) as bar:
            return Worker(maker, part, bar).run()

    def _on_ray(self, drawing: Drawing, recipe: Recipe, store: Store) -> Done:
        from fastddpm.shards.ray_cluster import draw_on_ray  # late: an optional package

        with ShardBar(recipe.plan.n, quiet=drawing.quiet) as bar:
            return draw_on_ray(str(self.ray), drawing.sampler, recipe, store, bar, self.cpus_per_worker)


def _told(out: str, done: Done, shards: int) -> str:
    """What to say about a set of shards."""
    if not done.drawn:
        return f"{out} holds all {shards} shards already" if shards > 1 else f"{out} holds the shard already"
    mended = f"; {done.mended} had been damaged" if done.mended else ""
    drawn = f"{done.drawn} shard{'' if done.drawn == 1 else 's'} ({done.pictures:,} pictures{mended})"
    return f"wrote {drawn} to {out}; all {shards} are there"
