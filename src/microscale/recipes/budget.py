"""How many bits there are to spend, as it is written: `4.6bits` a value, or `250KB` for a model."""

import re
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from microscale.errors import MicroscaleError

BITS = "bits"
BYTES = {
    "B": 1,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
}

_WRITTEN = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class Budget:
    """An amount, exact as it was written.

    `unit` is "bits" (the average of a value, scales included) or one of `BYTES` (of the whole
    model, what is not quantized included).
    """

    amount: Fraction
    unit: str = BITS

    @classmethod
    def parse(cls, given: "str | float | Budget") -> "Budget":
        """Read `4.6bits`, `4.6` or `250KB`. Raises MicroscaleError."""
        if isinstance(given, Budget):
            return given
        found = _WRITTEN.fullmatch(str(given).strip())
        units = {unit.lower(): unit for unit in ("bit", BITS, *BYTES)} | {"": BITS}
        unit = units.get(found[2].lower()) if found else None
        if found is None or unit is None:
            raise MicroscaleError(
                f"budget {given!r} is not an amount: write average bits, as in 4.6bits, or the "
                f"size of the model in {', '.join(BYTES)}, as in 250KB."
            )
        budget = cls(Fraction(found[1]), BITS if unit == "bit" else unit)
        if not budget.amount:
            raise MicroscaleError(f"budget {given!r} must be more than 0.")
        return budget

    @property
    def is_average(self) -> bool:
        """Whether it is an average of bits, and not a size."""
        return self.unit == BITS

    def bits(self, values: int, rest: int) -> int:
        """The bits that `values` values may take in a model with `rest` bits besides."""
        if self.is_average:
            return floor(self.amount * values)
        return floor(self.amount * 8 * BYTES[self.unit]) - rest

    def said(self, values: int, rest: int, bits: int) -> str:
        """So many bits of `values` values, in the unit of this budget, rounded up."""
        exact = Fraction(bits, values)
        if not self.is_average:
            exact = Fraction(bits + rest, 8 * BYTES[self.unit])
        return f"{-floor(-exact * 10**4) / 10**4:g}{self.unit}"

    def __str__(self) -> str:
        """Return what `parse` reads."""
        return f"{float(self.amount):g}{self.unit}"
