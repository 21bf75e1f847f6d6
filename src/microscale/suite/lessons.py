"""What a model known by name is finetuned with: data to train on, to choose on, and to report on.

The three never share a sample. `Split` says what they are for models that bring their own data;
others are given theirs, of which every eighth batch is held back to choose on, and are reported on
what `compare` uses.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.recipes.batch import Batch
from microscale.suite.calibration import ARRAYS, read_arrays, read_calibration
from microscale.suite.digits import Digits
from microscale.suite.pictures import labelled_task
from microscale.suite.registry import ENTRIES, check_name, plan
from microscale.suite.setting import Setting
from microscale.suite.speech import load_clips, score_clips
from microscale.suite.task import Task
from microscale.suite.windows import read_text

BATCH = 32
HELD = 8
"""Of so many batches of given data one is held back to choose on."""

TARGETS = ("labels", "targets")
CHOSEN_DIGITS = 150
CLIPS = (0.5, 0.125)
"""Shares of the stored clips that are trained and chosen on; the rest is reported on."""


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """A model, the batches it is trained and chosen on, and the task it is reported on.

    `folder` holds what else belongs to the model (None: nothing); `about` says where batches come
    from.
    """

    model: nn.Module
    train: list[Batch]
    development: list[Batch]
    task: Task
    about: str
    folder: Path | None = None


Split = Callable[[Path, Setting], tuple[list[Batch], list[Batch], Task, str]]


def read_lesson(source: str, data: Path | None, text: Path | None, setting: Setting) -> Lesson:
    """Load the model called `source` and its data.

    Args:
        source: as for `compare`.
        data: to train on: UTF-8 text for a causal language model; for other models an .npz or
            .safetensors of inputs by name and `labels` (or `targets`); None for models that bring
            their own.
        text: what a language model is reported on, where it is not one of the suite's.
        setting: its limit is the number of samples (windows of text) of `data` that are used.

    Raises:
        MicroscaleError: names and files that are not there, data that does not fit.
    """
    check_name(source)
    entry = ENTRIES.get(source)
    if data is None:
        return _own(source, text, setting)
    if text is not None and text.exists() and data.exists() and _same(text, data):
        raise MicroscaleError(
            f"--text {str(text)!r} holds what --data {str(data)!r} does: a model is not to be "
            "reported on what it was trained with."
        )
    # The limit is that of the data to train on; what is reported on is as `compare` has it.
    reporting = replace(setting, limit=None, batch_size=None)
    if entry is not None and not entry.takes_text:
        train = _read_supervised(data, setting)
        subject = plan(source, text, reporting)[0].load()
        return Lesson(subject.model, *_held_back(train, data), subject.task, data.name)
    planned = plan(source, text, reporting)[0]
    found = read_calibration(source, data, replace(setting, limit=setting.limit or 2**31))
    if text is None and _holds(data, entry.folder() if entry else None):
        raise MicroscaleError(
            f"--data {str(data)!r} is what {source!r} is reported on; train it on another text."
        )
    task = planned.load().task
    return Lesson(found.model, *_held_back(found.batches, data), task, found.about, found.folder)


def _own(source: str, text: Path | None, setting: Setting) -> Lesson:
    entry = ENTRIES.get(source)
    split = _split(source)
    if entry is None or split is None:
        known = ", ".join(sorted(name for name in ENTRIES if _split(name)))
        raise MicroscaleError(
            f"model {source!r} brings no data to train on: add --data FILE. (Those that do: "
            f"{known}.)"
        )
    if text is not None:
        raise MicroscaleError(f"model {source!r} reads no text; leave out --text {str(text)!r}.")
    model = plan(source, None, setting)[0].load().model
    return Lesson(model, *split(entry.folder(), setting))


def _split(name: str) -> Split | None:
    if name.startswith("digits-"):
        return _digits
    return _clips if name.startswith(("arm-kws", "kwt1")) else None


def _digits(_: Path, setting: Setting) -> tuple[list[Batch], list[Batch], Task, str]:
    """Trained on what the model was trained on; chosen and reported on digits it never saw."""
    digits = Digits.read()
    images, labels = digits.test
    chosen, kept = slice(None, CHOSEN_DIGITS), slice(CHOSEN_DIGITS, None)
    about = f"scikit-learn's handwritten digits: {len(labels[kept])} that were not chosen on"
    task = labelled_task(images[kept], labels[kept], setting, about)
    return (
        _pairs(*digits.train, setting),
        _pairs(images[chosen], labels[chosen], setting),
        task,
        f"scikit-learn's handwritten digits: {len(digits.train[1])}",
    )


def _clips(folder: Path, setting: Setting) -> tuple[list[Batch], list[Batch], Task, str]:
    """The stored clips in an order drawn once: half trained on, an eighth chosen on."""
    features, labels = load_clips(folder)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    first = int(CLIPS[0] * len(labels))
    second = first + int(CLIPS[1] * len(labels))
    parts = order[:first], order[first:second], order[second:]
    train, development = (_pairs(features[part], labels[part], setting) for part in parts[:2])
    rest = parts[2].sort().values
    about = f"Speech Commands v2: {len(rest)} of {len(labels)} clips, not trained or chosen on"
    task = score_clips(features[rest], labels[rest], setting, about)
    return train, development, task, f"Speech Commands v2: {first} of {len(labels)} stored clips"


def _pairs(inputs: Tensor, targets: Tensor, setting: Setting) -> list[Batch]:
    size = setting.batch_size or BATCH
    both = zip(inputs.split(size), targets.split(size), strict=True)
    device, dtype = setting.device, setting.dtype
    return [
        (
            x.to(device=device, dtype=dtype if x.is_floating_point() else None),
            y.to(device=device, dtype=dtype if y.is_floating_point() else None),
        )
        for x, y in both
    ]


def _read_supervised(data: Path, setting: Setting) -> list[Batch]:
    if not data.is_file():
        raise MicroscaleError(f"--data {str(data)!r} does not exist (or is no file).")
    if data.suffix.lower() not in ARRAYS[1:]:
        raise MicroscaleError(
            f"--data {str(data)!r}: give an {' or '.join(ARRAYS[1:])} of inputs by name and "
            f"{' (or '.join(TARGETS)})."
        )
    arrays = read_arrays(data)
    given = [name for name in TARGETS if name in arrays]
    if len(given) != 1 or len(arrays) < 2:
        raise MicroscaleError(
            f"--data {str(data)!r} holds {', '.join(sorted(arrays)) or 'nothing'}; give inputs by "
            f"name and either {' or '.join(TARGETS)}."
        )
    counts = {name: len(x) if x.dim() else 0 for name, x in arrays.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise MicroscaleError(
            f"--data {str(data)!r} holds arrays of {counts} samples; give at least one sample, and "
            "as many in each array."
        )
    targets = arrays.pop(given[0])[: setting.limit]
    inputs = [_pairs(x[: setting.limit], targets, setting) for x in arrays.values()]
    if len(arrays) == 1:
        return inputs[0]
    names = list(arrays)
    found: list[Batch] = []
    for group in zip(*inputs, strict=True):
        pairs = [pair for pair in group if isinstance(pair, tuple)]
        found.append((dict(zip(names, (x for x, _ in pairs), strict=True)), pairs[0][1]))
    return found


def _held_back(batches: list[Batch], data: Path) -> tuple[list[Batch], list[Batch]]:
    if len(batches) < 2:
        raise MicroscaleError(
            f"--data {str(data)!r} makes {len(batches)} batch; at least two are needed, one to "
            "train on and one to choose on. Give more data, or a smaller --batch-size."
        )
    step = min(HELD, len(batches))
    held = set(range(step - 1, len(batches), step))
    train = [batch for i, batch in enumerate(batches) if i not in held]
    return train, [batches[i] for i in sorted(held)]


def _same(a: Path, b: Path) -> bool:
    return a.samefile(b) or read_text(a) == read_text(b)


def _holds(data: Path, folder: Path | None) -> bool:
    """Whether `data` is one of the texts that lie in an entry's folder or beside it."""
    if folder is None:
        return False
    texts = (*folder.glob("*.txt"), *folder.parent.glob("stories260k-llama/*.txt"))
    content = data.read_bytes()
    return any(path.read_bytes() == content for path in texts)
