"""Causal language models on text: loss, perplexity, and generation with a cache.

Every window is one unit. The windows are exactly as long as said (no padding), so a format's
blocks along keys depend on the window alone, not on what shares its batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.suite.hub import LanguageModel
from microscale.suite.predictions import Predictions, score
from microscale.suite.sampling import sample
from microscale.suite.setting import Setting
from microscale.suite.task import Generation, Task
from microscale.suite.windows import Window, batches, documents, windows

WINDOW = 512
BATCH = 8
GENERATED_WINDOWS = 4
PROMPT_TOKENS = GENERATED_TOKENS = 32
"""A whole block of keys to begin with, then one that fills token by token."""

VALUES_NOTE = (
    "Along keys a block of V spans 32 tokens, so its shared scale sees up to 31 later tokens of "
    "the block; figures named 'values unquantized' leave the product of probabilities and "
    "values alone."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How a text is read.

    `length` of a window; `openings`: only the first window of each document; `documents`: only
    the first so many; `limit`: how many windows are used where the setting names none.
    """

    length: int = WINDOW
    openings: bool = False
    documents: int | None = None
    limit: int | None = None


def language_task(
    language: LanguageModel, text: str, setting: Setting, reading: Reading, about: str
) -> Task:
    """The task of predicting `text`, read as `reading` says; `about` names it in the report."""
    length = min(reading.length, language.context)
    every = cut(language, text, replace(reading, length=length))
    limit = setting.limit if setting.limit is not None else reading.limit
    chosen = sample(every, limit, setting.seed)
    _check_vocabulary(language, chosen)
    tokens = sum(map(len, chosen))
    size = setting.batch_size or BATCH
    return Task(
        evaluate=partial(_predict, windows=chosen, size=size, device=setting.device),
        metric="perplexity",
        unit="window",
        units=len(chosen),
        about=f"{about}: {len(chosen)} of {len(every)} windows of up to {length} tokens, {tokens} "
        f"predicted tokens",
        causal=True,
        generation=partial(check_generation, windows=chosen, device=setting.device),
        notes=(VALUES_NOTE,),
    )


def cut(language: LanguageModel, text: str, reading: Reading) -> list[Window]:
    """The windows of a text; `reading.limit` is not applied yet.

    Raises MicroscaleError if the text has no two tokens to predict one from the other.
    """
    every: list[Window] = []
    for document in documents(text)[: reading.documents]:
        tokens = encode(language.tokenizer, document)
        # An opening is cut at `length` tokens, the first included, as the stories' READMEs count.
        kept = tokens[: reading.length] if reading.openings else tokens
        every.extend(windows(kept, reading.length))
    if not every:
        raise MicroscaleError(
            f"the text holds {len(text)} characters but no token that another one precedes; "
            f"give a longer one."
        )
    return every


def _check_vocabulary(language: LanguageModel, chosen: Sequence[Window]) -> None:
    largest = max(max(window.inputs + window.targets) for window in chosen)
    if language.vocabulary is not None and largest >= language.vocabulary:
        raise MicroscaleError(
            f"model {language.name!r}: its tokenizer gives the token {largest}, but the model "
            f"knows {language.vocabulary} tokens; give it the tokenizer that it was trained with."
        )


def encode(tokenizer: Any, document: str) -> list[int]:
    """Token ids of one document, begun with the beginning-of-sequence token if there is one."""
    ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id
    return [int(i) for i in ids] if start is None else [start, *map(int, ids)]


def check_generation(
    model: nn.Module, *, windows: Sequence[Window], device: torch.device
) -> Generation | None:
    """Feed a few windows token by token after a prompt; compare with the full pass.

    Both passes see the true tokens (teacher forcing), so a position differs only by what the
    cached pass cannot see yet: later tokens in a shared scale. None if the model keeps no cache.
    """
    if not _keeps_cache(model):
        return None
    full_length = max(map(len, windows))
    longest = [window for window in windows if len(window) == full_length][:GENERATED_WINDOWS]
    length = min(PROMPT_TOKENS + GENERATED_TOKENS, full_length)
    prompt = length // 2
    ids = torch.tensor([window.inputs[:length] for window in longest], device=device)
    targets = torch.tensor([window.targets[prompt:length] for window in longest], device=device)
    full = _forward(model, ids)[:, prompt:]
    cache = model(input_ids=ids[:, :prompt], use_cache=True).past_key_values
    steps: list[Tensor] = []
    for token in ids[:, prompt:].split(1, dim=1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(_logits(output))
    scores = score(Predictions(torch.cat(steps, dim=1), targets), full)
    assert scores.divergence is not None
    assert scores.agreement is not None
    divergence, agreement = float(scores.divergence.mean()), float(scores.agreement.mean())
    return Generation(divergence, agreement, targets.numel())


def _predict(
    model: nn.Module, *, windows: Sequence[Window], size: int, device: torch.device
) -> Iterator[Predictions]:
    for batch in batches(windows, size):
        ids = torch.tensor([window.inputs for window in batch], device=device)
        targets = torch.tensor([window.targets for window in batch], device=device)
        yield Predictions(_forward(model, ids), targets)


def _keeps_cache(model: nn.Module) -> bool:
    """Whether the model takes and gives the cache of transformers."""
    return {"past_key_values", "use_cache"} <= {*signature(model.forward).parameters}


def _forward(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of the full pass; no cache is filled for nothing."""
    options = {"use_cache": False} if _keeps_cache(model) else {}
    return _logits(model(input_ids=ids, **options))


def _logits(output: Any) -> Tensor:
    logits = output.logits
    assert isinstance(logits, Tensor)
    return logits
