"""The operands of products, one record per GEMM, and how they are written as plain data.

Data only: no torch. `microscale.policy` puts these together.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from microscale.errors import MicroscaleError, near_names
from microscale.formats import BlockFormat
from microscale.rounding import LAWS, Options
from microscale.spelling import get_block_format

WIDE = "fp32"
"""How an operand that is not quantized is written."""

_KEYS = ("format", "prescale", *(law.argument() for law in LAWS))


@dataclass(frozen=True, slots=True)
class Operand:
    """A block format and how values are cast to it. The format's spelling is accepted.

    `prescale` is what values are multiplied with before the cast, scales included; the product is
    divided by it. It is for operands of the backward pass (2502.20586; `policies/mxfp4.toml`).
    """

    format: BlockFormat
    options: Options = field(default_factory=Options)
    prescale: float | str = "1.0"

    def __post_init__(self) -> None:
        """Read a spelling; raise MicroscaleError for one that is not known."""
        object.__setattr__(self, "format", get_block_format(self.format))
        try:
            number = math.nan if isinstance(self.prescale, bool) else float(self.prescale)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number <= 1:
            raise MicroscaleError(f"prescale={self.prescale!r} is not a number in (0, 1].")
        # As text: torch.compile takes a number in an object for one that may change.
        object.__setattr__(self, "prescale", str(number))

    def __str__(self) -> str:
        """Return the format's spelling, and what is unusual about the cast."""
        unusual = self._unusual()
        return " ".join([str(self.format), *(f"{k}={v}" for k, v in unusual.items())])

    @property
    def factor(self) -> float:
        """What values are multiplied with before the cast."""
        return float(self.prescale)

    @property
    def laws(self) -> dict[str, Any]:
        """How values are cast, as keywords of `cast` and `quantize`."""
        return dict(self.options.by_name())

    def _unusual(self) -> dict[str, Any]:
        scaled = {} if self.factor == 1 else {"prescale": self.factor}
        return self.options.unusual() | scaled

    def to_data(self) -> str | dict[str, Any]:
        """Return the spelling alone, or a table where the cast is not the usual one."""
        unusual = self._unusual()
        return {"format": str(self.format), **unusual} if unusual else str(self.format)


Spelling = str | BlockFormat | Operand | Mapping[str, str] | None
"""What an operand may be given as: a format or its spelling, a table such as `to_data` gives."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Operands of the product itself, cast along its reduction axis."""

    input: Operand | None = None
    weight: Operand | None = None


@dataclass(frozen=True, slots=True)
class Dgrad:
    """Operands of the product that gives the gradient of the input, cast along out-features."""

    grad: Operand | None = None
    weight: Operand | None = None
    hadamard: int = 0


@dataclass(frozen=True, slots=True)
class Wgrad:
    """Operands of the product that gives the gradient of the weight, cast along tokens.

    Blocks run along the tokens of "all" samples, flattened, or of each "sample" for itself.
    """

    input: Operand | None = None
    grad: Operand | None = None
    hadamard: int = 0
    tokens: str = "all"


@dataclass(frozen=True, slots=True)
class Matmul:
    """Operands of products of two activations, with a switch for each product of attention."""

    left: Operand | None = None
    right: Operand | None = None
    scores: bool = True
    values: bool = True


Setting = Operand | bool | str | int | None
Settings = tuple[tuple[str, Setting], ...]
"""What is set at some of the paths, in the order of the paths."""

PATHS = (
    "forward.input",
    "forward.weight",
    "dgrad.grad",
    "dgrad.weight",
    "wgrad.input",
    "wgrad.grad",
    "matmul.left",
    "matmul.right",
    "storage",
    "cache",
)
"""The operands by their names in a policy."""

SWITCHES = ("matmul.scores", "matmul.values")
CHOICES = {
    "convolution": ("channels", "window"),
    "vector": ("float32", "bfloat16", "bfloat16_away"),
    "wgrad.tokens": ("all", "sample"),
    "rotation": ("off", "hadamard"),
}
"""Settings that are one of several words, the first by default."""

ROTATIONS = ("dgrad.hadamard", "wgrad.hadamard")
"""Sizes of random Hadamard transforms of both operands of a product, 0 for none."""

SETTINGS = (*PATHS, *SWITCHES, *CHOICES, *ROTATIONS)
"""Everything that can be set for one module."""

_WEIGHTS = ("forward.weight", "dgrad.weight", "storage")
_SCALED = ("dgrad.grad", "dgrad.weight", "wgrad.input", "wgrad.grad")
_SECTIONS = ("forward", "dgrad", "wgrad", "matmul")


def check_setting(place: str, setting: Setting) -> None:
    """Refuse words that are not among the choices, and channels for what has none."""
    words = next((words for path, words in CHOICES.items() if place.endswith(path)), None)
    if words is not None and setting not in words:
        raise MicroscaleError(f"policy {place} is {setting!r}; write {' or '.join(words)}.")
    if place.endswith(ROTATIONS):
        _check_rotation(place, setting)
    if isinstance(setting, Operand) and setting.factor != 1 and not place.endswith(_SCALED):
        raise MicroscaleError(
            f"policy {place} has prescale={setting.factor}; only operands of dgrad and wgrad, "
            "whose products are divided by it, may have one."
        )
    if not isinstance(setting, Operand) or setting.format.block != "channel":
        return
    if not place.endswith(_WEIGHTS):
        token, tensor = (str(replace(setting.format, block=b)) for b in ("token", "tensor"))
        raise MicroscaleError(
            f"policy {place} is {setting.format}, but activations have no output channels; "
            f"write {setting.format}/{token} or {setting.format}/{tensor} (weight/activation)."
        )


def nested(settings: Iterable[tuple[str, Setting]]) -> dict[str, Any]:
    """Return settings as plain data: tables of tables, operands as they are written."""
    data: dict[str, Any] = {}
    for path, setting in settings:
        value = setting.to_data() if isinstance(setting, Operand) else setting
        section, _, key = path.partition(".")
        table = data.setdefault(section, {}) if key else data
        table[key or section] = WIDE if value is None else value
    return data


def read_settings(place: str, data: Mapping[str, object], laws: Mapping[str, str]) -> Settings:
    """Read tables of tables, whose keys are those of SETTINGS.

    `laws` are fields of the operands that are given as formats alone. Raises MicroscaleError
    that names the place.
    """
    flat: dict[str, object] = {}
    for key, value in data.items():
        if key in _SECTIONS:
            flat |= {f"{key}.{k}": v for k, v in table(f"{place} {key}", value).items()}
        else:
            flat[key] = value
    for path in flat:
        if path not in SETTINGS:
            near = near_names(path, SETTINGS)
            raise MicroscaleError(f"{place} has the unknown key {path!r}.{near}")
    given = [path for path in SETTINGS if path in flat]
    return tuple((path, _setting(f"{place} {path}", path, flat[path], laws)) for path in given)


def _setting(place: str, path: str, value: object, laws: Mapping[str, str]) -> Setting:
    if path in CHOICES:
        return str(value)
    if path in ROTATIONS:
        _check_rotation(place, value)
        return int(str(value))
    if path not in SWITCHES:
        return _operand(place, value, laws)
    if not isinstance(value, bool):
        raise MicroscaleError(f"{place} is {value!r}; write true or false.")
    return value


def _check_rotation(place: str, value: object) -> None:
    size = value if isinstance(value, int) and not isinstance(value, bool) else -1
    if size < 0 or size == 1 or size & (size - 1):
        raise MicroscaleError(f"{place} is {value!r}; write a power of two such as 16, or 0.")


def _operand(place: str, value: object, laws: Mapping[str, str]) -> Operand | None:
    if isinstance(value, Operand):
        return value
    if value is None or (isinstance(value, str) and value.strip().lower() == WIDE):
        return None
    written: dict[str, Any] = {**laws, "format": value}
    if isinstance(value, Mapping):
        written = dict(value)
    if unknown := written.keys() - set(_KEYS):
        name = str(min(unknown, key=str))
        raise MicroscaleError(f"{place} has the unknown key {name!r}.{near_names(name, _KEYS)}")
    if "format" not in written:
        raise MicroscaleError(f"{place} is {value!r}, which names no format.")
    try:
        prescale = written.pop("prescale", 1.0)
        return Operand(written.pop("format"), Options(**written), prescale)
    except MicroscaleError as error:
        raise MicroscaleError(f"{place}: {error}") from error


def table(place: str, value: object) -> Mapping[str, Any]:
    """Return `value` if it is a table, else raise."""
    if not isinstance(value, Mapping):
        raise MicroscaleError(f"{place} is {value!r}; a table of settings is expected.")
    return value
