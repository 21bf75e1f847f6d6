"""Names from Arabic to English letters, by a transformer and by recurrent networks with CTC.

Headline metric: character error rate of the decoded words, edits over letters of the reference.
The transformer's loss and divergence are of the letters of the reference, each predicted from the
right ones before it; the recurrent networks' loss is that of CTC, their divergence of each step.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microscale.errors import MicroscaleError
from microscale.suite.models.bilstm import INPUTS
from microscale.suite.models.translator import END, START, Translator
from microscale.suite.predictions import Predictions
from microscale.suite.sampling import sample
from microscale.suite.setting import Setting
from microscale.suite.spelling import (
    BATCH,
    UNKNOWN,
    Word,
    by_length,
    marks,
    read_pairs,
    sources,
    until,
)
from microscale.suite.task import CHARACTERS, Evaluate, Task
from microscale.suite.windows import read_text

Symbol = TypeVar("Symbol", int, str)

WORDS = "ar2en-test.txt"
LONGEST = 40
"""Letters after which a transliteration is cut."""

BLANK = 0


def translation_task(folder: Path, setting: Setting, limit: int) -> Task:
    """Transliterate the test words of `folder` (aren-transformer) by its transformer."""
    letters = _vocabulary(folder / "source_vocabulary.txt")
    spelled = _vocabulary(folder / "target_vocabulary.txt")

    def encode(source: str, target: str) -> Word:
        return Word(
            tuple(letters.get(letter, len(letters)) for letter in source),
            (tuple(spelled.get(letter, UNKNOWN) for letter in target),),
        )

    pairs = read_pairs(folder / WORDS)
    words = [encode(*pair) for pair in sample(pairs, setting.limit or limit, setting.seed)]
    evaluate = partial(_translate, words=words, unknown=len(spelled), setting=setting)
    return _task(evaluate, words, len(pairs), causal=True)


def ctc_task(folder: Path, setting: Setting, limit: int) -> Task:
    """Transliterate the same words by a network of `folder` (ar2en-bilstm-ctc)."""
    codec = Codec.read(folder / "codec.json")
    pairs = read_pairs(folder.parent / "aren-transformer" / WORDS)
    words = [codec.encode(*pair) for pair in sample(pairs, setting.limit or limit, setting.seed)]
    evaluate = partial(_read_steps, words=words, codec=codec, setting=setting)
    return _task(evaluate, words, len(pairs))


@dataclass(frozen=True, slots=True)
class Codec:
    """Code points by class, and how many empty steps stand around each letter."""

    inputs: dict[int, int]
    outputs: dict[int, int]
    blanks: int

    @classmethod
    def read(cls, path: Path) -> "Codec":
        """Read codec.json."""
        try:
            content = json.loads(read_text(path))
            inputs, outputs = content["input_codepoints"], content["output_codepoints"]
            blanks = int(content["blanks_between_characters"])
        except (ValueError, KeyError, TypeError) as error:
            raise MicroscaleError(
                f"{str(path)!r} is no codec of this model ({error!r}); fetch the folder again."
            ) from error
        return cls(_numbered(inputs), _numbered(outputs), blanks)

    def encode(self, source: str, target: str) -> Word:
        """Classes of both words; unknown letters are class 0 of the input."""
        return Word(
            tuple(self.inputs.get(ord(letter), 0) for letter in source),
            (tuple(self.outputs.get(ord(letter), UNKNOWN) for letter in target),),
        )

    def steps(self, words: Tensor) -> Tensor:
        """One-hot vectors [words, steps, 48] of ids [words, letters], blanks around each letter."""
        hot = F.one_hot(words, INPUTS).float()
        spread = F.pad(hot.unsqueeze(2), (0, 0, self.blanks, 0)).flatten(1, 2)
        return F.pad(spread, (0, 0, 0, self.blanks))


def best_path(scores: Tensor) -> tuple[int, ...]:
    """The classes that a word's scores [steps, classes] spell.

    Of each stretch of steps between blanks, the class with the highest probability.
    """
    highest, classes = scores.softmax(-1).max(-1)
    spelled: list[int] = []
    best = 0.0
    before = BLANK
    for value, found in zip(highest.tolist(), classes.tolist(), strict=True):
        if found != BLANK and before == BLANK:
            spelled.append(found)
            best = value
        elif found != BLANK and value > best:
            spelled[-1], best = found, value
        before = found
    return tuple(spelled)


def _task(evaluate: Evaluate, words: list[Word], there: int, *, causal: bool = False) -> Task:
    return Task(
        evaluate=evaluate,
        metric=CHARACTERS,
        unit="word",
        units=len(words),
        about=f"names, Arabic to English letters: {len(words)} of {there} words",
        causal=causal,
    )


def _vocabulary(path: Path) -> dict[str, int]:
    return _numbered(read_text(path).splitlines())


def _numbered(symbols: Iterable[Symbol]) -> dict[Symbol, int]:
    return {symbol: number for number, symbol in enumerate(symbols)}


def _translate(
    model: nn.Module, *, words: list[Word], unknown: int, setting: Setting
) -> Iterator[Predictions]:
    assert isinstance(model, Translator)
    device = setting.device
    for group in by_length(words, setting.batch_size or BATCH):
        found = model.translate(sources(group, device), LONGEST).tolist()
        guesses = {word: until(ids, END) for word, ids in zip(group, found, strict=True)}
        # Padded steps would be seen by V's blocks of 32 steps, so nothing is padded.
        for same in by_length(group, len(group), of_target=True):
            right = torch.tensor([word.targets[0] for word in same], device=device)
            right = right.where(right != UNKNOWN, unknown)
            logits = model(sources(same, device), F.pad(right, (1, 0), value=START))
            errors = marks(same, [guesses[word] for word in same])
            yield Predictions(logits, F.pad(right, (0, 1), value=END), errors)


def _read_steps(
    model: nn.Module, *, words: list[Word], codec: Codec, setting: Setting
) -> Iterator[Predictions]:
    for group in by_length(words, setting.batch_size or BATCH):
        steps = codec.steps(sources(group, setting.device)).to(setting.dtype)
        scores = model(steps)
        errors = marks(group, [best_path(word) for word in scores], ctc_loss(scores, group))
        yield Predictions(scores, None, errors)


def ctc_loss(scores: Tensor, words: list[Word]) -> Tensor:
    """The loss of CTC [words] for each letter, of scores [words, steps, classes].

    Letters that the model has no class for are left out of the target.
    """
    targets = [[letter for letter in word.targets[0] if letter != UNKNOWN] for word in words]
    log_probabilities = scores.double().log_softmax(-1).transpose(0, 1)
    loss = F.ctc_loss(
        log_probabilities,
        torch.tensor([letter for target in targets for letter in target], device=scores.device),
        torch.full((len(words),), scores.shape[1]),
        torch.tensor([len(target) for target in targets]),
        blank=BLANK,
        reduction="none",
    )
    return loss / torch.tensor([len(word.targets[0]) for word in words], device=scores.device)
