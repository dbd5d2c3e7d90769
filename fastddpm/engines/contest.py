"""Contest: which way to make a step is the quickest here, by measurement; what a way costs must be earned back.

What was measured is remembered on disk for each (network, batch, form of the step, precision, processor, threads). A
way that was never measured is taken to save its `gain` of an eager step's time, and at least `LEAST_GAIN` of the best
step's; preparing it is taken to cost its `cost_s`. It is tried where the steps that are to come save more than that. So
a run spends no more on trying than it may be expected to save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from fastddpm.engines.compare import CompileError
from fastddpm.engines.measured import Measured, remember, remembered
from fastddpm.engines.quick import Quick
from fastddpm.engines.race import Entrant, race
from fastddpm.engines.runner import StepRunner
from fastddpm.step.step import Call

LEAST_GAIN = 0.05
"""The part of the best step's time that a way which was never measured may be hoped to save."""
SLOWER_MEANWHILE = 4.0
"""How many times as long compiling takes beside a run."""


@dataclasses.dataclass
class Contestant:
    """A way, for one kind of call.

    Attributes:
        way: how steps are run.
        call: the call in its form.
        key: its key.
        known: what was measured.
        is_there: whether it can be had without compiling.
    """

    way: Quick
    call: Call
    key: str
    known: Measured | None
    is_there: bool

    @classmethod
    def of(cls, way: Quick, call: Call, memory: Mapping[str, Measured]) -> Contestant:
        """A way with what is remembered of it."""
        formed = way.formed(call)
        key = way.key(formed)
        return cls(way, formed, key, memory.get(key), way.is_there(formed))

    @property
    def ms(self) -> float | None:
        """Milliseconds of a step, if they were measured."""
        return None if self.known is None else self.known.compiled_ms

    @property
    def cost_s(self) -> float:
        """Seconds that it takes to have it."""
        if self.is_there:
            return 0.0
        known = None if self.known is None else self.known.compile_s
        return self.way.cost_s if known is None else known

    def hoped_ms(self, eager_ms: float, best_ms: float) -> float:
        """Milliseconds of a step that may be hoped for."""
        if self.ms is not None:
            return self.ms
        return min(eager_ms * (1 - self.way.gain), best_ms * (1 - LEAST_GAIN))


@dataclasses.dataclass
class Verdict:
    """What came of a contest, or how it stands.

    Attributes:
        best: the quickest way; None is eager.
        times: milliseconds of a step by engine, as far as they are known.
        notes: why some ways were not taken.
        failure: what should have worked and did not, in one line; "" where all did.
        later: what would pay, and was left to be compiled beside the run.
    """

    best: Contestant | None = None
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    failure: str = ""
    later: Contestant | None = None

    @property
    def name(self) -> str:
        """Of the quickest engine."""
        return "eager" if self.best is None else self.best.way.name

    @property
    def why(self) -> str:
        """The times, the quickest first, and the notes."""
        (first, ms), *others = sorted(self.times.items(), key=lambda item: item[1]) or [("", 0.0)]
        times = [f"{ms:.3g} ms a step {first}", *(f"{ms:.3g} {name}" for name, ms in others)] if first else []
        return "; ".join(text for text in (", ".join(times), *self.notes) if text)


class Contest:
    """Compares the ways of one engine.

    Attributes:
        failed: by key, why a way cannot be taken.
    """

    def __init__(self, ways: Sequence[Quick], missing: Sequence[str], in_place: bool) -> None:
        """Nothing was compared yet.

        Args:
            ways: besides eager steps, those that are ready soonest first.
            missing: what to say of ways that are not there.
            in_place: whether eager steps change the samples' own tensors.
        """
        self.ways, self._missing, self._in_place = tuple(ways), tuple(missing), in_place
        self._own: dict[str, Measured] = {}  # of this process: some of it may not be kept on disk
        self.failed: dict[str, str] = {}
        self._unsaid: dict[str, str] = {}  # failures of which no verdict has told

    def contestants(self, call: Call) -> list[Contestant]:
        """All ways with what is known of them, the quickest that were measured first."""
        on_disk = remembered()
        found = []
        for way in self.ways:
            formed = way.formed(call)
            found.append(Contestant.of(way, formed, self._own | (on_disk if way.is_kept(formed) else {})))
        return sorted(found, key=lambda one: float("inf") if one.ms is None else one.ms)

    def settle(
        self,
        contestants: Sequence[Contestant],
        call: Call,
        eager_ms: float,
        to_come: int,
        on_compile: Callable[[bool], None],
        later: Collection[str] = (),
    ) -> Verdict:
        """Choose.

        Args:
            contestants: of `contestants`.
            call: the samples, which stay as they are.
            eager_ms: milliseconds of an eager step.
            to_come: steps that are to be made.
            on_compile: called with True before and False after preparing.
            later: keys of ways that are not compiled now; the verdict names one that would pay.

        Returns:
            The verdict; a way in it is prepared.
        """
        verdict = Verdict(times={"eager": eager_ms})
        for one in contestants:
            if one.ms is not None:
                verdict.times[one.way.name] = one.ms
            best_ms = verdict.times[verdict.name]
            if one.ms is not None and one.ms >= best_ms:
                continue
            waits = one.key in later and not one.is_there
            why = self.failed.get(one.key) or _not_worth(one, eager_ms, best_ms, to_come, waits)
            verdict.failure = self._unsaid.pop(one.key, verdict.failure)
            if why:
                verdict.notes.append(why)
            elif waits:
                verdict.later = one
            else:
                self._enter(one, call, verdict, on_compile)
        verdict.notes += self._missing
        return verdict

    def _enter(self, one: Contestant, call: Call, verdict: Verdict, on_compile: Callable[[bool], None]) -> None:
        """Prepare a way, time it beside the best where it never was, and see which of the two is quicker."""
        try:
            seconds = one.way.prepare(one.call, on_compile)
        except (CompileError, OSError) as error:
            verdict.notes.append(self.fail(one, str(error)))
            verdict.failure = self._unsaid.pop(one.key)
            return
        if one.ms is None or one.known is None:
            measured = self.compare(one, verdict.best, call, verdict.times["eager"], seconds)
            if verdict.best is not None and verdict.best.ms is not None:
                verdict.times[verdict.name] = verdict.best.ms
            verdict.times |= {"eager": measured.eager_ms, one.way.name: measured.compiled_ms or 0.0}
        elif seconds is not None:
            self._remember(one, dataclasses.replace(one.known, compile_s=seconds))
        slower: Contestant | None = one
        if verdict.times[one.way.name] < verdict.times[verdict.name]:
            slower, verdict.best = verdict.best, one
        if slower is not None:
            slower.way.forget(slower.call)

    def compare(
        self, one: Contestant, best: Contestant | None, call: Call, eager_ms: float | None, seconds: float | None
    ) -> Measured:
        """Time a prepared way beside the best one, and remember both.

        Args:
            one: the way.
            best: the one that is the quickest so far; None is eager.
            call: the samples, which stay as they are.
            eager_ms: milliseconds of an eager step; None, or `best` None, measures them too.
            seconds: that preparing the way took.

        Returns:
            What was measured.
        """
        ways: list[Entrant] = [(one.way.runner, one.call)]
        if best is not None:
            ways.append((best.way.runner, best.call))
        if best is None or eager_ms is None:
            ways.append(self._eager(call))
        ms = [round(time, 3) for time in race(ways)]
        eager = ms[-1] if best is None or eager_ms is None else eager_ms
        measured = Measured(eager, ms[0], seconds, _label(call), one.way.name)
        self._remember(one, measured)
        if best is not None and best.known is not None:
            self._remember(best, dataclasses.replace(best.known, eager_ms=eager, compiled_ms=ms[1]))
        return measured

    def fail(self, one: Contestant, failure: str) -> str:
        """Take a way for one that does not work; returns the note about it."""
        self._unsaid[one.key] = failure
        self.failed[one.key] = f"{one.way.name} does not work: {failure}"
        return self.failed[one.key]

    def time_eager(self, call: Call) -> float:
        """Milliseconds of an eager step, measured now."""
        return race([self._eager(call)])[0]

    def _remember(self, one: Contestant, measured: Measured) -> None:
        one.known = self._own[one.key] = measured
        if one.way.is_kept(one.call):
            remember(one.key, measured)

    def _eager(self, call: Call) -> Entrant:
        return (lambda call: StepRunner(call.step, call)), call.formed(in_place=self._in_place)


def known_eager_ms(contestants: Sequence[Contestant]) -> float | None:
    """Milliseconds of an eager step as they were measured beside any of the ways."""
    return next((one.known.eager_ms for one in contestants if one.known is not None), None)


def _not_worth(one: Contestant, eager_ms: float, best_ms: float, to_come: int, waits: bool) -> str:
    """Why a way does not pay for so many steps; "" if it does or may."""
    cost, hoped = one.cost_s, one.hoped_ms(eager_ms, best_ms)
    left = to_come - (1000 * SLOWER_MEANWHILE * cost / best_ms if waits else 0.0)
    saved = max(0.0, left * (best_ms - hoped) / 1000)
    if saved >= cost:
        return ""
    return f"{one.way.name} would take about {cost:.0f} s to get ready and save about {saved:.0f} s"


def _label(call: Call) -> str:
    """What was measured, for people."""
    batch, *shape = call.state.x.shape
    where = f"on {call.state.x.device}, {torch.get_num_threads()} threads"
    return f"batch {batch} of {' × '.join(map(str, shape))}{call.step.form.caption} {where}"
