"""Pictures for classifiers: labelled digits, and clothes that colour classifiers never saw.

Colour classifiers come without their own data, so they are shown Fashion-MNIST, resized and
coloured: out of distribution, without labels, for agreement with the unquantized model only. They
get noise as a camera adds it: in areas of one colour all pixels would be rounded the same way, and
the errors of a whole area add up as in no photograph.
"""

import gzip
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microscale.errors import MicroscaleError
from microscale.suite.models.checkpoint import named, read_tensors
from microscale.suite.predictions import Predictions
from microscale.suite.sampling import sample
from microscale.suite.setting import Setting
from microscale.suite.task import Task

FASHION = "fashion_mnist/t10k-images-idx3-ubyte.gz"
IMAGES_MAGIC = 2051
BATCH = 50
NOISE = 0.05
"""Deviation of the noise, where white is 1."""

COLOUR_NOTE = (
    "Fashion-MNIST pictures, resized, coloured and with noise by the seed, are out of this model's "
    "distribution and carry none of its labels: agreement with the unquantized model only."
)


def fashion_task(
    data: Path, setting: Setting, limit: int, *, side: int, scale: Callable[[Tensor], Tensor]
) -> Task:
    """Classify coloured clothes of side x side pixels; `scale` maps RGB in 0..1 to the input.

    `data` is the folder of data sets that holds fashion_mnist.
    """
    grey = read_images(data / FASHION)
    chosen = sample(range(len(grey)), setting.limit or limit, setting.seed)
    draw = torch.Generator().manual_seed(setting.seed)
    colours = torch.rand(len(chosen), 2, 3, 1, 1, generator=draw)
    clothes = Clothes(grey[chosen], colours, side, setting.seed)
    return Task(
        evaluate=partial(_agree, clothes, scale, setting),
        metric="agreement",
        unit="picture",
        units=len(chosen),
        about=f"Fashion-MNIST in colour, {side} x {side}: {len(chosen)} of {len(grey)} pictures",
        notes=(COLOUR_NOTE,),
    )


def sample_digits_task(folder: Path, setting: Setting) -> Task:
    """Classify the fifty digits that came with mnist-mlp."""
    path = folder / "sample_digits.safetensors"
    images, labels = named(read_tensors(path), ("images", "labels"), path)
    chosen = sample(range(len(labels)), setting.limit, setting.seed)
    about = f"MNIST digits: {len(chosen)} of {len(labels)}, a smoke test"
    return labelled_task(images[chosen] / 255, labels[chosen].long(), setting, about)


def labelled_task(images: Tensor, labels: Tensor, setting: Setting, about: str) -> Task:
    """Classify `images` as they are."""
    return Task(
        evaluate=partial(_classify, images, labels, setting),
        metric="accuracy",
        unit="picture",
        units=len(labels),
        about=about,
    )


def read_images(path: Path) -> Tensor:
    """The pictures [pictures, height, width], uint8, of a gzipped IDX file."""
    if not path.is_file():
        raise MicroscaleError(
            f"pictures {str(path)!r} do not exist: MICROSCALE_DATA needs data/fashion_mnist too."
        )
    try:
        content = gzip.decompress(path.read_bytes())
        magic, *shape = struct.unpack_from(">4I", content)
        pixels = torch.frombuffer(bytearray(content[16:]), dtype=torch.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, RuntimeError, ValueError) as error:
        raise MicroscaleError(
            f"{str(path)!r} is no gzipped IDX file of pictures ({error}); fetch it again."
        ) from error
    if magic != IMAGES_MAGIC:
        raise MicroscaleError(
            f"{str(path)!r} begins with {magic}, not {IMAGES_MAGIC}: it holds no pictures."
        )
    return pixels


@dataclass(frozen=True, slots=True, eq=False)
class Clothes:
    """Pictures `grey` [pictures, h, w], uint8, and two `colours` each [pictures, 2, 3, 1, 1]."""

    grey: Tensor
    colours: Tensor
    side: int
    seed: int

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.grey)

    def rgb(self, rows: range) -> Tensor:
        """Some of the pictures in colour: [pictures, 3, side, side] in 0..1."""
        ink = self.grey[rows.start : rows.stop].unsqueeze(1) / 255
        ink = F.interpolate(ink, (self.side, self.side), mode="bilinear", align_corners=False)
        back, front = self.colours[rows.start : rows.stop].unbind(1)
        noise = torch.stack([self._noise(row) for row in rows])
        return (back + (front - back) * ink + noise).clamp(0, 1)

    def _noise(self, row: int) -> Tensor:
        # A seed for each picture, so that batches of another size show the same ones.
        draw = torch.Generator().manual_seed(self.seed + row)
        return NOISE * torch.randn(3, self.side, self.side, generator=draw)


def _agree(
    clothes: Clothes, scale: Callable[[Tensor], Tensor], setting: Setting, model: nn.Module
) -> Iterator[Predictions]:
    size = setting.batch_size or BATCH
    for start in range(0, len(clothes), size):
        images = scale(clothes.rgb(range(start, min(start + size, len(clothes)))))
        yield Predictions(model(images.to(device=setting.device, dtype=setting.dtype)))


def _classify(
    images: Tensor, labels: Tensor, setting: Setting, model: nn.Module
) -> Iterator[Predictions]:
    size = setting.batch_size or BATCH
    for some, right in zip(images.split(size), labels.split(size), strict=True):
        batch = some.to(device=setting.device, dtype=setting.dtype)
        yield Predictions(model(batch), right.to(setting.device))
