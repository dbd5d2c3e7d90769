"""The training loop: L_simple (Ho et al. 2020, eq. 14) and the hybrid loss for learned variances.

Every random number is a function of the seed and a count: the order of the data of (seed, epoch), timesteps and label
dropout of (seed, step), and the noise of picture n of the run of (seed, n, t). A run that was killed and resumed is
therefore the same run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.checkpoints import native
from fastddpm.checkpoints.base import CheckpointError, load_weights
from fastddpm.data import ImageData
from fastddpm.files import write_tensors
from fastddpm.kernels.q_sample import q_sample
from fastddpm.losses import hybrid_loss
from fastddpm.schedule import NoiseSchedule
from fastddpm.spec import ModelSpec
from fastddpm.unet import UNet

STATE_NAME = "train_state.safetensors"
METRICS_NAME = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the network, the schedule and the conventions are given apart.

    Args:
        epochs: Passes over the data.
        batch_size: Pictures per step.
        learning_rate: AdamW's peak rate.
        lr_schedule: What follows the warm-up: "cosine" falls to zero at the last step, "constant" stays.
        warmup: Steps over which the rate rises linearly from zero.
        weight_decay: AdamW's decoupled decay.
        ema_decay: Decay of the exponential moving average of the weights, reached gradually: min(decay, (1+n)/(10+n)).
        grad_clip: Largest norm of the gradient.
        label_dropout: Probability that a picture's class is replaced by "no class" (Ho & Salimans 2022).
        hflip: Whether pictures are mirrored with probability one half.
        vlb_weight: λ in L_simple + λ·L_vlb where the variance is learned (Nichol & Dhariwal 2021, eq. 16).
        seed: Of everything random, in [0, 2**63).
        save_every: Steps between saved states; a kill loses at most these.
        autocast: "bf16" runs the network in bfloat16 where that is safe, "fp32" does not.
        weights_dtype: How the sampled (averaged) weights are stored.
        gradient_checkpointing: Trade a second forward pass for memory.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 500
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    label_dropout: float = 0.1
    hflip: bool = False
    vlb_weight: float = 1e-3
    seed: int = 0
    save_every: int = 500
    autocast: Literal["bf16", "fp32"] = "fp32"
    weights_dtype: Literal["fp32", "fp16"] = "fp32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        ranges: dict[str, tuple[float, float]] = {
            "epochs": (1, 10**9), "batch_size": (1, 2**20), "learning_rate": (0, 10), "warmup": (0, 10**9),
            "weight_decay": (0, 10), "ema_decay": (0, 1), "grad_clip": (1e-12, 1e12), "label_dropout": (0, 1),
            "vlb_weight": (0, 1e6), "seed": (0, 2**63 - 1), "save_every": (1, 10**9),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"TrainConfig: {name} must be in [{low:g}, {high:g}], got {value!r}")


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
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepare a run, or resume the one that the folder holds.

        Args:
            folder: Where the run lives; made if missing.
            network: A freshly made network; its weights are replaced when resuming.
            schedule: The forward process.
            spec: The conventions to train.
            data: The pictures.
            config: How to train.
            device: Where to train.

        Raises:
            ValueError: If data, network and conventions disagree, or the folder's state belongs to another run.
            CheckpointError: If the folder's state is damaged.
        """
        self.folder, self.schedule, self.spec, self.data, self.config = (
            Path(folder),
            schedule,
            spec,
            data,
            config,
        )
        self.device = torch.device(device)
        _check_data(data, network, spec, config)
        torch.manual_seed(config.seed)
        self.network = network.to(self.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.network.gradient_checkpointing = config.gradient_checkpointing
        self.ema = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.alphas = tuple(
            a.to(self.device, torch.float32)
            for a in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
        )
        self.steps_per_epoch = len(data.images) // config.batch_size
        self.total = self.steps_per_epoch * config.epochs
        self.step = 0
        self.resumed = (self.folder / STATE_NAME).exists()
        if self.resumed:
            self._load_state()

    def run(self, on_progress: Callable[[Progress], None] | None = None, stop_after: int | None = None) -> None:
        """Train until the last epoch is done; the state is saved at intervals, at each epoch's end and on Ctrl-C.

        Args:
            on_progress: Called after every step.
            stop_after: Stop after this many steps of this session (for tests and time budgets).

        Raises:
            FloatingPointError: If the loss is no longer finite.
            OSError: If the folder cannot be written.
        """
        started, first = time.perf_counter(), self.step
        last = self.total if stop_after is None else min(self.total, first + stop_after)
        losses: list[float] = []
        try:
            while self.step < last:
                loss = self.train_step()
                losses.append(loss)
                rate = (self.step - first) * self.config.batch_size / (time.perf_counter() - started)
                ended = self.step % self.steps_per_epoch == 0
                if ended or self.step % self.config.save_every == 0 or self.step == last:
                    self.save(sum(losses) / len(losses), rate)
                    losses = []
                if on_progress is not None:
                    on_progress(Progress(self.step, self.total, self.step // self.steps_per_epoch, loss, rate, ended))
        except KeyboardInterrupt:
            if losses:
                self.save(sum(losses) / len(losses), None)
            raise

    def train_step(self) -> float:
        """One optimiser step; returns its loss.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        x_start, labels, numbers = self._batch()
        generator = self._generator("timesteps", self.step)
        t = torch.randint(self.schedule.T, (len(numbers),), generator=generator).to(self.device)
        labels = self._drop_labels(labels, generator)
        torch.manual_seed(_seed(self.config.seed, "dropout", self.step))
        self._set_learning_rate()
        loss = self._loss(x_start, t, labels, numbers.to(self.device))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value} at step {self.step}; lower the learning rate and resume")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip)
        self.optimizer.step()
        self._update_ema()
        self.step += 1
        return value

    def _loss(self, x_start: Tensor, t: Tensor, labels: Tensor | None, numbers: Tensor) -> Tensor:
        seed = torch.full_like(numbers, self.config.seed)
        x_t, eps = q_sample(x_start, t, *self.alphas, seed=seed, sample_id=numbers)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.autocast == "bf16"):
            out = self.network(x_t, t * self.spec.time_scale if self.spec.time_scale != 1.0 else t, labels)
        out = out.float()
        if self.spec.learned_variance:
            clean = x_start if x_start.is_floating_point() else x_start.float() / 127.5 - 1
            return hybrid_loss(self.schedule, clean, x_t, t, eps, out, self.spec.prediction, self.config.vlb_weight)
        return F.mse_loss(out, self._target(x_start, x_t, t, eps))

    def _target(self, x_start: Tensor, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        if self.spec.prediction == "eps":
            return eps
        clean = x_start if x_start.is_floating_point() else x_start.float() / 127.5 - 1
        return clean if self.spec.prediction == "x_start" else self.schedule.v_from(clean, eps, t)

    def _batch(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """The pictures of this step, their labels, and their numbers in the run (int64, unique)."""
        epoch, within = divmod(self.step, self.steps_per_epoch)
        order = torch.randperm(len(self.data.images), generator=self._generator("order", epoch))
        first = within * self.config.batch_size
        chosen = order[first : first + self.config.batch_size]
        images = self.data.images[chosen]
        if self.config.hflip:
            flips = torch.rand(len(chosen), generator=self._generator("flips", self.step)) < 0.5
            images = torch.where(flips[:, None, None, None], images.flip(3), images)
        labels = None if self.spec.num_classes is None or self.data.labels is None else self.data.labels[chosen]
        numbers = self.step * self.config.batch_size + torch.arange(len(chosen))
        return images.to(self.device), labels if labels is None else labels.to(self.device), numbers

    def _drop_labels(self, labels: Tensor | None, generator: torch.Generator) -> Tensor | None:
        if labels is None or self.spec.null_class is None:
            return labels
        dropped = torch.rand(len(labels), generator=generator).to(self.device) < self.config.label_dropout
        return torch.where(dropped, self.spec.null_class, labels)

    def _generator(self, purpose: str, count: int) -> torch.Generator:
        return torch.Generator().manual_seed(_seed(self.config.seed, purpose, count))

    def _set_learning_rate(self) -> None:
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
        torch._foreach_lerp_(list(self.ema.values()), list(self.network.state_dict().values()), 1 - decay)

    def save(self, loss: float, images_per_second: float | None) -> None:
        """Write the averaged weights, the state to resume from and a line of metrics.

        Raises:
            OSError: If a file cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [name for name, _ in self.network.named_parameters()]
        tensors = {f"model.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"ema.{name}": value for name, value in self.ema.items()}
        for name, parameter in self.network.named_parameters():
            state = self.optimizer.state[parameter]
            tensors |= {f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq")}
        facts = {"step": self.step, "fingerprint": self._fingerprint(), "parameters": len(names)}
        write_tensors(self.folder / STATE_NAME, tensors, {key: json.dumps(value) for key, value in facts.items()})
        self._append_metrics(
            {"step": self.step, "loss": loss, "images_per_second": images_per_second, "time": time.time()}
        )
        dtype = torch.float16 if self.config.weights_dtype == "fp16" else torch.float32
        native.save(
            self.folder, self.network, self.schedule, self.spec,
            weights=self.ema, dtype=dtype, training=self.summary(),
        )  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """How the weights came about, for config.json and model cards."""
        return {
            "data": self.data.source,
            "pictures": len(self.data.images),
            "step": self.step,
            "total_steps": self.total,
            **dataclasses.asdict(self.config),
        }

    def _fingerprint(self) -> dict[str, Any]:
        """What must not change between the sessions of one run."""
        return {
            "unet": self.network.config.to_dict(),
            "schedule": self.schedule.to_config(),
            "spec": self.spec.to_dict(),
            "pictures": list(self.data.images.shape),
            "config": {k: v for k, v in dataclasses.asdict(self.config).items() if k not in _MAY_CHANGE},
        }

    def _append_metrics(self, line: Mapping[str, Any]) -> None:
        """Add a line; lines of steps that a kill has undone are dropped first."""
        path = self.folder / METRICS_NAME
        kept = [old for old in _metrics(path) if old["step"] < line["step"]]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in [*kept, dict(line)]), encoding="utf-8")
        os.replace(temporary, path)

    def _load_state(self) -> None:
        path = self.folder / STATE_NAME
        tensors, metadata = native.read_safetensors(path), native.read_metadata(path)
        mine = json.loads(json.dumps(self._fingerprint()))
        try:
            facts = {key: json.loads(value) for key, value in metadata.items()}
            theirs, step = facts["fingerprint"], int(facts["step"])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a training state ({error}); remove it to start afresh") from error
        if theirs != mine:
            different = sorted(key for key in mine if theirs.get(key) != mine[key])
            raise ValueError(
                f"{self.folder} holds a run with other settings ({', '.join(different)} differ); "
                "use the same options to resume it, or another folder for a new run"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "exp_avg": {}, "exp_avg_sq": {}}
        for name, value in tensors.items():
            prefix, _, rest = name.partition(".")
            parts.setdefault(prefix, {})[rest] = value
        with torch.no_grad():
            reference = UNet(self.network.config)
            load_weights(reference, parts["model"], str(path))
            self.network.load_state_dict(reference.state_dict())
            load_weights(reference, parts["ema"], str(path))
            self.ema = {name: value.to(self.device) for name, value in reference.state_dict().items()}
            for name, parameter in self.network.named_parameters():
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": parts["exp_avg"][name].to(parameter),
                    "exp_avg_sq": parts["exp_avg_sq"][name].to(parameter),
                }
        self.step = step


_MAY_CHANGE = ("save_every", "weights_dtype", "autocast", "gradient_checkpointing")


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


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
    native._check_agreement(network.config, spec)
