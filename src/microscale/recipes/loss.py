"""Losses: how a batch is turned into one, and where one that is not finite began."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from microscale.errors import MicroscaleError
from microscale.recipes.batch import Batch, run
from microscale.recipes.learned import LostRangeError

Loss = Callable[[nn.Module, Any], Tensor]
"""Given the model and a batch, returns the mean loss, a scalar with a gradient."""


class DivergedError(MicroscaleError):
    """Training cannot go on: a loss, a gradient or a learned range that is no good any more."""


IGNORED = -100
"""A label that is not counted, as in `torch.nn.functional.cross_entropy`."""


def usual_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a batch that says enough by itself.

    A dictionary: what the model returns as `loss`; of a language model whose batch has
    `input_ids` and no `labels`, the next tokens are the labels, without padding. A pair (inputs,
    targets): the cross entropy for integer targets, the mean squared error for floats; inputs are a
    tensor, a tuple of arguments or a dictionary of named ones. Raises MicroscaleError for others.
    """
    if isinstance(batch, Mapping):
        return _own_loss(model, dict(batch))
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        inputs, targets = batch
        return _supervised(_logits(run(model, inputs)), targets)
    raise MicroscaleError(
        f"a batch is a {type(batch).__name__} that says no loss; give pairs (inputs, targets), "
        "dictionaries for a model that returns its loss, or loss= a function of model and batch."
    )


def _own_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    if "labels" not in batch and "input_ids" in batch:
        labels = batch["input_ids"]
        if isinstance(mask := batch.get("attention_mask"), Tensor):
            labels = labels.masked_fill(mask == 0, IGNORED)
        batch["labels"] = labels
    output = model(**batch)
    loss = getattr(output, "loss", output.get("loss") if isinstance(output, Mapping) else None)
    if not isinstance(loss, Tensor):
        raise MicroscaleError(
            f"the model returned a {type(output).__name__} without a loss; give the batch labels, "
            "or loss= a function of model and batch."
        )
    return loss


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", output)
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise MicroscaleError(
            f"the model returned a {type(output).__name__}, in which no logits are found; give "
            "loss= a function of model and batch."
        )
    return found


def _supervised(logits: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        if logits.shape != targets.shape:
            raise MicroscaleError(
                f"the model returned shape {tuple(logits.shape)} for targets of shape "
                f"{tuple(targets.shape)}."
            )
        return F.mse_loss(logits, targets)
    if logits.shape[:-1] != targets.shape:
        raise MicroscaleError(
            f"the model returned logits of shape {tuple(logits.shape)} for targets of shape "
            f"{tuple(targets.shape)}; [..., classes] and [...] go together."
        )
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORED)


def safely(loss: Loss, model: nn.Module, batch: Batch, number: int) -> Tensor:
    """The loss of a batch; what the model refuses becomes a MicroscaleError that names it."""
    try:
        found = loss(model, batch)
    except LostRangeError:
        raise
    except MicroscaleError as error:
        raise MicroscaleError(f"batch {number}: {error}") from error
    # What a model says of data of a wrong shape or type can be any of these.
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise MicroscaleError(
            f"batch {number}: model or loss failed ({type(error).__name__}: {first})."
        ) from error
    if not isinstance(found, Tensor) or found.numel() != 1:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise MicroscaleError(f"batch {number}: the loss is a {what}; it must be one number.")
    return found


@torch.no_grad()
def origin(model: nn.Module, loss: Loss, batch: Batch) -> str:
    """Where a loss that is not finite begins: a parameter, or the first output of a module."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _finite([parameter]):
            return f"parameter {name}"
    found: list[str] = []

    def look(name: str, module: nn.Module, given: Any, output: Any) -> None:
        if not found and not _finite(output) and _finite(given):
            found.append(f"the output of {name or 'the model'} ({type(module).__name__})")

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hook = module.register_forward_hook(
                lambda module, given, output, name=name: look(name, module, given, output)
            )
            hooks.callback(hook.remove)
        loss(model, batch)
    return found[0] if found else "the loss itself"


def bad_gradient(model: nn.Module) -> str:
    """The last parameter, by the order of the model, whose gradient is not finite, or ""."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    bad = [name for name, grad in named if not _finite([grad])]
    return bad[-1] if bad else ""


def _finite(tree: Any) -> bool:
    leaves: Iterable[Any] = pytree.tree_leaves(tree)
    floats = (x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())
    return all(bool(x.detach().isfinite().all()) for x in floats)
