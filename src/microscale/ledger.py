"""Which product ran how: `with record_products() as ledger: model(x)`.

Recording is off unless a ledger is open, and then costs nothing but the question.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.overrides import TorchFunctionMode

from microscale.products import PRODUCTS

How = Literal["native", "packed", "emulated", "skipped"]
"""Run by a kernel of the format; from packed weights; on cast operands in a wider type; neither."""


@dataclass(frozen=True, slots=True)
class Product:
    """One kind of product in one module: what ran, how, with which formats of left and right."""

    module: str
    product: str
    how: How
    formats: tuple[str, str]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Row(Product):
    """A product, and how many times it ran."""

    calls: int = 0


class Ledger:
    """Every product that ran while the ledger was open, in the order of their first call."""

    def __init__(self) -> None:
        self._calls: dict[Product, int] = {}

    def add(self, product: Product) -> None:
        """Count one call."""
        self._calls[product] = self._calls.get(product, 0) + 1

    @property
    def rows(self) -> list[Row]:
        """One row for each product of each module."""
        return [
            Row(p.module, p.product, p.how, p.formats, p.reason, calls)
            for p, calls in self._calls.items()
        ]

    def __iter__(self) -> Iterator[Row]:
        """Iterate over the rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._calls)

    @property
    def skipped(self) -> list[Row]:
        """The rows of products that were not quantized."""
        return [row for row in self.rows if row.how == "skipped"]

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the rows as plain data."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        """Return the rows as a table."""
        head = ("module", "product", "how", "left", "right", "calls", "reason")
        lines = [
            (r.module or "-", r.product, r.how, *r.formats, str(r.calls), r.reason)
            for r in self.rows
        ]
        return text_table([head, *lines])


_open: list[Ledger] = []


@contextmanager
def record_products() -> Iterator[Ledger]:
    """Open a ledger. Products outside converted modules are listed too, as skipped.

    Compiled models run eagerly meanwhile, since what is compiled can no longer be watched.
    """
    ledger = Ledger()
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_Watch())
        _open.append(ledger)
        stack.callback(_open.remove, ledger)
        yield ledger


def recording() -> bool:
    """Whether a ledger is open; in compiled code none is."""
    return not torch.compiler.is_compiling() and bool(_open)


def note(
    module: str, product: str, how: How, formats: tuple[object, object], reason: str = ""
) -> None:
    """Tell every open ledger that a product ran; None stands for the wider type."""
    if not recording():
        return
    left, right = (str(fmt) if fmt is not None else "fp32" for fmt in formats)
    for ledger in _open:
        ledger.add(Product(module, product, how, (left, right), reason))


def skip(module: str, function: Any, reason: str = "") -> None:
    """Tell every open ledger that a function of PRODUCTS ran without being quantized."""
    product = PRODUCTS[function]
    reason = reason or f"{product} is not quantized in this version"
    note(module, product, "skipped", (None, None), reason)


class _Watch(TorchFunctionMode):
    """Sees the products that no scope of a converted module has dealt with."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            skip("", func, "ran outside the modules that were converted")
        return func(*args, **(kwargs or {}))


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns of plain text; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
