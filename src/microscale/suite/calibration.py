"""Models and calibration data as a command line names them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.recipes.batch import Batch, run
from microscale.suite.hub import LanguageModel, check_directory, load_language_model
from microscale.suite.language import Reading, cut
from microscale.suite.predictions import Predictions
from microscale.suite.registry import ENTRIES, check_name
from microscale.suite.sampling import sample
from microscale.suite.setting import Setting
from microscale.suite.task import Task
from microscale.suite.windows import batches, read_text

SAMPLES = 128
BATCH = 16
WINDOW = 512
ARRAYS = (".npy", ".npz", ".safetensors")


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """A model, its data, and the folder with what else belongs to it (None: nothing)."""

    model: nn.Module
    batches: list[Batch]
    about: str
    folder: Path | None


def read_calibration(source: str, data: Path, setting: Setting) -> Calibrated:
    """Load the model called `source` and what it is to be calibrated with.

    A causal language model (a directory, or a name of the suite or of the hub) reads UTF-8 text.
    Every other model of the suite takes arrays: a .npy of its one input, or an .npz or
    .safetensors of its inputs by name, samples first. `setting.limit` samples (windows of text)
    are drawn by its seed. Raises MicroscaleError naming what is missing.
    """
    check_name(source)
    is_array = data.suffix.lower() in ARRAYS
    entry = ENTRIES.get(source)
    if not data.is_file():
        raise MicroscaleError(f"--data {str(data)!r} does not exist (or is no file).")
    if entry is not None and not entry.takes_text:
        if not is_array:
            raise MicroscaleError(
                f"model {source!r} ({entry.about}) reads no text; --data is to end in "
                f"{', '.join(ARRAYS)}, not {str(data)!r}."
            )
        arrays = read_arrays(data)
        model = entry.load(entry.folder(), setting, None).model
        return Calibrated(model, *_array_batches(arrays, data, setting), None)
    if is_array:
        raise MicroscaleError(f"--data {str(data)!r}: a language model reads UTF-8 text.")
    text = read_text(data)
    place = source
    if entry is not None:
        folder = entry.folder()
        place = str(folder / source if (folder / source).is_dir() else folder)
    elif Path(source).is_dir():
        check_directory(Path(source))
    language = load_language_model(place, dtype=setting.dtype, device=setting.device)
    found, about = _text_batches(language, text, data, setting)
    home = Path(place) if Path(place).is_dir() else None
    return Calibrated(language.model, found, about, home)


def _text_batches(
    language: LanguageModel, text: str, data: Path, setting: Setting
) -> tuple[list[Batch], str]:
    length = min(WINDOW, language.context)
    every = cut(language, text, Reading(length=length))
    limit = SAMPLES if setting.limit is None else setting.limit
    # Long windows say most, and equally long ones share a batch without padding.
    longest = sorted(every, key=len, reverse=True)
    whole = sum(len(window) == length for window in every)
    chosen = sample(longest[: max(limit, whole)], limit, setting.seed)
    found: list[Batch] = [
        {"input_ids": torch.tensor([w.inputs for w in group], device=setting.device)}
        for group in batches(chosen, setting.batch_size or BATCH)
    ]
    tokens = sum(map(len, chosen))
    return found, f"{data.name}: {len(chosen)} windows of up to {length} tokens, {tokens} tokens"


def read_arrays(data: Path) -> dict[str, Tensor]:
    """The arrays of a file by name, "" for the one of an .npy; raises MicroscaleError."""
    try:
        if data.suffix.lower() == ".safetensors":
            return dict(load_file(data))
        held = np.load(data, allow_pickle=False)
        named = {"": held} if isinstance(held, np.ndarray) else dict(held.items())
        return {name: torch.from_numpy(array) for name, array in named.items()}
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise MicroscaleError(f"--data {str(data)!r} cannot be read: {error}.") from error


def _array_batches(
    arrays: dict[str, Tensor], data: Path, setting: Setting
) -> tuple[list[Batch], str]:
    counts = {name: len(x) if x.dim() else 0 for name, x in arrays.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise MicroscaleError(
            f"--data {str(data)!r} holds arrays of {counts} samples; give at least one sample, and "
            "as many in each array."
        )
    count = next(iter(counts.values()))
    limit = SAMPLES if setting.limit is None else setting.limit
    chosen = sample(range(count), limit, setting.seed)
    size = setting.batch_size or BATCH
    groups = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    found = [_batch(arrays, group, setting) for group in groups]
    return found, f"{data.name}: {len(chosen)} of {count} samples"


def _batch(arrays: dict[str, Tensor], chosen: Sequence[int], setting: Setting) -> Batch:
    picked = {
        name: x[torch.tensor(chosen)].to(
            device=setting.device, dtype=setting.dtype if x.is_floating_point() else None
        )
        for name, x in arrays.items()
    }
    return picked.get("", picked)


def calibration_task(found: Calibrated) -> Task:
    """What compares a model's logits on its calibration data with those of the unquantized one."""

    def evaluate(model: nn.Module) -> Iterator[Predictions]:
        for batch in found.batches:
            yield Predictions(_logits(run(model, batch)))

    return Task(evaluate=evaluate, metric="agreement", unit="sample", about=found.about)


def _logits(output: Any) -> Tensor:
    """The logits among what a model returned."""
    found = getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise MicroscaleError(
            f"the model returned a {type(output).__name__}, in which no logits are found; search "
            "without --data."
        )
    return found
