"""Tiny models for tests of the suite: a classifier, and a language model with a tokenizer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from microscale.suite.predictions import Predictions
from microscale.suite.task import Evaluate, Task

TEXT = "the cat sat on the mat and the dog ran off with the hat of the man in the fog " * 8


class Classifier(nn.Module):
    """Two layers with random weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 5)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


def data(units: int = 60) -> tuple[Tensor, Tensor]:
    """Inputs, and as targets what the classifier says of them with some noise."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(units, 32, generator=generator)
    with torch.no_grad():
        logits = Classifier()(inputs)
    noise = torch.randn(logits.shape, generator=generator)
    return inputs, (logits + 0.5 * noise).argmax(-1)


def evaluation(batch: int = 16, units: int = 60) -> Evaluate:
    """Evaluate a classifier batch by batch."""
    inputs, targets = data(units)

    def evaluate(model: nn.Module) -> list[Predictions]:
        rows = [slice(i, i + batch) for i in range(0, units, batch)]
        return [Predictions(model(inputs[row]), targets[row]) for row in rows]

    return evaluate


def batches(task: Task, model: nn.Module) -> list[Predictions]:
    """What the task's evaluation gives for a model, batch by batch."""
    with torch.no_grad():
        evaluation = task.evaluate(model.eval())
        assert isinstance(evaluation, Iterable)
        found = list(evaluation)
    assert all(isinstance(one, Predictions) for one in found)
    return [one for one in found if isinstance(one, Predictions)]


def save_language_model(folder: Path) -> Path:
    """Save a random GPT-2 of two layers and its tokenizer of words in Hugging Face's format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = sorted(set(TEXT.split()))
    vocabulary = {word: number for number, word in enumerate(["<s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast_class: Any = PreTrainedTokenizerFast
    fast = fast_class(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def save_encoder(folder: Path, labels: int = 0) -> Path:
    """Save a random BERT of two layers and its tokenizer, with a head of so many outputs if any."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertModel,
        PreTrainedTokenizerFast,
    )

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *("boat", "fish", "wave", "sail", "bird", "cloud", "wind", "star"),
    ]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast_class: Any = PreTrainedTokenizerFast
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    fast_class(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config_class: Any = BertConfig
    config = config_class(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
        num_labels=labels or 2,
    )
    if labels == 2:
        config.label2id, config.id2label = {"sea": 0, "sky": 1}, {0: "sea", 1: "sky"}
    model = BertForSequenceClassification(config) if labels else BertModel(config)
    model.save_pretrained(folder)
    return folder
