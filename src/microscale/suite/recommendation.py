"""Films for users of MovieLens, without its data: agreement with the unquantized model.

The unit is a user, for whom a hundred items drawn by the seed are scored. The scores are taken as
logits: agreement is on the best item, and the divergence is of the softmax over the hundred.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from microscale.suite.models.ranking import ITEMS, USERS
from microscale.suite.predictions import Predictions
from microscale.suite.setting import Setting
from microscale.suite.task import Task

CANDIDATES = 100
BATCH = 128


def ranking_task(setting: Setting, limit: int) -> Task:
    """Rank items for seeded users."""
    count = min(setting.limit or limit, USERS)
    draw = torch.Generator().manual_seed(setting.seed)
    users = torch.randperm(USERS, generator=draw)[:count]
    items = torch.rand(count, ITEMS, generator=draw).argsort(-1)[:, :CANDIDATES]
    return Task(
        evaluate=partial(_rank, users, items, setting),
        metric="agreement",
        unit="user",
        units=count,
        about=f"best of {CANDIDATES} items for {count} of {USERS} users, both drawn by the seed",
        notes=("Without labels: agreement with the unquantized model.",),
    )


def _rank(
    users: Tensor, items: Tensor, setting: Setting, model: nn.Module
) -> Iterator[Predictions]:
    size = setting.batch_size or BATCH
    for some, shown in zip(users.split(size), items.split(size), strict=True):
        candidates = shown.to(setting.device)
        yield Predictions(
            model(some.to(setting.device).unsqueeze(1).expand_as(candidates), candidates)
        )
