"""Formats as data. Every number about a format is written here once; the rest is derived.

An element format is the grid of one value; a scale format is the grid of the shared scale; a
block format joins the two with a block shape and a scale rule. Kernels, checkpoints and
documentation receive these records or the numbers derived from them.

Sources: OCP Microscaling Formats (MX) v1.0, tables 1 to 7; OCP OFP8 v1.0 for E4M3 and E5M2;
arXiv 2309.17224 for the `fnuz` kind; NVIDIA Transformer Engine documentation for NVFP4.
"""

from microscale.formats.block import (
    LARGEST_BLOCK,
    WHOLE_BLOCKS,
    ZERO_POINT,
    ZERO_POINT_BITS,
    BlockFormat,
    WholeBlock,
    default_scale,
    element_spelling,
)
from microscale.formats.concrete import (
    CONCRETE,
)
from microscale.formats.element import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    ELEMENTS,
    FLOAT_SPECIALS,
    INT4,
    INT8,
    INTEGER_SPECIALS,
    ElementFormat,
    Specials,
    float_format,
    integer_format,
)
from microscale.formats.named import (
    MXFP4,
    MXFP6_E2M3,
    MXFP6_E3M2,
    MXFP8_E4M3,
    MXFP8_E5M2,
    MXINT8,
    NAMED,
    NVFP4,
    make_concrete,
)
from microscale.formats.scale import (
    BF16,
    E8M0,
    FP32,
    POW2,
    SCALE_E4M3,
    SCALES,
    UE5M3,
    UNIT,
    ScaleFormat,
    exponent_scale,
    settled_scale,
)
from microscale.formats.shape import (
    channel_dimension,
    packed_bytes,
    packing_group,
    row_dimension,
)

__all__ = [
    "BF16",
    "CONCRETE",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "E8M0",
    "ELEMENTS",
    "FLOAT_SPECIALS",
    "FP32",
    "INT4",
    "INT8",
    "INTEGER_SPECIALS",
    "LARGEST_BLOCK",
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8_E4M3",
    "MXFP8_E5M2",
    "MXINT8",
    "NAMED",
    "NVFP4",
    "POW2",
    "SCALES",
    "SCALE_E4M3",
    "UE5M3",
    "UNIT",
    "WHOLE_BLOCKS",
    "ZERO_POINT",
    "ZERO_POINT_BITS",
    "BlockFormat",
    "ElementFormat",
    "ScaleFormat",
    "Specials",
    "WholeBlock",
    "channel_dimension",
    "default_scale",
    "element_spelling",
    "exponent_scale",
    "float_format",
    "integer_format",
    "make_concrete",
    "packed_bytes",
    "packing_group",
    "row_dimension",
    "settled_scale",
]
