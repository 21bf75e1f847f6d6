"""The Python source files of the running interpreter's standard library, split by file.

Both `freeze_stdlib.py` (frozen evaluation data) and `train_stdlib_gpt.py` (the small GPT) read
the library through this module, so that they cannot disagree about what was held out.

Whole files are assigned, never parts of files. A file's rank is the SHA-256 of a seed and its
path: independent of the file system's order and of the file's text. Held-out and validation
files are taken from the front of that order, within limits of size, so that each split holds
many different files instead of one large one; everything else is training text.
"""

import hashlib
import sysconfig
import tokenize
from dataclasses import dataclass
from pathlib import Path

SEED = "microscale-stdlib-1"
HELD_OUT_BYTES = 200_000
VALIDATION_BYTES = 200_000
SPLIT_FILE_BYTES = (2_000, 40_000)

# Tests and tools are another kind of text; encodings and the single files are tables;
# _sysconfigdata and config-* describe the machine Python was built on.
EXCLUDED_FOLDERS = frozenset(
    {
        "test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo",
        "ensurepip", "pydoc_data", "encodings", "lib-dynload", "__pycache__", "__phello__",
    }
)  # fmt: skip
EXCLUDED_FILES = frozenset(
    {"__hello__.py", "this.py", "token.py", "stringprep.py", "sre_constants.py", "html/entities.py"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file: `path` relative to the library's root with forward slashes, and its text."""

    path: str
    text: str

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())

    @property
    def section(self) -> str:
        """The text under a header line that names the file: how every split writes a file."""
        return f"# file: {self.path}\n{self.text.rstrip()}\n\n"

    @property
    def sha256(self) -> str:
        """SHA-256 of the section in UTF-8, in hexadecimal: the excerpt alone suffices to check."""
        return hashlib.sha256(self.section.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Splits:
    """The library's files in three disjoint groups, each in the order of the seeded hash."""

    train: tuple[SourceFile, ...]
    validation: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]


def library_root() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_wanted(path: str) -> bool:
    """Whether the file at `path` (relative, forward slashes) is part of the corpus."""
    parts = path.split("/")
    return not (
        EXCLUDED_FOLDERS.intersection(parts[:-1])
        or path in EXCLUDED_FILES
        or parts[0].startswith(EXCLUDED_PREFIXES)
    )


def read_source(root: Path, path: str) -> SourceFile:
    """Read one file by its declared encoding, with line feeds as line ends."""
    with tokenize.open(root / path) as stream:
        return SourceFile(path, stream.read())


def read_library(root: Path) -> list[SourceFile]:
    """All wanted files that are not empty, sorted by path."""
    paths = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    sources = [read_source(root, path) for path in paths if is_wanted(path)]
    return [source for source in sources if source.text.strip()]


def rank(source: SourceFile) -> str:
    """The seeded hash that orders files."""
    return hashlib.sha256(f"{SEED}:{source.path}".encode()).hexdigest()


def take(sources: list[SourceFile], size: int) -> tuple[SourceFile, ...]:
    """Remove files of middling size from the front of `sources` until `size` bytes are held."""
    smallest, largest = SPLIT_FILE_BYTES
    taken: list[SourceFile] = []
    for source in list(sources):
        if sum(file.size for file in taken) >= size:
            break
        if smallest <= source.size <= largest:
            taken.append(source)
            sources.remove(source)
    return tuple(taken)


def split(sources: list[SourceFile]) -> Splits:
    """Assign every file to held-out, validation or train."""
    ordered = sorted(sources, key=rank)
    held_out = take(ordered, HELD_OUT_BYTES)
    validation = take(ordered, VALIDATION_BYTES)
    return Splits(train=tuple(ordered), validation=validation, held_out=held_out)


def join(sources: tuple[SourceFile, ...]) -> str:
    """The sections of the files one after the other."""
    return "".join(source.section for source in sources)
