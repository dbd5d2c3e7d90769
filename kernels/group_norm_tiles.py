"""How group norms are cut into tiles: what one program of the kernels takes. The numbers were measured on an H200."""

from typing import NamedTuple

MOST_ELEMENTS = 32768
"""Elements of a tile, padding included, that fit into a program's registers without spills."""

_ENOUGH = 128  # programs, about one for each of a large GPU's multiprocessors: below, narrower tiles are quicker
_NARROW = 16  # channels next to each other below which memory is used badly
_WIDE = 32  # and from which on wider tiles gain nothing more, unless they are small
_SMALL = 4096
# Of groups that are shared out: channels and elements of a tile, most programs that share a group, programs wanted of
# the first launch and of the second, most tiles of a program of the second.
_SPLIT_WIDE, _SPLIT_ELEMENTS, _MOST_SPLITS, _FIRST, _SECOND, _MOST_LATER = 64, 4096, 64, 1056, 512, 4


class Plan(NamedTuple):
    """What one program of the kernels takes.

    Attributes:
        size: channels of a group.
        together: groups.
        rows: pixels of a tile, a power of two.
        tiles: that it goes through, one after the other.
        splits: programs that share a group.
        later: tiles of a program of the second launch.
    """

    size: int
    together: int
    rows: int
    tiles: int = 1
    splits: int = 1
    later: int = 1

    @property
    def width(self) -> int:
        """Channels of a tile, padded to a power of two."""
        return next_power(self.together * self.size)

    @property
    def at_once(self) -> bool:
        """Whether a program holds all of its groups, so that one launch does all."""
        return self.tiles == self.splits == 1

    def warps(self, lanes: int = 32) -> int:
        """Of a program; `lanes` is 64 on AMD's GPUs."""
        per_thread = 64 if self.at_once and self.width == self.together * self.size else 32
        return min(max(self.width * self.rows // (per_thread * lanes), 128 // lanes), 512 // lanes)

    def apart(self, lanes: int = 32) -> int:
        """Of the pixels of a tile, so many from each other are those of one thread, which has 8 channels of each."""
        return min(max(8 * lanes * self.warps(lanes) // self.width, 1), self.rows)

    def is_full(self, pixels: int, tiles: int | None = None) -> bool:
        """Whether no tile has elements that are not there, if a program goes through so many tiles."""
        taken = self.rows * (self.tiles if tiles is None else tiles)
        return self.width == self.together * self.size and pixels % taken == 0


def next_power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def plan_for(batch: int, channels: int, groups: int, pixels: int, keep: bool, itemsize: int) -> Plan:
    """The plan of a norm.

    Args:
        batch: pictures.
        channels: of a picture.
        groups: that its channels are in.
        pixels: H·W.
        keep: whether the sum is written too.
        itemsize: bytes of an element.
    """
    size, rows, together = channels // groups, next_power(pixels), 1
    # What is written twice gains by wide tiles; padded groups and float32 take more registers.
    most = MOST_ELEMENTS if keep and itemsize == 2 and next_power(size) == size else MOST_ELEMENTS // 2
    while groups % (2 * together) == 0:
        width, elements = next_power(2 * together * size), next_power(2 * together * size) * rows
        few = batch * groups // (2 * together) < _ENOUGH
        if width > _NARROW and (few or elements > most or (width > _WIDE and elements > _SMALL)):
            break
        together *= 2
    plan = Plan(size, together, rows)
    return split_plan(batch, size, groups, pixels) if plan.width * rows > most else plan


def split_plan(batch: int, size: int, groups: int, pixels: int) -> Plan:
    """The plan of a norm whose groups, of `size` channels, are shared out among programs."""
    together = 1
    while groups % (2 * together) == 0 and together * size < _SPLIT_WIDE:
        together *= 2
    width, pieces = next_power(together * size), groups // together * batch
    rows = max(1, min(_SPLIT_ELEMENTS // width, next_power(pixels)))
    if pixels > rows * _MOST_SPLITS and pieces * _MOST_SPLITS < 2 * _ENOUGH:
        rows *= 2  # few programs have more threads instead
    parts = -(-pixels // rows)
    tiles = -(-parts // min(max(_FIRST // max(pieces, 1), 1), _MOST_SPLITS))
    later = min(max(pieces * parts // _SECOND, 1), _MOST_LATER)
    return Plan(size, together, rows, tiles, -(-parts // tiles), later)
