"""Train the small GPT that `microscale compare` uses when it is given no model.

Makes `src/microscale/suite/embedded/stdlib-gpt/`: a byte-level BPE tokenizer of 1,024 tokens and
a GPT-2 of 0.96 M parameters (4 layers, 4 heads, width 128, context 256, float32), both trained
on the training files of Python's standard library as `stdlib_sources.py` splits it. The held-out
excerpt is read to write down its loss when a model is installed and chooses nothing. The shipped
model took 48 minutes of one thread on 2 cores of an x86 CPU that other work shared; the model
card (from `stdlib_gpt_card.md`) says what it reached.

The learning rate follows the clock (warm-up, then cosine to zero over `--minutes`), so that the
run ends annealed on a machine that others use too; the number of steps, and with it the bits of
the result, therefore differ from run to run. The shipped files are the reference. Interrupting
the run (Ctrl-C or SIGTERM) ends it early and installs the best model so far.

    python runs/train_stdlib_gpt.py

With glibc, MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000 in the environment
makes it about a fifth faster: the logits of a step are otherwise mapped and unmapped every time.
"""

import argparse
import json
import logging
import math
import platform
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from stdlib_sources import SEED, SourceFile, Splits, join, library_root, read_library, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

MODEL_FOLDER = Path(__file__).parents[1] / "src/microscale/suite/embedded/stdlib-gpt"
CARD_TEMPLATE = Path(__file__).with_name("stdlib_gpt_card.md")
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 1024
CONTEXT = 256
WINDOW = CONTEXT + 1
CHECKED_WINDOWS = 16
INSTALL_EVERY_SECONDS = 900.0

log = logging.getLogger("train_stdlib_gpt")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything chosen by hand. Batches are small because steps, not tokens, were scarce."""

    seed: int = 20260
    batch: int = 16
    peak_rate: float = 3e-3
    warm_up: float = 0.01  # share of the time
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    evaluate_every_seconds: float = 90.0


@dataclass(slots=True)
class Progress:
    """What is written beside the model."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    validation_loss: float = math.inf
    best_step: int = 0
    history: list[tuple[float, int, float]] = field(default_factory=list)


def train_tokenizer(files: tuple[SourceFile, ...]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any UTF-8 text has tokens, and decoding gives the text back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.section for file in files), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, files: tuple[SourceFile, ...]) -> Tensor:
    """The files in random order as one int64 stream, each begun by the end-of-text token."""
    order = list(files)
    random.Random(SEED).shuffle(order)
    encoded = [tokenizer.encode(END_OF_TEXT + file.section) for file in order]
    return torch.tensor([token for tokens in encoded for token in tokens], dtype=torch.int64)


def new_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """A GPT-2 with random weights, without dropout."""
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=128, n_layer=4, n_head=4,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=end, eos_token_id=end, use_cache=True,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def new_optimizer(model: GPT2LMHeadModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [value for value in model.parameters() if value.ndim > 1]
    vectors = [value for value in model.parameters() if value.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=recipe.betas, fused=True)


def rate(share: float, recipe: Recipe) -> float:
    """Learning rate after `share` (0 to 1) of the time."""
    if share < recipe.warm_up:
        return recipe.peak_rate * max(share, 1e-4) / recipe.warm_up
    position = (share - recipe.warm_up) / (1 - recipe.warm_up)
    return recipe.peak_rate * 0.5 * (1 + math.cos(math.pi * min(position, 1.0)))


def batches(stream: Tensor, recipe: Recipe) -> Iterator[Tensor]:
    """Endless batches [batch, WINDOW] of windows at random places of the stream."""
    generator = torch.Generator().manual_seed(recipe.seed)
    window = torch.arange(WINDOW)
    while True:
        starts = torch.randint(len(stream) - WINDOW + 1, (recipe.batch,), generator=generator)
        yield stream[starts[:, None] + window]


def loss(model: GPT2LMHeadModel, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood (nats per token) of tokens[:, 1:]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, stream: Tensor) -> float:
    """Mean loss in float32 over consecutive windows of WINDOW tokens; the rest is dropped."""
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    model.eval()  # type: ignore[no-untyped-call]
    losses = [loss(model, part).item() * len(part) for part in windows.split(16)]
    model.train()
    return sum(losses) / len(windows)


def facts(splits: Splits, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """What is recorded about a model: data, recipe, course of the training, software."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "split_seed": SEED,
        "files": {name: len(getattr(splits, name)) for name in Splits.__slots__},
        "train_bytes": sum(file.size for file in splits.train),
        "recipe": asdict(recipe),
        "progress": asdict(progress),
    }


def held_out_facts(model: GPT2LMHeadModel, stream: Tensor, text: str) -> dict[str, Any]:
    """The losses on the excerpt: on all of it, and on the few windows that a test can repeat."""
    value = evaluate(model, stream)
    log.info("held-out loss %.4f", value)
    return {
        "held_out_bytes": len(text.encode()),
        "held_out_tokens": len(stream),
        "held_out_loss": value,
        "held_out_loss_of_first_windows": evaluate(model, stream[: CHECKED_WINDOWS * WINDOW]),
        "checked_windows": CHECKED_WINDOWS,
    }


def model_card(model: GPT2LMHeadModel, written: dict[str, Any]) -> str:
    """The text of README.md: the template beside this script, filled with the numbers."""
    progress = written["progress"]
    nats_per_byte = (
        written["held_out_loss"] * written["held_out_tokens"] / written["held_out_bytes"]
    )
    return CARD_TEMPLATE.read_text().format(
        **written,
        parameters=model.num_parameters(),
        train_megabytes=written["train_bytes"] / 1e6,
        millions=progress["tokens"] / 1e6,
        epochs=progress["tokens"] / written["train_tokens"],
        minutes=progress["seconds"] / 60,
        speed=progress["tokens"] / progress["seconds"],
        perplexity=math.exp(written["held_out_loss"]),
        bits_per_byte=nats_per_byte / math.log(2),
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for of_this_session in ("backend", "is_local", "local_files_only"):
        config.pop(of_this_session, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def install(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, written: dict[str, Any]
) -> None:
    """Write model, tokenizer, `training.json` and README.md, then move them into MODEL_FOLDER.

    Each file is replaced in one atomic step, so that a reader never meets half a file.
    """
    staging = MODEL_FOLDER.with_name(MODEL_FOLDER.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(staging)
    save_tokenizer(tokenizer, staging)
    (staging / "training.json").write_text(json.dumps(written, indent=2) + "\n")
    (staging / "README.md").write_text(model_card(model, written))
    MODEL_FOLDER.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)
        file.replace(MODEL_FOLDER / file.name)
    staging.rmdir()
    log.info("installed %s", MODEL_FOLDER)


class Training:
    """One run: the model, its optimiser, and the weights with the lowest validation loss."""

    def __init__(self, splits: Splits, recipe: Recipe, minutes: float) -> None:
        torch.manual_seed(recipe.seed)
        self.splits, self.recipe = splits, recipe
        self.minutes = minutes
        self.tokenizer = train_tokenizer(splits.train)
        self.stream = encode(self.tokenizer, splits.train)
        self.validation = encode(self.tokenizer, splits.validation)
        self.model = new_model(self.tokenizer)
        self.optimizer = new_optimizer(self.model, recipe)
        self.progress = Progress()
        self.best = self.copy_of_weights()

    def copy_of_weights(self) -> dict[str, Tensor]:
        """The weights as they are now."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def step(self, tokens: Tensor, share: float) -> None:
        """One update. Products in bfloat16 (half as fast again on CPUs that have it)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(share, self.recipe)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(self.model, tokens)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.steps += 1
        self.progress.tokens += tokens[:, 1:].numel()

    def validate(self) -> None:
        """Measure, write down, and keep the weights if they are the best so far."""
        progress = self.progress
        value = evaluate(self.model, self.validation)
        progress.history.append((round(progress.seconds), progress.steps, round(value, 4)))
        log.info(
            "%5.0f s  step %6d  %5.1f M tokens  validation loss %.4f",
            progress.seconds, progress.steps, progress.tokens / 1e6, value,
        )  # fmt: skip
        if value < progress.validation_loss:
            progress.validation_loss, progress.best_step = value, progress.steps
            self.best = self.copy_of_weights()

    def run(self) -> None:
        """Train until the time is over; install the best model so far now and then."""
        begin = time.monotonic()
        next_validation, next_install = self.recipe.evaluate_every_seconds, INSTALL_EVERY_SECONDS
        for tokens in batches(self.stream, self.recipe):
            seconds = self.progress.seconds = time.monotonic() - begin
            share = seconds / (60 * self.minutes)
            if share >= 1:
                break
            self.step(tokens, share)
            if seconds >= next_validation:
                self.validate()
                next_validation += self.recipe.evaluate_every_seconds
            if seconds >= next_install:
                self.install()
                next_install += INSTALL_EVERY_SECONDS
        self.validate()

    def install(self) -> None:
        """Put the best weights in place."""
        model = new_model(self.tokenizer)
        model.load_state_dict(self.best)
        text = join(self.splits.held_out)
        written = facts(self.splits, self.recipe, self.progress)
        written["train_tokens"] = len(self.stream)
        written["validation_tokens"] = len(self.validation)
        written |= held_out_facts(model, torch.tensor(self.tokenizer.encode(text)), text)
        install(model, self.tokenizer, written)


def interrupt(_signal: int, _frame: object) -> None:
    """SIGTERM ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> None:
    """Read the arguments, train, install."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=48.0, help="time to train")
    parser.add_argument("--threads", type=int, default=1, help="threads of one product")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    signal.signal(signal.SIGTERM, interrupt)
    splits = split(read_library(library_root()))
    torch.set_num_threads(arguments.threads)
    training = Training(splits, Recipe(), arguments.minutes)
    log.info("%.2f M training tokens", len(training.stream) / 1e6)
    try:
        training.run()
    except KeyboardInterrupt:
        log.info("interrupted after %d steps", training.progress.steps)
    training.install()


if __name__ == "__main__":
    main()
