"""How good pictures are: Fréchet and kernel distances, precision, recall, density, coverage, against a reference.

evaluator = Evaluator(open_set("reference/"), load_features("inception"))
evaluation = evaluator.measure(open_set("generated.npz"))
"""

from fastddpm.evaluate.evaluation import (
    METRICS,
    Evaluation,
    Evaluator,
    Metric,
    check_sets,
    compare_statistics,
    lowest,
)
from fastddpm.evaluate.features import Features, load_features
from fastddpm.evaluate.frechet import frechet_distance
from fastddpm.evaluate.kernel import KernelDistance, kernel_distance
from fastddpm.evaluate.neighbours import Neighbourhood, prdc
from fastddpm.evaluate.sets import PictureSet, SampledPictures, open_set
from fastddpm.evaluate.statistics import RunningStatistics, Statistics, read_statistics, write_statistics

__all__ = [
    "METRICS", "Evaluation", "Evaluator", "Features", "KernelDistance", "Metric", "Neighbourhood", "PictureSet",
    "RunningStatistics", "SampledPictures", "Statistics", "check_sets", "compare_statistics", "frechet_distance",
    "kernel_distance", "load_features", "lowest", "open_set", "prdc", "read_statistics", "write_statistics",
]  # fmt: skip
