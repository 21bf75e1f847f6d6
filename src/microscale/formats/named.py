"""The concrete formats of the MX specification and of NVFP4, and those that tables list."""

from microscale.formats.block import WHOLE_BLOCKS, BlockFormat
from microscale.formats.concrete import CONCRETE
from microscale.formats.element import E4M3, E5M2, INT4, INT8
from microscale.formats.scale import FP32


def make_concrete(name: str) -> BlockFormat:
    """The concrete format of that name."""
    element, scale, block, tensor_scale = CONCRETE[name]
    return BlockFormat(element, scale, block, scale.default_rule, tensor_scale)


MXFP8_E4M3 = make_concrete("mxfp8_e4m3")
MXFP8_E5M2 = make_concrete("mxfp8_e5m2")
MXFP6_E2M3 = make_concrete("mxfp6_e2m3")
MXFP6_E3M2 = make_concrete("mxfp6_e3m2")
MXFP4 = make_concrete("mxfp4")
MXINT8 = make_concrete("mxint8")
NVFP4 = make_concrete("nvfp4")
NAMED: dict[str, BlockFormat] = {name: make_concrete(name) for name in CONCRETE} | {
    str(fmt): fmt
    for fmt in (
        BlockFormat(element, FP32, block)
        for element in (INT8, INT4, E4M3, E5M2)
        for block in WHOLE_BLOCKS
    )
}
"""The formats that tables list, by their spelling. Any other can be written down."""
