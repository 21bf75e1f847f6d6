"""Freeze the embedded evaluation data from the running Python's standard library.

Writes into `src/microscale/suite/embedded/`:

- `stdlib_excerpt.txt`: the held-out files, whole, each under a line `# file: PATH`;
- `stdlib_docstrings.jsonl`: docstrings with the module they come from, for sentence encoders;
- `PROVENANCE.json`: Python's version, the split of the files, checksums of all of it;
- `LICENSE.python`: Python's licence, which covers the two data files.

Frozen means that results do not drift with the Python of whoever runs the comparison. Running
this under another Python makes other data; tests hold the files to PROVENANCE.json.

    python runs/freeze_stdlib.py
"""

import ast
import hashlib
import inspect
import json
import platform
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stdlib_sources import SEED, SourceFile, Splits, join, library_root, read_library, split

EMBEDDED = Path(__file__).parents[1] / "src/microscale/suite/embedded"
FEWEST_PER_MODULE = 44
MOST_PER_MODULE = 60
TEST_SHARE = 0.4
FEWEST_WORDS = 8
MOST_WORDS = 60
MASK = "[name]"
# Pure Python twins are labelled with the module they implement.
TWINS = {"_pydecimal": "decimal", "_pyio": "io", "_collections_abc": "collections"}

DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Docstring:
    """One example: a cleaned text, the module to predict, where it stood, and its split."""

    text: str
    label: str
    name: str
    split: str = "train"

    @property
    def letters(self) -> str:
        """What two docstrings share if they differ in case, digits and punctuation only."""
        return re.sub(r"[^a-z]", "", self.text.lower())

    @property
    def rank(self) -> str:
        """The seeded hash that orders docstrings."""
        return hashlib.sha256(f"{SEED}:{self.label}:{self.text}".encode()).hexdigest()


def label_of(path: str) -> str:
    """The top-level module or package that the file at `path` belongs to."""
    module = path.partition("/")[0].removesuffix(".py")
    return TWINS.get(module, module)


def clean(docstring: str, label: str) -> str:
    """One line of at most MOST_WORDS words up to the first doctest, the label masked."""
    prose = inspect.cleandoc(docstring).split(">>>")[0]
    words = " ".join(prose.split()[:MOST_WORDS])
    return re.sub(rf"\b_?{re.escape(label)}s?\b", MASK, words, flags=re.IGNORECASE)


def documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of `node` and of all definitions inside it."""
    if isinstance(node, (ast.Module, *DEFINITIONS)):
        docstring = ast.get_docstring(node)
        if docstring:
            yield name, docstring
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, DEFINITIONS) else name
        yield from documented(child, inner)


def docstrings_of(source: SourceFile) -> Iterator[Docstring]:
    """The docstrings of one file that have enough words."""
    module = source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    label = label_of(source.path)
    for name, docstring in documented(ast.parse(source.text), module):
        text = clean(docstring, label)
        if len(text.split()) >= FEWEST_WORDS:
            yield Docstring(text, label, name)


def collect(sources: list[SourceFile]) -> dict[str, list[Docstring]]:
    """Docstrings by module, each text once: a text that two modules share belongs to neither."""
    owners: dict[str, set[str]] = defaultdict(set)
    first: dict[str, Docstring] = {}
    for source in sources:
        for docstring in docstrings_of(source):
            owners[docstring.letters].add(docstring.label)
            first.setdefault(docstring.letters, docstring)
    by_module: dict[str, list[Docstring]] = defaultdict(list)
    for letters, docstring in first.items():
        if len(owners[letters]) == 1:
            by_module[docstring.label].append(docstring)
    return by_module


def choose(by_module: dict[str, list[Docstring]]) -> list[Docstring]:
    """A capped number per module that has enough, split, in the order of the seeded hash."""
    chosen: list[Docstring] = []
    for docstrings in by_module.values():
        if len(docstrings) < FEWEST_PER_MODULE:
            continue
        kept = sorted(docstrings, key=lambda docstring: docstring.rank)[:MOST_PER_MODULE]
        tests = round(TEST_SHARE * len(kept))
        chosen += [replace(docstring, split="test") for docstring in kept[:tests]]
        chosen += kept[tests:]
    # In hash order, so that the first lines of a split are a fair sample of the modules.
    return sorted(chosen, key=lambda docstring: (docstring.split, hash_of(docstring.text)))


def hash_of(text: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def checksums(splits: Splits) -> dict[str, dict[str, str]]:
    """Path to SHA-256 of the section of every file of every split, sorted by path."""
    return {
        name: dict(sorted((file.path, file.sha256) for file in getattr(splits, name)))
        for name in Splits.__slots__
    }


def write(name: str, text: str) -> str:
    """Write an embedded file with line feeds as line ends; returns its SHA-256."""
    (EMBEDDED / name).write_text(text, encoding="utf-8", newline="\n")
    return hash_of(text)


def main() -> None:
    """Collect, choose, write."""
    root = library_root()
    sources = read_library(root)
    splits = split(sources)
    docstrings = choose(collect(sources))
    lines = [json.dumps(asdict(docstring), ensure_ascii=False) for docstring in docstrings]
    EMBEDDED.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(root / "LICENSE.txt", EMBEDDED / "LICENSE.python")
    provenance = {
        "made_by": "runs/freeze_stdlib.py",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "split_seed": SEED,
        "sha256": {
            "stdlib_excerpt.txt": write("stdlib_excerpt.txt", join(splits.held_out)),
            "stdlib_docstrings.jsonl": write(
                "stdlib_docstrings.jsonl", "".join(line + "\n" for line in lines)
            ),
        },
        "sections": checksums(splits),
    }
    write("PROVENANCE.json", json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
