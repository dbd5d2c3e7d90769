"""What tells two checkpoints of the same weights apart: the schedule and the conventions."""

from __future__ import annotations

import dataclasses
import json
import zlib

from fastddpm.process.schedule import NoiseSchedule
from fastddpm.process.spec import ModelSpec


def conventions_checksum(schedule: NoiseSchedule, spec: ModelSpec) -> str:
    """CRC-32 of a schedule and of those conventions that are not the usual ones, as eight hexadecimal digits.

    A convention that a later version adds changes nothing for checkpoints that do not use it.
    """
    usual = {field.name: field.default for field in dataclasses.fields(ModelSpec)}
    unusual = {name: value for name, value in dataclasses.asdict(spec).items() if value != usual[name]}
    text = json.dumps([schedule.to_config(), unusual], sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x}"
