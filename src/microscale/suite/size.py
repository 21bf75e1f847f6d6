"""The size of a model as it is: its type, bits per weight and megabytes."""

from collections import Counter
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from microscale.conversion import Conversion


@dataclass(frozen=True, slots=True)
class Size:
    """`bits_per_weight` counts weights with their scales; `megabytes` (10^6 bytes) everything."""

    bits_per_weight: float
    megabytes: float

    @classmethod
    def plain(cls, model: nn.Module) -> "Size":
        """The size without quantization: parameters and buffers, tied ones once."""
        tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
        size = sum(tensor.nbytes for tensor in tensors.values())
        return cls(8.0 * main_dtype(model).itemsize, size / 1e6)

    @classmethod
    def converted(cls, conversion: Conversion, model: nn.Module) -> "Size":
        """The size with the converted weights packed; where none are, weights stay as they were."""
        plain = 8.0 * main_dtype(model).itemsize
        return cls(conversion.bits_per_weight or plain, conversion.size_bits / 8e6)


def main_dtype(model: nn.Module) -> torch.dtype:
    """The type of most parameters; float32 where there are none."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32
