"""A character language model that reads streams of a novel, each from a zero state."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.suite.predictions import IGNORE, Predictions
from microscale.suite.setting import Setting
from microscale.suite.task import Task
from microscale.suite.windows import read_text

STREAM, SKIPPED, BATCH = 512, 32, 64
"""Characters of a stream; its first predictions, which are not counted; streams of a batch."""


def stream_task(folder: Path, setting: Setting, limit: int) -> Task:
    """Predict each next character of the first streams of the excerpt in `folder`."""
    vocabulary = _vocabulary(folder / "vocab.json")
    path = folder / "bronte_excerpt.txt"
    text = read_text(path)
    unknown = sorted(set(text) - vocabulary.keys())
    if unknown:
        raise MicroscaleError(
            f"{str(path)!r} has characters that vocab.json lacks: {''.join(unknown[:10])!r}."
        )
    ids = torch.tensor([vocabulary[character] for character in text])
    # Each with the first character of the next one, which it predicts last.
    streams = ids.unfold(0, STREAM + 1, STREAM)
    chosen = streams[: setting.limit or limit]
    return Task(
        evaluate=partial(_read, chosen, setting),
        metric="perplexity",
        unit="stream",
        units=len(chosen),
        about=f"Charlotte Bronte's novels: the first {len(chosen)} streams of {STREAM} characters",
        notes=(f"The first {SKIPPED} predictions of a stream are not counted.",),
    )


def _vocabulary(path: Path) -> dict[str, int]:
    try:
        return {str(c): int(number) for c, number in json.loads(read_text(path)).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise MicroscaleError(
            f"{str(path)!r} does not map characters to numbers ({error}); fetch the folder again."
        ) from error


def _read(streams: Tensor, setting: Setting, model: nn.Module) -> Iterator[Predictions]:
    for batch in streams.split(setting.batch_size or BATCH):
        characters = batch.to(setting.device)
        targets = characters[:, 1:].clone()
        targets[:, :SKIPPED] = IGNORE
        yield Predictions(model(characters[:, :-1]), targets)
