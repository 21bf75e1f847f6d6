"""Pitch of synthetic tones, made on the spot.

Headline metric: share of tones whose pitch is found within 25 cents. The loss is that of the
paper's training (arXiv 1802.06182, section 2.2): the binary cross entropy of the bins against a
bell of 25 cents around the right pitch. The divergence is of the activations, brought to a sum of
one: these weights are what the pitch is read from.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microscale.suite.models.pitch import bin_cents, cents
from microscale.suite.predictions import Marks, Predictions
from microscale.suite.setting import Setting
from microscale.suite.task import PITCH, Task

RATE, SAMPLES = 16_000, 1024
LOWEST, HIGHEST = 60.0, 900.0
HARMONICS = 15
NOISE = 0.1
"""Deviation of the noise against the tone's: 20 dB less power."""

REFERENCE = 10.0
"""The frequency in Hz that cents count from."""

CLOSE = 25.0
BATCH = 50


def tone_task(setting: Setting, limit: int) -> Task:
    """Find the pitch of tones drawn by the setting's seed."""
    count = setting.limit or limit
    frames, pitches = tones(count, setting.seed)
    return Task(
        evaluate=partial(_listen, frames, pitches, setting),
        metric=PITCH,
        unit="tone",
        units=count,
        about=f"{count} synthetic harmonic tones, {LOWEST:.0f} to {HIGHEST:.0f} Hz, with noise",
    )


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames [count, 1024] and their pitches [count] in cents above 10 Hz.

    Up to 15 harmonics that fall as h^-a, a from 0.5 to 2, with random phases, and white noise.
    """
    draw = torch.Generator().manual_seed(seed)
    place, slope = torch.rand(2, count, 1, 1, generator=draw, dtype=torch.float64)
    phases = torch.rand(count, HARMONICS, 1, generator=draw, dtype=torch.float64)
    noise = torch.randn(count, SAMPLES, generator=draw, dtype=torch.float64)
    pitch = LOWEST * (HIGHEST / LOWEST) ** place
    harmonic = torch.arange(1, HARMONICS + 1, dtype=torch.float64).unsqueeze(1)
    heard = harmonic * pitch < RATE / 2
    loudness = harmonic ** -(0.5 + 1.5 * slope) * heard
    turns = harmonic * pitch * torch.arange(SAMPLES) / RATE + phases
    tone = (loudness * torch.sin(2 * math.pi * turns)).sum(1)
    frames = tone + NOISE * tone.std(-1, keepdim=True) * noise
    return frames.float(), 1200 * (pitch.flatten() / REFERENCE).log2()


def _listen(
    frames: Tensor, pitches: Tensor, setting: Setting, model: nn.Module
) -> Iterator[Predictions]:
    size = setting.batch_size or BATCH
    for frame, pitch in zip(frames.split(size), pitches.split(size), strict=True):
        logits = model(frame.to(device=setting.device, dtype=setting.dtype))
        right = pitch.to(setting.device)
        close = (cents(logits) - right).abs() <= CLOSE
        yield Predictions(F.logsigmoid(logits), None, Marks(close, loss=_loss(logits, right)))


def _loss(logits: Tensor, pitch: Tensor) -> Tensor:
    """Binary cross entropy of the bins, summed: [tones]."""
    distance = bin_cents(logits.device) - pitch.unsqueeze(1)
    bell = torch.exp(-(distance**2) / (2 * CLOSE**2))
    found = F.binary_cross_entropy_with_logits(logits.double(), bell, reduction="none")
    return found.sum(-1)
