"""Evaluator: sets of every kind against each other, what is said of the numbers, and what cannot be compared."""

import json
import tracemalloc

import numpy as np
import pytest
import torch

from fastddpm.evaluate import (
    Evaluator,
    SampledPictures,
    Statistics,
    compare_statistics,
    evaluation,
    frechet_distance,
    kernel_distance,
    load_features,
    lowest,
    open_set,
    prdc,
    sets,
    write_statistics,
)
from fastddpm.evaluate.features import INCEPTION_SHA256
from fastddpm.evaluate.sets import PictureSet
from tests.evaluate.common import Pooled, pictures
from tests.networks import tiny_sampler
from tests.pictures.test_data import idx
from tests.pictures.test_streams import save_folder

GENERATED, REFERENCE = pictures(60, bright=0.8), pictures(90, seed=1)


@pytest.fixture(scope="module")
def pooled():
    return load_features("tests.evaluate.common:Pooled", device="cpu")


@pytest.fixture
def sides(tmp_path):
    """(generated, reference) as archives."""
    np.savez(tmp_path / "generated.npz", arr_0=GENERATED)
    np.savez(tmp_path / "reference.npz", arr_0=REFERENCE)
    return open_set(tmp_path / "generated.npz"), open_set(tmp_path / "reference.npz")


def pooled_features(array):
    tensor = torch.from_numpy(array)
    return Pooled()(tensor[:, None] if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2))


def numpy_statistics(array):
    values = pooled_features(array).double().numpy()
    return Statistics(torch.from_numpy(values.mean(0)), torch.from_numpy(np.cov(values, rowvar=False)))


def test_numbers_are_those_of_the_whole_sets(sides, pooled):
    generated, reference = sides
    found = Evaluator(reference, pooled, batch_size=7).measure(generated)
    assert found.fd == pytest.approx(frechet_distance(numpy_statistics(GENERATED), numpy_statistics(REFERENCE)))
    fake, real = pooled_features(GENERATED), pooled_features(REFERENCE)
    assert found.kid == kernel_distance(fake, real) and found.prdc == prdc(fake, real)
    assert (found.generated_n, found.reference_n) == (60, 90)
    assert found.distance == "FD (tests.evaluate.common:Pooled)" and found.digest == pooled.digest
    assert found.preprocessing == "8×8 pixels, gray; not resized, given as bytes"
    json.dumps(found.to_dict())


@pytest.mark.parametrize("kind", ["folder", "classes", "idx", "shards"])
def test_every_layout_gives_the_same_numbers(sides, pooled, tmp_path, kind):
    expected = Evaluator(sides[1], pooled, metrics=["fd", "prdc"]).measure(sides[0])
    path = tmp_path / "set"
    if kind == "idx":
        path.write_bytes(idx(GENERATED))
    elif kind == "shards":
        path.mkdir()
        for k, part in enumerate((GENERATED[:25], GENERATED[25:50], GENERATED[50:])):
            np.savez(path / f"shard-{k:05d}.npz", part)
    else:
        save_folder(path, GENERATED, nested=kind == "classes")
    found = Evaluator(sides[1], pooled, metrics=["fd", "prdc"]).measure(open_set(path))
    assert found.fd == pytest.approx(expected.fd, rel=1e-9) and found.prdc == expected.prdc


def test_another_reader_is_asked_first(monkeypatch, sides, pooled):
    """What a room of shards on object stores would hand in."""
    stream = sides[0].pictures
    monkeypatch.setattr(sets, "OPENERS", (lambda path, size: stream if path.startswith("s3://") else None,))
    assert open_set("s3://bucket/run") == PictureSet("s3://bucket/run", stream)
    assert Evaluator(sides[1], pooled).measure(open_set("s3://bucket/run")).generated == "s3://bucket/run"


# ---------------------------------------------------------------------- statistics


def test_statistics_stand_for_the_reference(sides, pooled, tmp_path):
    generated, reference = sides
    evaluator = Evaluator(reference, pooled, metrics=["fd"])
    assert evaluator.statistics is None
    expected = evaluator.measure(generated)
    write_statistics(tmp_path / "s.npz", evaluator.statistics)
    found = Evaluator(open_set(tmp_path / "s.npz"), pooled).measure(generated)
    assert found.fd == pytest.approx(expected.fd, rel=1e-9)
    assert (found.reference_n, found.kid, found.prdc) == (90, None, None)
    assert found.notes == ("kid and prdc left out: they need the pictures of both sides, not statistics",)
    both = compare_statistics(open_set(tmp_path / "s.npz"), open_set(tmp_path / "s.npz"))
    assert both.fd < 1e-9 and both.distance == "FD (statistics)" and both.digest == pooled.digest


def test_statistics_of_other_features_are_refused(sides, pooled, tmp_path):
    evaluator = Evaluator(sides[1], pooled, metrics=["fd"])
    evaluator.measure(sides[0])
    write_statistics(tmp_path / "s.npz", evaluator.statistics)
    other = load_features("tests.evaluate.test_evaluation:More", device="cpu")
    with pytest.raises(ValueError, match=r"s.npz: statistics must be of the features tests.*:More, got those of other"):
        Evaluator(open_set(tmp_path / "s.npz"), other).measure(sides[0])
    np.savez(tmp_path / "unknown.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ValueError, match="must have 5 dimensions as the other side's, got 16"):
        Evaluator(open_set(tmp_path / "unknown.npz"), pooled).measure(sides[0])


class More(Pooled):
    pass


def test_openai_s_reference_batches_hold_both(sides, pooled, tmp_path):
    """Statistics of the whole set for the distance, some pictures for the rest; only with inception's features."""
    whole = numpy_statistics(pictures(500, seed=5))
    np.savez(tmp_path / "ref.npz", arr_0=REFERENCE, mu=whole.mu, sigma=whole.sigma, mu_s=np.zeros(3))
    reference = open_set(tmp_path / "ref.npz")
    own = Evaluator(reference, pooled).measure(sides[0])
    assert own.fd == pytest.approx(Evaluator(sides[1], pooled).measure(sides[0]).fd, rel=1e-9)
    assert any("mu and sigma are left out" in note for note in own.notes)
    named = type(pooled)("inception", INCEPTION_SHA256, pooled.network, pooled.device)
    found = Evaluator(reference, named).measure(sides[0])
    assert found.fd == pytest.approx(frechet_distance(numpy_statistics(GENERATED), whole), rel=1e-9)
    assert found.distance == "FID" and found.prdc == own.prdc


# ---------------------------------------------------------------------- sampling


def test_what_is_sampled_is_measured(pooled, tmp_path):
    sampler = tiny_sampler(10)
    np.savez(tmp_path / "r.npz", REFERENCE)
    drawn = SampledPictures(sampler, 30, 5, (0, 1, 2), {"steps": 3, "progress": False})
    drawn.check()
    evaluator = Evaluator(open_set(tmp_path / "r.npz"), pooled, batch_size=8, metrics=["fd"])
    found = evaluator.measure(PictureSet(drawn.source, drawn))
    labels = [i % 3 for i in range(30)]
    whole = sampler.sample(30, seed=5, class_labels=labels, steps=3, output="uint8", batch_size=8, progress=False)
    np.savez(tmp_path / "g.npz", whole.permute(0, 2, 3, 1).numpy())
    assert found.fd == pytest.approx(evaluator.measure(open_set(tmp_path / "g.npz")).fd, rel=1e-9)
    assert found.generated_n == 30 and "seed 5" in found.generated
    colour = next(drawn.batches(8, 3))
    assert torch.equal(colour[:, 0], colour[:, 2]) and colour.shape == (8, 3, 8, 8)


def test_a_wrong_option_of_sampling_is_refused_before_the_work():
    with pytest.raises(ValueError, match="class_labels must be in 0"):
        SampledPictures(tiny_sampler(10), 4, 0, (7,)).check()
    with pytest.raises(TypeError, match="stepps"):
        SampledPictures(tiny_sampler(10), 4, 0, (0,), {"stepps": 3}).check()


def test_the_lowest_of_several(sides, pooled):
    evaluator = Evaluator(sides[1], pooled, metrics=["fd"])
    measured = [evaluator.measure(side) for side in (sides[0], sides[1], sides[0])]
    assert lowest(measured) is measured[1]
    with pytest.raises(ValueError, match="must each have a Fréchet distance"):
        lowest([Evaluator(sides[1], pooled, metrics=["kid"]).measure(sides[0])])


def test_the_reference_is_read_once(sides, pooled, monkeypatch):
    evaluator, seen = Evaluator(sides[1], pooled), []
    gather = evaluation.Gatherer.gather
    monkeypatch.setattr(
        evaluation.Gatherer,
        "gather",
        lambda self, side, *rest: (seen.append(side.source), gather(self, side, *rest))[1],
    )
    evaluator.measure(sides[0])
    evaluator.measure(sides[0])
    assert seen == [sides[1].source, sides[0].source, sides[0].source]


# ---------------------------------------------------------------------- channels, notes, refusals


def test_gray_against_colour_is_compared_in_colour(sides, pooled, tmp_path):
    np.savez(tmp_path / "c.npz", arr_0=pictures(90, seed=1, channels=3))
    found = Evaluator(open_set(tmp_path / "c.npz"), pooled).measure(sides[0])
    assert found.preprocessing.startswith("8×8 pixels, in colour; ")
    expected = numpy_statistics(np.repeat(GENERATED[..., None], 3, -1)), numpy_statistics(pictures(90, 8, 1, 1.0, 3))
    assert found.fd == pytest.approx(frechet_distance(*expected), rel=1e-6)
    with pytest.raises(ValueError, match="must have 1 channels, got 3"):
        Evaluator(open_set(tmp_path / "c.npz"), pooled.seeing(1)).measure(sides[0])


def test_too_few_pictures_are_named(sides, pooled, tmp_path):
    np.savez(tmp_path / "few.npz", arr_0=GENERATED[:16])
    notes = Evaluator(sides[1], pooled).measure(open_set(tmp_path / "few.npz")).notes
    assert "few.npz: 16 pictures are too few for 16 features: the covariance is singular" in notes[0]
    assert "KID from subsets of 8 pictures instead of 1,000" in notes[1] and len(notes) == 2
    np.savez(tmp_path / "enough.npz", arr_0=GENERATED[:17])
    notes = Evaluator(sides[1], pooled, metrics=["fd"]).measure(open_set(tmp_path / "enough.npz")).notes
    assert notes == ()


def test_what_cannot_be_compared_is_refused(sides, pooled, tmp_path):
    generated, reference = sides
    np.savez(tmp_path / "other.npz", arr_0=pictures(9, side=6))
    np.savez(tmp_path / "one.npz", arr_0=GENERATED[:1])
    np.savez(tmp_path / "s.npz", mu=np.zeros(16), sigma=np.eye(16))
    with pytest.raises(ValueError, match="one size, got 6×6 and 8×8; resize"):
        Evaluator(reference, pooled).measure(open_set(tmp_path / "other.npz"))
    with pytest.raises(ValueError, match="at least 2 on either side for fd, got 1"):
        Evaluator(reference, pooled, metrics=["fd"]).measure(open_set(tmp_path / "one.npz"))
    with pytest.raises(ValueError, match="at least 11 on either side for prdc"):
        Evaluator(reference, pooled, metrics=["prdc"], k=10).measure(open_set(tmp_path / "one.npz"))
    with pytest.raises(ValueError, match=r"s.npz: must hold pictures for kid, got mu and sigma alone"):
        Evaluator(open_set(tmp_path / "s.npz"), pooled, metrics=["fd", "kid"]).measure(generated)
    for options, message in (
        ({"metrics": ["fid"]}, "metrics must be of fd, kid, prdc, got 'fid'"),
        ({"metrics": []}, "got none"),
        ({"k": 0}, "k must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluator(reference, pooled, **options)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        pooled.seeing(2)
    inception = type(pooled)("inception", "", pooled.network, pooled.device, channels=3)
    with pytest.raises(ValueError, match="channels must be 3 for inception, got 1"):
        inception.seeing(1)


def test_memory_does_not_grow_with_the_pictures(pooled, tmp_path):
    """4,096 pictures of 32 × 32 are 4.2 MB, a batch of 32 is 33 kB."""
    np.savez(tmp_path / "many.npz", arr_0=np.zeros((4096, 32, 32), np.uint8) + np.arange(32, dtype=np.uint8))
    evaluator = Evaluator(open_set(tmp_path / "many.npz"), pooled, metrics=["fd"], batch_size=32)
    tracemalloc.start()
    try:
        evaluator.measure(open_set(tmp_path / "many.npz"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e6
