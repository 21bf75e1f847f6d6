"""Reading the spelling of a format: any format can be written down in a line."""

import re
from functools import lru_cache

from microscale.errors import MicroscaleError, near_names
from microscale.formats import (
    CONCRETE,
    ELEMENTS,
    FLOAT_SPECIALS,
    NAMED,
    SCALES,
    WHOLE_BLOCKS,
    ZERO_POINT,
    BlockFormat,
    ElementFormat,
    ScaleFormat,
    Specials,
    WholeBlock,
    default_scale,
    element_spelling,
    float_format,
    integer_format,
    make_concrete,
    settled_scale,
)
from microscale.rounding import ScaleRule

_FLOAT = re.compile(r"(?:fp[0-9]_)?e([0-9])m([0-9])(?:b([0-9]{1,3}))?(finite|fn|fnuz|ieee)?")
_INTEGER = re.compile(r"int([0-9]{1,3})(full)?")
_BLOCK = re.compile(r"([0-9]{1,9})(?:x([0-9]{1,9}))?")
_SETTLED = re.compile(r"at([0-9]{1,50}(?:\.[0-9]{1,60})?)(?:z([0-9]{1,3}))?")
_ALIASES = {"mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3", "mxfp4_e2m1": "mxfp4"}


def get_format(spelling: "str | BlockFormat | ElementFormat") -> BlockFormat | ElementFormat:
    """Read a format's spelling, in any case: `mxfp4`, `mxfp4-rceil`, `e4m3`, `e3m0-16-bf16`.

    `get_format(str(f)) == f` for every format. Raises MicroscaleError with near names.
    """
    if not isinstance(spelling, str):
        if isinstance(spelling, (BlockFormat, ElementFormat)):
            return spelling
        raise MicroscaleError(f"format {spelling!r} is neither a spelling nor a format.")
    return _read(spelling.strip().lower())


def get_block_format(spelling: "str | BlockFormat") -> BlockFormat:
    """Read the spelling of a block format; refuse an element format, which has no scale."""
    fmt = get_format(spelling)
    if isinstance(fmt, ElementFormat):
        raise MicroscaleError(
            f"{fmt} is an element format, without a scale; name a block, for example "
            f"{element_spelling(fmt)}-32 or {element_spelling(fmt)}-tensor."
        )
    return fmt


@lru_cache(maxsize=1024)
def _read(spelling: str) -> BlockFormat | ElementFormat:
    base, *options = _ALIASES.get(spelling, spelling).split("-")
    base = _ALIASES.get(base, base)
    concrete = make_concrete(base) if base in CONCRETE else None
    element = concrete.element if concrete else _read_element(base)
    if element is None:
        known = NAMED.keys() | ELEMENTS.keys()
        raise MicroscaleError(
            f"format {spelling!r} is not known.{near_names(spelling, known)} "
            "Any format can be written as element-block-scale-rule, as in e3m2-16-e8m0-ceil."
        )
    if concrete is None and not options:
        return element
    return _read_block(spelling, element, concrete, options)


def _read_block(
    spelling: str, element: ElementFormat, concrete: BlockFormat | None, options: list[str]
) -> BlockFormat:
    block = concrete.block if concrete else None
    scale = concrete.scale if concrete else None
    rule: ScaleRule | None = None
    tensor_scale = concrete.tensor_scale if concrete else None
    options_by_kind = _sort_options(spelling, options)
    for kind, option in options_by_kind.items():
        if kind == "block":
            block = _read_size(option)
        elif kind == "scale":
            scale = _read_scale(option)
        elif kind == "rule":
            rule = ScaleRule(option)
        elif kind == "tensor scale":
            tensor_scale = SCALES[option.removeprefix("tensor_")]
    if block is None:
        raise MicroscaleError(f"format {spelling!r} names no block; add one, as in {element}-32.")
    zero_point = ZERO_POINT in options_by_kind
    scale = scale or default_scale(block, zero_point)
    return BlockFormat(element, scale, block, rule or scale.default_rule, tensor_scale, zero_point)


def _sort_options(spelling: str, options: list[str]) -> dict[str, str]:
    """The options by what they say; one of each at most."""
    kinds: dict[str, str] = {}
    for option in options:
        if _read_size(option) is not None:
            kind = "block"
        elif option in SCALES or _SETTLED.fullmatch(option):
            kind = "scale"
        elif option in list(ScaleRule):
            kind = "rule"
        elif option.startswith("tensor_") and option.removeprefix("tensor_") in SCALES:
            kind = "tensor scale"
        elif option == ZERO_POINT:
            kind = ZERO_POINT
        else:
            known = [*WHOLE_BLOCKS, "32", *SCALES, *ScaleRule, ZERO_POINT]
            raise MicroscaleError(
                f"format {spelling!r}: option {option!r} is not known.{near_names(option, known)}"
            )
        if kind in kinds:
            raise MicroscaleError(
                f"format {spelling!r} names two of one kind ({kind}): {kinds[kind]!r} and "
                f"{option!r}; leave one away."
            )
        kinds[kind] = option
    return kinds


def _read_size(option: str) -> int | tuple[int, int] | WholeBlock | None:
    for whole in WHOLE_BLOCKS:
        if option == whole:
            return whole
    if not (match := _BLOCK.fullmatch(option)):
        return None
    return (int(match[1]), int(match[2])) if match[2] else int(match[1])


def _read_scale(option: str) -> ScaleFormat:
    if match := _SETTLED.fullmatch(option):
        return settled_scale(float(match[1]), int(match[2]) if match[2] else None)
    return SCALES[option]


def _read_element(name: str) -> ElementFormat | None:
    if match := _INTEGER.fullmatch(name):
        return integer_format(int(match[1]), "full" if match[2] else "finite")
    if match := _FLOAT.fullmatch(name):
        kinds: dict[str, Specials] = {str(kind): kind for kind in FLOAT_SPECIALS}
        bias = int(match[3]) if match[3] else None
        element = float_format(int(match[1]), int(match[2]), kinds.get(match[4] or ""), bias)
        prefix = name.partition("_")[0] if name.startswith("fp") else f"fp{element.bits}"
        if prefix != f"fp{element.bits}":
            raise MicroscaleError(
                f"format {name!r}: {element} has {element.bits} bits, not {prefix[2:]}."
            )
        return element
    return None
