"""Encoders from Hugging Face on labelled sentences, or on pairs of sentences with a score.

What is measured follows from the model and the file:

- sentences, encoder: nearest centroid, as in `microscale.suite.sentences`; without a field `split`
  half of each class (rounded up), drawn by the seed, makes the centroids;
- sentences, model with a classification head (`...ForSequenceClassification`): that head's accuracy
  on the test split, or on all sentences if the file has no splits;
- pairs, encoder: Spearman's correlation of cosine similarities with the scores;
- pairs, model with a head of one output: the correlation of what it gives for both at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microscale.checkpoint.folder import read_json
from microscale.errors import MicroscaleError, near_names
from microscale.suite.entry import Subject
from microscale.suite.hub import (
    CLASSIFIER,
    ENCODER,
    context_of,
    load_config,
    load_pretrained,
)
from microscale.suite.labelled import Examples, Pair, Pairs, Sentence, Sentences
from microscale.suite.predictions import Predictions
from microscale.suite.sampling import sample
from microscale.suite.sentences import BATCH, Encoder, batches, sentence_task
from microscale.suite.setting import Setting
from microscale.suite.spearman import CORRELATION, influences
from microscale.suite.task import Task

LONGEST = 512
"""Tokens of a sentence, unless the model says fewer."""

CORRELATION_NOTE = (
    "Standard errors of the correlation and of its differences are those of the infinitesimal "
    "jackknife: every pair's influence on the rank correlation, paired between formats."
)


def check_table(source: str, table: Examples | Pairs, setting: Setting) -> None:
    """Refuse a file that the model at `source` has no use for, by its configuration alone.

    Raises MicroscaleError, also for a directory whose pooling is not known.
    """
    config = load_config(source, ENCODER)
    has_head = _has_head(config)
    if isinstance(table, Pairs):
        if has_head and config.num_labels != 1:
            raise MicroscaleError(
                f"model {source!r} has a head of {config.num_labels} classes, which gives pairs no "
                f"score; give an encoder, or a head of one output."
            )
    elif has_head:
        _numbers(source, config, table)
    else:
        Sentences.of(table.rows, setting.seed)
    if not has_head:
        _pooling(source)


def encoder_subject(source: str, table: Examples | Pairs, setting: Setting, about: str) -> Subject:
    """Load the model at `source`, a directory or a name of the hub, with its task on `table`.

    Raises MicroscaleError as `check_table` does, or if the model does not load.
    """
    kind = CLASSIFIER if _has_head(load_config(source, ENCODER)) else ENCODER
    model, tokenizer = load_pretrained(source, kind, dtype=setting.dtype, device=setting.device)
    if tokenizer.pad_token is None:
        raise MicroscaleError(
            f"model {source!r}: its tokenizer has no padding token, so sentences cannot share a "
            f"batch; it is no encoder. A causal language model takes a text that ends in .txt."
        )
    pooling = "mean" if kind is CLASSIFIER else _pooling(source)
    length = min(tokenizer.model_max_length, context_of(model.config), LONGEST)
    encoder = Encoder(model.eval(), tokenizer, setting.device, length, pooling)
    if isinstance(table, Pairs):
        task = _pair_task(encoder, table.rows, setting, about)
    elif kind is CLASSIFIER:
        task = _head_task(encoder, _numbers(source, model.config, table), setting, about)
    else:
        data = Sentences.of(table.rows, setting.seed)
        task = sentence_task(encoder, data, setting, about=about)
    return Subject(Path(source).name, model, task)


def _has_head(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _pooling(source: str) -> str:
    """How a directory of sentence-transformers pools hidden states; their mean by default."""
    path = Path(source) / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    content = read_json(path)
    modes = {name for name in content if name.startswith("pooling_mode_") and content[name] is True}
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or not modes <= known.keys():
        raise MicroscaleError(
            f"{str(path)!r} asks for {' and '.join(sorted(modes)) or 'no pooling'}; only "
            f"{' or '.join(known)} is supported."
        )
    return known[modes.pop()]


def _numbers(source: str, config: Any, table: Examples) -> list[Sentence]:
    """The sentences that are measured, with the numbers that the head has for their labels."""
    known: Mapping[str, int] = config.label2id
    if config.num_labels < 2:
        raise MicroscaleError(
            f"model {source!r} has a head of one output, which tells no classes apart; give it "
            f"pairs with scores, or sentences to an encoder."
        )
    numbers = {**{str(number): number for number in known.values()}, **known}
    for example in table.rows:
        if example.label not in numbers:
            raise MicroscaleError(
                f"label {example.label!r} is no class of the head of model {source!r}."
                f"{near_names(example.label, known)}"
            )
    tested = [example for example in table.rows if example.split != "train"]
    if not tested:
        raise MicroscaleError("the split 'test' is empty; nothing is left to measure on.")
    return [Sentence(example.text, numbers[example.label]) for example in tested]


def _head_task(
    encoder: Encoder, sentences: Sequence[Sentence], setting: Setting, about: str
) -> Task:
    chosen = sample(sentences, setting.limit, setting.seed)
    config: Any = encoder.model.config
    return Task(
        evaluate=partial(
            _classify, encoder=encoder, items=chosen, size=setting.batch_size or BATCH
        ),
        metric="accuracy",
        unit="sentence",
        units=len(chosen),
        about=f"{about}: {len(chosen)} of {len(sentences)} sentences, {config.num_labels} classes "
        f"of the model's own head",
    )


def _classify(
    model: nn.Module, *, encoder: Encoder, items: Sequence[Sentence], size: int
) -> Iterator[Predictions]:
    for group in batches(items, size):
        targets = torch.tensor([item.label for item in group], device=encoder.device)
        yield Predictions(model(**encoder.tokens([item.text for item in group])).logits, targets)


def _pair_task(encoder: Encoder, pairs: Sequence[Pair], setting: Setting, about: str) -> Task:
    chosen = sample(pairs, setting.limit, setting.seed)
    joint = _has_head(encoder.model.config)
    how = "scored by the model's own head" if joint else "by cosine similarity"
    return Task(
        evaluate=partial(
            _correlate,
            encoder=encoder,
            pairs=chosen,
            size=setting.batch_size or BATCH,
            alike=_scored if joint else _similar,
        ),
        metric=CORRELATION,
        unit="pair",
        units=len(chosen),
        about=f"{about}: {len(chosen)} of {len(pairs)} pairs, {how}",
        notes=(CORRELATION_NOTE,),
    )


Alike = Callable[[nn.Module, Encoder, Sequence[Pair]], Tensor]
"""How alike the two sentences of each pair are, [pairs]."""


def _correlate(
    model: nn.Module, *, encoder: Encoder, pairs: Sequence[Pair], size: int, alike: Alike
) -> dict[str, Tensor]:
    # Pairs of similar length together, so that little is padded.
    ordered = sorted(pairs, key=lambda pair: len(pair.first) + len(pair.second), reverse=True)
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    found = torch.cat([alike(model, encoder, group).double().cpu() for group in groups])
    scores = torch.tensor([pair.score for pair in ordered], dtype=torch.float64)
    return {CORRELATION: influences(found, scores)}


def _similar(model: nn.Module, encoder: Encoder, pairs: Sequence[Pair]) -> Tensor:
    first = encoder.embed(model, [pair.first for pair in pairs])
    second = encoder.embed(model, [pair.second for pair in pairs])
    return (first * second).sum(-1)


def _scored(model: nn.Module, encoder: Encoder, pairs: Sequence[Pair]) -> Tensor:
    tokens = encoder.tokens([pair.first for pair in pairs], [pair.second for pair in pairs])
    scores: Tensor = model(**tokens).logits.squeeze(-1)
    return scores
