"""How values are rounded and scales chosen: each member with its law in one line.

`grid` is the element's set of values; R is rounding to nearest, ties to even, at the element's
mantissa width; amax is the largest finite magnitude of a block; `emax` and `largest` are the
exponent and the value of the largest element.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Self

from microscale.errors import MicroscaleError, near_names


class Law(StrEnum):
    """A string enumeration whose members carry their law: `member.law`."""

    law: str

    def __new__(cls, value: str, law: str = "") -> Self:
        """Make a member that compares equal to `value` and knows its law."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.law = law
        return member

    @classmethod
    def argument(cls) -> str:
        """The name of the argument that takes this enumeration."""
        return "".join(("_" + c.lower()) if c.isupper() else c for c in cls.__name__).lstrip("_")

    @classmethod
    def _missing_(cls, value: object) -> "Law":
        known = [str(member) for member in cls]
        raise MicroscaleError(
            f"{cls.argument()}={value!r} is not known.{near_names(str(value), known)}"
        )


class Rounding(Law):
    """Rounding of a quotient to the element's grid."""

    EVEN = (
        "even",
        "nearest value of the grid; a tie to the even significand, or where none is, the larger",
    )
    AWAY = "away", "nearest value of the grid; a tie goes away from zero"
    ZERO = "zero", "nearest value of the grid towards zero (truncation)"
    STOCHASTIC = (
        "stochastic",
        "away from zero with probability floor(2^32 f) / 2^32, f the part of the gap",
    )


class ScaleRule(Law):
    """Choice of the shared scale: `amax` for real-valued scales, the others for powers of two."""

    FLOOR = "floor", "exponent = floor(log2(amax)) - emax (OCP MX 6.3)"
    CEIL = "ceil", "exponent = ceil(log2(amax)) - emax"
    EVEN = "even", "exponent = floor(log2(R(amax))) - emax"
    RCEIL = "rceil", "exponent = ceil(log2(amax / largest))"
    SEVEN_QUARTERS = (
        "seven_quarters",
        "floor's exponent, one more where amax is 7/4 of its power of two or larger",
    )
    MSE = "mse", "of floor's exponent and its two neighbours the one with the least squared error"
    AMAX = "amax", "scale = amax / largest, rounded once to the scale format"
    FOUR_OVER_SIX = (
        "four_over_six",
        "of the scales that take amax to 6 and to 4 the one with the least squared error (e2m1)",
    )

    @property
    def is_power_of_two(self) -> bool:
        """Whether the rule chooses an exponent, not a real-valued scale."""
        return self not in (ScaleRule.AMAX, ScaleRule.FOUR_OVER_SIX)


class Overflow(Law):
    """What becomes of a finite value that rounds beyond the largest element."""

    SATURATE = "saturate", "the largest element, sign kept"
    NONFINITE = "nonfinite", "the element's infinity, else its NaN (OFP8's OVF)"


class Nonfinite(Law):
    """What becomes of a block that holds NaN or infinity."""

    BLOCK = "block", "scale NaN, so the whole block is NaN"
    ELEMENT = (
        "element",
        (
            "scale from the finite values; NaN and infinity kept where the element encodes them, "
            "else NaN makes the block NaN and infinity saturates"
        ),
    )


class FlushSubnormals(Law):
    """Whether values below 2^-126, the smallest normal float32, become zero."""

    OFF = "off", "float32 subnormals are ordinary numbers"
    ELEMENT = "element", "an element below 2^-126 becomes zero (arXiv 2310.10537, Algorithm 1)"
    BLOCK = "block", "a block whose amax is below 2^-126 becomes zero (the paper's library)"


class Prerounding(Law):
    """Whether values are rounded to a wider type before anything else."""

    OFF = "off", "values are taken as they are"
    BFLOAT16 = (
        "bfloat16",
        (
            "values are rounded to bfloat16 first: as `rounding` says, to nearest even where that "
            "is stochastic; beyond its largest to infinity (the paper's library)"
        ),
    )


class Gradient(Law):
    """The gradient of a cast (a straight-through estimator)."""

    IDENTITY = "identity", "1 everywhere"
    CLIPPED = (
        "clipped",
        "1 where |x| <= largest x scale (real scales: within their rounding), else 0",
    )


@dataclass(frozen=True, slots=True)
class Options:
    """How a cast rounds, besides its format. Plain strings are taken for the members.

    Raises MicroscaleError for a name that is not known.
    """

    rounding: Rounding = Rounding.EVEN
    overflow: Overflow = Overflow.SATURATE
    nonfinite: Nonfinite = Nonfinite.BLOCK
    flush_subnormals: FlushSubnormals = FlushSubnormals.OFF
    prerounding: Prerounding = Prerounding.OFF

    def __post_init__(self) -> None:
        """Resolve the names."""
        for law in LAWS:
            object.__setattr__(self, law.argument(), law(getattr(self, law.argument())))

    def __str__(self) -> str:
        """Return the spelling that `read_options` takes back."""
        return " ".join(self.by_name().values())

    def by_name(self) -> dict[str, str]:
        """Each option as a keyword of `cast` and `quantize`."""
        return {law.argument(): str(getattr(self, law.argument())) for law in LAWS}

    def unusual(self) -> dict[str, str]:
        """The options that are not the usual ones."""
        usual = Options().by_name()
        return {name: law for name, law in self.by_name().items() if law != usual[name]}


LAWS: tuple[type[Law], ...] = (Rounding, Overflow, Nonfinite, FlushSubnormals, Prerounding)
"""What can be chosen for a cast, in the order of the fields of `Options`."""


@lru_cache(maxsize=256)
def make_options(*names: str) -> Options:
    """Options by name, in the order of `LAWS`."""
    laws: tuple[Any, ...] = tuple(law(name) for law, name in zip(LAWS, names, strict=True))
    return Options(*laws)


def read_options(spelling: str) -> Options:
    """Read what `str(options)` gave."""
    return make_options(*spelling.split())
