"""A watch over code that must not wait for a device: every operation that would is an error, on the CPU as well."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_WAITS = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.nonzero, aten.nonzero_numpy, aten.masked_select,
    aten.equal, aten.allclose, aten.unique_dim, aten._unique2, aten.repeat_interleave,
}  # fmt: skip
_COPIES = {aten._to_copy, aten.copy_}


class NoSync(TorchDispatchMode):
    """Raises on operations whose result the host must know, and on copies between devices.

    Attributes:
        calls: names of the operations that ran, in order.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        self.calls.append(func.name())
        if packet in _WAITS:
            raise AssertionError(f"{func} waits for the device")
        if packet in _COPIES:
            devices = {value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)}
            devices |= {torch.device(kwargs["device"])} if kwargs.get("device") is not None else set()
            if len(devices) > 1:
                raise AssertionError(f"{func} copies between {devices}")
        # Indexing by a mask is a nonzero in disguise.
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if packet is aten.index else []
        if masks:
            raise AssertionError(f"{func} with a mask waits for the device")
        return func(*args, **kwargs)
