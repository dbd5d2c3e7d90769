"""Training: it learns, it is the same run however often it is stopped, and it says what is wrong."""

import dataclasses
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastddpm.checkpoints import CheckpointError, load_checkpoint
from fastddpm.checkpoints.native import read_metadata
from fastddpm.common.interrupts import hold_interrupt
from fastddpm.kernels.philox import TRAINING
from fastddpm.nets.unet import UNet
from fastddpm.process.noise import normals
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.sampler import Sampler
from fastddpm.train.loop import TrainConfig, Trainer
from fastddpm.train.losses import simple_loss, variance_loss
from tests.tiny import SPEC, UNET, T, environment, pictures, unconditional

pytestmark = pytest.mark.usefixtures("single_thread")  # sums in one order are equal bit for bit
QUICK = TrainConfig(epochs=3, batch_size=16, warmup=2, save_every=5, ema_decay=0.9, learning_rate=2e-3)


def trainer(folder, data=None, unet=UNET, spec=SPEC, network_seed=0, **changes):
    torch.manual_seed(network_seed)
    config = dataclasses.replace(QUICK, **changes)
    return Trainer(folder, UNet(unet), NoiseSchedule.linear(T), spec, data or pictures(), config)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{key: line[key] for key in ("step", "loss")} for line in lines]


def assert_same_run(one, other):
    """Every tensor of the state and of the checkpoint, and the metrics, are equal bit for bit."""
    for name in ("train_state.safetensors", "model.safetensors"):
        mine, theirs = load_file(one / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        different = [key for key, value in mine.items() if not torch.equal(value, theirs[key])]
        assert different == []
    assert without_times(metrics(one)) == without_times(metrics(other))


# ---------------------------------------------------------------------- it learns


@pytest.mark.parametrize(
    ("prediction", "conditional"), [("eps", True), ("x_start", False), ("v", True)], ids=["eps", "x_start", "v"]
)
def test_the_loss_falls(tmp_path, prediction, conditional):
    unet, spec = (UNET, dataclasses.replace(SPEC, prediction=prediction))
    if not conditional:
        unet, spec = unconditional(prediction=prediction)
    run = trainer(tmp_path, unet=unet, spec=spec, epochs=40, lr_schedule="constant", learning_rate=5e-3)
    losses = [run.train_step() for _ in range(60)]
    assert mean(losses[-20:]) < 0.6 * mean(losses[:5])


def test_learned_variance_trains_and_its_checkpoint_samples(tmp_path):
    unet, spec = unconditional(variance="learned_range")
    run = trainer(tmp_path, unet=unet, spec=spec, epochs=20, lr_schedule="constant", learning_rate=5e-3, vlb_weight=0.1)
    variance_weights = run.weights["conv_out.weight"][1:].clone()
    losses = [run.train_step() for _ in range(60)]
    run.save(losses[-1], None)
    assert mean(losses[-20:]) < 0.8 * mean(losses[:5])
    assert not torch.equal(run.weights["conv_out.weight"][1:], variance_weights)
    sampler = Sampler.from_pretrained(tmp_path)
    for options in ({"solver": "ddpm"}, {"solver": "ddim", "steps": 5}):
        images = sampler.sample(3, progress=False, **options)
        assert images.shape == (3, 1, 8, 8) and bool(images.isfinite().all())
    assert not torch.equal(sampler.sample(1, solver="ddpm", progress=False), torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_the_loss_is_the_textbooks(tmp_path, prediction, variance):
    """The loop's loss at its own timesteps and noise, against the schedule's and the losses' own functions."""
    unet, spec = unconditional(prediction=prediction, variance=variance)
    run = trainer(tmp_path, unet=unet, spec=spec)
    for parameter in run.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images, _, numbers = run.batch()
    t = torch.arange(16) % T
    eps = normals(torch.zeros(16, dtype=torch.int64), numbers, t + TRAINING, (1, 8, 8))
    x_start = images.float() / 127.5 - 1
    with torch.no_grad():
        x_t = run.schedule.q_sample(x_start, t, eps)
        out = run.network(x_t, t)
        expected = simple_loss(run.schedule, x_start, t, eps, out, prediction).mean()
        if spec.learned_variance:
            expected += run.config.vlb_weight * variance_loss(run.schedule, x_start, x_t, t, out, prediction).mean()
        assert float(run.loss(images, t, None, numbers)) == pytest.approx(float(expected), rel=1e-5)


def test_bfloat16_and_checkpointing_train_too(tmp_path):
    plain = trainer(tmp_path / "a").train_step()
    for change in ({"gradient_checkpointing": True}, {"autocast": "bf16"}):
        run = trainer(tmp_path / "b", **change)
        losses = [run.train_step() for _ in range(3)]
        assert losses[0] == pytest.approx(plain, rel=0.02)
        assert losses[2] != losses[0]


def test_half_precision_weights_are_stored_half_and_resume_whole(tmp_path):
    trainer(tmp_path, weights_dtype="fp16").run(stop_after=5)
    stored = load_file(tmp_path / "model.safetensors")
    state = load_file(tmp_path / "train_state.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(value, state[f"ema.{name}"].half()) for name, value in stored.items())


# ---------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_learning_rate(tmp_path, schedule):
    run = trainer(tmp_path, warmup=4, epochs=5, lr_schedule=schedule, learning_rate=1.0)
    assert run.total == 20
    rates = []
    for run.step in range(20):
        run.set_learning_rate()
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    if schedule == "constant":
        assert rates[4:] == [1.0] * 16
    else:
        assert rates[4] == 1.0 and rates[12] == pytest.approx(0.5) and 0 < rates[19] < 0.02
        assert rates[4:] == sorted(rates[4:], reverse=True)


def test_the_average_follows_its_formula(tmp_path):
    run = trainer(tmp_path, ema_decay=0.3)
    expected = run.ema["stem.weight"].double()
    for n in range(6):
        run.train_step()
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * run.weights["stem.weight"].double()
    torch.testing.assert_close(run.ema["stem.weight"].double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_labels_are_dropped_at_the_rate_that_was_asked_for(tmp_path, share):
    run = trainer(tmp_path, label_dropout=share)
    labels = torch.zeros(20_000, dtype=torch.int64)
    dropped = run.drop_labels(labels, run.generator("timesteps", 0)) == SPEC.null_class
    # 0.01 is 4.7 standard deviations of the mean of 20,000 draws at 0.1: fails by chance once in 400,000 seeds.
    assert float(dropped.float().mean()) == pytest.approx(share, abs=0.01 if 0 < share < 1 else 0)


def test_mirroring_is_random_and_half_of_all(tmp_path):
    data = pictures(640)
    run = trainer(tmp_path, data, hflip=True, batch_size=320)
    seen, _, _ = run.batch()
    chosen = run.order(0)[:320]
    same = (seen == data.images[chosen]).flatten(1).all(1)
    mirrored = (seen == data.images[chosen].flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 110 < int(mirrored.sum()) < 210  # 160 ± 5.6 standard deviations
    run.step = 1
    assert not torch.equal(run.batch()[0][:64], seen[:64])


def test_every_epoch_is_a_new_permutation(tmp_path):
    run = trainer(tmp_path)
    numbers, epochs = [], []
    for run.step in range(8):
        _, _, ids = run.batch()
        numbers += ids.tolist()
        epochs.append(run.order(run.step // 4))
    assert numbers == list(range(8 * 16))
    assert sorted(epochs[0].tolist()) == list(range(64))
    assert torch.equal(epochs[0], epochs[3]) and not torch.equal(epochs[0], epochs[4])


# ---------------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_in_pieces_is_the_same_run(tmp_path, dropout):
    unet = dataclasses.replace(UNET, dropout=dropout)
    trainer(tmp_path / "whole", unet=unet, hflip=True).run()
    for piece, stop_after in enumerate((4, 1, 5, None)):  # each ends where a save was due, so that metrics agree too
        run = trainer(tmp_path / "pieces", unet=unet, network_seed=piece, hflip=True)
        assert run.resumed is (piece > 0)
        torch.manual_seed(random.randrange(2**32))
        run.run(stop_after=stop_after)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


def test_the_optimiser_goes_on_with_its_own_memory_layout(tmp_path):
    """The fused AdamW walks raw memory: moments laid out unlike their weight would meet the wrong elements."""
    trainer(tmp_path).run(stop_after=1)
    run = trainer(tmp_path)
    for parameter in run.network.parameters():
        state = run.optimizer.state[parameter]
        assert parameter.stride() == state["exp_avg"].stride() == state["exp_avg_sq"].stride()


SESSION = """
import sys
from tests.train.test_training import trainer
import torch
torch.set_num_threads(1)
trainer(sys.argv[1], epochs=12).run(lambda progress: print(progress.step, flush=True))
"""


def start_session(folder):
    """A training session in a process of its own that tells each step."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environ = environment(PYTHONPATH=root)
    return subprocess.Popen(
        [sys.executable, "-c", SESSION, str(folder)], stdout=subprocess.PIPE, text=True, env=environ
    )


def wait_for_step(session, step):
    for line in session.stdout:
        if int(line) >= step:
            return
    raise AssertionError("the session ended too early")


@pytest.mark.parametrize("step", [13, pytest.param(37, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, step):
    """SIGKILL at an unforeseen moment; 12 epochs of 4 steps, a save every 5 steps and at each epoch's end."""
    trainer(tmp_path / "whole", epochs=12).run()
    killed = tmp_path / "killed"
    session = start_session(killed)
    wait_for_step(session, step)
    time.sleep(random.random() / 50)
    session.kill()
    session.communicate(timeout=60)
    assert session.returncode == -signal.SIGKILL
    (killed / ".train_state.00000000.tmp.safetensors").touch()  # as if the kill had hit a write
    run = trainer(killed, epochs=12)
    assert step - 5 < run.step < 48
    run.run()
    assert_same_run(tmp_path / "whole", killed)
    assert [line["step"] for line in metrics(killed)] == sorted({*range(4, 49, 4), *range(5, 49, 5)})
    names = ["config.json", "metrics.jsonl", "model.safetensors", "train_state.safetensors"]
    assert sorted(os.listdir(killed)) == names


class Interrupting:
    """Pictures that press Ctrl-C when they are looked at for the n-th time."""

    def __init__(self, images, n):
        self.images, self.left = images, n

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
        return self.images[index]

    def __len__(self):
        return len(self.images)

    def __getattr__(self, name):
        return getattr(self.images, name)


def test_ctrl_c_within_a_step_finishes_and_saves_it(tmp_path):
    trainer(tmp_path / "whole").run()
    data = pictures()
    run = trainer(tmp_path / "stopped", dataclasses.replace(data, images=Interrupting(data.images, 7)))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert metrics(tmp_path / "stopped")[-1]["step"] == 7
    run = trainer(tmp_path / "stopped")
    assert run.step == 7
    run.run()
    mine, theirs = (load_file(tmp_path / name / "train_state.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_interrupts_are_held_and_handlers_restored():
    before = signal.getsignal(signal.SIGINT)
    done = []
    with pytest.raises(KeyboardInterrupt), hold_interrupt():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("all of the block")
    assert done and signal.getsignal(signal.SIGINT) is before


def test_a_kill_between_metrics_and_state_leaves_no_line_twice(tmp_path):
    trainer(tmp_path).run(stop_after=4)
    old = (tmp_path / "train_state.safetensors").read_bytes()
    trainer(tmp_path).run(stop_after=4)
    (tmp_path / "train_state.safetensors").write_bytes(old)  # as if the kill came just before the state was written
    run = trainer(tmp_path)
    assert run.step == 4
    run.run()
    assert [line["step"] for line in metrics(tmp_path)] == [4, 5, 8, 10, 12]


def test_a_finished_run_stays_as_it_is(tmp_path):
    trainer(tmp_path).run()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run = trainer(tmp_path)
    assert run.step == run.total == 12
    run.run()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


LOCKING = """
import sys, time
from pathlib import Path
from fastddpm.train.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked(0):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_trains_in_a_folder(tmp_path):
    run = trainer(tmp_path)
    other = subprocess.Popen([sys.executable, "-c", LOCKING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="must be trained in by one process, got another one"):
            run.run()
        assert os.listdir(tmp_path) == [".fastddpm.lock"] and run.step == 0
    finally:
        other.kill()
        other.communicate(timeout=60)
    run.run(stop_after=1)  # the killed process has left its lock, which holds nobody up
    assert ".fastddpm.lock" not in os.listdir(tmp_path)


def test_a_run_that_went_on_elsewhere_meanwhile_is_not_overwritten(tmp_path):
    early = trainer(tmp_path)
    trainer(tmp_path).run(stop_after=2)
    with pytest.raises(ValueError, match=r"must stand at step 0, .* got 2: another process trained in it meanwhile"):
        early.run()
    assert trainer(tmp_path).step == 2


def test_a_run_does_not_write_through_links(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"model\.safetensors: it is a symbolic link"):
        trainer(tmp_path / "run").run()
    assert not (tmp_path / "precious").exists()


def test_what_a_run_leaves_is_a_checkpoint_and_a_record(tmp_path):
    seen = []
    trainer(tmp_path).run(seen.append)
    assert [news.step for news in seen] == list(range(1, 13)) and {news.total for news in seen} == {12}
    assert [news.step for news in seen if news.epoch_ended] == [4, 8, 12]
    assert all(news.images_per_second > 0 for news in seen)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.spec == SPEC
    assert checkpoint.training["step"] == 12 and checkpoint.training["data"] == "made-up pictures"
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [4, 5, 8, 10, 12]
    assert lines[0]["loss"] == pytest.approx(sum(news.loss for news in seen[:4]) / 4)
    assert lines[1]["loss"] == seen[4].loss
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


# ---------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"epochs": 4}, "config.epochs was 3, is 4"), ({"seed": 1}, "config.seed was 0, is 1"),
     ({"learning_rate": 0.5}, "config.learning_rate"), ({"data": pictures(80)}, "pictures"),
     ({"unet": dataclasses.replace(UNET, scale_shift=True)}, "unet.scale_shift was False, is True"),
     ({"spec": dataclasses.replace(SPEC, prediction="v")}, "spec.prediction was 'eps', is 'v'")],
    ids=["epochs", "seed", "rate", "data", "network", "conventions"],
)  # fmt: skip
def test_other_settings_do_not_resume(tmp_path, changes, name):
    trainer(tmp_path).run(stop_after=1)
    before = (tmp_path / "train_state.safetensors").read_bytes()
    with pytest.raises(ValueError, match=f"other settings: {name}.*another folder"):
        trainer(tmp_path, **changes)
    assert (tmp_path / "train_state.safetensors").read_bytes() == before


def test_a_state_from_before_an_option_existed_resumes_with_its_default(tmp_path):
    trainer(tmp_path).run(stop_after=1)
    path = tmp_path / "train_state.safetensors"
    tensors, metadata = load_file(path), read_metadata(path)
    settings = json.loads(metadata["fingerprint"])
    for section, option in (("spec", "clipped_eps"), ("unet", "embedding_shift"), ("config", "hflip")):
        del settings[section][option]
    save_file(tensors, path, {**metadata, "fingerprint": json.dumps(settings)})
    with pytest.raises(ValueError, match="config.hflip was False, is True"):
        trainer(tmp_path, hflip=True)
    assert trainer(tmp_path).step == 1


@pytest.mark.parametrize("changes", [{"save_every": 1}, {"weights_dtype": "fp16"}, {"gradient_checkpointing": True}])
def test_settings_that_do_not_change_the_run_may_change(tmp_path, changes):
    trainer(tmp_path).run(stop_after=1)
    assert trainer(tmp_path, **changes).step == 1


def test_loss_that_is_nan(tmp_path):
    run = trainer(tmp_path)
    run.run(stop_after=5)
    sound = (tmp_path / "train_state.safetensors").read_bytes()
    with torch.no_grad():
        next(run.network.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss became nan.* at step 5; .*learning rate below 0.002"):
        run.run()
    assert (tmp_path / "train_state.safetensors").read_bytes() == sound


def test_a_gradient_that_is_infinite_never_reaches_the_weights(tmp_path):
    run = trainer(tmp_path)
    run.train_step()
    before = {name: value.clone() for name, value in run.weights.items()}
    run.network.conv_out.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="its gradient (inf|nan)"):
        run.train_step()
    assert all(torch.equal(value, before[name]) for name, value in run.weights.items())


def damage(folder, kind):
    path = folder / "train_state.safetensors"
    tensors, metadata = load_file(path), read_metadata(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "foreign":
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    elif kind == "a checkpoint":
        shutil.copy(folder / "model.safetensors", path)
    elif kind == "metrics":
        (folder / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    else:
        if kind == "missing moment":
            del tensors["exp_avg.stem.weight"]
        elif kind == "NaN":
            tensors["model.stem.weight"].fill_(float("nan"))
        elif kind == "negative step":
            metadata["step"] = "-3"
        save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "kind", ["truncated", "foreign", "a checkpoint", "metrics", "missing moment", "NaN", "negative step"]
)
def test_a_damaged_state_is_refused(tmp_path, kind):
    trainer(tmp_path).run(stop_after=1)
    damage(tmp_path, kind)
    with pytest.raises(CheckpointError, match="metrics.jsonl: line 2" if kind == "metrics" else "train_state"):
        trainer(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 0}, {"epochs": 1.5}, {"epochs": True}, {"batch_size": 0}, {"learning_rate": -1.0},
     {"learning_rate": float("nan")}, {"learning_rate": "1"}, {"label_dropout": 1.5}, {"ema_decay": 2.0},
     {"seed": -1}, {"seed": 2**63}, {"save_every": 0}, {"lr_schedule": "linear"}, {"autocast": "fp16"},
     {"weights_dtype": "bf16"}, {"grad_clip": 0.0}],
    ids=str,
)  # fmt: skip
def test_settings_out_of_range(changes):
    with pytest.raises((ValueError, TypeError), match=f"TrainConfig: {next(iter(changes))} must be"):
        TrainConfig(**changes)


def test_pictures_that_do_not_fit(tmp_path):
    data = pictures()
    cases = {
        "batch_size must be at most the 8 pictures, got 16": {"data": pictures(8)},
        "shape": {"data": dataclasses.replace(data, images=data.images[..., :6])},
        "has no labels": {"data": dataclasses.replace(data, labels=None, class_names=None)},
        "labels must be below 3, got 5": {"data": dataclasses.replace(data, labels=data.labels + 3)},
        "unet and spec must agree": {"spec": dataclasses.replace(SPEC, variance="learned_range")},
    }
    for message, changes in cases.items():
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stop_after", [0, -1])
def test_stopping_before_the_first_step(tmp_path, stop_after):
    with pytest.raises(ValueError, match="stop_after must be at least 1"):
        trainer(tmp_path).run(stop_after=stop_after)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(OSError, match="must be a folder"):
        trainer(tmp_path / "file" / "run").run()
    assert (tmp_path / "file").read_text() == "text"
