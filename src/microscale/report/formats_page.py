"""The page docs/formats.md, made from the records in `microscale.formats`."""

from collections.abc import Iterable, Iterator

from microscale.formats import ELEMENTS, NAMED, SCALES
from microscale.report.format_words import (
    block_words,
    element_layout,
    number,
    scale_range,
    specials_words,
)
from microscale.rounding import LAWS, Gradient, Law, ScaleRule

INTRODUCTION = """\
# Formats

This page is made from `src/microscale/formats/` and `rounding.py` by
`python runs/formats_page.py`; a test keeps it in step. `microscale formats NAME` shows one format
in full.

A block format is an element format, a scale format, a block and a scale rule. A value of a block
is its element's value times the shared scale of the block (times the tensor scale, where there is
one).
"""

SPELLING = """\
## Spelling

Any block format can be written as a base and options, joined by `-`, in any case:

- the base is a name of the first table, or an element (`e2m1`, `fp4_e2m1`, `int4`);
- a block: a number of values along the axis (`32`), a tile of rows and columns (`16x32`),
  `channel`, `token` or `tensor`;
- a scale: a name of the third table;
- a scale rule: a name from the table of rules;
- `zero_point`, which gives each block of integers one.

Examples: `mxfp4-rceil`, `e3m0-16`, `fp6_e3m2-64-pow2-ceil`, `int8-channel`. What is left out is
that of the base; an element alone with a counted block has `e8m0` scales, with a whole block
or a zero point `fp32`. Float elements are `eXmY` of 2 to 8 bits, with a bias (`e4m3b11`) and a
kind of specials (`finite`, `fn`, `fnuz`, `ieee`) where they are not the usual ones; integers are
`int2` to `int8`, and `int8full` uses the most negative code too.
A pair `weight/activation` is written `mxfp4/mxfp6_e2m3`.
"""

WORDS = """\
amax is the largest finite magnitude of a block; emax and largest are the exponent and the value of
the largest element; R rounds to nearest even at the element's mantissa width.
"""

OPTIONS = """\
## Options of a cast

They belong to the call, not to the format; the first of each is the default.
"""


def page() -> str:
    """The whole page as Markdown."""
    elements = ("name", "bits", "code", "emin", "emax", "largest", "smallest", "specials")
    blocks = ("name", "element", "scale", "block: one scale", "rule", "bits/value")
    options: tuple[type[Law], ...] = (*LAWS, Gradient)
    parts = [
        INTRODUCTION,
        "## Block formats\n",
        _table(blocks, _blocks()),
        "Bits per value count the scale where a block has a fixed number of values.\n",
        "## Element formats\n",
        _table(elements, _elements()),
        "## Scale formats\n",
        _table(("name", "bits", "range"), _scales()),
        SPELLING,
        "## Scale rules\n",
        _table(("rule", "law"), _laws(ScaleRule)),
        WORDS,
        OPTIONS,
        *(_table((f"`{option.argument()}`", "law"), _laws(option)) for option in options),
    ]
    return "\n".join(parts)


def _table(headers: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    names = tuple(headers)
    lines = [names, ("---",) * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _blocks() -> Iterator[tuple[str, ...]]:
    for name, fmt in NAMED.items():
        outer = f", {fmt.tensor_scale} for the tensor" if fmt.tensor_scale else ""
        bits = f"{fmt.bits_per_value:g}"
        yield (
            f"`{name}`",
            str(fmt.element),
            f"{fmt.scale}{outer}",
            block_words(fmt),
            str(fmt.rule),
            bits,
        )


def _elements() -> Iterator[tuple[str, ...]]:
    for name, element in ELEMENTS.items():
        exponents = (str(element.emin), str(element.emax))
        ends = (number(element.largest), number(element.smallest))
        layout, specials = element_layout(element), specials_words(element)
        yield (f"`{name}`", str(element.bits), layout, *exponents, *ends, specials)


def _scales() -> Iterator[tuple[str, ...]]:
    for name, scale in SCALES.items():
        yield f"`{name}`", str(scale.bits), scale_range(scale)


def _laws(option: type[Law]) -> Iterator[tuple[str, ...]]:
    for member in option:
        yield f"`{member}`", member.law.replace("|", r"\|")
