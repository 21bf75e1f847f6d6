"""TensorFlow's padding, for models that were trained with it."""

from torch import Tensor, nn
from torch.nn import functional as F


def pad_same(x: Tensor, conv: nn.Module) -> Tensor:
    """Pad as TensorFlow's "SAME": max((ceil(n/s) - 1) s + k - n, 0), the smaller half in front.

    `x` is [N, channels, *sizes], `conv` a Conv1d or Conv2d without padding of its own.
    """
    assert isinstance(conv, (nn.Conv1d, nn.Conv2d))
    sides: list[int] = []
    # F.pad counts dimensions from the last one.
    for n, k, s in reversed(list(zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True))):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)
