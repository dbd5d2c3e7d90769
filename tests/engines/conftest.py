"""What the tests of the engines share."""

import pytest

from fastddpm import Sampler
from tests.engines.common import like
from tests.networks import one_level_sampler


@pytest.fixture(scope="session")
def compiled(own_cache) -> Sampler:
    """A sampler whose step for three samples is compiled ahead of time."""
    sampler = like(one_level_sampler(), "compiled")
    assert sampler.compile(3) > 0
    return sampler
