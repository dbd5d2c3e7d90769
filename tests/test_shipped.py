"""The checkpoint that ships with the package: what it is, and whether its digits are digits."""

import json
from pathlib import Path

import pytest
import torch

import fastddpm
from fastddpm import Sampler
from fastddpm.kernels.philox import X_T_COUNTER
from fastddpm.process import reference
from fastddpm.process.noise import normals
from tests.helpers import mnist_dir
from tests.judge import accuracy, classify, judge, trained
from tests.rounding import rounding_bound

FOLDER = Path(fastddpm.__file__).parent / "pretrained" / "mnist"


@pytest.fixture(scope="module")
def mnist() -> Sampler:
    return Sampler.from_pretrained("mnist", device="cpu")


def test_it_is_small_and_says_what_it_is(mnist):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 4_000_000
    assert (mnist.spec.shape, mnist.spec.num_classes, mnist.spec.null_class) == ((1, 28, 28), 10, 10)
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["training"]["step"] == config["training"]["total_steps"]
    card = (FOLDER / "README.md").read_text()
    for fact in ("MNIST", "fastddpm train", f"{config['training']['total_steps']:,} steps", "loss", "Licence"):
        assert fact in card


@pytest.mark.parametrize("steps", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_engine_draws_the_reference_s_pictures(mnist, steps):
    ids, y = torch.tensor([0, 1]), torch.tensor([3, 8])

    def noise(t):
        return normals(torch.zeros(2, dtype=torch.int64), ids, torch.full((2,), t), (1, 28, 28))

    times = mnist.table(solver="ddpm", steps=steps).timesteps[:-1]
    z = lambda i: noise(int(times[i]))  # noqa: E731
    expected = reference.p_sample_loop(mnist.model, mnist.schedule, noise(X_T_COUNTER), z, timesteps=times, y=y)
    got = mnist.sample(2, class_labels=y, solver="ddpm", steps=steps, output="raw")
    assert float((got - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize(
    "n, run",
    [(6, {"solver": "ddpm", "steps": 10}),
     *(pytest.param(16, {"solver": solver, "steps": 20}, marks=pytest.mark.slow) for solver in ("ddpm", "ddim"))],
    ids=["ddpm", "ddpm, more", "ddim, more"],
)  # fmt: skip
def test_a_digit_does_not_depend_on_its_batch(mnist, n, run):
    """Up to rounding, whose bound is measured on this processor: one step's, and how the run amplifies it."""
    labels, sizes = [i % 10 for i in range(n)], (1, n // 2 - 1)
    bound = rounding_bound(mnist, labels, sizes, **run)
    assert bound < 1e-3  # else it would say nothing
    expected = mnist.sample(n, class_labels=labels, output="raw", **run)
    for size in sizes:
        got = mnist.sample(n - 2, class_labels=labels[:-2], batch_size=size, output="raw", **run)
        assert float((got - expected[:-2]).abs().max()) <= bound
    got = mnist.sample(1, sample_ids=[5], class_labels=[5], output="raw", **run)
    assert float((got - expected[[5]]).abs().max()) <= bound


@pytest.mark.parametrize("run", [{"solver": "ddpm", "steps": 5}, {"solver": "dpmpp_2m", "steps": 6}], ids=str)
def test_at_one_batch_size_a_digit_is_the_same_bit_for_bit(mnist, run):
    """Whatever its place and company: short batches are filled up, so that the arithmetic is always the same."""
    run = {"output": "raw", "batch_size": 8, **run}
    expected = mnist.sample(16, class_labels=[i % 10 for i in range(16)], **run)
    assert torch.equal(mnist.sample(1, sample_ids=[5], class_labels=5, **run)[0], expected[5])
    got = mnist.sample(3, sample_ids=[14, 5, 9], class_labels=[4, 5, 9], **run)
    assert torch.equal(got, expected[[14, 5, 9]])
    ids = list(range(15, 4, -1))
    assert torch.equal(mnist.sample(11, sample_ids=ids, class_labels=[i % 10 for i in ids], **run), expected[ids])


@pytest.mark.parametrize(
    "run",
    [{"solver": "dpmpp_2m", "steps": 10},
     *(pytest.param(run, marks=pytest.mark.slow)
       for run in ({"solver": "dpmpp_2m", "steps": 20}, {"solver": "ddim", "steps": 50}, {"solver": "ddpm"}))],
    ids=["dpmpp10", "dpmpp20", "ddim50", "1000 ancestral steps"],
)  # fmt: skip
def test_digits_are_what_was_asked(mnist, run):
    """By the judge, who is also asked whether they are their neighbours."""
    network, share = judge(mnist_dir())
    assert share >= 0.985, "the judge itself is not to be trusted"
    asked = torch.arange(100) % 10
    seen = classify(network, mnist.sample(100, class_labels=asked, guidance_scale=1.5, **run))
    assert int((seen == asked).sum()) >= 97 and int((seen == (asked + 1) % 10).sum()) <= 3


@pytest.mark.slow
def test_training_makes_such_a_judge():
    assert accuracy(trained(mnist_dir()), mnist_dir()) >= 0.985


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["eager", "cuda_graph"])
def test_a_gpu_draws_the_cpus_digits(mnist, engine):
    """By the default run, in float32, to two of the 255 levels: one is what two orders of summation come to."""
    on_gpu = Sampler.from_pretrained("mnist", device="cuda", engine=engine, precision="fp32")
    got, expected = (sampler.sample(16, output="uint8") for sampler in (on_gpu, mnist))
    assert int((got.cpu().int() - expected.int()).abs().max()) <= 2


def test_a_folder_of_the_same_name_does_not_hide_it(tmp_path, monkeypatch):
    """People keep MNIST itself in a folder called mnist."""
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Sampler.from_pretrained("mnist", device="cpu").spec.num_classes == 10
    with pytest.raises(fastddpm.CheckpointError, match="expected a folder"):
        Sampler.from_pretrained("./mnist", device="cpu")
