"""Profiles: choices that belong together, under the name of whose numbers they reproduce.

A profile is a set of keywords of `Policy.of`; the scale rule is part of a format's spelling. What
separates a profile from its model beyond these choices is listed in docs/peers.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

USUAL = "ocp"
"""The profile of a spelling that names none."""

_LINEAR_ALONE = {"storage": None, "matmul": None}

PROFILES: Mapping[str, Mapping[str, Any]] = {
    # OCP MX v1.0: ties to even, float32 subnormals are numbers, vector operations as they are.
    "ocp": {},
    # arXiv 2310.10537 as its authors' library computes it: bfloat16 first and between all
    # operations, ties away from zero in both casts, embedding tables left alone; blocks of weight
    # gradients end where a sample does.
    "paper": {
        "rounding": "away",
        "flush_subnormals": "block",
        "prerounding": "bfloat16",
        "vector": "bfloat16_away",
        "storage": None,
        "tokens": "sample",
    },
    # arXiv 2309.17224: products with weights alone in FP8, each tensor scaled by 2^b (b is minus
    # the exponent of the scale here). FP8-AMAX: b = floor(log2(largest / amax)) of each tensor.
    "fp8_amax": _LINEAR_ALONE,
    # FP8-CSCALE: one constant for all tensors; name another one as in
    # fp8_cscale:fp8_e4m3fnuz-tensor-at0.25 (b = 2).
    "fp8_cscale": _LINEAR_ALONE,
}

FORMATS: Mapping[str, str] = {
    "fp8_amax": "fp8_e4m3fnuz-tensor-pow2-rceil",
    "fp8_cscale": "fp8_e4m3fnuz-tensor-at1",
}
"""The format of weights and activations of a profile that is named without one."""

_FILES = Path(__file__).with_name("policies")


def policy_files() -> dict[str, Path]:
    """The policies that come with the package, by name: files to read and to copy from."""
    return {path.stem: path for path in sorted(_FILES.glob("*.toml"))}
