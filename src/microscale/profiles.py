"""Profiles: choices that belong together, under the name of whose numbers they reproduce.

A profile is a set of keywords of `Policy.of`; the scale rule is part of a format's spelling. What
separates a profile from its model beyond these choices is listed in docs/peers.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

USUAL = "ocp"
"""The profile of a spelling that names none."""

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
}

_FILES = Path(__file__).with_name("policies")


def policy_files() -> dict[str, Path]:
    """The policies that come with the package, by name: files to read and to copy from."""
    return {path.stem: path for path in sorted(_FILES.glob("*.toml"))}
