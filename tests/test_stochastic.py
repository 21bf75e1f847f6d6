"""Stochastic rounding: its generator, its probabilities, and what its bits depend on."""

import math

import pytest
import torch

from microscale.cast import cast
from microscale.errors import MicroscaleError
from microscale.kernels.philox import philox, random_words
from microscale.tensor import quantize
from samples import same

FORMATS = ["mxfp4", "mxfp8_e4m3", "mxint8", "nvfp4", "int8-token", "int4-16-bf16", "e3m0-32"]


def key(seed: int, call: int = 0, operand: int = 0, offset: int = 0) -> torch.Tensor:
    """A key as a training step would hold it."""
    return torch.tensor([seed, call, operand, offset])


KNOWN = [  # counter, key, output: the known answers that Random123 publishes for philox4x32-10
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "keys", "expected"), KNOWN)
def test_philox_gives_the_known_answers(
    counter: list[int], keys: list[int], expected: list[int]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in keys)
    words = philox((c0, c1, c2, c3), (k0, k1))
    assert [int(word) for word in words] == expected


def python_philox(counter: list[int], keys: list[int]) -> list[int]:
    """The generator once more, in Python's integers."""
    c, k = list(counter), list(keys)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            second >> 32 ^ c[1] ^ k[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ c[3] ^ k[1],
            first & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_words_are_those_of_the_documented_counter(seed: int) -> None:
    index = [0, 1, 2, 3, 4, 1001, 2**34 + 6, 2**40 + 3]
    words = random_words(torch.tensor(index), torch.tensor([seed, 7, 2])).tolist()
    keys = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for i, word in zip(index, words, strict=True):
        block = i // 4
        assert word == python_philox([block & 0xFFFFFFFF, block >> 32, 7, 2], keys)[i % 4]


# ---------------------------------------------------------------- exact probabilities


@pytest.mark.parametrize("fraction", [0.0, 2.0**-20, 0.125, 0.3, 0.5, 0.75, 1 - 2.0**-12])
def test_a_value_moves_exactly_where_its_word_says(fraction: float) -> None:
    # One block: amax 4 makes the scale 1, so 2 + fraction lies between the neighbours 2 and 3.
    x = torch.full((64, 32), 2.0 + fraction)
    x[:, 0] = 4.0
    y = cast(x, "mxfp4", rounding="stochastic", seed=5)
    words = random_words(torch.arange(x.numel()), torch.tensor([5, 0, 0])).reshape(x.shape)
    exact = float(x[0, 1]) - 2.0
    expected = torch.where(words < math.floor(exact * 2**32), 3.0, 2.0)
    expected[:, 0] = 4.0
    same(y, expected)


@pytest.mark.parametrize("fmt", FORMATS[:-1])  # without a mantissa every maximum saturates
def test_the_mean_is_the_value(fmt: str) -> None:
    x = torch.randn(8, 64, dtype=torch.float64).clamp(-1.4, 1.4)
    x[:, 0] = 1.5  # no block saturates: 1.5 is a value of every grid under the scale it causes
    calls = 400
    total = sum(cast(x, fmt, rounding="stochastic", seed=key(1, call)) for call in range(calls))
    assert isinstance(total, torch.Tensor)
    low = cast(x, fmt, rounding="zero")
    gap = (cast(x, fmt, rounding="stochastic", seed=9) - low).abs().amax()
    gap = torch.maximum(gap, (x - low).abs().amax())
    # Hoeffding: a mean of `calls` values within a gap strays by t with probability 2 exp(-2 n t^2).
    bound = gap * math.sqrt(math.log(2 * x.numel() * 1e6) / (2 * calls))
    assert ((total / calls - x).abs() <= bound + 1e-6).all()


@pytest.mark.parametrize("fmt", ["mxfp4", "mxfp8_e4m3", "mxint8", "mxfp6_e3m2", "e3m0-32"])
def test_values_of_the_grid_stay(fmt: str) -> None:
    x = cast(torch.randn(4, 96), fmt)
    same(cast(x, fmt, rounding="stochastic", seed=1), x)


@pytest.mark.parametrize("fmt", FORMATS)
def test_results_are_neighbours_of_the_value(fmt: str) -> None:
    x = torch.randn(16, 64)
    y = cast(x, fmt, rounding="stochastic", seed=2)
    towards = cast(x, fmt, rounding="zero")
    assert (y.abs() >= towards.abs()).all()
    nearest = cast(x, fmt)
    assert ((y - x).abs() <= 2 * (nearest - x).abs().amax() + 1e-6).any()
    assert (y != nearest).any()
    # A real scale is rounded: the largest element may decode an ulp below the maximum.
    assert ((y == towards) | (y.abs() >= x.abs() * (1 - 2.0**-22))).all()


def test_no_words_in_common_between_calls_operands_and_seeds() -> None:
    index = torch.arange(4096)
    keys = [(s, c, o) for s in (0, 1) for c in (0, 1) for o in (0, 1)]
    drawn = torch.stack([random_words(index, torch.tensor(k)) for k in keys]).double() / 2**32
    centred = drawn - 0.5
    correlation = centred @ centred.T / (index.numel() / 12)
    off = correlation - torch.diag(correlation.diag())
    assert off.abs().max() < 5 / math.sqrt(index.numel())
    assert (drawn.mean(1) - 0.5).abs().max() < 5 * math.sqrt(1 / 12 / index.numel())


# ---------------------------------------------------------------- what the bits depend on


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_layout_does_not_matter(fmt: str, axis: int) -> None:
    x = torch.randn(5, 6, 70)
    expected = cast(x, fmt, axis, rounding="stochastic", seed=3)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    same(cast(strided, fmt, axis, rounding="stochastic", seed=3), expected)
    sliced = torch.randn(10, 6, 70)
    sliced[::2] = x
    same(cast(sliced[::2], fmt, axis, rounding="stochastic", seed=3), expected)
    same(quantize(x, fmt, axis, rounding="stochastic", seed=3).dequantize(), expected)


@pytest.mark.parametrize("fmt", ["mxfp4", "mxint8", "int8-token"])
def test_a_shard_passes_its_offset(fmt: str) -> None:
    x = torch.randn(8, 70)
    whole = cast(x, fmt, rounding="stochastic", seed=key(4, 2, 1))
    parts = [
        cast(x[i : i + 2], fmt, rounding="stochastic", seed=key(4, 2, 1, i * 70))
        for i in range(0, 8, 2)
    ]
    same(torch.cat(parts), whole)


def test_a_seed_repeats_and_torch_seeds_the_rest() -> None:
    x = torch.randn(8, 64)

    def draw(seed: int | torch.Tensor | None = None) -> torch.Tensor:
        return cast(x, "mxfp4", rounding="stochastic", seed=seed)

    same(draw(7), draw(7))
    same(draw(7), draw(key(7)[:3]))
    assert not torch.equal(draw(7), draw(8))
    assert not torch.equal(draw(key(7, 0)), draw(key(7, 1)))
    assert not torch.equal(draw(key(7, 0, 0)), draw(key(7, 0, 1)))
    torch.manual_seed(0)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    same(draw(), first)
    same(draw(2**64 - 1), draw(-1))


def test_threads_do_not_matter() -> None:
    x, threads = torch.randn(64, 640), torch.get_num_threads()
    expected = cast(x, "mxfp6_e2m3", rounding="stochastic", seed=1)
    try:
        torch.set_num_threads(3)
        same(cast(x, "mxfp6_e2m3", rounding="stochastic", seed=1), expected)
    finally:
        torch.set_num_threads(threads)


def test_compiled_steps_take_a_seed_tensor() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        return cast(x, "mxfp4", rounding="stochastic", seed=seed)

    x, seed = torch.randn(8, 64), key(11)
    for call in range(3):
        seed[1] = call
        same(step(x, seed), cast(x, "mxfp4", rounding="stochastic", seed=key(11, call)))


def test_compiled_calls_without_a_seed_are_independent() -> None:
    draw = torch.compile(
        lambda x: cast(x, "mxfp4", rounding="stochastic"), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(8, 64)
    assert not torch.equal(draw(x), draw(x))


def test_gradient_is_straight_through_and_operators_check() -> None:
    x = torch.randn(4, 40, requires_grad=True)
    cast(x, "mxfp4", rounding="stochastic", seed=1).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))
    options = "stochastic saturate block off off"
    seed = key(3)
    torch.library.opcheck(
        torch.ops.microscale.cast.default, (x, "mxfp4", 1, options, torch.float32, seed)
    )
    torch.library.opcheck(
        torch.ops.microscale.quantize.default, (x.detach(), "nvfp4", 0, options, seed)
    )


def test_zeros_and_values_that_are_not_finite() -> None:
    x = torch.tensor([[0.0, -0.0] * 16, [math.nan] + [1.0] * 31, [math.inf] + [1.0] * 31])
    y = cast(x, "mxfp4", rounding="stochastic", seed=1)
    same(y[0], x[0])
    assert y[1:].isnan().all()
    assert cast(torch.empty(0, 5), "mxfp4", rounding="stochastic", seed=1).shape == (0, 5)
    assert cast(torch.tensor(1.0), "mxfp4", rounding="stochastic", seed=1) == 1.0


@pytest.mark.parametrize(
    ("rounding", "seed", "message"),
    [
        ("even", 3, "seed=3 with rounding='even': only rounding='stochastic' takes a seed"),
        ("stochastic", 1.5, r"seed=1\.5 is not an integer"),
        ("stochastic", True, "seed=True is not an integer"),
        ("stochastic", 2**64, "is not an integer of 64 bits"),
        ("stochastic", torch.tensor([1, 2]), r"seed is torch\.int64 of shape \(2,\)"),
        ("stochastic", torch.tensor([1.0, 2.0, 3.0]), r"seed is torch\.float32"),
    ],
)
def test_bad_seeds_are_refused(rounding: str, seed: int, message: str) -> None:
    for verb in (cast, quantize):
        with pytest.raises(MicroscaleError, match=message):
            verb(torch.ones(4, 32), "mxfp4", rounding=rounding, seed=seed)


def test_prerounding_is_to_nearest() -> None:
    x = torch.randn((5, 70), generator=torch.Generator().manual_seed(3))
    first = cast(x, "mxfp4", rounding="stochastic", prerounding="bfloat16", seed=1)
    same(first, cast(x.bfloat16().float(), "mxfp4", rounding="stochastic", seed=1))
