"""Text as tokens in a file that is mapped into memory.

A folder holds `train.bin` and `valid.bin` (little-endian uint16, or uint32 for vocabularies that
need it), `tokenizer.json` for BPE, and `data.json`: where the tokens came from, with the digests
of every file. Each document begins with the end-of-text token.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from microscale.errors import MicroscaleError
from microscale.files import write_file

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
RECORD = "data.json"
TOKENIZER = "tokenizer.json"
TEXTS = (".txt", ".txt.gz")


class Tokenizer(Protocol):
    """Text to tokens and back."""

    size: int
    end: int

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens; bytes that are no UTF-8 become the replacement character."""


class Bytes:
    """The bytes of UTF-8, and one token for the end of a text."""

    size, end = BYTES + 1, BYTES

    def encode(self, text: str) -> list[int]:
        """The bytes of a text."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """The text of bytes."""
        return bytes(token for token in tokens if token < BYTES).decode(errors="replace")


class BytePairs:
    """A byte-level BPE of the library tokenizers: every text has tokens."""

    def __init__(self, path: Path) -> None:
        """Read what `train_byte_pairs` wrote."""
        from tokenizers import Tokenizer as Library

        self._library = Library.from_file(str(path))
        self.size = self._library.get_vocab_size()
        self.end = int(self._library.token_to_id(END_OF_TEXT) or 0)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        found: list[int] = self._library.encode(text).ids
        return found

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens."""
        return str(self._library.decode(tokens))


def train_byte_pairs(texts: Iterator[str], vocabulary: int, path: Path) -> None:
    """Train a BPE of `vocabulary` tokens and write it."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    write_file(path, library.to_str(pretty=True))


def text_files(path: Path, key: str) -> list[Path]:
    """The text files at a path, in order; raises MicroscaleError where there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MicroscaleError(f"{key} = {str(path)!r}: there is no such file or folder.")
    found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(TEXTS))
    if not found:
        raise MicroscaleError(f"{key} = {str(path)!r} has no files ending in {', '.join(TEXTS)}.")
    return found


def read_text(path: Path) -> str:
    """A text file, unpacked if it ends in .gz; raises MicroscaleError where it is no UTF-8."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise MicroscaleError(f"text {str(path)!r} cannot be read: {error}.") from error


def digest_file(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Source:
    """What tokens are made from: text files, a share of their end held out, and the tokenizer."""

    text: Path
    validation: Path | None
    held_out: float
    tokenizer: str
    vocabulary: int

    def files(self) -> tuple[list[Path], list[Path]]:
        """The files of training and of validation."""
        held = [] if self.validation is None else text_files(self.validation, "validation")
        return text_files(self.text, "text"), held

    def record(self) -> dict[str, Any]:
        """Everything that decides what the tokens are, with the digests of the files."""
        train, held = self.files()
        return {
            "train": {str(p): digest_file(p) for p in train},
            "validation": {str(p): digest_file(p) for p in held},
            "held_out": self.held_out if self.validation is None else None,
            "tokenizer": self.tokenizer,
            "vocabulary": self.vocabulary if self.tokenizer == "bpe" else None,
        }

    def texts(self, *, held_out: bool) -> Iterator[str]:
        """The texts of training or of validation, one file in memory at a time."""
        train, held = self.files()
        if self.validation is not None:
            yield from map(read_text, held if held_out else train)
            return
        for text in map(read_text, train):
            cut = len(text) - int(len(text) * self.held_out)
            yield text[cut:] if held_out else text[:cut]


class Data:
    """Tokens of training and validation, mapped into memory."""

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        """Open what `prepare` wrote."""
        self.record = record
        self.tokenizer: Tokenizer = (
            Bytes() if record["tokenizer"] == "bytes" else BytePairs(folder / TOKENIZER)
        )
        kind = _dtype(self.tokenizer.size)
        self.train, self.valid = (
            np.memmap(folder / name, dtype=kind, mode="r") for name in ("train.bin", "valid.bin")
        )

    def batch(self, step: int, rows: slice, shape: tuple[int, int], seed: int) -> Tensor:
        """Rows of the batch of a step, as int64 [rows, time + 1]; `shape` is [batch, time].

        Windows of `time` tokens that follow each other are gone through in random order, anew in
        each epoch with another first token. A batch depends on its step and the seed alone.
        """
        batch, time = shape
        windows = (len(self.train) - time - 1) // time
        found = []
        for place in range(step * batch, (step + 1) * batch)[rows]:
            epoch, index = divmod(place, windows)
            first, order = _epoch(seed, epoch, windows, time)
            begin = first + int(order[index]) * time
            found.append(self.train[begin : begin + time + 1].astype(np.int64))
        return torch.from_numpy(np.stack(found))

    def windows(self, time: int, count: int) -> Tensor:
        """The first `count` windows [count, time + 1] of validation, one after the other."""
        whole = min(count, (len(self.valid) - 1) // time)
        rows = [self.valid[i * time : i * time + time + 1].astype(np.int64) for i in range(whole)]
        return torch.from_numpy(np.stack(rows))


_kept: dict[tuple[int, int, int, int], tuple[int, NDArray[np.int64]]] = {}


def _epoch(seed: int, epoch: int, windows: int, time: int) -> tuple[int, NDArray[np.int64]]:
    key = seed, epoch, windows, time
    if key not in _kept:
        random = np.random.default_rng([seed, epoch])
        if len(_kept) > 2:  # a batch may span two epochs
            _kept.clear()
        _kept[key] = int(random.integers(time)), random.permutation(windows)
    return _kept[key]


def prepare(folder: Path, source: Source, time: int) -> Data:
    """Make the token files in `folder`, or open them if they are of the same texts.

    Raises MicroscaleError where a text or a token file has changed since, and where there are too
    few tokens for windows of `time`.
    """
    record_file = folder / RECORD
    wanted = source.record()
    if record_file.is_file():
        record = _read_record(record_file)
        _compare(record, wanted, folder)
        return Data(folder, record)
    folder.mkdir(parents=True, exist_ok=True)
    if source.tokenizer == "bpe":
        texts = source.texts(held_out=False)
        train_byte_pairs(texts, source.vocabulary, folder / TOKENIZER)
        tokenizer: Tokenizer = BytePairs(folder / TOKENIZER)
    else:
        tokenizer = Bytes()
    written = {}
    for name, held_out in (("train.bin", False), ("valid.bin", True)):
        count = _write(folder / name, tokenizer, source.texts(held_out=held_out))
        if count < 2 * time + 2:
            raise MicroscaleError(
                f"{name.removesuffix('.bin')} has {count} tokens, too few for windows of "
                f"{time}; give more text or a smaller context."
            )
        written[name] = {"tokens": count, "digest": digest_file(folder / name)}
    if source.tokenizer == "bpe":
        written[TOKENIZER] = {"tokens": tokenizer.size, "digest": digest_file(folder / TOKENIZER)}
    record = wanted | {"files": written}
    # Last, so that an interrupted preparation is done again.
    write_file(record_file, json.dumps(record, indent=2) + "\n")
    return Data(folder, record)


def _write(path: Path, tokenizer: Tokenizer, texts: Iterator[str]) -> int:
    """Write the tokens of texts, each after the end-of-text token; return how many."""
    kind, count = _dtype(tokenizer.size), 0
    with path.open("wb") as file:
        for text in texts:
            tokens = np.array([tokenizer.end, *tokenizer.encode(text)] if text else [], kind)
            tokens.tofile(file)
            count += len(tokens)
    return count


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        _ = {name: facts["digest"] for name, facts in record["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MicroscaleError(f"{str(path)!r} is damaged ({error}); delete its folder.") from error
    return record


def _compare(record: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    for part in ("train", "validation"):
        for path, digest in wanted[part].items():
            if record[part].get(path, digest) != digest:
                raise MicroscaleError(
                    f"text {path!r} has changed since its tokens were written to "
                    f"{str(folder)!r}. Put the old file back, or train in another folder."
                )
    if different := [key for key, value in wanted.items() if record.get(key) != value]:
        raise MicroscaleError(
            f"{str(folder)!r} holds the tokens of another {different[0]}; train in another folder."
        )
    for name, facts in record["files"].items():
        path = folder / name
        if not path.is_file() or digest_file(path) != facts["digest"]:
            raise MicroscaleError(
                f"token file {str(path)!r} is missing or has changed since it was written; delete "
                f"the folder {str(folder)!r} and its tokens are made again."
            )


def _dtype(vocabulary: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
