"""The settings of a training run, as a TOML file holds them."""

import tomllib
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from microscale.errors import MicroscaleError, near_names
from microscale.policy import Policy
from microscale.recipes.training.gpt import SIZES, Size
from microscale.recipes.training.kaplan import Reckoning, reckon
from microscale.recipes.training.policies import training_policy
from microscale.recipes.training.tokens import Source

AUTO = "auto"
TOKENIZERS = ("bytes", "bpe")
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What is trained, on what, how long; see docs/training.md.

    Attributes:
        text: a UTF-8 file (.txt or .txt.gz), or a folder of them.
        out: folder of the run.
        size: one of SIZES.
        validation: likewise; by default the last `held_out` of each text.
        held_out: share of the text that is not trained on.
        tokenizer: "bytes", or "bpe" of `vocabulary` tokens, trained on the text.
        vocabulary: of BPE.
        context: tokens of a window.
        policy: the name of a training policy, a policy file, or a spelling such as "mxfp6_e3m2",
            "weight/activation" or "weight/activation/gradient"; "fp32" is not quantized.
        steps: a number, or "auto" for Kaplan's rule.
        batch: windows of one step.
        accumulate: parts of the batch that run one after the other.
        learning_rate: the highest; by default that of the size.
        warm_up: steps until then.
        final_rate: share of it at the end of the cosine.
        weight_decay: of matrices.
        beta1: of AdamW.
        beta2: of AdamW.
        clip: largest norm of the gradient.
        seed: of weights, order of data, and stochastic rounding.
        dtype: "float32", or "bfloat16" for autocast; weights are float32 in both.
        compile: whether to run torch.compile.
        checkpointing: whether blocks are computed again in the backward pass, which saves memory.
        device: where it runs.
        evaluate_every: steps between evaluations.
        evaluate_windows: windows of validation that are used.
        save_every: steps between checkpoints.
        sample_every: steps between samples; 0 for the end alone.
        sample_tokens: length of a sample.
        tensorboard: whether to write a TensorBoard log.
        ignore: patterns of modules that stay in the wider type, such as "head".
        monitor_every: steps between looks at what the casts lose; 0 for none.
    """

    text: Path
    out: Path
    size: str = "0.5M"
    validation: Path | None = None
    held_out: float = 0.05
    tokenizer: str = "bytes"
    vocabulary: int = 1024
    context: int = 256
    policy: str = "fp32"
    steps: int | str = AUTO
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 0.0
    warm_up: int = 100
    final_rate: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    checkpointing: bool = False
    device: str = "cpu"
    evaluate_every: int = 250
    evaluate_windows: int = 64
    save_every: int = 250
    sample_every: int = 0
    sample_tokens: int = 200
    tensorboard: bool = False
    monitor_every: int = 0
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that make no sense; raises MicroscaleError."""
        for name, known in (
            ("size", SIZES), ("tokenizer", TOKENIZERS), ("dtype", DTYPES)
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                raise MicroscaleError(
                    f"config {name} = {value!r} is not known.{near_names(value, known)}"
                )
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise MicroscaleError(f"config {name} = {getattr(self, name)} must be above 0.")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise MicroscaleError(f"config {name} = {getattr(self, name)} is below 0.")
        if not 0 < self.held_out < 1:
            raise MicroscaleError(f"config held_out = {self.held_out} is not between 0 and 1.")
        if self.steps != AUTO and (not isinstance(self.steps, int) or self.steps < 1):
            raise MicroscaleError(f'config steps = {self.steps!r}; write a number or "auto".')
        if self.batch % self.accumulate:
            raise MicroscaleError(
                f"config batch = {self.batch} cannot be cut into accumulate = {self.accumulate} "
                "equal parts."
            )
        self.read_policy()

    @classmethod
    def read(cls, path: Path, **given: Any) -> "TrainConfig":
        """Read a TOML file; `given` come before what it says. Raises MicroscaleError.

        Paths in the file are relative to its folder.
        """
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise MicroscaleError(f"config {str(path)!r} cannot be read: {error}.") from error
        try:
            return cls.from_dict(data, path.parent, **given)
        except MicroscaleError as error:
            raise MicroscaleError(f"config file {str(path)!r}: {error}") from error

    @classmethod
    def from_dict(cls, data: dict[str, Any], base: Path = Path(), **given: Any) -> "TrainConfig":
        """Read plain data; raises MicroscaleError for unknown keys, by their names."""
        known = {field.name: field for field in fields(cls)}
        if unknown := [key for key in data if key not in known]:
            raise MicroscaleError(
                f"config has the unknown key {unknown[0]!r}.{near_names(unknown[0], known)}"
            )
        read = {key: _value(key, value, known[key].type, base) for key, value in data.items()}
        read |= {key: value for key, value in given.items() if value is not None}
        needed = [name for name, field in known.items() if field.default is MISSING]
        if missing := [name for name in needed if name not in read]:
            raise MicroscaleError(f"config has no {missing[0]!r}, which is needed.")
        policy = str(read.get("policy", ""))
        if policy.endswith((".toml", ".json")) and "policy" not in given:
            read["policy"] = str(base / policy)
        return cls(**read)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON and TOML."""
        plain: dict[type, Any] = {tuple: list}
        plain |= dict.fromkeys((type(self.text), type(self.out)), str)
        return {k: plain.get(type(v), lambda x: x)(v) for k, v in asdict(self).items()}

    def resolved(self) -> "TrainConfig":
        """The same with the number of steps and the learning rate written out."""
        rate = self.learning_rate or self.shape.learning_rate
        return replace(self, steps=self.steps_to_do, learning_rate=rate)

    @property
    def shape(self) -> Size:
        """Layers, width and heads."""
        return SIZES[self.size]

    @property
    def steps_to_do(self) -> int:
        """The number of steps."""
        return self.reckoning().steps if self.steps == AUTO else int(self.steps)

    def reckoning(self) -> Reckoning:
        """Kaplan's rule for this model and batch."""
        return reckon(self.shape.block_parameters(), self.batch * self.context)

    def read_policy(self) -> Policy:
        """The policy; raises MicroscaleError."""
        return training_policy(self.policy, self.ignore)

    def source(self) -> Source:
        """What the tokens are made from."""
        return Source(self.text, self.validation, self.held_out, self.tokenizer, self.vocabulary)


_POSITIVE = (
    "vocabulary", "context", "batch", "accumulate", "clip", "evaluate_every", "evaluate_windows",
    "save_every",
)  # fmt: skip
_NOT_NEGATIVE = (
    "learning_rate", "warm_up", "final_rate", "weight_decay", "beta1", "beta2", "seed",
    "sample_every", "sample_tokens", "monitor_every",
)  # fmt: skip

MAY_CHANGE = frozenset(
    {"out", "steps", "device", "evaluate_every", "evaluate_windows"}
    | {"save_every", "sample_every", "sample_tokens", "tensorboard", "monitor_every"}
)
"""Settings that a run may go on with although they are others."""


def _value(key: str, value: Any, kind: Any, base: Path) -> Any:
    """Check one value's type; paths become absolute to the file's folder."""
    if kind == tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise MicroscaleError(f"config {key} = {value!r} is not a list of names.")
        return tuple(value)
    if kind in (Path, Path | None):
        if not isinstance(value, str):
            raise MicroscaleError(f"config {key} = {value!r}; write a path in quotes.")
        return base / value
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and (whole or isinstance(value, float)):
        return float(value)
    fits = {int: whole, str: isinstance(value, str), bool: isinstance(value, bool)}
    if fits.get(kind, whole or isinstance(value, str)) and kind is not float:
        return value
    name = getattr(kind, "__name__", "number")
    raise MicroscaleError(f"config {key} = {value!r} is not a {name}.")
