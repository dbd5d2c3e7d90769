"""How group norms are cut into tiles: what one program of the kernel takes. The numbers were measured on an H200."""

from typing import NamedTuple

MOST_ELEMENTS = 16384
"""Elements of a tile, padding included, that fit into a program's registers without spills."""

_PER_THREAD = 32
_ENOUGH = 128  # programs, about one for each of a large GPU's multiprocessors: below, narrower tiles are quicker
_VECTOR = 8  # channels of 16 bits in the widest access
_WIDE = 32  # channels next to each other, from which on memory is used well
# Of groups that are shared out: channels and elements of a tile, programs that are wanted, most that share a group.
_SPLIT_WIDE, _SPLIT_ELEMENTS, _SPLIT_PROGRAMS, _MOST_SPLITS = 64, 8192, 512, 128


class Plan(NamedTuple):
    """What one program of the kernel takes.

    Attributes:
        together: groups.
        width: their channels, padded to a power of two.
        rows: pixels of a tile, a power of two.
        tiles: that it goes through, one after the other.
        splits: programs that share a group; where it is 1, one launch does all.
    """

    together: int
    width: int
    rows: int
    tiles: int
    splits: int

    def warps(self, lanes: int = 32) -> int:
        """Of a program; `lanes` is 64 on AMD's GPUs."""
        return min(max(self.width * self.rows // (_PER_THREAD * lanes), 128 // lanes), 512 // lanes)

    def is_full(self, group: int, pixels: int) -> bool:
        """Whether no tile has elements that are not there."""
        return self.width == self.together * group and pixels == self.rows * self.tiles * self.splits


def next_power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def plan_for(batch: int, channels: int, groups: int, pixels: int) -> Plan:
    """The plan of a norm.

    Args:
        batch: pictures.
        channels: of a picture.
        groups: that its channels are in.
        pixels: H·W.
    """
    size, rows, together = channels // groups, next_power(pixels), 1
    while groups % (2 * together) == 0:
        wide = next_power(2 * together * size)
        elements, programs = wide * rows, batch * groups // (2 * together)
        if wide > _VECTOR and (programs < _ENOUGH or elements > MOST_ELEMENTS or (wide > _WIDE and elements > 4096)):
            break
        together *= 2
    width = next_power(together * size)
    if width * rows > MOST_ELEMENTS:
        return split_plan(batch, channels, groups, pixels)
    return Plan(together, width, rows, 1, 1)


def split_plan(batch: int, channels: int, groups: int, pixels: int) -> Plan:
    """The plan of a norm whose groups are shared out among programs."""
    size, together = channels // groups, 1
    while groups % (2 * together) == 0 and together * size < _SPLIT_WIDE:
        together *= 2
    width = next_power(together * size)
    rows = max(1, min(_SPLIT_ELEMENTS // width, next_power(pixels)))
    parts = -(-pixels // rows)
    most = min(max(_SPLIT_PROGRAMS * together // max(batch * groups, 1), 16), _MOST_SPLITS)
    tiles = -(-parts // most)
    return Plan(together, width, rows, tiles, -(-parts // tiles))
