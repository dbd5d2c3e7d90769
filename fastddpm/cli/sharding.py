"""Sharding: what `fastddpm sample --shards` was asked for, beside what every drawing is asked for."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

import torch

from fastddpm.cli.drawing import Drawing, Outputs
from fastddpm.cli.errors import Stopped
from fastddpm.cli.shard_bar import ShardBar
from fastddpm.common.wording import counted
from fastddpm.shards.formats import FormatName
from fastddpm.shards.maker import Maker, Recipe
from fastddpm.shards.part import local_gpu, parse_part, part_of
from fastddpm.shards.plan import Plan
from fastddpm.shards.store import Store
from fastddpm.shards.worker import Done, Worker


@dataclasses.dataclass(frozen=True)
class Sharding:
    """The options of `fastddpm sample` that are about shards; see there, and `checked`."""

    out: str | None
    shard_size: int | None = None
    format: FormatName | None = None
    part: str | None = None
    ray: str | None = None
    cpus_per_worker: int | None = None

    def checked(self, files: Mapping[str, object]) -> Sharding | None:
        """The same, if shards are asked for; otherwise None.

        Args:
            files: the options that ask for other files, which do not go together with shards.

        Raises:
            ValueError: options do not go together, or one is out of range.
        """
        mine = [name for name, value in vars(self).items() if name != "out" and value is not None]
        if self.out is None:
            if mine:
                name = mine[0].replace("_", "-")
                raise ValueError(f"--{name} must be given with --shards, got it alone; name the place of the shards")
            return None
        if given := [name for name, value in files.items() if value is not None]:
            raise ValueError(
                f"--shards must be given without {given[0]}, got both; `fastddpm shards gather` joins shards"
            )
        if self.ray is not None and self.part is not None:
            raise ValueError("--part must be left out with --ray, got both; Ray says which actor draws what")
        cpus = self.cpus_per_worker
        if cpus is not None and (self.ray is None or cpus < 1):
            raise ValueError(f"--cpus-per-worker must be at least 1, and given with --ray, got {cpus}; correct it")
        return self

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
        drawing.check(Outputs())
        recipe = self._recipe(drawing)
        store = Store(str(self.out))
        try:
            done = self._on_ray(drawing, recipe, store) if self.ray is not None else self._here(drawing, recipe, store)
        except KeyboardInterrupt:
            raise Stopped("; the same command continues") from None
        return [_told(str(self.out), done, len(recipe.plan))]

    def _recipe(self, drawing: Drawing) -> Recipe:
        cycle = drawing.cycle()
        return Recipe(
            Plan(drawing.n, 1000 if self.shard_size is None else self.shard_size, drawing.first_id),
            self.format or "npz",
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
    drawn = f"{counted(done.drawn, 'shard')} ({done.pictures:,} pictures{mended})"
    return f"wrote {drawn} to {out}; all {shards} are there"
