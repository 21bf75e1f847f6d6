"""Random products by the compiled core, held against float64; also run under sanitizers."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from microscale.formats import NAMED
from microscale.kernels.native import products
from microscale.kernels.native.loader import native
from microscale.tensor import BlockTensor, quantize
from native.test_products import check, decoded

FORMATS = (
    *(name for name in sorted(NAMED) if isinstance(products.numbers(name), products.Numbers)),
    *("fp4_e2m1-64", "int4-128-bf16", "fp8_e4m3-7", "fp8_e4m3fnuz-32", "fp8_e4m3-16-ue5m3"),
    *("fp6_e3m2-48", "int8-7-fp32", "fp8_e5m2-3000"),
)
ROWS = (0, 1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 47, 48, 49, 65, 130)
LENGTHS = (0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 100, 127, 129, 160, 250, 513)
BATCHES = (0, 1, 1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 40)
AWKWARD = (float("nan"), float("inf"), -float("inf"), 2.0**-140, -(2.0**-120), 2.0**118, 3e38)


def _sample(shape: tuple[int, int], random_case: random.Random) -> Tensor:
    """Values of many sizes in memory of just their size, sometimes with awkward ones."""
    generator = torch.Generator().manual_seed(random_case.randrange(10**6))
    x = (
        torch.randn(shape, generator=generator)
        * torch.randn(shape[0], 1, generator=generator).exp()
    )
    if random_case.random() < 0.2 and x.numel():
        for _ in range(3):
            x.view(-1)[random_case.randrange(x.numel())] = random_case.choice(AWKWARD)
    return x


def _packed(shape: tuple[int, int], random_case: random.Random) -> BlockTensor:
    """A packed matrix, sometimes with any codes and any scales, sometimes of every other row."""
    rows, length = shape
    apart = random_case.choice([1, 1, 2, 3])
    found = quantize(_sample((rows * apart, length), random_case), random_case.choice(FORMATS))
    generator = torch.Generator().manual_seed(random_case.randrange(10**6))
    if random_case.random() < 0.3:
        codes = torch.randint(256, found.codes.shape, generator=generator)
        found.codes.copy_(codes)
    if random_case.random() < 0.3 and found.scales.dtype is torch.uint8:
        found.scales.copy_(torch.randint(256, found.scales.shape, generator=generator))
    every = found[::apart]
    assert isinstance(every, BlockTensor)
    return every


def _apart(x: Tensor, random_case: random.Random) -> Tensor:
    """The same values, as rows that follow each other, lie apart or are one."""
    way = random_case.choice(["contiguous", "wide", "columns", "misaligned"])
    if way == "wide":
        return torch.cat([x, x[:, :3]], 1)[:, : x.shape[1]]
    if way == "columns":
        return x.T.contiguous().T
    if way == "misaligned":
        return torch.cat([x.flatten()[:1], x.flatten()])[x[:1, :1].numel() :].view(x.shape)
    return x


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def multiply(random_case: random.Random) -> None:
    """One product of a packed matrix, with values or with another. Raises where it is wrong."""
    pick = random_case.choice
    rows, length, batch = pick(ROWS), pick(LENGTHS), pick(BATCHES)
    weight = _packed((rows, length), random_case)
    w = products.Matrix(weight.stored, weight.format.name, length)
    with _threads(pick([1, 2, 3])):
        if random_case.random() < 0.3:
            left = _packed((batch, length), random_case)
            x = products.Matrix(left.stored, left.format.name, length)
            check(products.linear_packed(x, w, torch.float32), decoded(left), decoded(weight))
            return
        values = _sample((batch, length), random_case)
        values = _apart(
            values.to(pick([torch.float32, torch.bfloat16, torch.float16])), random_case
        )
        bias = pick([None, _sample((1, rows), random_case)[0]])
        check(products.linear(values, w, bias, torch.float32), values, decoded(weight), bias)


def run(first: int, cases: int) -> None:
    """So many products, drawn from the seed `first` on."""
    for seed in range(first, first + cases):
        try:
            multiply(random.Random(seed))
        except AssertionError as error:
            raise AssertionError(f"product {seed}: {error}") from error


def main(cases: int, first: int) -> None:
    """So many products with every instruction set, and with tiles modelled in C++."""
    library = native().library
    assert library is not None, native().reason
    for number in range(5):
        if library.ms_set_isa(number):
            continue
        run(first + number * 10**6, cases)
        if library.ms_model_tiles(1) == 0:
            run(first + 10**7, cases)
        library.ms_model_tiles(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
