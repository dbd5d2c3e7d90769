"""The book of rows: chapters of several runs in one batch, each equal to its own run, and room for them."""

import functools

import pytest
import torch

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.sampler import Sampler
from fastddpm.step.book import Book
from fastddpm.step.state import State
from tests.networks import SPEC, tiny_sampler, tiny_unet
from tests.steps import begin, finish

RUNS = (
    {"solver": "ddim", "steps": 12}, {"solver": "dpmpp_2m", "steps": 7}, {"solver": "ddpm", "steps": 20},
    {"solver": "dpmpp_3m", "steps": 17},
)  # fmt: skip


def joined(states: list[State]) -> State:
    """Samples of several states in one."""
    names = [name for name, _ in states[0].tensors()]
    return State(**{name: torch.cat([getattr(state, name) for state in states]) for name in names})


@pytest.mark.parametrize("guidance", [None, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("in_place", [False, True], ids=["functional", "in place"])
def test_chapters_of_four_solvers_share_a_batch_bit_for_bit(guidance, in_place):
    """12 samples, three of each run, interleaved; each is what it is in a batch of 12 of its own run."""
    sampler = tiny_sampler()
    ids, labels = list(range(12)), [i // len(RUNS) % 3 for i in range(12)]
    form = {"history": 2, "stochastic": True, "in_place": in_place}
    alone, parts = [], []
    for run in RUNS:
        table = sampler.table(**run)
        alone.append(finish(begin(sampler, table, ids, labels, guidance, **form)).clone())
        parts.append(begin(sampler, table, ids, labels, guidance, **form))
    call = parts[0]
    for number, part in enumerate(parts):
        slots = torch.arange(number, 12, len(RUNS))
        rows = State(**{name: value[slots] for name, value in part.state.tensors()})
        call.state.put(slots, rows)
    assert len(set(call.state.end.tolist())) == 12  # four runs of three classes
    mixed = finish(call)
    for number, expected in enumerate(alone):
        assert torch.equal(mixed[number :: len(RUNS)], expected[number :: len(RUNS)])


@functools.cache
def table_of(steps: int, solver: str = "ddim"):
    return tiny_sampler().table(solver=solver, steps=steps)


def book(capacity: int) -> Book:
    return Book(tiny_unet(), SPEC, 40, torch.device("cpu"), capacity=capacity)


def test_a_chapter_is_the_tables_rows_and_ends_with_the_identity():
    rows, table = book(16), table_of(5)
    with rows.open(table, [1, 1, 2]) as places:
        begins, ends = places.step.tolist(), places.end.tolist()
        assert begins == [0, 0, 6] and ends == [5, 5, 11]
        for first in (0, 6):
            assert torch.equal(rows.rows[first : first + 6], table.rows)
            assert torch.equal(rows.timesteps[first : first + 6], table.timesteps)
        wanted = tiny_unet().embed(table.timesteps, torch.full((6,), 2))
        torch.testing.assert_close(rows.conditions[6:12], wanted)


def test_a_run_that_is_in_the_book_is_not_written_again(monkeypatch):
    network, written = tiny_unet(), []
    rows = Book(network, SPEC, 40, torch.device("cpu"), capacity=64)
    tabulate = network.tabulate
    monkeypatch.setattr(network, "tabulate", lambda times, label: written.append(label) or tabulate(times, label))
    for _ in range(2):
        with rows.open(table_of(5), [0, 1]), rows.open(table_of(6), [1]):
            pass
    assert written == [0, 1, 1]


def test_chapters_that_nobody_reads_make_way():
    rows = book(16)
    with rows.open(table_of(9), [0]) as first:
        with rows.open(table_of(4), [0]):
            pass
        with rows.open(table_of(5), [0]) as third:
            assert rows.capacity == 16 and third.step.tolist() == [10]
        assert torch.equal(rows.rows[: first.end[0] + 1], table_of(9).rows)


def test_room_doubles_when_all_chapters_are_being_read():
    rows = book(8)
    before = rows.rows
    with rows.open(table_of(5), [0]) as first, rows.open(table_of(7), [0]) as second:
        assert rows.capacity == 16 and rows.rows is not before
        assert torch.equal(before[:6], table_of(5).rows)  # who reads the old tensors goes on with them
        assert torch.equal(rows.rows[first.step[0] : first.end[0] + 1], table_of(5).rows)
        assert torch.equal(rows.rows[second.step[0] : second.end[0] + 1], table_of(7).rows)


def test_runs_of_all_lengths_and_classes_find_room():
    """Chapters that come and go in any order never overlap."""
    rows, generator = book(32), torch.Generator().manual_seed(0)
    for _ in range(60):
        lengths = torch.randint(1, 20, (2,), generator=generator).tolist()
        with rows.open(table_of(lengths[0]), [0, 1]) as a, rows.open(table_of(lengths[1]), [2]) as b:
            spans = {(int(x), int(y)) for p in (a, b) for x, y in zip(p.step, p.end, strict=True)}
            ordered = sorted(spans)
            assert all(x[1] < y[0] for x, y in zip(ordered, ordered[1:], strict=False))
            for first, last in spans:
                assert torch.equal(rows.rows[first : last + 1], table_of(last - first).rows)


def test_changed_weights_make_new_rows():
    network = tiny_unet()
    rows, table = Book(network, SPEC, 40, torch.device("cpu"), capacity=64), table_of(3)
    with rows.open(table, [0]) as places:
        before = rows.conditions[places.step[0]].clone()
        with torch.no_grad():
            network.time_projection.bias.add_(1.0)
        rows.forget(network)
        with rows.open(table, [0]) as again:
            assert again.step.tolist() != places.step.tolist()  # the first run is still under way
            torch.testing.assert_close(rows.conditions[again.step[0]], before + 1.0)


def test_networks_without_classes_and_foreign_ones_are_told_the_time():
    spec = ModelSpec(shape=(1, 8, 8), time_scale=0.25)
    sampler = Sampler(lambda x, t: x * t.view(-1, 1, 1, 1), NoiseSchedule.linear(40), spec, device="cpu")
    rows = sampler.stepper.book
    with rows.open(table_of(4), [None, None]) as places:
        assert not rows.holds_classes and places.uncond is None and places.step.tolist() == [0, 0]
        assert torch.equal(rows.conditions[:5], table_of(4).timesteps * 0.25)
