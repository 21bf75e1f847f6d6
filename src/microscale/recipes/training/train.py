"""Train a small GPT from scratch, with any policy, and go on after any interruption."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from microscale.convert import convert
from microscale.errors import MicroscaleError
from microscale.files import write_file
from microscale.recipes.training.config import MAY_CHANGE, TrainConfig
from microscale.recipes.training.gpt import GPT, SIZES, loss
from microscale.recipes.training.journal import Journal
from microscale.recipes.training.monitor import Look, Monitor
from microscale.recipes.training.nonfinite import blame_forward, blame_gradient
from microscale.recipes.training.state import Checkpoint, newest, restore, save
from microscale.recipes.training.tokens import Data, Tokenizer, prepare
from microscale.recipes.training.trained import Trained
from microscale.recipes.training.world import World, joined
from microscale.weights import forget_all

CHECKPOINTS, WEIGHTS, SETTINGS = "checkpoints", "model.safetensors", "run.json"
DATA, SAMPLES = "data", "samples.txt"

Report = Callable[[str, int, int | None], None]


def train(
    config: TrainConfig, report: Report | None = None, say: Callable[[str], None] | None = None
) -> Trained:
    """Train as `config` says, or go on from the newest checkpoint in its folder.

    Args:
        config: see `TrainConfig`.
        report: called with what runs, steps done, and of how many.
        say: called with lines for the reader, by the first process alone.

    Returns:
        Losses, figures and where the weights are.

    Raises:
        MicroscaleError: settings, data or a checkpoint that do not fit, before anything is
            overwritten; a loss that is no longer finite, with where it began.
    """
    with joined(config.device) as world:
        quiet = not world.first
        run = _Run(
            config.resolved(),
            world,
            (lambda *_: None) if quiet or report is None else report,
            (lambda _: None) if quiet or say is None else say,
        )
        return run.train()


class _Run:
    """One process of one run."""

    def __init__(
        self, config: TrainConfig, world: World, report: Report, say: Callable[[str], None]
    ) -> None:
        self.config, self.world, self.report, self.say = config, world, report, say
        self.parts = world.share(config.batch, config.accumulate)
        checkpoints = config.out / CHECKPOINTS
        found = newest(checkpoints)
        self.checkpoints, self.last = checkpoints, found
        self.report("reading text", 0, None)
        with world.in_turn():
            self.data: Data = prepare(config.out / DATA, config.source(), config.context)
        if found is not None:
            _check_settings(found, config, self.data)
        self.model = self._new_model()
        self.optimizer = _new_optimizer(self.model, config)
        self.step = 0
        torch.manual_seed(config.seed + 7919 * (world.rank + 1))
        if found is not None:
            restore(found, self.model, self.optimizer, world)
            self.step = found.step
            self._say_resumed(found)
        self.monitor: Monitor | None = None
        if config.monitor_every:
            self.monitor = Monitor(config.out, self.model, world)
            self.monitor.resume(self.step)
        self.called: nn.Module = self.model
        if config.compile:
            self.called = cast("nn.Module", torch.compile(self.model))

    def _new_model(self) -> GPT:
        config = self.config
        torch.manual_seed(config.seed)
        model = GPT(
            config.shape,
            self.data.tokenizer.size,
            config.context,
            checkpointing=config.checkpointing,
        ).to(self.world.device)
        policy = config.read_policy()
        convert(model, policy, verbose=False)
        self.say(f"policy: {policy}")
        self.world.shard(model)
        return model

    def _say_resumed(self, found: Checkpoint) -> None:
        self.say(f"going on from {str(found.path)!r}")
        if found.world_size != self.world.size:
            self.say(
                f"it was written by {found.world_size} processes and goes on with "
                f"{self.world.size}: not bit for bit as it would have"
            )

    def train(self) -> Trained:
        """Do all steps that are left, then write the weights."""
        config, begin, first = self.config, time.perf_counter(), self.step
        journal = self._open_journal()
        try:
            while self.step < self.config.steps_to_do:
                looked = self._look()
                row = self._one_step()
                if self._is_due(config.evaluate_every):
                    row["validation"] = self.evaluate()
                if journal is not None:
                    journal.write(row, looked.scalars() if looked else None)
                if self._is_due(config.sample_every):
                    self._sample()
                if self._is_due(config.save_every):
                    self._save()
                self.report(_label(row), self.step, config.steps_to_do)
            self._sample()
        finally:
            if journal is not None:
                journal.close()
        seconds = time.perf_counter() - begin
        self._export()
        rows = [] if journal is None else journal.rows
        tokens = (self.step - first) * config.batch * config.context
        count = config.shape.parameters(self.data.tokenizer.size, config.context)
        seen = [] if self.monitor is None else self.monitor.rows
        return Trained(config, rows, first, seconds, tokens, count, seen)

    def _open_journal(self) -> Journal | None:
        if not self.world.first:
            return None
        write_file(self.config.out / SETTINGS, json.dumps(self.config.to_dict(), indent=2) + "\n")
        return Journal(self.config.out, self.step, tensorboard=self.config.tensorboard)

    def _is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps is to be done, or at the end."""
        last = self.step == self.config.steps_to_do
        return bool(every) and (self.step % every == 0 or last)

    def _look(self) -> Look | None:
        """Look at what the casts lose before a step is done, if it is one that is looked at."""
        if self.monitor is None or self.step % self.config.monitor_every:
            return None
        self.model.train()
        look = self.monitor.look(self.step + 1, self._first_part)
        if warning := self.monitor.warn(look):
            self.say(warning)
        return look

    def _first_part(self) -> None:
        with self._wide():
            value = loss(self.model, self._windows(self.parts[0]))
        value.backward()

    # ------------------------------------------------------------ steps

    def _one_step(self) -> dict[str, Any]:
        config = self.config
        rate = _rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        before = torch.get_rng_state()
        self.model.train()
        total = torch.zeros((), device=self.world.device)
        for rows in self.parts:
            windows = self._windows(rows)
            with self._wide():
                value = loss(self.called, windows) / config.accumulate
            value.backward()
            total += value.detach()
        mean = self.world.mean(total).item()
        if not math.isfinite(mean):
            torch.set_rng_state(before)
            self._stop(mean, blame_forward(self.model, self._losses))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not math.isfinite(norm.item()):
            self._stop(mean, blame_gradient(self.model))
        if self.monitor and (warning := self.monitor.warn_of_norm(self.step + 1, norm.item())):
            self.say(warning)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return {
            "step": self.step,
            "loss": mean,
            "gradient_norm": norm.item(),
            "learning_rate": rate,
        }

    def _windows(self, rows: slice) -> Tensor:
        config = self.config
        shape = config.batch, config.context
        return self.data.batch(self.step, rows, shape, config.seed).to(self.world.device)

    def _losses(self) -> None:
        """Run the forward passes of a step again."""
        for rows in self.parts:
            with self._wide(), torch.no_grad():
                loss(self.model, self._windows(rows))

    @contextmanager
    def _wide(self) -> Iterator[None]:
        enabled = self.config.dtype == "bfloat16"
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=enabled):
            yield

    def _stop(self, value: float, blame: str) -> None:
        last = (
            f"the last good checkpoint is {str(self.last.path)!r}"
            if self.last
            else ("there is no checkpoint yet")
        )
        raise MicroscaleError(
            f"step {self.step + 1}: the loss is {value:.4g}, and {blame}. No weights were changed "
            f"by this step; {last}."
        )

    # ------------------------------------------------------------ looking on

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean loss on validation, in nats a token; the same windows and random bits each time."""
        config, world = self.config, self.world
        windows = self.data.windows(config.context, config.evaluate_windows)
        # All processes run as many forward passes, some of them in vain.
        mine = range(world.rank, -(-len(windows) // world.size) * world.size, world.size)
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        with self._aside():
            for begin in range(0, len(mine), config.batch):
                places = mine[begin : begin + config.batch]
                real = [i for i in places if i < len(windows)]
                picked = windows[[i if i < len(windows) else 0 for i in places]].to(world.device)
                with self._wide():
                    value = loss(self.model, picked[: len(real) or 1])
                total += torch.tensor([value.item() * len(real), len(real)], dtype=torch.float64)
        summed, count = world.total(total).tolist()
        return float(summed / count)

    def _sample(self) -> None:
        config = self.config
        if not config.sample_tokens:
            return
        with self._aside():
            generator = torch.Generator().manual_seed(config.seed)
            tokenizer = self.data.tokenizer
            tokens = self.model.generate([tokenizer.end], config.sample_tokens, generator)
        if self.world.first:
            with (config.out / SAMPLES).open("a", encoding="utf-8") as file:
                file.write(f"--- step {self.step}\n{tokenizer.decode(tokens)}\n")

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Run the model without leaving a trace: in the random state, or as casts that are kept.

        Weights that were rounded stochastically here would be used again in the next step, and a
        run that goes on from a checkpoint has none of them.
        """
        devices = [self.world.device] if self.world.device.type == "cuda" else []
        self.model.eval()
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.config.seed)
            forget_all()
            yield
            forget_all()
        self.model.train()

    # ------------------------------------------------------------ files

    def _save(self) -> None:
        record = {
            "step": self.step,
            "config": self.config.to_dict(),
            "data": self.data.record,
            "policy": self.config.read_policy().to_dict(),
        }
        save(self.checkpoints, self.model, self.optimizer, record, self.world)
        path = self.checkpoints / f"step-{self.step:08}"
        self.last = Checkpoint(path, record | {"world_size": self.world.size})

    def _export(self) -> None:
        """Write the weights as one file, whole."""
        from safetensors.torch import save as to_bytes
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
        )

        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=whole)
        if self.world.first:
            weights.pop("head.weight", None)  # the table of tokens
            tensors = {k: x.contiguous() for k, x in weights.items() if isinstance(x, Tensor)}
            write_file(self.config.out / WEIGHTS, to_bytes(tensors))
        self.world.wait()


def read_model(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer that a run left in its folder, not converted."""
    from safetensors.torch import load_file

    try:
        settings = json.loads((folder / SETTINGS).read_text())
        record = json.loads((folder / DATA / "data.json").read_text())
        tokenizer = Data(folder / DATA, record).tokenizer
        model = GPT(SIZES[settings["size"]], tokenizer.size, settings["context"])
        model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise MicroscaleError(f"{str(folder)!r} holds no finished run: {error}.") from error
    return model, tokenizer


def _rate(step: int, config: TrainConfig) -> float:
    """Linear to the highest rate, then a cosine down to its final share."""
    if step < config.warm_up:
        return config.learning_rate * (step + 1) / config.warm_up
    share = (step - config.warm_up) / max(1, config.steps_to_do - config.warm_up)
    low = config.final_rate
    return config.learning_rate * (
        low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    )


def _new_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices alone."""
    groups = [
        {
            "params": [p for p in model.parameters() if p.dim() > 1],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))


def _check_settings(found: Checkpoint, config: TrainConfig, data: Data) -> None:
    """Refuse to go on with what would make it another run."""
    before, now = found.record["config"], config.to_dict()
    for key in sorted((before.keys() | now.keys()) - MAY_CHANGE):
        if before.get(key) != now.get(key):
            raise MicroscaleError(
                f"config {key} = {now.get(key)!r}, but checkpoint {str(found.path)!r} was trained "
                f"with {before.get(key)!r}. Set it back, or train in another folder."
            )
    if found.record["policy"] != config.read_policy().to_dict():
        raise MicroscaleError(
            f"the policy {config.policy!r} has changed since checkpoint {str(found.path)!r} was "
            "written. Put the old one back, or train in another folder."
        )
    if found.record["data"] != data.record:
        raise MicroscaleError(
            f"checkpoint {str(found.path)!r} was trained on other tokens than those in "
            f"{str(config.out / DATA)!r}; train in another folder."
        )


def _label(row: dict[str, Any]) -> str:
    return f"loss {row['loss']:.3f}"
