"""What formats make of shapes: which dimensions share a scale, how many bytes a row takes."""

import math


def channel_dimension(dimensions: int, axis: int) -> int:
    """The dimension that a `channel` block keeps apart: 0, or the last if 0 is reduced."""
    return 0 if axis != 0 else dimensions - 1


def row_dimension(dimensions: int, axis: int) -> int | None:
    """The dimension that the rows of a tile run along; a vector has none.

    Of the matrices of a tensor (its last two dimensions) it is the one that is not the axis. A
    kernel [out, in, height, width], whose matrices lie in front, is cast along another axis: there
    it is the dimension before the axis, or the one behind it if the axis is the first.
    """
    if dimensions < 2:
        return None
    if axis >= dimensions - 2:
        return 2 * dimensions - 3 - axis
    return axis - 1 if axis else 1


def packing_group(bits: int) -> int:
    """The fewest codes of `bits` bits that fill whole bytes."""
    return 8 // math.gcd(8, bits)


def packed_bytes(length: int, bits: int, padding: int) -> int:
    """Bytes of a row of `length` codes, padded to whole blocks and then to whole bytes."""
    whole = -(-length // padding) * padding
    group = packing_group(bits)
    return -(-whole // group) * group * bits // 8
