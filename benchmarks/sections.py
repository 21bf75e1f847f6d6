"""The sections of `python benchmarks/run.py`: which functions are timed beside which yardstick.

Goals are those that were set for a processor with AVX-512 and AMX; on others they are wishes.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import casts
import decoders
import help_time
import limits
import peers
import probes
import products
import training
from growth import doublings, one_and_all
from microscale.cast import cast
from microscale.spelling import get_block_format
from microscale.tensor import quantize
from rows import Entry, Goal, Group

Groups = Iterator[Group]
LARGE = 2**24
"""float32 values: beyond the caches of most machines."""
SMALL = 2**17
"""float32 values: two tensors of so many fit a second cache of 1 MB."""
EIGHT_BITS = ("mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "int8-channel")


# ---------------------------------------------------------------- limits


def memory(x: Tensor, y: Tensor) -> dict[str, Entry]:
    """What can be done with memory at most, by our loops and by torch."""
    values = x.numel()
    found = {name: Entry(f, values, limits.MOVED[name]) for name, f in limits.limits(x, y).items()}
    for pages in probes.PAGES:
        ways: dict[str, tuple[Callable[[], object], float]] = {
            "read": (partial(probes.read, x, pages), 4),
            "non-temporal copy": (partial(probes.copy, x, y, pages), 8),
            "non-temporal write": (partial(probes.write, y, pages), 4),
            "read-modify-write": (partial(probes.modify, y, pages), 8),
        }
        found |= {
            f"{name}, {pages} at a time": Entry(run, values, moved)
            for name, (run, moved) in ways.items()
        }
    return found


def section_limits() -> Groups:
    """Memory in three sizes, multipliers."""
    for values in limits.SIZES:
        x, y = probes.aligned(values), probes.aligned(values)
        yield Group(f"memory, {values * 4 / 2**20:g} MB", memory(x, y))
    yield Group("multipliers", _multipliers())


def _multipliers() -> dict[str, Entry]:
    size = 2048
    found = {
        f"{name}, registers only": Entry(run, operations, 1, "FLOP")
        for name, (run, operations) in probes.peaks().items()
    }
    for dtype, peak in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        best = "amx" if dtype is torch.bfloat16 and "amx, registers only" in found else peak
        goals = (Goal(best, "share"),)
        found[f"torch {peak} product of {size} x {size}"] = Entry(
            partial(torch.mm, a, b), 2 * size**3, 1, "FLOP", goals
        )
    a, b = torch.randint(-128, 128, (2, size, size), dtype=torch.int8)
    found["torch int8 product (_int_mm)"] = Entry(
        partial(torch._int_mm, a, b), 2 * size**3, 1, "OP"  # noqa: SLF001
    )  # fmt: skip
    return found


# ---------------------------------------------------------------- casts


def _goals_of_cast(name: str) -> tuple[Goal, ...]:
    if "in place" in name:
        return (Goal("read-modify-write", "share", 0.85),)
    if name.startswith("cast") and "fresh" in name:
        return (Goal("clone"),)
    # The goals are for float32 tensors in memory that is there, rounded to nearest.
    usual = not any(word in name for word in ("stochastic", "axis", "bfloat16", "-"))
    if name.startswith("cast"):
        share, time = (0.8, 0.7) if usual else (None, None)
        return (Goal("non-temporal copy", "share", share), Goal("copy_", "time", time))
    return (Goal("copy_"),)


def _entries(found: casts.Functions, values: int) -> dict[str, Entry]:
    return {
        name: Entry(run, values, moved, goals=_goals_of_cast(name))
        for name, (run, moved) in found.items()
    }


def section_casts() -> Groups:
    """Casts into memory that is there, beside copies; others' casts."""
    x, y = probes.aligned(LARGE).normal_(), probes.aligned(LARGE)
    x = x.view(-1, 4096)
    y = y.view_as(x)
    entries = memory(probes.aligned(LARGE), probes.aligned(LARGE))
    entries |= _entries(casts.casts(x, y), LARGE)
    yield Group("casts, 64 MB of float32", entries)
    foreign = _entries(casts.peers(x) | peers.casts(x), LARGE)
    foreign |= _entries(peers.casts_of_parts(x), peers.PART)
    ours = {"cast mxfp8_e4m3, fresh": partial(cast, x, "mxfp8_e4m3"), "copy_": partial(y.copy_, x)}
    foreign |= {name: Entry(run, LARGE, 8) for name, run in ours.items()}
    yield Group("casts of others, 64 MB of float32", foreign)


def section_cache() -> Groups:
    """Casts of what lies in the second cache, one thread."""
    x, y = probes.aligned(SMALL).normal_(), probes.aligned(SMALL)
    copying = partial(peers.memmove, x, y)
    entries = {"memcpy": Entry(copying, SMALL, 8), "copy_": Entry(partial(y.copy_, x), SMALL, 8)}
    goals = (Goal("memcpy", "share", 0.7),)
    rows, out = x.view(-1, 4096), y.view(-1, 4096)
    for fmt in casts.FORMATS:
        run = partial(cast, rows, fmt, out=out)
        entries[f"cast {fmt}, out"] = Entry(run, SMALL, 8, goals=goals)
    yield Group("casts, 0.5 MB of float32, one thread", entries, threads=1)


def section_packing() -> Groups:
    """Packed parts from values, and values from them."""
    x = probes.aligned(LARGE).normal_().view(-1, 4096)
    y, half = probes.aligned(LARGE), probes.aligned(LARGE, torch.bfloat16)
    entries = memory(x.view(-1), y)
    for fmt in casts.FORMATS:
        stored = _stored_bits(fmt) / 8
        parts = probes.aligned(int(LARGE * stored), torch.uint8)
        entries[f"limit: read {fmt}, write bfloat16"] = Entry(
            partial(_read_and_write, parts, half), LARGE, 2 + stored
        )
    for name, (run, moved) in casts.packing(x).items():
        verb, fmt, *to = name.split(maxsplit=2)
        goals: tuple[Goal, ...] = (Goal("copy_"),)
        if verb == "quantize":
            goals = (Goal("copy_", "time", 0.55),)
        elif to:
            goals = (Goal(f"limit: read {fmt}", "share", 0.9),)
        entries[name] = Entry(run, LARGE, moved, goals=goals)
    yield Group("packing, 64 MB of float32", entries)


def _read_and_write(parts: Tensor, out: Tensor) -> None:
    probes.read(parts)
    probes.write(out, 1)


def _stored_bits(fmt: str) -> float:
    block = get_block_format(fmt)
    size = block.block if isinstance(block.block, int) else 4096
    return block.element.bits + block.scale.bits / size


# ---------------------------------------------------------------- products


def section_gemv() -> Groups:
    """One row of activations, weights that lie in no cache."""
    for shape in products.SHAPES:
        yield _products(shape, 1)


def section_gemm() -> Groups:
    """8, 64 and 512 rows."""
    for batch in products.BATCHES[1:]:
        yield _products(products.SHAPES[0], batch)


def _products(shape: tuple[int, int], batch: int) -> Group:
    values = torch.randn(shape).bfloat16()
    x = torch.randn(batch, shape[1]).bfloat16()
    size = shape[0] * shape[1]
    cold = probes.aligned(products.COLD // 4)
    entries = {
        f"read, {pages} at a time": Entry(partial(probes.read, cold, pages), cold.numel(), 4)
        for pages in probes.PAGES
    }
    foreign = products.peers(values, x, torchao=False)
    for name, run in (foreign | peers.products(values, x)).items():
        bits = next((b for word, b in peers.WEIGHT_BITS.items() if word in name), 16)
        entries[name] = Entry(run, size, bits / 8, goals=(Goal("torch bfloat16 linear"),))
    for name, run in products.products(values, batch, products.FORMATS).items():
        fmt, _, how = name.partition(", ")
        goals = _goals_of_product(fmt, how, batch)
        entries[name] = Entry(run, size, _stored_bits(fmt) / 8, goals=goals)
    return Group(f"{shape[0]} x {shape[1]}, batch {batch}, cold weights", entries)


def _goals_of_product(fmt: str, how: str, batch: int) -> tuple[Goal, ...]:
    four = fmt in {"mxfp4", "nvfp4", "int4-channel"}
    if batch > 1:
        most = {8: 0.7 if four else 0.9, 64: 0.65, 512: 0.75}[batch]
        goal = most if how == "bfloat16" and (batch > 8 or four or fmt in EIGHT_BITS) else None
        return (Goal("torch bfloat16 linear", "time", goal),)
    found = [Goal("read", "share", 0.8)]
    if how == "bfloat16":
        beside_mv = 0.3 if fmt == "mxfp4" else 0.5 if fmt in EIGHT_BITS else None
        found.append(Goal("torch bfloat16 mv", "time", beside_mv))
    if fmt == "mxfp4" and how != "float32":
        found.append(Goal("ggml mxfp4", "time", 0.6))
    return tuple(found)


# ---------------------------------------------------------------- calls and starts


def section_calls() -> Groups:
    """Calls that have almost nothing to do, microseconds each."""
    x = torch.randn(4, 32)
    y = torch.empty_like(x)
    runs: dict[str, Callable[[], object]] = {
        "x + 1 of 128 values": partial(x.add, 1),
        "cast of 128 values": partial(cast, x, "mxfp4"),
        "cast of 128 values, out": partial(cast, x, "mxfp4", out=y),
        "quantize of 128 values": partial(quantize, x, "mxfp4"),
    }
    three = (Goal("3 microseconds", "seconds", 3e-6),)
    with torch.no_grad():
        yield Group(
            "calls without gradients",
            {name: Entry(run, goals=three if "cast" in name else ()) for name, run in runs.items()},
        )


def section_start() -> Groups:
    """The command line's start."""
    limit = (Goal("0.3 s", "seconds", help_time.LIMIT),)
    yield Group(
        "processes",
        {
            name: Entry(partial(help_time.seconds, command), goals=limit if "help" in name else ())
            for name, command in help_time.COMMANDS.items()
        },
    )


SECTIONS: dict[str, Callable[[], Groups]] = {
    "limits": section_limits,
    "casts": section_casts,
    "cache": section_cache,
    "packing": section_packing,
    "gemv": section_gemv,
    "gemm": section_gemm,
    "layers": training.section_layers,
    "decoder": decoders.section_decoder,
    "calls": section_calls,
    "start": section_start,
    "growth": doublings,
    "threads": one_and_all,
}
