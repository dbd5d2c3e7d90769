"""A step table as a scheduler reads it: numbers on the host, tensors on each device, and the row of a timestep."""

from __future__ import annotations

import torch
from torch import Tensor

from fastddpm.kernels.operands import COLUMNS, Row
from fastddpm.process.table import StepTable


class Rows:
    """A table as the host and every device that asks for it have it.

    Args:
        table: the table, on the CPU.

    Attributes:
        table: the table.
        host: its rows as numbers.
        timesteps: the training timestep of each row.
        index: timestep → row.
    """

    def __init__(self, table: StepTable) -> None:
        self.table = table
        self.host = [Row(*row) for row in table.rows.tolist()]
        self.timesteps: list[int] = table.timesteps[:-1].tolist()
        self.index = {t: i for i, t in enumerate(self.timesteps)}
        self._on: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}
        self._steps: dict[tuple[torch.device, int], Tensor] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The table on a device, made when first asked for.

        Returns:
            float32 [S+2, len(COLUMNS)], whose row S is NaN and whose last row is the identity; the timestep of each
            of these rows, int64 [S+2]; and for each training timestep its row, int64 [T], S where it has none.
        """
        if device not in self._on:
            with torch.inference_mode(False):
                rows, S = self.table.rows, self.table.S
                # A timestep that is not in the run must show. Reading it to raise an error would stop the device.
                rows = torch.cat([rows[:S], rows.new_full((1, len(COLUMNS)), torch.nan), rows[S:]])
                times = torch.cat([self.table.timesteps, self.table.timesteps.new_zeros(1)])
                row_of = torch.full((max(self.timesteps) + 2,), S, dtype=torch.int64)
                row_of[self.table.timesteps[:S]] = torch.arange(S)
                self._on[device] = rows.to(device), times.to(device), row_of.to(device)
        return self._on[device]

    def step(self, row: int, batch: int, device: torch.device) -> Tensor:
        """int64 [batch] that holds `row` of `on`, made on the device, once for all rows and each size of batch."""
        key = device, batch
        if key not in self._steps:
            with torch.inference_mode(False):
                self._steps[key] = torch.arange(len(self.host) + 1, device=device)[:, None].repeat(1, batch)
        return self._steps[key][row]

    def find(self, timestep: int | Tensor, timesteps: Tensor) -> int | Tensor | None:
        """The row of a timestep, without waiting for a device.

        Args:
            timestep: a number, or a tensor of one entry or of one per sample.
            timesteps: the scheduler's own list, from which most callers take `timestep`.

        Returns:
            The row; or int64 [B], the rows of the samples; or None if it cannot be told or is not in the run. On an
            accelerator a timestep that is not in the run is row S of `on`.

        Raises:
            IndexError: of several timesteps on the CPU, one is not in the run.
        """
        if not isinstance(timestep, Tensor):
            try:
                return self.index.get(timestep)
            except TypeError:
                return None
        if timestep.device.type == "cpu":
            if timestep.ndim > 1 or timestep.is_floating_point():
                return None
            values: int | list[int] = timestep.tolist()
            return self._find_all(values) if isinstance(values, list) else self.index.get(values)
        position = position_of(timestep, timesteps)
        if position is not None:
            return position
        if timestep.ndim > 1 or timestep.is_floating_point():
            return None
        return self._look_up(timestep)

    def _find_all(self, values: list[int]) -> int | Tensor | None:
        rows = [self.index.get(value) for value in values]
        if all(value == values[0] for value in values):
            return rows[0] if rows else None
        missing = [value for value, row in zip(values, rows, strict=True) if row is None]
        if missing:
            raise IndexError(f"step: timestep must be in the run's timesteps, got {missing[0]}; see set_timesteps")
        return torch.tensor(rows)

    def _look_up(self, timesteps: Tensor) -> Tensor:
        """int64 [B], the rows of integer timesteps on their own device; row S of `on` where they are not in the run."""
        row_of = self.on(timesteps.device)[2]
        inside = (timesteps >= 0) & (timesteps < row_of.numel())
        return row_of.index_select(0, torch.where(inside, timesteps, row_of.numel() - 1).reshape(-1).long())

    def or_last(self, timesteps: Tensor) -> Tensor:
        """Integer timesteps [B], with the run's last in place of those that are not in it."""
        last = self.timesteps[-1]
        if timesteps.device.type == "cpu":
            return torch.tensor([t if t in self.index else last for t in timesteps.tolist()])
        return torch.where(self._look_up(timesteps) < len(self.timesteps), timesteps, last)


def position_of(timestep: Tensor, timesteps: Tensor) -> int | None:
    """Where in `timesteps` an element of it stands, told by its address: reading it would stop the device."""
    if timestep.numel() != 1 or timestep.device != timesteps.device or timestep.dtype != timesteps.dtype:
        return None
    offset = timestep.data_ptr() - timesteps.data_ptr()
    stride = timesteps.stride(0) * timesteps.element_size()
    if timesteps.ndim != 1 or stride <= 0 or offset % stride or not 0 <= offset // stride < timesteps.numel():
        return None
    return offset // stride
