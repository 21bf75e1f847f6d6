"""Models of Hugging Face from a directory or by name, checked before loading."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError
from torch import nn

from microscale.checkpoint.folder import read_json
from microscale.errors import MicroscaleError
from microscale.suite.extras import require

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of model: its name in words, and the class of transformers that loads it."""

    name: str
    loader: str


CAUSAL = Kind("causal language model", "AutoModelForCausalLM")
ENCODER = Kind("encoder", "AutoModel")
CLASSIFIER = Kind("sequence classifier", "AutoModelForSequenceClassification")


@dataclass(frozen=True, slots=True, eq=False)
class LanguageModel:
    """A causal language model with its tokenizer.

    `context` is the longest sequence it was made for, `vocabulary` the number of its tokens, if
    its configuration says.
    """

    name: str
    model: nn.Module
    tokenizer: Any  # transformers has no common public type for what AutoTokenizer gives
    context: int
    vocabulary: int | None


def check_directory(folder: Path) -> None:
    """Refuse a model directory that lacks files, naming them."""
    if not folder.is_dir():
        raise MicroscaleError(f"model directory {str(folder)!r} does not exist.")
    missing = list(_missing(folder))
    if missing:
        raise MicroscaleError(
            f"model directory {str(folder)!r} lacks {'; and '.join(missing)}. A Hugging Face "
            f"model directory (save_pretrained of model and tokenizer) has all of these."
        )


def _missing(folder: Path) -> Iterator[str]:
    if not (folder / "config.json").is_file():
        yield "config.json"
    names = [name for name in WEIGHTS if (folder / name).is_file()]
    indices = [folder / f"{name}.index.json" for name in WEIGHTS]
    index = next((path for path in indices if path.is_file()), None)
    if not names and index is None:
        yield f"weights ({' or '.join(WEIGHTS)}, or shards with their index)"
    elif not names and index is not None:
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        yield from (
            f"{shard} (named in {index.name})" for shard in shards if not (folder / shard).is_file()
        )
    if not any((folder / name).is_file() for name in TOKENIZERS):
        yield f"a tokenizer ({' or '.join(TOKENIZERS)})"


def load_language_model(source: str, *, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """Load the causal language model at `source`, a directory or a name of the hub.

    Raises MicroscaleError if it cannot be reached, is no causal language model, or its weights do
    not fit the architecture its configuration names (the tensors are named).
    """
    model, tokenizer = load_pretrained(source, CAUSAL, dtype=dtype, device=device)
    vocabulary = getattr(model.config, "vocab_size", None)
    return LanguageModel(source, model, tokenizer, context_of(model.config), vocabulary)


def load_pretrained(
    source: str, kind: Kind, *, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any]:
    """Load the model at `source`, a directory or a name of the hub, and its tokenizer.

    Raises MicroscaleError as `load_language_model` does.
    """
    transformers = require("transformers", f"the {kind.name} {source!r}")
    local = Path(source).is_dir()
    if local:
        check_directory(Path(source))
    # What was fetched before is found without the hub; else its client asks for most of a minute.
    offline = local or not is_reachable(require("huggingface_hub", "the hub").constants.ENDPOINT)
    with quiet(transformers), _refused(source, kind, local=local):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=offline)
        model, loading = getattr(transformers, kind.loader).from_pretrained(
            source, dtype=dtype, local_files_only=offline, output_loading_info=True
        )
    _check_fit(source, kind, loading)
    return model.to(device), tokenizer


def is_reachable(address: str) -> bool:
    """Whether a server answers at a web address, or a proxy stands before it (then it may)."""
    parts = urlsplit(address)
    if parts.scheme in getproxies():
        return True
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def load_config(source: str, kind: Kind) -> Any:
    """The configuration of the model at `source`; raise MicroscaleError as for the model."""
    transformers = require("transformers", f"the {kind.name} {source!r}")
    local = Path(source).is_dir()
    with quiet(transformers), _refused(source, kind, local=local):
        return transformers.AutoConfig.from_pretrained(source, local_files_only=local)


def _check_fit(source: str, kind: Kind, loading: dict[str, Any]) -> None:
    missing = sorted(str(key) for key in loading.get("missing_keys", ()))
    wrong = sorted(str(key) for key in loading.get("mismatched_keys", ()))
    # A pooler is a layer of pretraining; encoders are saved with and without it, and none uses it.
    missing = [key for key in missing if kind is not ENCODER or not key.startswith("pooler.")]
    if missing or wrong:
        raise MicroscaleError(
            f"model {source!r}: its weights do not fit its configuration as a {kind.name}; "
            f"missing: {_some(missing)}; of another shape: {_some(wrong)}."
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "none"
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def context_of(config: Any) -> int:
    """The longest sequence that a model was made for, in tokens."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return 2048


@contextmanager
def _refused(source: str, kind: Kind, *, local: bool) -> Iterator[None]:
    """Turn what transformers raises for a bad model into one error that says how to mend it."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if local:
            raise MicroscaleError(
                f"model directory {source!r} cannot be loaded as a {kind.name}: {reason}"
            ) from error
        raise MicroscaleError(
            f"model {source!r} is neither a directory nor a model of the suite, and could not be "
            f"had from the Hugging Face hub or its cache on this machine ({reason}). Give a "
            f"directory with config.json, the weights and the tokenizer."
        ) from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and warnings of transformers: what matters of them is raised here."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
