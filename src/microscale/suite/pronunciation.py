"""English words to phonemes by the network of g2p_en.

Headline metric: phoneme error rate of what the network says by itself, against the nearest listed
pronunciation. Loss and divergence: of the phonemes of the first one listed, each predicted from
the right ones before it.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from microscale.errors import MicroscaleError
from microscale.suite.models.speller import END, START, Speller
from microscale.suite.predictions import IGNORE, Predictions
from microscale.suite.sampling import sample
from microscale.suite.setting import Setting
from microscale.suite.spelling import BATCH, Word, by_length, marks, read_pairs, sources, until
from microscale.suite.task import PHONEMES, Task
from microscale.suite.windows import read_text

WORDS = "cmudict_4000.tsv"


def pronunciation_task(folder: Path, setting: Setting, limit: int) -> Task:
    """Pronounce the words of `folder` (g2p-gru)."""
    graphemes, phonemes = (_symbols(folder / f"{n}.json") for n in ("graphemes", "phonemes"))
    pairs = read_pairs(folder / WORDS)
    chosen = sample(pairs, setting.limit or limit, setting.seed)
    try:
        words = [_encode(*pair, graphemes, phonemes) for pair in chosen]
    except KeyError as error:
        raise MicroscaleError(
            f"{str(folder / WORDS)!r} has the symbol {error.args[0]!r}, which graphemes.json and "
            f"phonemes.json lack; fetch the folder again."
        ) from error
    return Task(
        evaluate=partial(_pronounce, words=words, setting=setting),
        metric=PHONEMES,
        unit="word",
        units=len(words),
        about=f"CMU Pronouncing Dictionary: {len(words)} of {len(pairs)} words",
    )


def _encode(word: str, said: str, graphemes: dict[str, int], phonemes: dict[str, int]) -> Word:
    letters = *(graphemes[letter] for letter in word), graphemes["</s>"]
    spoken = [tuple(phonemes[p] for p in one.split()) for one in said.split(" | ")]
    return Word(letters, tuple(spoken))


def _symbols(path: Path) -> dict[str, int]:
    try:
        return {str(symbol): number for number, symbol in enumerate(json.loads(read_text(path)))}
    except (ValueError, TypeError) as error:
        raise MicroscaleError(
            f"{str(path)!r} is no list of symbols ({error}); fetch the folder again."
        ) from error


def _pronounce(model: nn.Module, *, words: list[Word], setting: Setting) -> Iterator[Predictions]:
    assert isinstance(model, Speller)
    for group in by_length(words, setting.batch_size or BATCH):
        letters = sources(group, setting.device)
        said = [until(ids, END) for ids in model.pronounce(letters).tolist()]
        right = [torch.tensor([*word.targets[0], END]) for word in group]
        # A recurrent network does not see what comes later, so padding at the end is harmless.
        targets = nn.utils.rnn.pad_sequence(right, batch_first=True, padding_value=IGNORE)
        targets = targets.to(setting.device)
        before = F.pad(targets[:, :-1].clamp(min=0), (1, 0), value=START)
        yield Predictions(model(letters, before), targets, marks(group, said))
