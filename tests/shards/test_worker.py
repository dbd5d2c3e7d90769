import json
import shutil
import threading

import numpy as np
import pytest
import torch

from fastddpm.shards.claims import Claims
from fastddpm.shards.formats import FORMATS
from fastddpm.shards.gathering import gather_npz, stream_shards
from fastddpm.shards.part import Part
from fastddpm.shards.plan import Plan
from fastddpm.shards.shard_set import ShardSet
from fastddpm.shards.store import Store
from fastddpm.shards.worker import Done
from tests.shards.runs import PLAN, RECIPE, maker, small_sampler, some_order, tree, work


@pytest.fixture(params=FORMATS)
def format(request):
    return request.param


@pytest.fixture(autouse=True)
def single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sampler():
    return small_sampler()


@pytest.fixture(scope="module")
def expected(sampler):
    """The pictures of the usual run, drawn in one go, uint8 [n, H, W, C]."""
    ids = range(PLAN.first_id, PLAN.first_id + PLAN.n)
    drawn = sampler.sample(
        PLAN.n, method=RECIPE.method, seed=RECIPE.seed, sample_ids=ids, class_labels=RECIPE.labels(ids),
        batch_size=RECIPE.batch_size, output="uint8", progress=False,
    )  # fmt: skip
    return drawn.permute(0, 2, 3, 1).numpy()


def test_shards_hold_the_pictures_of_a_plain_run(tmp_path, sampler, expected, format):
    done = work(maker(tmp_path / "out", format, sampler))
    assert done == Done(5, 0, 22)
    shards = ShardSet.open(Store(str(tmp_path / "out")))
    pieces = list(stream_shards(shards))
    assert np.array_equal(np.concatenate([pictures for pictures, _ in pieces]), expected)
    labels = [label for _, labels in pieces for label in labels]
    assert labels == [(2, 0, 1)[i % 3] for i in range(3, 25)]
    assert gather_npz(shards, tmp_path / "all.npz") == []
    with np.load(tmp_path / "all.npz") as archive:
        assert np.array_equal(archive["arr_0"], expected) and archive["arr_1"].tolist() == labels


@pytest.mark.parametrize("order", range(3))
def test_the_bytes_do_not_depend_on_order_or_company(tmp_path, sampler, format, order):
    work(maker(tmp_path / "plain", format, sampler))
    made = maker(tmp_path / "other", format)  # another sampler, of the same weights
    for number in some_order(order, len(PLAN)):
        made.make(made.set.plan[number])
        made.make(made.set.plan[number])
    assert tree(tmp_path / "plain") == tree(tmp_path / "other")


def test_what_a_record_says(tmp_path, sampler):
    work(maker(tmp_path, sampler=sampler))
    assert sorted(tree(tmp_path)) == sorted(
        ["run.json", *(f"shard-0000{k}.{suffix}" for k in range(5) for suffix in ("json", "npz"))]
    )
    record = json.loads((tmp_path / "shard-00004.json").read_text())
    assert (record["first_id"], record["count"], record["labels"]) == (23, 2, [1, 2])
    assert record["files"] == ["shard-00004.npz"] and record["sizes"] == [len(tree(tmp_path)["shard-00004.npz"])]
    run = json.loads((tmp_path / "run.json").read_text())
    assert record["run"] == run["digest"] and run["engine"] == "eager" and run["batch_size"] == 3


def test_a_network_without_classes(tmp_path):
    made = maker(tmp_path, sampler=small_sampler(num_classes=None, null_class=None), classes=None)
    work(made)
    assert json.loads((tmp_path / "shard-00000.json").read_text())["labels"] is None
    assert gather_npz(made.set, tmp_path / "all.npz") == []
    with np.load(tmp_path / "all.npz") as archive:
        assert archive.files == ["arr_0"]


def test_a_second_worker_finds_all_there(tmp_path, sampler, format):
    work(maker(tmp_path, format, sampler))
    before = tree(tmp_path)
    assert work(maker(tmp_path, format, sampler), Part(1, 3)) == Done() and tree(tmp_path) == before


def test_a_part_is_finished_before_the_others_are_helped(tmp_path, sampler):
    made, drawn = maker(tmp_path, sampler=sampler), []
    make = made.make
    made.make = lambda shard, tell: drawn.append(shard.number) or make(shard, tell)
    work(made, Part(1, 2))
    assert drawn[:2] == [1, 3] and sorted(drawn[2:]) == [0, 2, 4]


def test_two_workers_share_the_work(tmp_path, sampler):
    makers = [maker(tmp_path / "out", sampler=small_sampler()) for _ in range(2)]
    done = {}

    def go(i):
        done[i] = work(makers[i], Part(i, 2), look=0.01)

    threads = [threading.Thread(target=go, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done[0].drawn + done[1].drawn == 5
    work(maker(tmp_path / "plain", sampler=sampler))
    assert tree(tmp_path / "out") == tree(tmp_path / "plain")


def test_a_shard_that_another_claims_is_waited_for_and_then_taken(tmp_path, sampler):
    made = maker(tmp_path, sampler=sampler)
    Claims(made.set.store, "0/2").take(made.set.plan[2])
    naps = []
    done = work(made, Part(1, 2), patience=0.2, look=0.05, sleep=lambda s: naps.append(s) or threading.Event().wait(s))
    assert done.drawn == 5 and len(naps) >= 3
    assert not list(tmp_path.glob("*.claim"))


def test_a_shard_that_another_finishes_meanwhile_is_not_drawn(tmp_path, sampler):
    made = maker(tmp_path, sampler=sampler)
    other, shard = Claims(made.set.store, "0/2"), made.set.plan[2]
    other.take(shard)

    def finish(_):
        made.make(shard)
        other.release(shard)

    assert work(made, Part(1, 2), sleep=finish).drawn == 4


# --- damage ---------------------------------------------------------------------------------------


def flip(path, byte=-20):
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)


def victim(folder, format):
    return folder / "shard-00001" / "000000000008.png" if format == "png" else folder / f"shard-00001.{format}"


def harm(folder, format, kind):
    path = victim(folder, format)
    if kind == "flipped byte":
        flip(path)
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "removed":
        path.unlink()
    elif kind == "record removed":
        (folder / "shard-00001.json").unlink()
    elif kind == "record of another shard":
        shutil.copy(folder / "shard-00000.json", folder / "shard-00001.json")
    else:
        (folder / "shard-00001.json").write_text("{")


KINDS = {
    "flipped byte": "has another SHA-256 than its record says", "cut short": "has another SHA-256",
    "removed": "is not there", "record removed": "", "record damaged": "is not readable",
    "record of another shard": "belongs to another run or shard",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_and_mended(tmp_path, sampler, format, kind):
    made = maker(tmp_path, format, sampler)
    work(made)
    before = tree(tmp_path)
    harm(tmp_path, format, kind)
    [found] = [finding for finding in made.set.verify() if not finding]
    assert found.shard.number == 1 and KINDS[kind] in found.why
    assert found.state == ("missing" if kind == "record removed" else "damaged")
    assert gather_npz(made.set, tmp_path / "all.npz") == [found] and not (tmp_path / "all.npz").exists()
    assert work(maker(tmp_path, format, sampler)) == Done(1, kind != "record removed", 5)
    assert tree(tmp_path) == before and all(made.set.verify())


def test_the_owner_of_a_part_mends_it_and_the_others_do_not_read_it(tmp_path, sampler):
    work(maker(tmp_path, sampler=sampler))
    flip(tmp_path / "shard-00001.npz")
    assert work(maker(tmp_path, sampler=sampler), Part(0, 2)) == Done()
    assert work(maker(tmp_path, sampler=sampler), Part(1, 2)) == Done(1, 1, 5)


# --- other runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [({"seed": 8}, "seed was 7, is 8"), ({"classes": (1,)}, r"classes was \[2, 0, 1\], is \[1\]"),
     ({"guidance_scale": 2.0}, "guidance_scale was 1.0, is 2.0"), ({"batch_size": 4}, "batch_size was 3, is 4"),
     ({"format": "tar"}, "format was 'npz', is 'tar'"), ({"plan": Plan(23, 5, 3)}, "n was 22, is 23"),
     ({"plan": Plan(22, 6, 3)}, "shard_size was 5, is 6"), ({"sampler": small_sampler(50)}, "conventions was"),
     ({"sampler": small_sampler(clip=0.5)}, "conventions was")],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_another_run_is_refused_by_name(tmp_path, sampler, changes, phrase):
    made = maker(tmp_path, sampler=sampler)
    made.make(made.set.plan[0])
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=f"holds a run with other settings: .*{phrase}.*; use another place"):
        maker(tmp_path, **{"sampler": sampler, **changes})
    assert tree(tmp_path) == before


def test_other_weights_are_refused(tmp_path, sampler):
    maker(tmp_path, sampler=sampler)
    other = small_sampler()
    with torch.no_grad():
        next(other.stepper.source.parameters()).add_(1)
    with pytest.raises(ValueError, match="weights was"):
        maker(tmp_path, sampler=other)


def test_where_the_network_came_from_does_not_matter(tmp_path, sampler):
    maker(tmp_path, sampler=sampler, note={"model": "here"})
    maker(tmp_path, sampler=sampler, note={"model": "there"})


def test_a_batch_size_and_an_engine_that_are_not_asked_for_are_those_of_the_run(tmp_path, sampler):
    made = maker(tmp_path, sampler=sampler)
    joined = maker(tmp_path, batch_size=None)
    assert joined.batch_size == 3 and joined.set.run == made.set.run
    assert joined.sampler.engine.name == "eager"
    joined.make(joined.set.plan[0])
    assert joined.sampler.engine.why == "as in the run that this one joins"


def test_shards_of_no_run_are_refused(tmp_path, sampler):
    (tmp_path / "shard-00000.npz").touch()
    with pytest.raises(ValueError, match=r"must be a run's, got shard-00000\.npz without run\.json; use another place"):
        maker(tmp_path, sampler=sampler)


@pytest.mark.parametrize("text", ["", "[]", "7", "[" * 10**5, "{}", '{"n": 3}', '{"model": "mnist", "seed": 0}'])
def test_a_damaged_or_foreign_run_file(tmp_path, sampler, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json must be"):
        maker(tmp_path, sampler=sampler)
    with pytest.raises(ValueError, match=r"run\.json must be"):
        ShardSet.open(Store(str(tmp_path)))


def test_what_image_files_cannot_hold_is_refused(tmp_path):
    from fastddpm import ModelSpec, NoiseSchedule, Sampler

    five = Sampler(lambda x, t: x, NoiseSchedule.linear(20), ModelSpec(shape=(5, 4, 4)), device="cpu")
    with pytest.raises(ValueError, match="format must be npz for pictures of 5 channels, got tar"):
        maker(tmp_path, "tar", five, classes=None)
    assert work(maker(tmp_path, "npz", five, classes=None)).drawn == 5


def test_a_run_that_breaks_leaves_no_shard_and_no_claim(tmp_path):
    made = maker(tmp_path)
    with torch.no_grad():
        next(made.sampler.stepper.source.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        work(made)
    assert sorted(tree(tmp_path)) == ["run.json"]
