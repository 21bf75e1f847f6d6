"""Random products with every instruction set; tests/native_products.py says what is drawn."""

from collections.abc import Iterator

import pytest

import native_products
from microscale.kernels.native.loader import native, usable

LIBRARY = native().library
assert LIBRARY is not None  # without it `native_products` skips this file
SETS = usable(LIBRARY)
OVERFLOWING_SCALES, INFINITE_SCALE = 10100188, 3200300
"""Seeds of faults that were found so: scales of integers whose product with a sum overflowed on the
way, and blocks of 7 of them; an infinite scale times the zeros behind a row."""


@pytest.fixture(params=SETS, autouse=True)
def instructions(request: pytest.FixtureRequest) -> Iterator[None]:
    assert LIBRARY is not None
    before = LIBRARY.ms_isa()
    assert LIBRARY.ms_set_isa(SETS.index(request.param)) == 0
    yield
    LIBRARY.ms_set_isa(before)


def test_random_products() -> None:
    native_products.run(0, 60)


@pytest.mark.parametrize("seed", [OVERFLOWING_SCALES, INFINITE_SCALE])
def test_faults_that_were_found(seed: int) -> None:
    native_products.run(seed, 1)
