"""Three parts of each model's data that share no sample: calibration, development, evaluation.

Calibration data settle weights; options and defaults are chosen on development data alone; what is
reported is measured on evaluation data. `microscale compare` has shown a fixed choice of units
since long, on which defaults were once chosen: development units are taken from these, and
evaluation units from the others wherever there are enough.

- stories260k-llama, babyllama-tok105: openings of the first 400 stories, 100 of them (those that
  `compare` shows) for development, others for evaluation; calibrated with documents after these.
- stdlib-gpt: windows of the held-out excerpt; calibrated with source files of this interpreter's
  standard library that `stdlib_sources.py` does not hold out.
- digits-cnn, digits-vit: halves of the 500 test digits; calibrated with training digits.
- all others: units of one data set, each in one part. Images of classifiers without data of their
  own, and users of the recommender, have no labels: agreement and divergence say how far the
  quantized model is from float32.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from stdlib_sources import library_root, read_library, split
from torch import Tensor, nn
from torch.nn import functional as F

from microscale.recipes.batch import Batch
from microscale.suite.digits import Digits
from microscale.suite.entry import EMBEDDED, Subject
from microscale.suite.hub import load_language_model
from microscale.suite.language import encode
from microscale.suite.models import speller, translator
from microscale.suite.pictures import Clothes
from microscale.suite.predictions import IGNORE
from microscale.suite.registry import ENTRIES, STORIES, plan
from microscale.suite.sampling import sample
from microscale.suite.setting import Setting
from microscale.suite.spelling import UNKNOWN, by_length, sources
from microscale.suite.task import Task
from microscale.suite.windows import documents, read_text

EVALUATED_STORIES = 400
SOURCE_FILES = 300
BATCH = 16
Draw = Callable[[int], list[Batch]]
"""Calibration batches by a seed."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many units are drawn to calibrate with, and how many the other parts have.

    `shown`: how many `compare` shows; `made`: of data that are made on the spot, how many.
    """

    calibration: int
    development: int
    evaluation: int
    shown: int | None = None
    made: int | None = None


SIZES = {
    "minilm": Sizes(32, 60, 200, 320),
    "stdlib-gpt": Sizes(24, 32, 48, 96),
    "stories260k-llama": Sizes(32, 60, 120, 100),
    "babyllama-tok105": Sizes(32, 40, 80, 100),
    "kwt1-speech-commands": Sizes(32, 200, 400),
    "arm-kws": Sizes(64, 200, 600, 1200),
    "arm-kws-ds-cnn-s": Sizes(64, 400, 1000, 1200),
    "arm-kws-ds-cnn-m": Sizes(64, 200, 800, 1200),
    "arm-kws-lstm-l": Sizes(64, 200, 600, 1200),
    "arm-kws-gru-l": Sizes(64, 200, 600, 1200),
    "charrnn-bronte-lstm": Sizes(24, 24, 64, 64),
    "aren-transformer": Sizes(100, 200, 300, 400),
    "ar2en-bilstm-ctc": Sizes(100, 200, 600, 400),
    "ar2en-bilstm-ctc-1layer": Sizes(100, 200, 600, 400),
    "g2p-gru": Sizes(200, 200, 400, 600),
    "crepe-tiny-pitch": Sizes(32, 50, 150, made=400),
    "ncf-ml1m": Sizes(200, 200, 600, 1000),
    "resnet20-cifar10": Sizes(24, 50, 150, made=500),
    "mlperf-tiny-resnet8": Sizes(24, 50, 150, made=500),
    "mlperf-tiny-resnet8-large": Sizes(24, 50, 100, made=500),
    "mnist-mlp": Sizes(16, 0, 30),
    "digits-vit": Sizes(256, 250, 250),
    "digits-cnn": Sizes(256, 250, 250),
}

NOT_RUN = {
    **{
        f"resnet{depth}-cifar10": "ResNet-20 stands for this family; no labelled data"
        for depth in (32, 44, 56)
    },
    "tiny-darknet-imagenet": "pictures of 224 x 224 are too dear here; no labelled data",
}
"""Models that are left out, and why."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A model with the three parts of its data."""

    subject: Subject
    sizes: Sizes
    draw: Draw
    development: Task
    evaluation: Task


def load(name: str) -> Split:
    """The model called `name` and its data."""
    sizes = SIZES[name]
    every = 10**9 if sizes.made is None else sizes.made
    subject = plan(name, None, Setting.parse(limit=every))[0].load()
    assert subject.task.units is not None
    units = range(subject.task.units)
    shown = set(sample(units, sizes.shown, 0))
    development = sample(sorted(shown), sizes.development, 1)
    free = [unit for unit in units if unit not in (shown if sizes.shown else set(development))]
    random.Random(2).shuffle(free)
    chosen, rest = sorted(free[: sizes.evaluation]), sorted(free[sizes.evaluation :])
    assert len(chosen) == sizes.evaluation, (name, len(chosen))
    draw = _draw(name, subject, rest, sizes.calibration)
    parts = (only(subject.task, part) for part in (development, chosen))
    return Split(subject, sizes, draw, *parts)


def only(task: Task, units: Sequence[int]) -> Task:
    """The task on some of its units: whatever its evaluation holds one of for each is cut."""
    evaluate: Any = task.evaluate
    positional = (_cut(x, task.units, units) for x in evaluate.args)
    named = {name: _cut(x, task.units, units) for name, x in evaluate.keywords.items()}
    return replace(task, evaluate=partial(evaluate.func, *positional, **named), units=len(units))


def _cut(x: Any, count: int | None, units: Sequence[int]) -> Any:
    if not hasattr(x, "__len__") or len(x) != count:
        return x
    rows = torch.tensor(units, dtype=torch.long)
    if isinstance(x, Tensor):
        return x[rows]
    if isinstance(x, Clothes):
        return replace(x, grey=x.grey[rows], colours=x.colours[rows])
    return [x[unit] for unit in units]


# ---------------------------------------------------------------- calibration


def draw_for(name: str, count: int) -> Draw | None:
    """Calibration data from beside the task's own; None where its units are divided instead."""
    if name in ("stories260k-llama", "babyllama-tok105"):
        folder = ENTRIES[name].folder()
        stories = documents(read_text(folder.parent / STORIES))[EVALUATED_STORIES:]
        return _text(folder, stories, 256 if name.startswith("stories") else 192, count)
    if name == "stdlib-gpt":
        files = split(read_library(library_root())).train[:SOURCE_FILES]
        return _text(EMBEDDED / name, [file.section for file in files], 256, count)
    if name.startswith("digits"):
        images, _ = Digits.read().train
        return _seeded(range(len(images)), count, lambda group: images[group])
    return None


def _draw(name: str, subject: Subject, rest: Sequence[int], count: int) -> Draw:
    beside = draw_for(name, count)
    if beside is not None:
        return beside
    evaluate: Any = subject.task.evaluate
    held = evaluate.keywords

    def sentences(group: list[int]) -> Batch:
        tokens = held["encoder"].tokens([held["items"][i].text for i in group])
        return dict(tokens)

    special = {"minilm": sentences}
    if name in special:
        return _seeded(rest, count, special[name])
    if name in ("g2p-gru", "aren-transformer"):
        return _taught(name, held["words"], rest, count, held.get("unknown", 0))
    return _seeded(rest, count, lambda group: partial(_walk, only(subject.task, group)))


def _walk(task: Task, model: nn.Module) -> None:
    """Run the model as its evaluation does."""
    found: Any = task.evaluate(model)
    for _ in found:
        pass


def _seeded(pool: Sequence[int], count: int, batch: Callable[[list[int]], Batch]) -> Draw:
    def draw(seed: int) -> list[Batch]:
        chosen = random.Random(seed).sample(list(pool), min(count, len(pool)))
        return [batch(chosen[i : i + BATCH]) for i in range(0, len(chosen), BATCH)]

    return draw


def _text(source: Path, text: list[str], length: int, count: int) -> Draw:
    """The first `length` tokens of some of the documents that are so long."""
    setting = Setting.parse()
    language = load_language_model(str(source), dtype=setting.dtype, device=setting.device)
    encoded = [encode(language.tokenizer, document) for document in text]
    whole = [tokens[:length] for tokens in encoded if len(tokens) >= length]

    def batch(group: list[int]) -> Batch:
        return {"input_ids": torch.tensor([whole[i] for i in group])}

    return _seeded(range(len(whole)), count, batch)


def _taught(name: str, words: Sequence[Any], pool: Sequence[int], count: int, unknown: int) -> Draw:
    """Words with the right letters or phonemes before each, in groups of one length."""
    device = torch.device("cpu")

    def pairs(group: Sequence[Any]) -> tuple[Tensor, Tensor]:
        if name == "g2p-gru":
            right = [torch.tensor([*word.targets[0], speller.END]) for word in group]
            targets = nn.utils.rnn.pad_sequence(right, batch_first=True, padding_value=IGNORE)
            before = targets[:, :-1].clamp(min=0)
            return sources(group, device), F.pad(before, (1, 0), value=speller.START)
        same = torch.tensor([word.targets[0] for word in group])
        same = same.where(same != UNKNOWN, unknown)
        return sources(group, device), F.pad(same, (1, 0), value=translator.START)

    def draw(seed: int) -> list[Batch]:
        chosen = [words[i] for i in random.Random(seed).sample(list(pool), count)]
        groups = by_length(chosen, BATCH)
        if name != "g2p-gru":
            groups = (same for g in groups for same in by_length(g, BATCH, of_target=True))
        return [pairs(group) for group in groups]

    return draw
