"""Outliers of a model's layers: the shape of their inputs and weights, which says what format fits.

An outlier is a value more than `FAR` standard deviations from the mean of its tensor (arXiv
2109.12948). Channels are those along which the product sums: the last dimension of a matrix, the
first after the batch of a convolution.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from microscale.convert import convert
from microscale.formats import FP32, BlockFormat, ElementFormat
from microscale.kernels import reference
from microscale.nn.site import Site
from microscale.ranges import Sample, least_error
from microscale.recipes.batch import Batch
from microscale.recipes.ranges import gather, watch_inputs
from microscale.suite.accuracy import ELEMENTS
from microscale.suite.measure import evaluating
from microscale.watch import Product

FAR = 6.0

EDGES = tuple(2.0 ** (i / 2) for i in range(-16, 15))
"""Where the bins of histograms end, in standard deviations; what is nearer 0 is in the first."""

WORST = 8
"""How many of the channels with the most outliers are named."""


@dataclass(frozen=True, slots=True)
class Layer:
    """The inputs or the weight of one layer of the unquantized model.

    Attributes:
        module: its name.
        operand: "input" or "weight".
        crest: the largest magnitude over the root mean square.
        kurtosis: 3 if normal.
        outliers: their share of all values.
        channels: how many there are.
        reached: how many of them have an outlier.
        worst: (channel, share of its values that are outliers), the most first.
        histogram: the share of the magnitudes below each of `EDGES` and above the one before;
            the last is what lies above all.
        bits: of accuracy by format, one scale for the tensor.
    """

    module: str
    operand: str
    crest: float
    kurtosis: float
    outliers: float
    channels: int
    reached: int
    worst: tuple[tuple[int, float], ...]
    histogram: tuple[float, ...]
    bits: dict[str, float]

    @property
    def best(self) -> str:
        """The format with the most bits of accuracy; "" where nothing is lost."""
        known = {name: bits for name, bits in self.bits.items() if not math.isnan(bits)}
        return max(known, key=known.__getitem__) if known else ""

    @property
    def favours_floats(self) -> bool:
        """Whether FP8 with 4 exponent bits holds it better than INT8: its outliers are that far."""
        return self.bits["E4"] > self.bits["INT8"]

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON; what is not a finite number is None."""
        bits = {name: None if math.isnan(b) else b for name, b in self.bits.items()}
        figures = {"crest": self.crest, "kurtosis": self.kurtosis}
        finite = {name: None if math.isnan(x) else x for name, x in figures.items()}
        names = {"module": self.module, "operand": self.operand, "best": self.best}
        worst = [{"channel": channel, "share": share} for channel, share in self.worst]
        counts = {"channels": self.channels, "reached": self.reached}
        rest = {"outliers": self.outliers, **counts, "worst": worst}
        return {**names, **finite, **rest, "histogram": list(self.histogram), "bits": bits}


@dataclass(slots=True, eq=False)
class _Channels:
    """Values and outliers of each channel, counted batch by batch."""

    mean: float
    limit: float
    values: int = 0
    beyond: Tensor | None = None

    def add(self, x: Tensor, dim: int) -> None:
        rows = x.detach().movedim(dim, -1).reshape(-1, x.shape[dim])
        far = ((rows.double() - self.mean).abs() > self.limit).sum(0)
        self.values += len(rows)
        self.beyond = far if self.beyond is None else self.beyond + far


def layers_of(model: nn.Module, calls: Sequence[Batch], seed: int) -> tuple[Layer, ...]:
    """The layers of an unquantized model, which stays as it is, on data."""
    one = copy.deepcopy(model)
    convert(one, str(whole(ELEMENTS["INT8"])), verbose=False)
    with evaluating(one, seed):
        samples = gather(one, calls)
        channels = {name: _started(sample) for name, sample in samples.items()}

        def see(site: Site, product: Product, x: Tensor) -> None:
            if site.name in channels:
                channels[site.name].add(x, _channel(product, x))

        watch_inputs(one, calls, see)
    return tuple(_layers(model, samples, channels))


def whole(element: ElementFormat) -> BlockFormat:
    """One real-valued scale for the tensor."""
    return BlockFormat(element, FP32, "tensor")


def _layers(
    model: nn.Module, samples: dict[str, Sample], channels: dict[str, _Channels]
) -> Iterator[Layer]:
    for name, sample in samples.items():
        yield _layer(name, "input", sample, channels[name])
        weight = getattr(model.get_submodule(name), "weight", None)
        if isinstance(weight, nn.Parameter):
            every = Sample()
            every.add(weight)
            counted = _started(every)
            counted.add(weight, -1 if weight.dim() < 3 else 1)
            yield _layer(name, "weight", every, counted)


def _channel(product: Product, x: Tensor) -> int:
    """The dimension of an input that its product sums over."""
    if product.kind in ("matrix", "windows"):
        return -1
    return x.dim() - product.weight.dim() + 1


def _started(sample: Sample) -> _Channels:
    mean, variance, _ = _moments(sample)
    return _Channels(mean, FAR * math.sqrt(variance))


def _moments(sample: Sample) -> tuple[float, float, float]:
    """Mean, variance and fourth moment about the mean."""
    x, weights = sample.values.double(), sample.weights
    total = float(weights.sum())
    mean = float((x * weights).sum()) / total
    apart = x - mean
    variance = float((apart.square() * weights).sum()) / total
    return mean, variance, float((apart**4 * weights).sum()) / total


def _layer(name: str, operand: str, sample: Sample, channels: _Channels) -> Layer:
    mean, variance, fourth = _moments(sample)
    square = variance + mean**2
    most = max(abs(sample.low), abs(sample.high))
    beyond = channels.beyond
    assert beyond is not None
    shares = (beyond / max(channels.values, 1)).tolist()
    order = sorted(range(len(shares)), key=lambda channel: -shares[channel])
    worst = tuple((channel, shares[channel]) for channel in order[:WORST] if shares[channel])
    return Layer(
        module=name,
        operand=operand,
        crest=most / math.sqrt(square) if square else math.nan,
        kurtosis=fourth / variance**2 if variance else math.nan,
        outliers=sum(shares) / len(shares),
        channels=len(shares),
        reached=sum(share > 0 for share in shares),
        worst=worst,
        histogram=tuple(_histogram(sample, math.sqrt(variance))),
        bits={label: _bits(sample, e, variance) for label, e in ELEMENTS.items()},
    )


def _histogram(sample: Sample, sigma: float) -> list[float]:
    if not sigma:
        return [0.0] * (len(EDGES) + 1)
    edges = torch.tensor(EDGES, dtype=torch.float64)
    places = torch.bucketize(sample.values.double().abs() / sigma, edges)
    counts = places.bincount(sample.weights, len(EDGES) + 1)
    shares: list[float] = (counts / sample.count).tolist()
    return shares


def _bits(sample: Sample, element: ElementFormat, variance: float) -> float:
    """Bits of accuracy, log2(sigma / RMSE), of the best range per tensor."""
    rows, fmt = sample.values.unsqueeze(0), whole(element)
    scales = least_error(rows, fmt, sample.weights)
    quotient = reference.round_to_grid(rows / scales.block, element)
    errors = (rows.double() - (quotient * scales.block).double()).square()
    error = float((errors * sample.weights).sum() / sample.weights.sum())
    return math.log2(math.sqrt(variance / error)) if error and variance else math.nan
