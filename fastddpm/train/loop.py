"""The training loop: L_simple (Ho et al. 2020, eq. 14) and the hybrid loss for learned variances.

Every random number is a function of the seed and a count: the order of the data of (seed, epoch), timesteps and label
dropout of (seed, step), and the noise of picture n of the run of (seed, n, t). A run that was killed and resumed is
therefore the same run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastddpm.checkpoints import native
from fastddpm.common.interrupts import hold_interrupt
from fastddpm.kernels.philox import TRAINING
from fastddpm.kernels.q_sample import Draw, q_sample
from fastddpm.nets.unet import UNet
from fastddpm.pictures.data import ImageData
from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec
from fastddpm.train.config import TrainConfig as TrainConfig
from fastddpm.train.losses import simple_loss, variance_loss
from fastddpm.train.run_folder import RunFolder, TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """One step's news.

    Args:
        step: Steps done, counted over all sessions.
        total: Steps of the whole run.
        epoch: Epochs completed.
        loss: This step's loss.
        images_per_second: Since the session began.
        epoch_ended: Whether this step was the last of an epoch.
    """

    step: int
    total: int
    epoch: int
    loss: float
    images_per_second: float
    epoch_ended: bool


class Trainer:
    """A training run in a folder: config.json and model.safetensors to sample from, a state to resume from, metrics."""

    def __init__(
        self,
        folder: str | os.PathLike[str],
        network: UNet,
        schedule: NoiseSchedule,
        spec: ModelSpec,
        data: ImageData,
        config: TrainConfig,
    ) -> None:
        """Prepare a run, or resume the one that the folder holds.

        Args:
            folder: Where the run lives; made if missing.
            network: A freshly made network; its weights are replaced when resuming. It is trained where it is: move it
                to a GPU before.
            schedule: The forward process.
            spec: The conventions to train.
            data: The pictures.
            config: How to train.

        Raises:
            ValueError: If data, network and conventions disagree, or the folder's state belongs to another run.
            CheckpointError: If the folder's state is damaged.
        """
        _check_data(data, network, spec, config)
        self.folder, self.device = Path(folder), network.time_projection.weight.device
        self.schedule, self.spec, self.data, self.config = schedule, spec, data, config
        self.network = network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.network.gradient_checkpointing = config.gradient_checkpointing
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.weights = {name: value.detach() for name, value in self.network.state_dict().items()}
        self.ema = {name: value.clone() for name, value in self.weights.items()}
        self.levels = schedule.levels(self.device)
        self.steps_per_epoch = len(data.images) // config.batch_size
        self.total = self.steps_per_epoch * config.epochs
        self.step = 0
        self._epoch_order: tuple[int, Tensor] | None = None
        self._files = RunFolder(self.folder)
        shapes = {name: tuple(value.shape) for name, value in self.weights.items()}
        state = self._files.load_state(self._fingerprint(), shapes)
        self.resumed = state is not None
        if state is not None:
            self._resume(state)

    def run(self, on_progress: Callable[[Progress], None] | None = None, stop_after: int | None = None) -> None:
        """Train until the last epoch is done; the state is saved at intervals, at each epoch's end and on Ctrl-C.

        Args:
            on_progress: Called after every step.
            stop_after: Stop after this many steps of this session (for tests and time budgets).

        Raises:
            FloatingPointError: If the loss or its gradient is no longer finite.
            OSError: If the folder cannot be written.
            ValueError: If stop_after is less than 1, or another process trains in the folder.
        """
        if stop_after is not None and stop_after < 1:
            raise ValueError(f"Trainer.run: stop_after must be at least 1, got {stop_after}; leave it out for no limit")
        with self._files.locked(self.step):
            self._run(on_progress, self.total if stop_after is None else min(self.total, self.step + stop_after))

    def _run(self, on_progress: Callable[[Progress], None] | None, last: int) -> None:
        first, busy = self.step, 0.0
        losses: list[float] = []
        try:
            while self.step < last:
                started = time.perf_counter()
                with hold_interrupt():  # a step that is half done could not be resumed
                    losses.append(self.train_step())
                busy += time.perf_counter() - started
                rate = (self.step - first) * self.config.batch_size / busy
                news = Progress(
                    self.step, self.total, self.step // self.steps_per_epoch, losses[-1], rate,
                    self.step % self.steps_per_epoch == 0,
                )  # fmt: skip
                if news.epoch_ended or self.step % self.config.save_every == 0 or self.step == last:
                    with hold_interrupt():
                        self.save(sum(losses) / len(losses), rate)
                        losses = []
                if on_progress is not None:
                    on_progress(news)
        except KeyboardInterrupt:
            if losses:
                self.save(sum(losses) / len(losses), None)
            raise

    def train_step(self) -> float:
        """One optimiser step; returns its loss.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        x_start, labels, numbers = self.batch()
        generator = self.generator("timesteps", self.step)
        t = torch.randint(self.schedule.T, (len(numbers),), generator=generator).to(self.device)
        labels = self.drop_labels(labels, generator)
        if self.network.config.dropout > 0:
            torch.manual_seed(_seed(self.config.seed, "dropout", self.step))
        self.set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(x_start, t, labels, numbers.to(self.device))
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        value, steepness = torch.stack((loss.detach(), norm)).tolist()  # the step's only wait for the device
        if not (math.isfinite(value) and math.isfinite(steepness)):
            raise FloatingPointError(
                f"the loss became {value} and its gradient {steepness} at step {self.step}; the weights of the last "
                f"saved state are sound: start anew with a learning rate below {self.config.learning_rate:g}"
            )
        self.optimizer.step()
        self._update_ema()
        self.step += 1
        return float(value)

    def loss(self, x_start: Tensor, t: Tensor, labels: Tensor | None, numbers: Tensor) -> Tensor:
        """The loss of these pictures, each at its own timestep, with the noise of its number in the run."""
        draw = Draw(torch.full_like(numbers, self.config.seed), numbers, TRAINING)
        x_t, eps = q_sample(x_start, t, self.levels, draw)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast == "bf16"):
            out = self.network(x_t, self.spec.times_fed(t), labels)
        out, clean = out.float(), x_start.float() / 127.5 - 1
        schedule, prediction = self.schedule, self.spec.prediction
        loss = simple_loss(schedule, clean, t, eps, out, prediction)
        if self.spec.learned_variance:
            loss = loss + self.config.vlb_weight * variance_loss(schedule, clean, x_t, t, out, prediction)
        return loss.mean()

    def batch(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The pictures of this step, their labels, and their numbers in the run (int64, unique)."""
        epoch, within = divmod(self.step, self.steps_per_epoch)
        first = within * self.config.batch_size
        chosen = self.order(epoch)[first : first + self.config.batch_size]
        images = self.data.images[chosen]
        if self.config.hflip:
            flips = torch.rand(len(chosen), generator=self.generator("flips", self.step)) < 0.5
            images = torch.where(flips[:, None, None, None], images.flip(3), images)
        labels = None if self.spec.num_classes is None or self.data.labels is None else self.data.labels[chosen]
        numbers = self.step * self.config.batch_size + torch.arange(len(chosen))
        return images.to(self.device), labels if labels is None else labels.to(self.device), numbers

    def order(self, epoch: int) -> Tensor:
        """In which order an epoch visits the pictures: a permutation, kept until the next epoch."""
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            generator = self.generator("order", epoch)
            self._epoch_order = epoch, torch.randperm(len(self.data.images), generator=generator)
        return self._epoch_order[1]

    def drop_labels(self, labels: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """Labels of which some are replaced by that of no class, at random."""
        if labels is None or self.spec.null_class is None:
            return labels
        dropped = torch.rand(len(labels), generator=generator).to(self.device) < self.config.label_dropout
        return torch.where(dropped, self.spec.null_class, labels)

    def generator(self, purpose: str, count: int) -> torch.Generator:
        """Random numbers for one purpose and one count of steps or epochs."""
        return torch.Generator().manual_seed(_seed(self.config.seed, purpose, count))

    def set_learning_rate(self) -> None:
        """Give the optimiser the rate of the step to come."""
        config = self.config
        rate = config.learning_rate * min(1.0, (self.step + 1) / max(1, config.warmup))
        if config.lr_schedule == "cosine" and self.step >= config.warmup:
            done = (self.step - config.warmup) / max(1, self.total - config.warmup)
            rate *= 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def _update_ema(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), list(self.weights.values()), 1 - decay)

    def save(self, loss: float, images_per_second: float | None) -> None:
        """Write the averaged weights, the state to resume from and a line of metrics.

        Raises:
            OSError: If a file cannot be written.
        """
        self._files.append_metrics(
            {"step": self.step, "loss": loss, "images_per_second": images_per_second, "time": time.time()}
        )
        dtype = torch.float16 if self.config.weights_dtype == "fp16" else torch.float32
        native.save(
            self.folder, self.network, self.schedule, self.spec,
            weights={name: value.to(dtype) for name, value in self.ema.items()}, training=self.summary(),
        )  # fmt: skip
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.network.named_parameters()}
        parts: dict[str, dict[str, Tensor]] = {"model": self.weights, "ema": self.ema}
        parts |= {key: {name: state[key] for name, state in moments.items()} for key in ("exp_avg", "exp_avg_sq")}
        self._files.save_state(TrainState(self.step, parts), self._fingerprint())

    @torch.no_grad()
    def _resume(self, state: TrainState) -> None:
        # Every tensor is copied into one that the network laid out: the fused optimiser reads memory in order.
        for name, value in self.weights.items():
            value.copy_(state.parts["model"][name])
            self.ema[name].copy_(state.parts["ema"][name])
        for name, parameter in self.network.named_parameters():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step), device=self.device),
                **{key: torch.empty_like(parameter).copy_(state.parts[key][name]) for key in ("exp_avg", "exp_avg_sq")},
            }
        self.step = state.step

    def summary(self) -> dict[str, object]:
        """How the weights came about, for config.json and model cards."""
        return {
            "data": self.data.source,
            "pictures": len(self.data.images),
            "step": self.step,
            "total_steps": self.total,
            **dataclasses.asdict(self.config),
        }

    def _fingerprint(self) -> dict[str, object]:
        """What must not change between the sessions of one run."""
        return {
            "unet": self.network.config.to_dict(),
            "schedule": self.schedule.to_config(),
            "spec": self.spec.to_dict(),
            "pictures": list(self.data.images.shape),
            "config": self.config.lasting(),
        }


def _seed(seed: int, purpose: str, count: int) -> int:
    """A generator's seed for one purpose and one count: distinct for all that one run asks for."""
    purposes = ("order", "timesteps", "dropout", "flips")
    return (
        seed * 0x9E3779B97F4A7C15 + count * 0xBF58476D1CE4E5B9 + purposes.index(purpose) * 0x94D049BB133111EB
    ) % 2**63


def _check_data(data: ImageData, network: UNet, spec: ModelSpec, config: TrainConfig) -> None:
    shape = tuple(data.images.shape[1:])
    if shape != spec.shape:
        raise ValueError(f"Trainer: pictures must have shape {spec.shape}, got {shape} from {data.source}")
    if len(data.images) < config.batch_size:
        raise ValueError(
            f"Trainer: batch_size must be at most the {len(data.images)} pictures, got {config.batch_size}"
        )
    if spec.num_classes is not None and data.labels is None:
        raise ValueError(f"Trainer: the network has {spec.num_classes} classes but {data.source} has no labels")
    if spec.num_classes is not None and data.labels is not None and int(data.labels.max()) >= spec.num_classes:
        raise ValueError(f"Trainer: labels must be below {spec.num_classes}, got {int(data.labels.max())}")
    native.check_agreement(network.config, spec)
