import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.shards.part import Part, local_gpu, parse_part, part_of
from fastddpm.shards.plan import Plan, even_batch_size


@given(st.integers(1, 10**4), st.integers(1, 500), st.integers(0, 2**60))
def test_every_id_is_in_one_shard(n, shard_size, first_id):
    plan = Plan(n, shard_size, first_id)
    ids = [i for shard in plan for i in shard.ids]
    assert ids == list(range(first_id, first_id + n))
    assert [shard.number for shard in plan] == list(range(len(plan)))
    assert all(shard.count == shard_size for shard in list(plan)[:-1])


def test_shard_k_holds_the_ids_from_k_times_size_on():
    assert list(Plan(50_000)[7].ids) == list(range(7000, 8000))
    assert Plan(50_000)[7].record == "shard-00007.json"


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [((0,), "n must be at least 1, got 0"), ((5, 0), "shard_size must be in 1 … 1,000,000, got 0"),
     ((5, 10**7), "got 10000000"), ((5, 1, -1), "first_id must be in 0"), ((5, 1, 2**63 - 4), "first_id must be")],
    ids=str,
)  # fmt: skip
def test_a_plan_out_of_range_is_refused(arguments, phrase):
    with pytest.raises(ValueError, match=phrase):
        Plan(*arguments)


def test_there_is_no_shard_beyond_the_last():
    with pytest.raises(IndexError, match="number must be in 0 … 4, got 5"):
        Plan(22, 5)[5]


@given(st.integers(1, 3000), st.integers(1, 300))
def test_batches_waste_little(shard_size, most):
    size = even_batch_size(shard_size, most)
    assert 1 <= size <= min(most, shard_size)
    batches = -(-shard_size // size)
    assert batches <= 2 * -(-shard_size // most)
    assert batches * size - shard_size < batches


@pytest.mark.parametrize(("shard_size", "most", "size"), [(1000, 64, 50), (1000, 256, 250), (1009, 64, 64), (8, 64, 8)])
def test_batches_divide_a_shard_where_they_can(shard_size, most, size):
    assert even_batch_size(shard_size, most) == size


# --- parts ----------------------------------------------------------------------------------------


@given(st.integers(0, 20), st.one_of(st.none(), st.integers(1, 20)), st.integers(1, 100))
def test_an_order_has_every_shard_once(index, count, shards):
    part = Part(index if count is None else index % count, count)
    own, others = part.order(shards, random.Random(0))
    assert sorted([*own, *others]) == list(range(shards))


def test_parts_share_the_shards():
    owned = [list(Part(i, 3).order(10, random.Random(0))[0]) for i in range(3)]
    assert owned == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


def test_without_a_count_parts_begin_far_from_each_other():
    begins = [Part(i, None).order(64, random.Random(0))[0][0] for i in range(8)]
    assert begins == [0, 32, 16, 48, 8, 40, 24, 56]


SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}


@pytest.mark.parametrize(
    ("environment", "part"),
    [({}, Part()), ({"RANK": "3", "WORLD_SIZE": "8"}, Part(3, 8)), ({"RANK": "3"}, Part()),
     ({**SLURM}, Part(2, 4)), ({**SLURM, "SLURM_ARRAY_TASK_STEP": "2"}, Part(1, 4)),
     ({**SLURM, "SLURM_ARRAY_TASK_ID": "90"}, Part(85, None)), ({**SLURM, "SLURM_ARRAY_TASK_COUNT": "1"}, Part()),
     ({"SLURM_ARRAY_TASK_ID": "2"}, Part(2, None)), ({"JOB_COMPLETION_INDEX": "6"}, Part(6, None)),
     ({**SLURM, "RANK": "0", "WORLD_SIZE": "2"}, Part(0, 2))],
    ids=str,
)  # fmt: skip
def test_a_part_is_read_from_the_launcher(environment, part):
    assert part_of(environment) == part


@pytest.mark.parametrize(
    ("environment", "phrase"),
    [({"RANK": "8", "WORLD_SIZE": "8"}, "RANK must be in 0 … 7, got 8"),
     ({"RANK": "x", "WORLD_SIZE": "8"}, "RANK must be a whole number, got 'x'"),
     ({"JOB_COMPLETION_INDEX": "-1"}, "JOB_COMPLETION_INDEX must be a whole number")],
    ids=str,
)  # fmt: skip
def test_a_launcher_that_contradicts_itself_is_refused(environment, phrase):
    with pytest.raises(ValueError, match=phrase):
        part_of(environment)


def test_a_part_is_read_from_the_command_line():
    assert parse_part("2/8") == Part(2, 8)
    for text, phrase in (
        ("8/8", "got 8/8"),
        ("1", "got '1'"),
        ("-1/2", "got '-1/2'"),
        ("1/0", "got 1/0"),
        ("", "got ''"),
    ):
        with pytest.raises(ValueError, match=f"--part must be I/N.*{phrase}"):
            parse_part(text)


@pytest.mark.parametrize(
    ("environment", "gpus", "device"),
    [({}, 8, None), ({"LOCAL_RANK": "3"}, 8, "cuda:3"), ({"LOCAL_RANK": "3"}, 1, None), ({"LOCAL_RANK": "3"}, 0, None)],
)
def test_the_local_rank_picks_a_gpu(environment, gpus, device):
    assert local_gpu(environment, gpus) == device


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match=r"LOCAL_RANK must be in 0 … 1 \(the GPUs of this machine\), got '2'"):
        local_gpu({"LOCAL_RANK": "2"}, 2)
