"""Sets of shards as one side of a comparison: each format, on a disk and under a URL, whole or not."""

import numpy as np
import pytest
import torch

from fastddpm.evaluate import Evaluator, load_features, open_set
from fastddpm.evaluate.shards import ShardStream
from tests.shards.runs import PLAN, RECIPE, maker, small_sampler, work


def draw(folder, format):
    """A finished run, and its pictures drawn at once."""
    work(maker(folder, format))
    ids = range(PLAN.first_id, PLAN.first_id + PLAN.n)
    return small_sampler().sample(
        PLAN.n, method=RECIPE.method, seed=RECIPE.seed, sample_ids=ids, batch_size=RECIPE.batch_size,
        class_labels=[RECIPE.classes[i % len(RECIPE.classes)] for i in ids], output="uint8", progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("format", ["npz", "tar", "png"])
@pytest.mark.parametrize("scheme", ["", "file://"], ids=["folder", "URL"])
def test_shards_are_measured(tmp_path, format, scheme):
    expected = draw(tmp_path / "run", format)
    opened = open_set(f"{scheme}{tmp_path / 'run'}")
    assert isinstance(opened.pictures, ShardStream) and len(opened.pictures) == PLAN.n
    assert torch.equal(torch.cat(list(opened.pictures.batches(4, 1))), expected)
    np.savez(tmp_path / "all.npz", expected.permute(0, 2, 3, 1).numpy())
    features = load_features("tests.evaluate.common:Pooled", device="cpu")
    assert Evaluator(open_set(tmp_path / "all.npz"), features).measure(opened).fd < 1e-9


def test_a_set_with_a_missing_shard_is_refused(tmp_path):
    draw(tmp_path, "npz")
    (tmp_path / "shard-00002.json").unlink()
    with pytest.raises(ValueError, match="all 5 shards must be there, 1 are missing"):
        open_set(tmp_path)


def test_shards_are_not_resized(tmp_path):
    draw(tmp_path, "npz")
    with pytest.raises(ValueError, match=r"must be 4×4 pixels, got 8×8"):
        open_set(tmp_path, size=4)
