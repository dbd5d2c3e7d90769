"""How group norms are cut into tiles: what one program of the kernel takes."""

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
