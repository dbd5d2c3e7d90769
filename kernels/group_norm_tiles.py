"""How group norms are cut into tiles: what one program of the kernel takes."""

from typing import NamedTuple

MOST_ELEMENTS = 16384
"""Elements of one program's tile, padding included, beyond which a group does not fit into registers without spills."""

_WIDE = 32  # channels next to each other in memory from which on accesses are as wide as they get
_PER_THREAD = 32


def next_power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def tile(channels: int, groups: int, pixels: int) -> tuple[int, int] | None:
    """How many groups one program takes and how many channels wide its tile is, or None where one group is too much.

    Args:
        channels: of a picture.
        groups: that its channels are in.
        pixels: H·W.
    """
    size, rows, together = channels // groups, next_power(pixels), 1
    if next_power(size) * rows > MOST_ELEMENTS:
        return None
    # Neighbouring groups in one program make wide accesses, as long as enough programs are left.
    while (
        groups % (2 * together) == 0
        and together * size < _WIDE
        and next_power(2 * together * size) * rows <= MOST_ELEMENTS
    ):
        together *= 2
    return together, next_power(together * size)


def warps_for(elements: int, lanes: int = 32) -> int:
    """Warps for a tile of so many elements; `lanes` is 64 on AMD's GPUs."""
    return min(max(elements // (_PER_THREAD * lanes), 128 // lanes), 512 // lanes)


class Plan(NamedTuple):
    """What one program of the kernel takes.

    Attributes:
        together: groups.
        width: their channels, padded to a power of two.
        rows: pixels of a tile, a power of two.
        tiles: that it goes through, one after the other.
        splits: programs that share a group; where it is 1, one launch does all.
        warps: of a program.
    """

    together: int
    width: int
    rows: int
    tiles: int
    splits: int
    warps: int


def plan_for(batch: int, channels: int, groups: int, pixels: int, lanes: int = 32) -> Plan:
    """The plan of a norm."""
    found = tile(channels, groups, pixels)
    if found is not None:
        together, width = found
        rows = next_power(pixels)
        return Plan(together, width, rows, 1, 1, warps_for(width * rows, lanes))
    return split_plan(channels, groups, pixels)


def split_plan(channels: int, groups: int, pixels: int, wide: int = 64, elements: int = 8192, most: int = 64,
               warps: int = 8) -> Plan:
    """The plan of a norm whose groups are shared out."""
    size, together = channels // groups, 1
    while groups % (2 * together) == 0 and together * size < wide:
        together *= 2
    width = next_power(together * size)
    rows = max(1, min(elements // width, next_power(pixels)))
    parts = -(-pixels // rows)
    tiles = -(-parts // most)
    return Plan(together, width, rows, tiles, -(-parts // tiles), warps)
