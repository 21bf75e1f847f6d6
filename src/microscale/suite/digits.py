"""Handwritten digits of scikit-learn, and small models trained on them in a few seconds."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from microscale.suite.extras import require
from microscale.suite.pictures import labelled_task
from microscale.suite.sampling import sample
from microscale.suite.setting import Setting
from microscale.suite.task import Task

TESTED, EPOCHS, BATCH, RATE = 500, 20, 64, 4e-3
BRIGHTEST = 16


@dataclass(frozen=True, slots=True, eq=False)
class Digits:
    """Images [n, 1, 8, 8] in 0..1 and labels [n], those to train on and those to test with."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @classmethod
    def read(cls) -> "Digits":
        """The 1,797 digits of `sklearn.datasets.load_digits`; always the same 500 are tested."""
        bunch = require("sklearn.datasets", "the handwritten digits").load_digits()
        images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / BRIGHTEST
        labels = torch.tensor(bunch.target, dtype=torch.long)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        test, train = order[:TESTED], order[TESTED:]
        return cls((images[train], labels[train]), (images[test], labels[test]))

    def task(self, setting: Setting) -> Task:
        """Classify the test digits."""
        images, labels = self.test
        chosen = sample(range(len(labels)), setting.limit, setting.seed)
        about = f"scikit-learn's handwritten digits: {len(chosen)} of {len(labels)} held out"
        return labelled_task(images[chosen], labels[chosen], setting, about)


def train(kind: type[nn.Module], digits: Digits, seed: int) -> nn.Module:
    """A model of this kind, trained in float32 on the CPU from a seeded start."""
    images, labels = digits.train
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(seed)
        model = kind()
        steps = EPOCHS * -(-len(labels) // BATCH)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(labels)).split(BATCH):
                loss = F.cross_entropy(model(images[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()
