"""Have the weights of a network changed? Asked before each run, so it must be cheap and must not miss anything."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from fastddpm.engines.modules import tensors_of

_SAMPLES = 16
"""Numbers of each tensor that are looked at."""


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all parameters and buffers, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        if value.numel():
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Weights:
    """Watches a network's parameters and buffers.

    PyTorch counts the changes that go through it (`tensor._version`), and a replaced tensor is another object. A change
    through `tensor.data` is counted nowhere, so some numbers of each tensor are looked at too: an optimiser's step or
    an average touches them all. Only when any of this has changed is the digest made anew.
    """

    def __init__(self, network: nn.Module) -> None:
        """Remember the weights as they are."""
        self._network = network
        self._places: tuple[object, ...] = ()
        self._samples: dict[int, list[Tensor]] = {}  # by the size of a number
        self._seen = self._look()
        self._digest: str | None = None

    @property
    def digest(self) -> str:
        """`weights_hash` of the network as it was when last looked at; made when first asked for."""
        if self._digest is None:
            self._digest = weights_hash(self._network)
        return self._digest

    def have_changed(self) -> bool:
        """Whether they are others than when this was last asked."""
        seen = self._look()
        if seen == self._seen:
            return False
        before, self._seen, self._digest = self._digest, seen, None
        return before is None or before != self.digest

    def _look(self) -> tuple[object, ...]:
        tensors = tensors_of(self._network)
        places = (*map(id, tensors), *map(Tensor.data_ptr, tensors))
        if places != self._places:
            self._places, self._samples = places, {}
            for tensor in filter(_is_dense, tensors):
                self._samples.setdefault(tensor.element_size(), []).append(_some(tensor))
        # What is made in inference mode counts no versions.
        counts = tuple(0 if t.is_inference() else t._version for t in tensors)
        numbers = tuple(torch.cat(views).cpu().numpy().tobytes() for views in self._samples.values())
        return places, counts, numbers


def _is_dense(tensor: Tensor) -> bool:
    """Whether all of the tensor's memory is one piece."""
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.numel() > 0 and (last or tensor.is_contiguous())


def _some(tensor: Tensor) -> Tensor:
    """The bytes of a few numbers of a dense tensor, evenly spread, uint8 [numbers, bytes]: a view of its memory."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat[:: max(1, tensor.numel() // _SAMPLES)].unsqueeze(-1).view(torch.uint8)
