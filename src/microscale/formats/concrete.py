"""What the concrete formats are made of.

Sources: OCP Microscaling Formats (MX) v1.0; NVIDIA Transformer Engine documentation for
NVFP4.
"""

from microscale.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, INT8, ElementFormat
from microscale.formats.scale import E8M0, FP32, SCALE_E4M3, ScaleFormat

CONCRETE: dict[str, tuple[ElementFormat, ScaleFormat, int, ScaleFormat | None]] = {
    "mxfp8_e4m3": (E4M3, E8M0, 32, None),
    "mxfp8_e5m2": (E5M2, E8M0, 32, None),
    "mxfp6_e2m3": (E2M3, E8M0, 32, None),
    "mxfp6_e3m2": (E3M2, E8M0, 32, None),
    "mxfp4": (E2M1, E8M0, 32, None),
    "mxint8": (INT8, E8M0, 32, None),
    "nvfp4": (E2M1, SCALE_E4M3, 16, FP32),
}
"""The concrete formats: element, scale, block and tensor scale by name."""
