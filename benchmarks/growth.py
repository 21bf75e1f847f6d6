"""How time grows with the elements, and what more threads bring."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import probes
from microscale.cast import cast
from microscale.tensor import BlockTensor, dequantize, quantize
from rows import Entry, Goal, Group, Row, exponent

SIZES = (1, 4, 16, 64, 256, 1024, 4096)
"""MB of float32."""
BEYOND = 64
"""MB from which on a tensor lies beyond the caches."""
LINEAR = (0.95, 1.05)
"""Exponents that count as linear."""
THREADS_GOAL = 1.8
FORMAT = "mxfp4"

Runs = dict[str, Callable[[], object]]


def doublings(largest: int = 1024) -> Iterator[Group]:
    """The same operations on ever more values, up to `largest` MB of float32."""
    for size in SIZES:
        if size <= largest:
            values = size * 2**18
            x = probes.aligned(values).normal_().view(-1, 4096)
            entries = {name: Entry(run, values, 4) for name, run in _memory_bound(x).items()}
            yield Group(f"{size} MB of float32", entries)


def _memory_bound(x: Tensor) -> Runs:
    y = probes.aligned(x.numel()).view_as(x)
    half = probes.aligned(x.numel(), torch.bfloat16).view_as(x)
    packed = quantize(x, FORMAT)
    mine = y.clone()
    return {
        "copy_": partial(y.copy_, x),
        "cast in place": partial(cast, mine, FORMAT, out=mine),
        "cast, out": partial(cast, x, FORMAT, out=y),
        "quantize": partial(quantize, x, FORMAT),
        "dequantize to bfloat16": partial(dequantize, packed, out=half),
        "GEMV": partial(_multiply, torch.randn(1, x.shape[1]), packed),
    }


def _multiply(x: Tensor, w: BlockTensor) -> Tensor:
    return F.linear(x, w)


def fits(rows: list[Row]) -> dict[str, dict[str, float]]:
    """The exponent of each operation's time, over all sizes and over those beyond the caches."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row.name for row in rows):
        pairs = [(row.values, row.timing.median) for row in rows if row.name == name]
        large = [(v, t) for v, t in pairs if v >= BEYOND * 2**18]
        found[name] = {
            title: exponent(*map(list, zip(*some, strict=True)))
            for title, some in (("all", pairs), ("beyond", large))
            if len(some) > 1
        }
    return found


def one_and_all() -> Iterator[Group]:
    """Each operation with one thread and with all of them."""
    x = probes.aligned(2**24).normal_().view(-1, 4096)
    small, out = x[:64].clone(), x[:64].clone()  # 1 MB
    weight = quantize(x.bfloat16(), FORMAT)
    many = torch.randn(512, 4096).bfloat16()
    computing: Runs = {
        "cast of 1 MB, out": partial(cast, small, FORMAT, out=out),
        "cast of 1 MB, stochastic": partial(
            cast, small, FORMAT, rounding="stochastic", seed=1, out=out
        ),
        "cast of 1 MB, rule mse": partial(cast, small, f"{FORMAT}-mse", out=out),
        "GEMM of 64 rows": partial(_multiply, many[:64], weight),
        "GEMM of 512 rows": partial(_multiply, many, weight),
    }
    entries: dict[str, Entry] = {}
    for runs, goal in ((_memory_bound(x), None), (computing, THREADS_GOAL)):
        for name, run in runs.items():
            entries |= _threads(name, run, goal)
    yield Group("one thread beside all: speed-up", entries)


def _threads(name: str, run: Callable[[], object], goal: float | None) -> dict[str, Entry]:
    every = torch.get_num_threads()
    single = f"{name}: 1 thread"
    goals = (Goal(single, "share", goal),)
    return {
        single: Entry(partial(_with, 1, run), 1, 1, "call"),
        f"{name}: {every} threads": Entry(partial(_with, every, run), 1, 1, "call", goals),
    }


def _with(threads: int, run: Callable[[], object]) -> None:
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    run()
