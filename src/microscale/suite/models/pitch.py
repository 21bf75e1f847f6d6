"""CREPE tiny, a convolutional pitch detector (arXiv 1802.06182).

Names of modules are those of the checkpoint `crepe-tiny-pitch/model.safetensors`.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microscale.suite.models.checkpoint import fit, read_tensors
from microscale.suite.models.padding import pad_same

CHANNELS = (1, 128, 16, 16, 16, 32, 64)
FIRST_WIDTH, FIRST_STRIDE, WIDTH = 512, 4, 64
BINS, BIN_CENTS, FIRST_CENTS = 360, 20.0, 1997.3794
EPSILON = 1e-3
AROUND = 4
"""Bins on either side of the highest that the pitch is averaged over."""


class PitchNetwork(nn.Module):
    """Frames [frames, 1024] of 16 kHz to logits [frames, 360] of bins, to go through a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        for index, (before, after) in enumerate(pairwise(CHANNELS), start=1):
            width, stride = (FIRST_WIDTH, FIRST_STRIDE) if index == 1 else (WIDTH, 1)
            self.add_module(f"conv{index}", nn.Conv1d(before, after, width, stride=stride))
            self.add_module(f"bn{index}", nn.BatchNorm1d(after, eps=EPSILON))
        self.classifier = nn.Linear(4 * CHANNELS[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Score the bins; frames are brought to mean 0 and standard deviation 1."""
        deviation = frames.std(-1, correction=0, keepdim=True)
        x = ((frames - frames.mean(-1, keepdim=True)) / deviation).unsqueeze(1)
        for index in range(1, len(CHANNELS)):
            conv = self.get_submodule(f"conv{index}")
            x = F.relu(conv(pad_same(x, conv)))
            x = F.max_pool1d(self.get_submodule(f"bn{index}")(x), 2)
        logits: Tensor = self.classifier(x.transpose(1, 2).flatten(1))
        return logits


def cents(logits: Tensor) -> Tensor:
    """The pitch [frames] in cents above 10 Hz: the mean of nine bins, weighted by activation."""
    activations = logits.double().sigmoid()
    bins = torch.arange(BINS, device=logits.device)
    near = (bins - activations.argmax(-1, keepdim=True)).abs() <= AROUND
    weights = activations * near
    return (weights * bin_cents(logits.device)).sum(-1) / weights.sum(-1)


def bin_cents(device: torch.device) -> Tensor:
    """The pitch of each bin [360] in cents above 10 Hz, float64."""
    bins = torch.arange(BINS, device=device, dtype=torch.float64)
    return BIN_CENTS * bins + FIRST_CENTS


def load(folder: Path) -> PitchNetwork:
    """The model with the weights of `folder`."""
    path = folder / "model.safetensors"
    model = PitchNetwork()
    fit(model, read_tensors(path), path)
    return model.eval()
