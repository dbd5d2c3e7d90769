"""Shards on a Ray cluster: Ray places the actors that draw and tells which died; here they are handed shards."""

from __future__ import annotations

import collections
import contextlib
import math
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch

from fastddpm.checkpoints import Checkpoint
from fastddpm.common.wording import first_line
from fastddpm.sampler import Sampler
from fastddpm.shards import claims
from fastddpm.shards.maker import Maker, Recipe
from fastddpm.shards.plan import Shard
from fastddpm.shards.store import Store
from fastddpm.shards.worker import Done, Report

try:
    import ray
except ImportError as error:
    raise ValueError('--ray needs the package ray, which is not installed; pip install "fastddpm[ray]"') from error

LOOK_S = 1.0
"""How often the cluster is asked whether there is room for more actors."""
ANSWER_S = 10.0
"""How long a cluster's address may be silent."""
NOBODY_S = 600.0
"""How long no actor may be there at all."""
MOST_DEATHS = 5
"""How often actors may die over one shard, before it is taken for the shard's fault."""


class Drawer:
    """An actor: one sampler in a process of its own, somewhere in the cluster."""

    def __init__(self, checkpoint: Checkpoint, run: dict[str, Any], recipe: Recipe, store: Store, share: int) -> None:
        """Take in what is asked for; nothing is done here, since Ray would wrap what goes wrong."""
        self._checkpoint, self._run, self._recipe, self._store, self._share = checkpoint, run, recipe, store, share
        self._maker: Maker | None = None

    def ready(self) -> None:
        """Make a sampler where the actor is, and begin the run or join it."""
        options = {name: value for name, value in self._run.items() if name != "threads"}
        if self._run["threads"]:
            torch.set_num_threads(int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
        checkpoint = self._checkpoint
        sampler = Sampler(checkpoint.network, checkpoint.schedule, checkpoint.spec, **options)
        self._maker = Maker(sampler, self._recipe, self._store, share=self._share)

    def draw(self, number: int) -> tuple[bool, bool]:
        """Have a shard; returns whether it was drawn, and whether a damaged one was there."""
        maker = self._maker
        if maker is None:
            raise RuntimeError("Drawer: ready must be called before draw, got draw alone; call it")
        shard = maker.set.plan[number]
        found = maker.set.look(shard, thorough=True)
        if not found:
            maker.make(shard)
        return not found, found.state == "damaged"


def draw_on_ray(
    address: str, sampler: Sampler, recipe: Recipe, store: Store, report: Report, cpus: int | None = None
) -> Done:
    """Draw what is missing or damaged of a set of shards on a Ray cluster.

    There is an actor for each GPU of the cluster, or, without GPUs or where `cpus` is given, for so many CPUs. An
    actor that dies is replaced where Ray finds room, and its shard is handed out again; a node that joins gets actors.

    Args:
        address: of the cluster; "auto" is the one at hand.
        sampler: what shall draw; its network is sent to the actors, its device and engine's choice are theirs.
        recipe: what is asked for.
        store: where the shards are to be; actors on other machines must reach it.
        report: is told how far the set is.
        cpus: CPUs of an actor.

    Returns:
        What was drawn.

    Raises:
        ValueError: there is no such cluster, another run is at the place, or the sampler has no checkpoint.
        OSError: the place cannot be written, no actor comes up, or a shard is the death of one actor after the other.
    """
    if sampler.checkpoint is None:
        raise ValueError("draw_on_ray: sampler must be of a checkpoint, got a network of your own; save it first")
    with _cluster(address):
        gpus = cpus is None and ray.cluster_resources().get("GPU", 0) >= 1
        needs = {"num_gpus": 1} if gpus else {"num_cpus": cpus or 1}
        run: dict[str, Any] = {"engine": sampler.engine.name, "precision": sampler.precision, "threads": not gpus}
        run["device"] = "cuda" if gpus else "cpu"
        arguments = (ray.put(sampler.checkpoint), run, recipe, store)
        hands = _Hands(arguments, needs, list(recipe.plan), report)
        try:
            done = hands.run()
        finally:
            hands.close()
    claims.remove_all(store)
    store.tidy()
    return done


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[None]:
    """A connection to a cluster; one that the program has already is used and left as it is."""
    if ray.is_initialized():
        yield
        return
    try:
        _check_answers(address)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # of several kinds, and not all are Ray's own
        raise ValueError(
            f"--ray must be a Ray cluster's address, got {address!r} ({first_line(error)}); start one: ray start --head"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """See that somebody listens at HOST:PORT: Ray itself would try for minutes.

    Raises:
        OSError: nobody does.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=ANSWER_S).close()


class _Hands:
    """Hands out shards, one at a time to each actor that is ready."""

    def __init__(self, arguments: tuple[Any, ...], needs: dict[str, int], shards: list[Shard], report: Report) -> None:
        self._arguments, self._needs, self._report = arguments, needs, report
        self._waiting = collections.deque(shards)
        self._deaths: collections.Counter[int] = collections.Counter()
        self._busy: dict[Any, tuple[Any, Shard | None]] = {}  # what is to come → the actor, and what it draws
        self._done = Done()
        self._last_news = time.monotonic()

    def run(self) -> Done:
        """Until every shard is there."""
        while self._waiting or any(shard for _, shard in self._busy.values()):
            self._hire()
            came, _ = ray.wait(list(self._busy), timeout=LOOK_S)
            for future in came:
                self._last_news = time.monotonic()
                self._hear(future, *self._busy.pop(future))
            self._check_somebody_is_there()
        return self._done

    def close(self) -> None:
        """Let all actors go."""
        for actor, _ in self._busy.values():
            ray.kill(actor)

    def _hire(self) -> None:
        """Ask for as many actors as there is room for, or one, so that a cluster that grows on demand does."""
        room = max(1, _room(self._needs))
        at_work = sum(shard is not None for _, shard in self._busy.values())
        for _ in range(min(room, at_work + len(self._waiting)) - len(self._busy)):
            remote = ray.remote(max_restarts=0, max_task_retries=0, **self._needs)(Drawer)
            actor = remote.remote(*self._arguments, room)
            self._busy[actor.ready.remote()] = (actor, None)

    def _hear(self, future: Any, actor: Any, shard: Shard | None) -> None:  # noqa: ANN401 - Ray has no types
        """What an actor answered, or that it died."""
        try:
            answer = ray.get(future)
        except (ray.exceptions.RayActorError, ray.exceptions.NodeDiedError, ray.exceptions.ObjectLostError) as error:
            self._mourn(error, shard)
            return
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        if shard is not None:
            drawn, damaged = answer
            self._done.drawn += drawn
            self._done.mended += damaged
            self._done.pictures += shard.count * drawn
            self._report.there(shard.count)
        if self._waiting:
            following = self._waiting.popleft()
            self._busy[actor.draw.remote(following.number)] = (actor, following)
        else:
            ray.kill(actor)

    def _mourn(self, error: Exception, shard: Shard | None) -> None:
        """An actor is gone; its shard is handed out again."""
        number = -1 if shard is None else shard.number
        self._deaths[number] += 1
        if self._deaths[number] >= MOST_DEATHS:
            what = "coming up" if shard is None else f"drawing {shard.name}"
            raise OSError(
                f"--ray: actors must live, got {MOST_DEATHS} that died {what} ({first_line(error)}); see Ray's logs"
            )
        if shard is not None:
            self._waiting.appendleft(shard)

    def _check_somebody_is_there(self) -> None:
        at_work = any(shard for _, shard in self._busy.values())
        if not at_work and time.monotonic() - self._last_news > NOBODY_S:
            raise OSError(
                f"--ray: actors of {self._needs} must come up, got none in {NOBODY_S:.0f} s; ask for less or add nodes"
            )


def _room(needs: dict[str, int]) -> int:
    """How many actors the nodes that are alive can hold."""
    [(name, least)] = needs.items()
    kind = "GPU" if name == "num_gpus" else "CPU"
    nodes = [node["Resources"].get(kind, 0) for node in ray.nodes() if node["Alive"]]
    return sum(math.floor(amount / least) for amount in nodes)
