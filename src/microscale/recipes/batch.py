"""Calibration data: what a model is called with, checked before anything is done."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Callable[[nn.Module], object]
"""The model's one argument, its arguments in order, its arguments by name, or a function that is
given the model and runs it."""


def read(batches: Iterable[Batch]) -> list[Batch]:
    """All batches. Raises MicroscaleError if there are none, or they hold what is not finite."""
    try:
        kept = list(batches)
    except TypeError as error:
        raise MicroscaleError(
            f"batches is a {type(batches).__name__}; give a list of what the model is called with."
        ) from error
    if isinstance(batches, Tensor):
        raise MicroscaleError(
            f"batches is one tensor {tuple(batches.shape)}; give a list of batches, as in [x]."
        )
    if not kept:
        raise MicroscaleError("batches is empty; statistics need data, a few hundred samples.")
    for number, batch in enumerate(kept):
        _check(number, batch)
    return kept


def run(model: nn.Module, batch: Batch) -> Any:
    """Call the model."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    if isinstance(batch, Tensor):
        return model(batch)
    return batch(model)


def mask_of(batch: Batch) -> Tensor | None:
    """Which positions [N, T] are data and not padding, if the batch says so.

    `attention_mask` holds 1 (True) for data, `src_key_padding_mask` and `key_padding_mask` hold
    True for padding, as transformers and PyTorch have them.
    """
    if not isinstance(batch, Mapping):
        return None
    for name, data in (
        ("attention_mask", True),
        ("src_key_padding_mask", False),
        ("key_padding_mask", False),
    ):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point():
            return mask.bool() if data else ~mask.bool()
    return None


def _check(number: int, batch: Batch) -> None:
    if isinstance(batch, Mapping):
        named = {str(key): value for key, value in batch.items()}
    elif isinstance(batch, (tuple, list)):
        named = {f"argument {i}": value for i, value in enumerate(batch)}
    elif isinstance(batch, Tensor):
        named = {"tensor": batch}
    elif callable(batch):
        return
    else:
        raise MicroscaleError(
            f"batch {number} is a {type(batch).__name__}; give a tensor, a tuple of arguments, a "
            "dictionary of named ones, or a function of the model."
        )
    for name, x in named.items():
        if not isinstance(x, Tensor):
            continue
        if not x.numel():
            raise MicroscaleError(f"batch {number}: {name} has shape {tuple(x.shape)}: no data.")
        # Masks are added to scores: minus infinity is what they are made of.
        if x.is_floating_point() and "mask" not in name and not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise MicroscaleError(
                f"batch {number}: {bad} of {x.numel()} values of {name} are NaN or infinite; "
                "leave such samples out."
            )
