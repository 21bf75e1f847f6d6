"""The header of a microscale checkpoint: what safetensors' own header cannot say.

A checkpoint is a safetensors file. Its metadata holds one entry, "microscale", which is JSON:

    {"version": 1,
     "packed": {"fc.weight": {"format": "mxfp4", "axis": 1, "compute": "float32",
                               "shape": [16, 64], "dtype": "float32"}},
     "aliases": {"lm_head.weight": "embed.weight"},
     "policy": {...} or null}

A packed tensor NAME is stored as NAME.codes, NAME.scales and, where its format has them,
NAME.tensor_scale and NAME.zero_point; docs/checkpoint.md says how these are laid out.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from microscale.errors import MicroscaleError
from microscale.formats import BlockFormat
from microscale.kernels.plan import FLOATS, Plan, check_axis
from microscale.kernels.storage import PARTS, Layout, Stored, empty_storage
from microscale.spelling import get_block_format

KEY = "microscale"
VERSION = 1
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


@dataclass(frozen=True, slots=True)
class Packed:
    """What a packed tensor is, besides its parts."""

    format: str
    axis: int
    compute: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def layout(self) -> Layout:
        """The layout of the parts."""
        axis = check_axis(self.axis, len(self.shape))
        return Layout(get_block_format(self.format), axis, DTYPES[self.compute])

    def expected(self) -> Stored:
        """Tensors without storage, of the shapes and types that the parts must have."""
        fmt, axis, _ = self.layout
        x = torch.empty(self.shape, dtype=DTYPES[self.dtype], device="meta")
        return empty_storage(x, Plan.of(fmt, axis))

    @property
    def parts(self) -> dict[str, int]:
        """The parts that are stored, with their places among all."""
        return stored_parts(self.layout.format)


def stored_parts(fmt: BlockFormat) -> dict[str, int]:
    """The parts of a packed tensor that a file holds, with their places among all."""
    absent = {"tensor_scale"} if fmt.tensor_scale is None else set()
    absent |= set() if fmt.zero_point else {"zero_point"}
    return {part: place for place, part in enumerate(PARTS) if part not in absent}


@dataclass(frozen=True, slots=True)
class Header:
    """The packed tensors, names that share one tensor, and the policy of a converted model."""

    packed: Mapping[str, Packed] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    policy: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """Return the text that is stored."""
        packed = {name: asdict(entry) for name, entry in self.packed.items()}
        data = {"version": VERSION, "packed": packed, "aliases": dict(self.aliases)}
        return json.dumps({**data, "policy": self.policy}, sort_keys=True)


def read_header(text: str, where: str) -> Header:
    """Read the stored text; raises MicroscaleError that names the file and the fault."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise MicroscaleError(f"{where}: the microscale header is not JSON ({error}).") from error
    if not isinstance(data, dict) or data.get("version") != VERSION:
        version = data.get("version") if isinstance(data, dict) else data
        raise MicroscaleError(
            f"{where}: header version {version!r} is not {VERSION}; "
            "read the file with a microscale that knows it."
        )
    packed = {
        name: _read_packed(entry, f"{where}: tensor {name!r}")
        for name, entry in _table(data.get("packed"), where, "packed").items()
    }
    aliases = _table(data.get("aliases"), where, "aliases")
    if odd := [name for name, of in aliases.items() if not isinstance(of, str)]:
        raise MicroscaleError(f"{where}: {odd[0]!r} shares {aliases[odd[0]]!r}, which is no name.")
    policy = data.get("policy")
    return Header(packed, aliases, None if policy is None else _table(policy, where, "policy"))


def _table(value: object, where: str, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MicroscaleError(f"{where}: {key!r} of the microscale header is {value!r}, no table.")
    return value


def _read_packed(entry: object, where: str) -> Packed:
    keys = {"format": str, "axis": int, "compute": str, "shape": list, "dtype": str}
    if not isinstance(entry, dict) or any(
        not isinstance(entry.get(key), kind) for key, kind in keys.items()
    ):
        raise MicroscaleError(f"{where}: {entry!r} lacks one of {', '.join(keys)}.")
    shape = entry["shape"]
    if not all(isinstance(size, int) and size >= 0 for size in shape):
        raise MicroscaleError(f"{where}: shape {shape!r} is not a list of sizes.")
    for key in ("compute", "dtype"):
        if entry[key] not in DTYPES:
            raise MicroscaleError(f"{where}: {key} {entry[key]!r} is not one of {list(DTYPES)}.")
    try:
        get_block_format(entry["format"])
        check_axis(entry["axis"], len(shape))
    except MicroscaleError as error:
        raise MicroscaleError(f"{where}: {error}") from error
    return Packed(entry["format"], entry["axis"], entry["compute"], tuple(shape), entry["dtype"])
