"""Sampler: the same pictures whatever the batches, the noise a caller supplies, guidance, and clear refusals."""

import copy
import json
import pickle
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastddpm import DynamicThreshold, ModelSpec, NoiseSchedule, Sampler
from fastddpm.kernels.philox import X_T_COUNTER
from fastddpm.process import reference
from fastddpm.process.noise import normals
from tests.networks import ODD_SHAPES, tiny_sampler

SOLVERS = {
    "ddpm": {"solver": "ddpm", "steps": 8},
    "ddpm-respaced": {"solver": "ddpm", "timesteps": "3,4"},
    "ddim": {"solver": "ddim", "steps": 8},
    "ddim-eta": {"solver": "ddim", "steps": 8, "eta": 0.7},
    "dpmpp_2m": {"solver": "dpmpp_2m", "steps": 8},
    "dpmpp_3m": {"solver": "dpmpp_3m", "steps": 8},
}
each_solver = pytest.mark.parametrize("run", SOLVERS.values(), ids=SOLVERS.keys())


def seeded(ids, seed, t, shape=(1, 8, 8)):
    """Philox normals of several samples at one counter t."""
    ids = torch.as_tensor(ids)
    return normals(torch.full_like(ids, seed), ids, torch.full_like(ids, t), shape)


class TestSameSample:
    @each_solver
    @pytest.mark.parametrize("guidance", [1.0, 2.0], ids=["plain", "guided"])
    def test_at_one_batch_size_bit_for_bit(self, run, guidance):
        """Whatever its place and company, short batches included."""
        sampler = tiny_sampler()
        options = {"output": "raw", "batch_size": 5, "guidance_scale": guidance, **run}
        expected = sampler.sample(10, class_labels=[i % 3 for i in range(10)], **options)
        for ids in ([7], [9, 0, 4], [1, 8, 3, 6, 2, 5]):
            got = sampler.sample(len(ids), sample_ids=ids, class_labels=[i % 3 for i in ids], **options)
            assert torch.equal(got, expected[ids])

    @each_solver
    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_whatever_the_batch_size(self, run, batch_size):
        sampler = tiny_sampler()
        labels = [i % 3 for i in range(10)]
        options = {**run, "seed": 9, "class_labels": labels, "guidance_scale": 1.5, "output": "raw"}
        expected = sampler.sample(10, **options)
        assert float((sampler.sample(10, batch_size=batch_size, **options) - expected).abs().max()) <= 1e-5

    @each_solver
    def test_in_any_order_and_split(self, run):
        sampler = tiny_sampler()
        expected = sampler.sample(6, class_labels=2, output="raw", **run)
        order = [4, 0, 5, 2]
        got = sampler.sample(4, sample_ids=order, class_labels=2, output="raw", **run)
        assert float((got - expected[order]).abs().max()) <= 1e-5

    def test_other_seeds_and_ids_give_other_samples(self):
        sampler = tiny_sampler()
        run = {"class_labels": 1, "output": "raw"}
        a, b = sampler.sample(2, seed=1, **run)
        c = sampler.sample(1, seed=2, **run)[0]
        d = sampler.sample(1, seed=1, sample_ids=[2**40], **run)[0]
        for one, other in ((a, b), (a, c), (a, d), (b, c)):
            assert float((one - other).abs().max()) > 0.1

    def test_over_two_processes(self, tmp_path):
        script = tmp_path / "half.py"
        script.write_text(
            "import json, sys\n"
            "from tests.networks import tiny_sampler\n"
            "ids = json.loads(sys.argv[1])\n"
            "x = tiny_sampler().sample(len(ids), seed=3, sample_ids=ids, class_labels=0, solver='ddpm', output='raw')\n"
            "print(json.dumps(x.tolist()))\n"
        )
        root = str(__import__("pathlib").Path(__file__).resolve().parents[1])
        halves = [
            subprocess.Popen([sys.executable, str(script), json.dumps(ids)], stdout=subprocess.PIPE, cwd=root,
                             env={**__import__("os").environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"})
            for ids in ([0, 1, 2], [3, 4])
        ]  # fmt: skip
        got = torch.cat([torch.tensor(json.loads(half.communicate(timeout=120)[0])) for half in halves])
        expected = tiny_sampler().sample(5, seed=3, class_labels=0, solver="ddpm", output="raw")
        assert float((got - expected).abs().max()) <= 1e-5


class TestAgainstTheReference:
    """The engine and the textbook, given the same noise."""

    @pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
    @pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
    def test_ancestral(self, variance, prediction):
        sampler = tiny_sampler(variance=variance, prediction=prediction)
        x_T = seeded(range(4), 0, X_T_COUNTER)
        y = torch.tensor([0, 1, 2, 0])
        z = torch.stack([seeded(range(4), 0, t) for t in range(39, -1, -1)])
        expected = reference.p_sample_loop(
            sampler.model, sampler.schedule, x_T, z, y=y, prediction=prediction, variance=variance
        )
        got = sampler.sample(4, class_labels=y, solver="ddpm", output="raw")
        assert float((got - expected).abs().max()) <= 1e-4

    def test_guidance(self):
        sampler = tiny_sampler()
        y = torch.tensor([0, 1, 2])
        model = reference.classifier_free_guidance(sampler.model, 2.5, 3)
        z = torch.stack([seeded(range(3), 0, t) for t in range(39, -1, -1)])
        expected = reference.p_sample_loop(model, sampler.schedule, seeded(range(3), 0, X_T_COUNTER), z, y=y)
        got = sampler.sample(3, class_labels=y, guidance_scale=2.5, solver="ddpm", output="raw")
        assert float((got - expected).abs().max()) <= 1e-4
        mixed = sampler.sample(3, class_labels=y, guidance_scale=[2.5, 1.0, 2.5], solver="ddpm", output="raw")
        plain = sampler.sample(3, class_labels=y, solver="ddpm", output="raw")
        torch.testing.assert_close(mixed[[0, 2]], got[[0, 2]], rtol=0, atol=1e-5)
        torch.testing.assert_close(mixed[1], plain[1], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("clipped_eps", ["rederive", "raw"])
    def test_ddim(self, clipped_eps):
        sampler = tiny_sampler(clipped_eps=clipped_eps)
        timesteps = torch.tensor([38, 30, 21, 9, 2])
        z = torch.randn(5, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        x_T = seeded([0, 1], 0, X_T_COUNTER)
        y = torch.tensor([1, 2])
        expected = reference.ddim_sample_loop(
            sampler.model,
            sampler.schedule,
            x_T,
            timesteps,
            eta=0.5,
            noise=z,
            y=y,
            clipped_eps=clipped_eps,
        )
        got = sampler.sample(2, timesteps=timesteps, eta=0.5, noise=z, class_labels=y, output="raw")
        assert float((got - expected).abs().max()) <= 1e-4

    def test_dpmpp_2m(self):
        sampler = tiny_sampler(T=200)
        timesteps = torch.tensor([199, 150, 90, 40, 10])
        y = torch.tensor([1, 2])
        x_T = seeded([0, 1], 0, X_T_COUNTER)
        expected = reference.dpmpp_2m_sample_loop(sampler.model, sampler.schedule, x_T, timesteps, y=y)
        got = sampler.sample(2, timesteps=timesteps, solver="dpmpp_2m", class_labels=y, output="raw")
        assert float((got - expected).abs().max()) <= 1e-4

    def test_dynamic_thresholding(self):
        sampler = tiny_sampler()
        y = torch.tensor([1, 2])
        z = torch.stack([seeded([0, 1], 0, t) for t in range(39, -1, -1)])
        expected = reference.p_sample_loop(
            sampler.model, sampler.schedule, seeded([0, 1], 0, X_T_COUNTER), z, y=y, threshold=(0.9, 3.0)
        )
        got = sampler.sample(2, class_labels=y, solver="ddpm", clip=DynamicThreshold(0.9, 3.0), output="raw")
        assert float((got - expected).abs().max()) <= 1e-4
        clipped = sampler.sample(2, class_labels=y, solver="ddpm", output="raw")
        assert float((got - clipped).abs().max()) > 1e-2


class TestSuppliedNoise:
    def options(self, sampler):
        steps = sampler.table(solver="ddpm", steps=8).timesteps[:-1]
        return steps, {"class_labels": 1, "solver": "ddpm", "steps": 8, "output": "raw", "seed": 4}

    def test_a_tensor_a_function_and_the_seed_agree(self):
        sampler = tiny_sampler()
        steps, options = self.options(sampler)
        z = torch.stack([seeded(range(5), 4, int(t)) for t in steps])
        expected = sampler.sample(5, **options)
        asked = []

        def function(i, t, ids):
            asked.append((i, t, ids.tolist()))
            return z[i][ids]

        for noise in (z, function):
            for batch_size in (None, 2):
                got = sampler.sample(5, noise=noise, batch_size=batch_size, **options)
                assert float((got - expected).abs().max()) <= 1e-5
        assert asked[:7] == [(i, int(steps[i]), [0, 1, 2, 3, 4]) for i in range(7)]  # the last step takes none

    def test_x_T_is_where_it_starts(self):
        sampler = tiny_sampler()
        _, options = self.options(sampler)
        x_T = seeded(range(5), 4, X_T_COUNTER)
        kept = x_T.clone()
        expected = sampler.sample(5, **options)
        assert float((sampler.sample(5, x_T=x_T, batch_size=2, **options) - expected).abs().max()) <= 1e-5
        assert torch.equal(x_T, kept)

    def test_a_generator_draws_as_peers_do(self):
        """x_T first, then one draw a step except the last: the order of diffusers and OpenAI."""
        sampler = tiny_sampler()
        _, options = self.options(sampler)
        generator = torch.Generator().manual_seed(11)
        x_T = torch.randn(3, 1, 8, 8, generator=generator)
        z = torch.stack([torch.randn(3, 1, 8, 8, generator=generator) for _ in range(7)] + [torch.zeros(3, 1, 8, 8)])
        expected = sampler.sample(3, x_T=x_T, noise=z, **options)
        used = torch.Generator().manual_seed(11)
        torch.testing.assert_close(sampler.sample(3, noise=used, **options), expected)
        assert torch.equal(torch.randn(3, generator=used), torch.randn(3, generator=generator))

    def test_ddim_draws_nothing(self):
        sampler = tiny_sampler()
        generator = torch.Generator().manual_seed(11)
        sampler.sample(3, noise=generator, class_labels=0)
        fresh = torch.Generator().manual_seed(11)
        torch.randn(3, 1, 8, 8, generator=fresh)  # x_T
        assert torch.equal(torch.randn(3, generator=generator), torch.randn(3, generator=fresh))


class TestOutputs:
    def test_the_four_forms_agree(self):
        sampler = tiny_sampler()
        raw = sampler.sample(3, class_labels=0, output="raw")
        unit = sampler.sample(3, class_labels=0)
        assert (unit.dtype, unit.shape) == (torch.float32, (3, 1, 8, 8))
        torch.testing.assert_close(unit, (raw / 2 + 0.5).clamp(0, 1))
        bytes_ = sampler.sample(3, class_labels=0, output="uint8")
        assert bytes_.dtype == torch.uint8
        assert float((bytes_ / 255 - unit).abs().max()) <= 0.5 / 255 + 1e-6
        images = sampler.sample(3, class_labels=0, output="pil")
        assert [type(image) for image in images] == [Image.Image] * 3
        assert np.array_equal(np.asarray(images[2]), bytes_[2, 0].numpy())

    def test_default_steps(self):
        sampler = tiny_sampler(T=100)
        assert [sampler.table(solver=s).S for s in ("ddpm", "ddim", "dpmpp_2m", "dpmpp_3m")] == [100, 50, 20, 20]
        assert [tiny_sampler(T=10).table(solver=s).S for s in ("ddpm", "ddim", "dpmpp_2m", "dpmpp_3m")] == [10] * 4

    @pytest.mark.parametrize("offset", [1, 3, 30])
    @pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"])
    def test_an_offset_does_not_apply_to_all_timesteps(self, solver, offset):
        sampler = tiny_sampler(T=20, spacing="leading", steps_offset=offset)
        everything = list(range(19, -1, -1))
        assert sampler.table(solver=solver).timesteps[:-1].tolist() == everything  # the default, where T is so small
        assert sampler.table(solver=solver, steps=20).timesteps[:-1].tolist() == everything

    @pytest.mark.parametrize(
        ("solver", "steps", "offset", "remedy"),
        [("ddpm", 19, 2, "ask for 20 or 18"), ("ddim", 10, 2, "ask for 20 or 9"),
         ("dpmpp_2m", 18, 2, "ask for 20 or 17"), ("ddim", 10, 20, "give timesteps")],
    )  # fmt: skip
    def test_steps_that_leave_no_room_for_the_offset(self, solver, steps, offset, remedy):
        sampler = tiny_sampler(T=20, spacing="leading", steps_offset=offset)
        with pytest.raises(ValueError, match=f"steps_offset of {offset} within 20, got {steps}; {remedy}$"):
            sampler.table(solver=solver, steps=steps)
        if remedy.startswith("ask"):
            near = int(remedy.split()[-1])
            assert sampler.table(solver=solver, steps=near).S == near

    @pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m"])
    def test_the_last_point_of_dpm_solver_is_no_step(self, solver):
        sampler = tiny_sampler(T=20, spacing="leading", steps_offset=1)
        assert sampler.table(solver=solver, steps=19).timesteps[:-1].tolist() == list(range(19, 0, -1))
        assert sampler.table(solver=solver, steps=4).timesteps[:-1].tolist() == [17, 13, 9, 5]

    def test_without_labels_the_null_class_is_asked(self):
        sampler = tiny_sampler()
        nulls = sampler.sample(2, output="raw")
        model = lambda x, t: sampler.network(x, t, torch.full((len(x),), 3))  # noqa: E731
        plain = Sampler(model, sampler.schedule, ModelSpec(shape=(1, 8, 8)), device="cpu")
        torch.testing.assert_close(plain.sample(2, output="raw"), nulls, rtol=0, atol=1e-5)

    def test_network_is_the_bare_output(self):
        sampler = tiny_sampler()
        x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 17]), torch.tensor([0, 2])
        torch.testing.assert_close(sampler.network(x, t, y), sampler.model(x, t, y))


class TestCallback:
    def test_previews_show_every_step(self):
        sampler = tiny_sampler()
        seen = []
        final = sampler.sample(3, class_labels=0, solver="ddpm", steps=6, callback=seen.append, output="raw")
        assert [(p.step, p.steps) for p in seen] == [(i, 6) for i in range(1, 7)]
        assert [p.timestep for p in seen] == sampler.table(solver="ddpm", steps=6).timesteps[:-1].tolist()
        assert torch.equal(seen[-1].x, final)
        torch.testing.assert_close(seen[-1].x_start, final)  # the last step lands on its estimate
        assert all(float(p.x_start.abs().max()) <= 1.0 for p in seen)
        assert not torch.equal(seen[0].x, seen[1].x)

    def test_watching_does_not_change_the_samples(self):
        sampler = tiny_sampler()
        for run in SOLVERS.values():
            expected = sampler.sample(3, class_labels=0, output="raw", **run)
            watched = sampler.sample(3, class_labels=0, output="raw", callback=lambda p: p.x.zero_(), **run)
            torch.testing.assert_close(watched, expected, rtol=0, atol=1e-6)

    def test_ctrl_c_ends_the_run(self):
        sampler = tiny_sampler()
        steps = []

        def interrupt(preview):
            steps.append(preview.step)
            if preview.step == 3:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            sampler.sample(3, class_labels=0, callback=interrupt)
        assert steps == [1, 2, 3]


class TestTrouble:
    @pytest.mark.parametrize("kind", ["seed", "tensor", "generator"])
    def test_nan_is_reported_with_its_step(self, kind):
        def model(x, t):
            return torch.where(t[:, None, None, None] <= 24, torch.nan, 0.1) * torch.ones_like(x)

        sampler = Sampler(model, NoiseSchedule.linear(40), ModelSpec(shape=(1, 4, 4)), device="cpu")
        noise = {"seed": None, "tensor": torch.zeros(40, 2, 1, 4, 4), "generator": torch.Generator()}[kind]
        with pytest.raises(FloatingPointError, match=r"from step 16 of 40 \(t = 24\) in 2 samples, first id 0"):
            sampler.sample(2, solver="ddpm", noise=noise)

    @pytest.mark.parametrize(
        ("n", "options", "error", "message"),
        [
            (0, {}, ValueError, "n must be at least 1"),
            (2.0, {}, TypeError, "n must be an int"),
            (2, {"steps": 41}, ValueError, r"steps must be in 1 … 40 .*got 41"),
            (2, {"steps": 0}, ValueError, "steps must be in 1"),
            (2, {"steps": 2.0}, TypeError, "steps must be an int"),
            (2, {"steps": 3, "timesteps": [5]}, ValueError, "must not both be given"),
            (2, {"timesteps": []}, ValueError, "at least one entry"),
            (2, {"timesteps": [3, 5]}, ValueError, "strictly descending"),
            (2, {"timesteps": [40, 5]}, ValueError, "must be in 0 … 39"),
            (2, {"timesteps": "ten"}, ValueError, "like '250'"),
            (2, {"solver": "euler"}, ValueError, "solver must be one of ddpm, ddim, dpmpp_2m, dpmpp_3m"),
            (2, {"solver": "ddpm", "eta": 0.5}, ValueError, "got eta"),
            (2, {"eta": 1.5}, ValueError, r"eta must be in \[0, 1\]"),
            (2, {"class_labels": 4}, ValueError, "class_labels must be in 0 … 2, got 4"),
            (2, {"class_labels": [0, -1]}, ValueError, "class_labels must be in 0 … 2, got -1"),
            (2, {"class_labels": [0, 1, 2]}, ValueError, "one label or n = 2"),
            (2, {"class_labels": 0.5}, TypeError, "class_labels must be integers"),
            (2, {"guidance_scale": 2.0}, ValueError, "no class_labels are given"),
            (2, {"class_labels": 0, "guidance_scale": float("nan")}, ValueError, "guidance_scale must be one finite"),
            (2, {"sample_ids": [1]}, ValueError, "sample_ids must have n = 2 entries"),
            (2, {"seed": -1}, ValueError, "seed must be in"),
            (2, {"batch_size": 0}, ValueError, "batch_size must be a positive int"),
            (2, {"x_T": torch.zeros(1, 1, 8, 8)}, ValueError, "x_T must be a tensor"),
            (2, {"noise": torch.zeros(3, 2, 1, 8, 8), "eta": 1.0}, ValueError, "noise must have shape"),
            (2, {"noise": "white"}, TypeError, "noise must be a tensor, a function or a torch.Generator"),
            (2, {"noise": lambda i, t, ids: torch.zeros(1), "eta": 1.0}, ValueError, "noise must return a tensor"),
            (2, {"output": "png"}, ValueError, "output must be unit, raw, uint8 or pil"),
            (2, {"clip": -1.0}, ValueError, "clip must be above 0"),
        ],
    )
    def test_bad_requests_are_refused(self, n, options, error, message):
        with pytest.raises(error, match=message):
            tiny_sampler().sample(n, **options)

    @pytest.mark.parametrize("value", ["0.5", None, [], ["x"], {}, object, b"x", 1j, True, np.array([1, 2])], ids=repr)
    @pytest.mark.parametrize(
        "name",
        ["n", "seed", "sample_ids", "steps", "timesteps", "prev_timesteps", "eta", "clip", "class_labels",
         "guidance_scale", "batch_size", "solver"],
    )  # fmt: skip
    def test_values_of_other_types_are_refused_in_our_own_words(self, name, value):
        """None, where it asks for the default, and the like are no errors."""
        arguments = {"n": 3, "steps": 2, "class_labels": 1, name: value}
        if name.endswith("timesteps"):
            del arguments["steps"]
        try:
            tiny_sampler().sample(**arguments)
        except (TypeError, ValueError) as error:
            assert re.match(r"(sample|make_table|\w+_table|respace): \w+ must ", str(error)) and "\n" not in str(error)
        else:
            assert value is None or (name, value) == ("guidance_scale", True) or name == "prev_timesteps"

    def test_labels_for_a_network_without_classes(self):
        sampler = tiny_sampler(num_classes=None, null_class=None)
        with pytest.raises(ValueError, match="the network has no classes"):
            sampler.sample(1, class_labels=0)
        assert sampler.sample(1).shape == (1, 1, 8, 8)

    def test_no_labels_for_a_network_that_needs_them(self):
        with pytest.raises(ValueError, match="class_labels must be given"):
            tiny_sampler(null_class=None).sample(1)

    def test_a_typing_error_in_an_option_fails(self):
        with pytest.raises(
            TypeError, match="options must be those of Sampler.sample, got guidance; it is called guidance_scale here"
        ):
            tiny_sampler().sample(1, guidance=2.0)

    @pytest.mark.parametrize("device", ["tpu", "mps", "cuda:99"])
    def test_devices_that_are_not_there(self, device):
        with pytest.raises(ValueError, match="device must be"):
            Sampler.from_pretrained("mnist", device=device)


def test_time_scale_feeds_fractional_timesteps():
    fed = []

    def model(x, t):
        fed.append(t.clone())
        return torch.zeros_like(x)

    spec = ModelSpec(shape=(1, 4, 4), time_scale=0.25)
    Sampler(model, NoiseSchedule.cosine(4000), spec, device="cpu").sample(2, timesteps=[3001, 3])
    assert [t.tolist() for t in fed] == [[750.25, 750.25], [0.75, 0.75]]


class TestCallersObjects:
    @pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array, torch.tensor], ids=lambda kind: kind.__name__)
    def test_integers_of_any_library(self, kind):
        plain = {"n": 3, "seed": 7, "steps": 4, "class_labels": 2, "batch_size": 2}
        same = {name: kind(value) for name, value in plain.items()}
        assert torch.equal(tiny_sampler().sample(**same), tiny_sampler().sample(**plain))
        same = tiny_sampler().sample(2, sample_ids=np.array([4, 9]), class_labels=np.array([0, 1]), steps=4)
        assert torch.equal(same, tiny_sampler().sample(2, sample_ids=[4, 9], class_labels=[0, 1], steps=4))

    @pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, torch.tensor], ids=lambda kind: kind.__name__)
    def test_numbers_of_any_library(self, kind):
        plain = {"eta": 0.5, "clip": 1.5, "guidance_scale": 2.0}
        same = {name: kind(value) for name, value in plain.items()}
        expected = tiny_sampler().sample(2, class_labels=1, steps=4, **plain)
        assert torch.equal(tiny_sampler().sample(2, class_labels=1, steps=4, **same), expected)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
    def test_timesteps_of_any_integer_type(self, dtype):
        strided = tiny_sampler(T=40, prev_timestep="stride")
        rows = [strided.table(timesteps=torch.tensor([30, 20, 10, 0], dtype=t)).rows for t in (dtype, torch.int64)]
        assert torch.equal(*rows)

    def test_a_module_keeps_its_gradients(self):
        sampler = tiny_sampler()
        assert all(p.requires_grad for p in sampler.model.parameters())

    def test_a_generator_draws_for_all_samples_at_once(self):
        sampler = tiny_sampler()
        run = {"class_labels": 0, "solver": "ddpm", "steps": 2, "output": "raw"}
        whole = sampler.sample(70, noise=torch.Generator().manual_seed(1), batch_size=70, **run)
        default = sampler.sample(70, noise=torch.Generator().manual_seed(1), **run)
        torch.testing.assert_close(default, whole, rtol=0, atol=1e-5)

    def test_a_learned_variance_needs_its_channels(self):
        spec = ModelSpec(shape=(1, 4, 4), variance="learned_range")
        sampler = Sampler(lambda x, t: x, NoiseSchedule.linear(10), spec, device="cpu")
        with pytest.raises(ValueError, match="must return 2 channels for learned_range, got 1"):
            sampler.sample(1, solver="ddpm")

    def test_ids_that_are_no_integers_are_refused(self):
        with pytest.raises(TypeError, match=r"sample_ids must be integers, got 1.5"):
            tiny_sampler().sample(1, sample_ids=[1.5])


class Convolution(torch.nn.Module):
    """The least network that is a module."""

    def __init__(self, channels):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, t):
        return self.convolution(x) / (1 + t.reshape(-1, 1, 1, 1) / 100)


NETWORKS = {"function": lambda channels: lambda x, t: x / (1 + t.view(-1, 1, 1, 1) / 100), "module": Convolution}


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m"])
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_any_network_samples_odd_shapes(shape, network, solver):
    sampler = Sampler(network(shape[0]), NoiseSchedule.linear(20), ModelSpec(shape=shape), device="cpu", engine="eager")
    run = {"solver": solver, "steps": 3, "output": "raw"}
    alone = [sampler.sample(1, sample_ids=[i], **run) for i in range(5)]
    for n in (2, 5):
        torch.testing.assert_close(sampler.sample(n, **run), torch.cat(alone[:n]), rtol=0, atol=1e-5)


def test_a_strided_convention_leaves_uneven_timesteps_alone():
    """diffusers' DDIM leads from t to t − T // S; on a list that is not evenly spaced the next row is not there."""
    strided, plain = tiny_sampler(T=1000, prev_timestep="stride"), tiny_sampler(T=1000)
    for timesteps, same in (([999, 500, 10], True), ("10,15,20", True), ([999, 666, 333, 0], False)):
        rows = [sampler.table(timesteps=timesteps, clip=None).rows for sampler in (strided, plain)]
        assert torch.equal(*rows) == same


class TestStream:
    def test_its_batches_are_the_sample(self):
        sampler = tiny_sampler()
        options = {"solver": "ddpm", "steps": 5, "class_labels": [0, 1, 2, 0, 1], "seed": 3, "batch_size": 2}
        batches = list(sampler.stream(5, sample_ids=range(10, 15), output="uint8", **options))
        assert [batch.ids.tolist() for batch in batches] == [[10, 11], [12, 13], [14]]
        whole = sampler.sample(5, sample_ids=range(10, 15), output="uint8", **options)
        assert torch.equal(torch.cat([batch.pictures for batch in batches]), whole)
        for batch in batches:
            assert batch.run.engine == "eager" and batch.run.steps == 5 and batch.run.seconds > 0 and batch.run.why

    def test_what_is_not_asked_for_is_not_drawn(self):
        seen = []
        stream = tiny_sampler().stream(6, steps=4, class_labels=0, batch_size=2, callback=seen.append)
        assert not seen
        next(stream)
        assert len(seen) == 4
        stream.close()
        assert len(seen) == 4

    def test_all_is_checked_before_the_first_batch(self):
        with pytest.raises(ValueError, match="n must be at least 1"):
            tiny_sampler().stream(0)
        with pytest.raises(ValueError, match="output must be unit"):
            tiny_sampler().stream(1, output=torch.zeros(3))

    def test_a_consumer_s_surroundings_are_its_own(self):
        """What surrounds a batch's work is gone while the caller looks at it."""
        with torch.enable_grad():
            for _ in tiny_sampler().stream(4, steps=2, class_labels=0, batch_size=2):
                assert torch.is_grad_enabled()

    def test_batches_may_be_left_and_mixed(self):
        """Two runs side by side, one of them never finished."""
        sampler = tiny_sampler()
        options = {"steps": 4, "class_labels": 1, "batch_size": 2, "progress": False}
        one, other = sampler.stream(6, **options), sampler.stream(6, seed=1, **options)
        first, second = next(one).pictures, next(other).pictures
        assert torch.equal(first, sampler.sample(2, **options))
        assert torch.equal(second, sampler.sample(2, seed=1, **options))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["copy", "pickle"])
def test_copies_draw_the_same(copied):
    """What was compiled or captured is made anew, and locks are no hindrance."""
    sampler = Sampler.from_pretrained("mnist", device="cpu", engine="eager")
    options = {"solver": "ddpm", "steps": 2, "class_labels": 3, "progress": False}
    expected, other = sampler.sample(1, **options), copied(sampler)
    assert torch.equal(other.sample(1, **options), expected)
    assert other.engine is not sampler.engine and other.engine.name == "eager"
    assert (
        other.checkpoint.path == sampler.checkpoint.path and other.checkpoint.network is not sampler.checkpoint.network
    )
