"""`microscale formats`: all formats as tables, or one in full."""

import math
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from microscale.commands.console import STANDARD_OUTPUT, console, write_json
from microscale.errors import MicroscaleError
from microscale.formats import ELEMENTS, NAMED, SCALES, BlockFormat, ElementFormat
from microscale.report.figures import check_picture, write_figure
from microscale.report.format_words import (
    describe,
    number,
    properties,
    record,
    scale_range,
    specials_words,
)
from microscale.report.number_line import draw, text_lines
from microscale.spelling import get_format

LARGEST_CODE_TABLE = 6
LINE_WIDTH = 96


def show_formats(*, json_file: Path | None, picture: Path | None) -> None:
    """Print the tables of block, element and scale formats, or write them as JSON."""
    if picture is not None:
        raise MicroscaleError(
            f"--picture {str(picture)!r} draws one format; name it: microscale formats mxfp4."
        )
    if json_file is not None:
        write_json(json_file, {name: record(fmt) for name, fmt in (NAMED | ELEMENTS).items()})
    if json_file == STANDARD_OUTPUT:
        return
    terminal = console()
    for title, table in _tables():
        terminal.print(f"\n{title}", style="bold")
        terminal.print(table)
    terminal.print(
        "\nAny other block format is written element-block-scale-rule: e3m0-16, mxfp4-rceil, "
        "fp6_e3m2-64-pow2-ceil.\nOne in full: microscale formats mxfp6_e2m3"
    )


def show_format(name: str, *, json_file: Path | None, picture: Path | None) -> None:
    """Print one format: properties, laws, codes, number line; draw it to `picture`."""
    fmt = get_format(name)
    if picture is not None:
        check_picture(picture)
    if json_file is not None:
        write_json(json_file, record(fmt))
    if picture is not None:
        _draw(fmt, picture)
    if json_file != STANDARD_OUTPUT:
        _print_format(fmt, console())


def _element(fmt: BlockFormat | ElementFormat) -> ElementFormat:
    return fmt if isinstance(fmt, ElementFormat) else fmt.element


def _draw(fmt: BlockFormat | ElementFormat, path: Path) -> None:
    write_figure(draw(_element(fmt), f"{fmt}: {describe(fmt)}"), path)


def _print_format(fmt: BlockFormat | ElementFormat, terminal: Console) -> None:
    element = _element(fmt)
    terminal.print(f"[bold]{fmt}[/bold]: {describe(fmt)}\n")
    grid = Table.grid(padding=(0, 3))
    for row in properties(fmt):
        grid.add_row(*row)
    terminal.print(grid)
    terminal.print(f"\n[bold]Codes of {element}[/bold]")
    small = element.bits <= LARGEST_CODE_TABLE
    terminal.print(code_table(element) if small else binade_table(element))
    terminal.print(f"\n[bold]Number line of {element}[/bold], positive half")
    terminal.print(text_lines(element, min(terminal.width, LINE_WIDTH)), soft_wrap=True)


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="underline")
    for header in headers:
        table.add_column(header, no_wrap=True)
    return table


def _tables() -> Iterator[tuple[str, Table]]:
    blocks = _table("name", "element", "scale", "block", "rule", "bits/value")
    for name, fmt in NAMED.items():
        outer = f" and {fmt.tensor_scale}" if fmt.tensor_scale else ""
        row = (name, fmt.element, f"{fmt.scale}{outer}", fmt.block, fmt.rule)
        blocks.add_row(*map(str, row), f"{fmt.bits_per_value:g}")
    yield "Block formats", blocks
    elements = _table(
        "name", "bits", "bias", "emin", "emax", "largest", "smallest", "NaN, infinity"
    )
    for name, element in ELEMENTS.items():
        counts = map(str, (element.bits, element.bias, element.emin, element.emax))
        ends = (number(element.largest), number(element.smallest))
        elements.add_row(name, *counts, *ends, specials_words(element))
    yield "Element formats", elements
    scales = _table("name", "bits", "range")
    for name, scale in SCALES.items():
        scales.add_row(name, str(scale.bits), scale_range(scale))
    yield "Scale formats", scales


def code_table(element: ElementFormat) -> Table:
    """Every code with its value, a row for each sign and exponent."""
    columns = 2 ** min(element.mantissa_bits, 3)
    low = columns.bit_length() - 1
    headers = [f"..{column:0{low}b}" if low else "value" for column in range(columns)]
    table = _table("code", *headers)
    for start in range(0, 2**element.bits, columns):
        head = f"{start >> low:0{element.bits - low}b}"
        values = element.values[start : start + columns]
        table.add_row(f"{head}{'.' * low}", *(number(value) for value in values))
    return table


def binade_table(element: ElementFormat) -> Table:
    """The positive codes, a row for each power of two: how many values and their spacing."""
    table = _table("codes", "from", "to", "values", "step")
    finite = [(code, v) for code, v in enumerate(element.values) if 0 < v <= element.largest]
    edge = element.smallest_normal or 0.0
    binades: dict[int | None, list[tuple[int, float]]] = {}
    for code, value in finite:
        exponent = None if value < edge else math.frexp(value)[1]
        binades.setdefault(exponent, []).append((code, value))
    for members in binades.values():
        (first, low), (last, high) = members[0], members[-1]
        step = (high - low) / (len(members) - 1) if len(members) > 1 else element.smallest
        span = (f"0x{first:02x} to 0x{last:02x}", number(low), number(high))
        table.add_row(*span, str(len(members)), number(step))
    return table
