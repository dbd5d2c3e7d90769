"""fastddpm: the pictures of the slow DDPM sampler, as fast as the hardware allows."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastddpm.checkpoints import Checkpoint as Checkpoint
    from fastddpm.checkpoints import CheckpointError as CheckpointError
    from fastddpm.checkpoints import load_checkpoint as load_checkpoint
    from fastddpm.checkpoints.convert import convert_checkpoint as convert_checkpoint
    from fastddpm.checkpoints.openai_classifier import load_classifier as load_classifier
    from fastddpm.engines.compare import CompileError as CompileError
    from fastddpm.export import OnnxSampler as OnnxSampler
    from fastddpm.export import export_onnx as export_onnx
    from fastddpm.integrations import accelerate as accelerate
    from fastddpm.integrations.diffusers_schedulers import FastDDIMScheduler as FastDDIMScheduler
    from fastddpm.integrations.diffusers_schedulers import FastDDPMScheduler as FastDDPMScheduler
    from fastddpm.integrations.diffusers_schedulers import (
        FastDPMSolverMultistepScheduler as FastDPMSolverMultistepScheduler,
    )
    from fastddpm.nets.classifier import Classifier as Classifier
    from fastddpm.nets.unet import UNet as UNet
    from fastddpm.nets.unet import UNetConfig as UNetConfig
    from fastddpm.pictures.inputs import low_res as low_res
    from fastddpm.process.likelihood import Likelihood as Likelihood
    from fastddpm.process.method import Method as Method
    from fastddpm.process.schedule import NoiseSchedule as NoiseSchedule
    from fastddpm.process.solvers import make_table as make_table
    from fastddpm.process.spec import ModelSpec as ModelSpec
    from fastddpm.process.table import DynamicThreshold as DynamicThreshold
    from fastddpm.process.table import StepTable as StepTable
    from fastddpm.sampler import Batch as Batch
    from fastddpm.sampler import Preview as Preview
    from fastddpm.sampler import Sampler as Sampler
    from fastddpm.step.state import State as State
    from fastddpm.step.step import Step as Step
    from fastddpm.train.config import TrainConfig as TrainConfig
    from fastddpm.train.loop import Trainer as Trainer

__version__ = "0.1.0"

# Names are imported when first used: PyTorch takes seconds, and `fastddpm --help` needs none of it.
_HOME = {
    "Batch": "sampler",
    "Checkpoint": "checkpoints",
    "CheckpointError": "checkpoints",
    "Classifier": "nets.classifier",
    "CompileError": "engines.compare",
    "DynamicThreshold": "process.table",
    "FastDDIMScheduler": "integrations.diffusers_schedulers",
    "FastDDPMScheduler": "integrations.diffusers_schedulers",
    "FastDPMSolverMultistepScheduler": "integrations.diffusers_schedulers",
    "Likelihood": "process.likelihood",
    "Method": "process.method",
    "ModelSpec": "process.spec",
    "NoiseSchedule": "process.schedule",
    "OnnxSampler": "export",
    "Preview": "sampler",
    "Sampler": "sampler",
    "State": "step.state",
    "Step": "step.step",
    "StepTable": "process.table",
    "TrainConfig": "train.config",
    "Trainer": "train.loop",
    "UNet": "nets.unet",
    "UNetConfig": "nets.unet",
    "accelerate": "integrations",
    "convert_checkpoint": "checkpoints.convert",
    "export_onnx": "export.exporter",
    "load_checkpoint": "checkpoints",
    "load_classifier": "checkpoints.openai_classifier",
    "low_res": "pictures.inputs",
    "make_table": "process.solvers",
}

# Whatever needs a package that fastddpm does not ask for is left out of `from fastddpm import *`.
__all__ = [*(name for name, home in _HOME.items() if home != "integrations.diffusers_schedulers"), "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'fastddpm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastddpm.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
