import json
import os

import pytest

from fastddpm.shards import claims
from fastddpm.shards.claims import Claims, standing
from fastddpm.shards.plan import Plan
from fastddpm.shards.store import Store

SHARD, OTHER = Plan(10, 5)


class Clock:
    """Seconds that pass when told; each worker has one, and no two show the same."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def test_one_of_two_has_a_shard(store):
    first, second = Claims(store, "0/2"), Claims(store, "1/2")
    assert first.take(SHARD) and not second.take(SHARD) and second.take(OTHER)
    first.release(SHARD)
    assert second.take(SHARD)


def test_a_claim_that_stays_the_same_is_void_by_the_clock_of_whoever_looks(store):
    clock = Clock(-(10.0**9))  # years away from the other's
    owner, other = Claims(store, "0/2", clock=Clock(5.0)), Claims(store, "1/2", patience=30, clock=clock)
    assert owner.take(SHARD) and not other.take(SHARD)
    clock.now += 29
    assert not other.take(SHARD)
    clock.now += 1
    assert other.take(SHARD)


def test_a_claim_that_changes_is_heeded(store):
    mine, theirs = Clock(0.0), Clock(100.0)
    owner, other = Claims(store, "0/2", clock=theirs), Claims(store, "1/2", patience=30, clock=mine)
    assert owner.take(SHARD)
    for drawn in range(1, 9):
        assert not other.take(SHARD)
        mine.now += 20
        theirs.now += 20
        owner.beat(SHARD, drawn)
    mine.now += 31
    assert not other.take(SHARD) and not other.take(SHARD)
    mine.now += 31
    assert other.take(SHARD)


def test_claims_are_seldom_written(store, monkeypatch):
    clock, written = Clock(0.0), []
    owner = Claims(store, "", clock=clock)
    owner.take(SHARD)
    monkeypatch.setattr(store, "write", lambda name, content: written.append(json.loads(content)["drawn"]))
    for drawn in range(1, 100):
        clock.now += 1
        owner.beat(SHARD, drawn)
    assert written == list(range(10, 100, 10))


def test_patience_follows_the_own_batches(store):
    clock = Clock(0.0)
    mine = Claims(store, "", clock=clock)
    assert mine.patience == claims.UNKNOWN_PATIENCE_S
    mine.take(SHARD)
    clock.now += 2
    mine.beat(SHARD, 1)
    assert mine.patience == claims.LEAST_PATIENCE_S
    clock.now += 40
    mine.beat(SHARD, 2)
    assert mine.patience == 200


def test_what_an_earlier_worker_of_the_same_part_claimed_is_void(store):
    assert Claims(store, "3/8").take(SHARD) and Claims(store, "3/8").take(SHARD)
    assert Claims(store, "").take(OTHER) and not Claims(store, "").take(OTHER)  # no parts: nothing is known


def test_a_claim_of_a_process_that_is_gone_is_void(store):
    child = os.fork()
    if child == 0:
        os._exit(not Claims(store, "").take(SHARD))
    assert os.waitpid(child, 0)[1] == 0
    assert Claims(store, "").take(SHARD)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"7", b'{"process": "x"}', b"\xff"])
def test_a_damaged_claim_is_a_hint_like_any_other(store, content):
    store.write("shard-00000.claim", content)
    clock = Clock(0.0)
    mine = Claims(store, "", patience=10, clock=clock)
    assert not mine.take(SHARD)
    clock.now += 10
    assert mine.take(SHARD)


def test_of_two_that_find_a_claim_void_the_later_one_goes_on(store, monkeypatch):
    store.write("shard-00000.claim", b"old")
    mine, other = (Claims(store, "", patience=0) for _ in range(2))
    assert not mine.take(SHARD) and not other.take(SHARD)  # each sees it for the first time
    write = store.write

    def overtaken(name, content):
        write(name, content)
        monkeypatch.setattr(store, "write", write)
        assert other.take(SHARD)

    monkeypatch.setattr(store, "write", overtaken)
    other.seen[0] = (mine.content(0), -1e9)
    assert not mine.take(SHARD)


def test_who_is_at_what(store):
    mine = Claims(store, "", clock=(clock := Clock(0.0)))
    mine.take(SHARD)
    mine.take(OTHER)
    clock.now += 60
    mine.beat(OTHER, 3)
    store.write("shard-00009.claim", b"broken")
    assert standing(store) == {"shard-00000": 0, "shard-00001": 3, "shard-00009": 0}
    claims.remove_all(store)
    assert standing(store) == {}


def test_what_another_process_is_just_writing_is_no_claim(store):
    store.write("shard-00001.claim", b"{}")
    store.write(".fastddpm.0123abcd.tmp.claim", b"{}")
    assert standing(store) == {"shard-00001": 0}
    claims.remove_all(store)
    assert store.sizes() == {".fastddpm.0123abcd.tmp.claim": 2}
