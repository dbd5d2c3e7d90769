"""What the tests of exporting share."""

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def one_table_of_operators() -> Iterator[None]:
    """PyTorch's exporter makes its table of operators anew for each trace, which takes half a second; it is always the
    same, and nothing here adds to it."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            once = functools.cache(ONNXRegistry.from_torchlib)
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(once))
        except ImportError:
            pass  # another version of PyTorch: each trace takes its half second
        yield
