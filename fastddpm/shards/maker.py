"""Maker: draws a shard and writes it; and what decides the pictures, besides their ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from fastddpm.common.terminal import patience
from fastddpm.engines.choose import EngineName, Settled
from fastddpm.engines.devices import versions
from fastddpm.files import sha256
from fastddpm.images import SHOWN_CHANNELS
from fastddpm.process.conventions import conventions_checksum
from fastddpm.process.method import Method
from fastddpm.process.table import DynamicThreshold
from fastddpm.sampler import Batch, Sampler
from fastddpm.shards.formats import FORMATS, FormatName, to_pieces
from fastddpm.shards.npz import Pictures
from fastddpm.shards.plan import Plan, Shard, even_batch_size
from fastddpm.shards.records import RUN_FILE, ShardRecord
from fastddpm.shards.shard_set import ShardSet
from fastddpm.shards.store import Store
from fastddpm.step.request import RunOptions, default_batch_size, in_turn, make_request

_SETTLING_STEPS = 3
"""Steps after which an engine that chooses has chosen."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is asked for, besides the network: all shards of a run are drawn by one recipe.

    Args:
        plan: which ids are in which shard.
        format: of the shards' files.
        method: how to sample.
        classes: the labels that the ids go through in turn: id i has classes[i mod len(classes)]; None for none.
        guidance_scale: of classifier-free guidance.
        seed: of all pictures.
        batch_size: samples that run together; None is what the run has that is joined, or else what fits the shards.
        note: what to write down for people, and not to compare: the network's name, its flags.
    """

    plan: Plan
    format: FormatName = "npz"
    method: Method = dataclasses.field(default_factory=Method)
    classes: Sequence[int] | None = None
    guidance_scale: float = 1.0
    seed: int = 0
    batch_size: int | None = None
    note: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def labels(self, ids: Sequence[int]) -> list[int] | None:
        """The class of each id."""
        return in_turn(self.classes, ids)

    def settings(self) -> dict[str, Any]:
        """What it asks for, as JSON-ready values."""
        plan = {"n": self.plan.n, "shard_size": self.plan.shard_size, "first_id": self.plan.first_id}
        method = {field.name: _plain(getattr(self.method, field.name)) for field in dataclasses.fields(Method)}
        asked = {"classes": _plain(self.classes), "guidance_scale": self.guidance_scale, "seed": self.seed}
        return {**self.note, **plan, "format": self.format, **method, **asked}


class Maker:
    """Draws shards by one recipe, with one sampler whose step is compiled and captured once for all of them."""

    def __init__(self, sampler: Sampler, recipe: Recipe, store: Store, *, share: int = 1) -> None:
        """Begin the run, or join it.

        Args:
            sampler: what draws.
            recipe: what is asked for.
            store: where the shards are to be.
            share: how many workers there will be, for the engine's choice: it asks how much work is to come.

        Raises:
            ValueError: another run is there, or what is asked for does not fit the network or the format.
            OSError: the place cannot be written or read.
        """
        _check_shown(sampler, recipe.format)
        store.check_writable()
        joined = _joined(store)
        device = sampler.device
        usual = even_batch_size(recipe.plan.shard_size, default_batch_size(device))
        self.batch_size = recipe.batch_size or int(joined.get("batch_size", usual))
        self.sampler, self.recipe = sampler, recipe
        if joined.get("device", device.type) == device.type:  # else what differs is told below
            self._settle(joined.get("engine"), share)
        self.set = ShardSet.begin(store, {**recipe.settings(), **self._own_settings()})

    def _own_settings(self) -> dict[str, object]:
        """What decides pictures besides the recipe: the network, and how it is run."""
        sampler = self.sampler
        return {
            "weights": sampler.stepper.weights,
            "conventions": conventions_checksum(sampler.schedule, sampler.spec),
            "batch_size": self.batch_size,
            "device": sampler.device.type,
            "engine": sampler.engine.name,
            "precision": sampler.precision,
            "versions": versions("fastddpm", "torch"),
        }

    def _settle(self, joined: EngineName | None, share: int) -> None:
        """Have one engine for the whole run: rounding differs between them, and with it the bytes of a shard."""
        engine = self.sampler.engine
        if engine.name != "auto":
            return  # where the run that is joined has another one, that is told below
        if joined is not None:
            engine.keep_to(joined)
        else:
            plan = self.recipe.plan
            batches = -(-plan.shard_size // self.batch_size) * len(plan)
            with patience("preparing the step"):
                engine.keep_to(self._chosen(-(-batches // share)))

    def _chosen(self, batches: int) -> EngineName:
        """The engine that a sampler chooses for so many batches, by the first steps of one that is thrown away."""
        sampler, recipe = self.sampler, self.recipe
        table = recipe.method.table(sampler.schedule, sampler.spec)
        ids = recipe.plan[0].ids[: self.batch_size]
        run = RunOptions(recipe.seed, ids, recipe.labels(ids), recipe.guidance_scale, self.batch_size)
        with sampler.stepper.undisturbed():
            sampler.stepper.refresh()
            request = make_request(sampler.spec, sampler.device, len(ids), run)
            come = batches * table.S
            with sampler.stepper.begin(table, request.filled(), to_come=come, settled=Settled()) as runner:
                made, most = 0, min(_SETTLING_STEPS, table.S)
                while made < most:
                    made += runner.run(most - made)
        return cast(EngineName, sampler.engine.used)

    def make(self, shard: Shard, told: Callable[[int], None] = lambda _: None) -> ShardRecord:
        """Draw a shard and write it: its pictures first, then its record, by which it counts.

        Args:
            shard: which.
            told: is told after each batch how many of the shard's pictures are drawn.

        Returns:
            The record.

        Raises:
            FloatingPointError: the samples ran into NaN or infinity.
            OSError: it cannot be written.
        """
        labels, store, form = self.recipe.labels(shard.ids), self.set.store, self.set.format
        target = form.target(shard)
        with store.writing(target, folder=form.in_folder) as path:
            form.write(path, shard, self._pictures(shard, labels, told), labels)
            files = sorted(path.iterdir()) if form.in_folder else [path]
            names = [f"{target}/{file.name}" for file in files] if form.in_folder else [target]
            sizes, sums = tuple(file.stat().st_size for file in files), tuple(sha256(file) for file in files)
        known = None if labels is None else tuple(labels)
        record = ShardRecord(
            shard.number, shard.first_id, shard.count, self.set.run.digest, tuple(names), sizes, sums, known
        )
        store.write(shard.record, record.to_json())
        return record

    def _pictures(self, shard: Shard, labels: list[int] | None, told: Callable[[int], None]) -> Iterator[Pictures]:
        drawn = 0
        for batch in self.stream(shard.ids, labels):
            yield to_pieces(cast(Tensor, batch.pictures))
            drawn += len(batch.ids)
            told(drawn)

    def stream(self, ids: Sequence[int], labels: list[int] | None) -> Iterator[Batch]:
        """Batches of pictures, uint8 [B, C, H, W]; short ones are filled up, so that each is drawn as all others."""
        recipe = self.recipe
        return self.sampler.stream(
            len(ids),
            method=recipe.method,
            seed=recipe.seed,
            sample_ids=ids,
            class_labels=labels,
            guidance_scale=recipe.guidance_scale,
            batch_size=self.batch_size,
            output="uint8",
            progress=False,
        )


def _joined(store: Store) -> Mapping[str, Any]:
    """The settings of the run that is there; nothing if there is none."""
    return ShardSet.open(store).settings if store.read(RUN_FILE) is not None else {}


def _check_shown(sampler: Sampler, form: FormatName) -> None:
    channels = sampler.spec.shape[0]
    if FORMATS[form].shows and channels not in SHOWN_CHANNELS:
        raise ValueError(
            f"format must be npz for pictures of {channels} channels, got {form}: image files hold 1, 3 or 4; change it"
        )


def _plain(value: object) -> object:
    """A setting as a JSON-ready value."""
    if isinstance(value, DynamicThreshold):
        return dataclasses.asdict(value)
    if isinstance(value, Tensor):
        return value.tolist()
    return list(value) if isinstance(value, (tuple, range, list)) else value
