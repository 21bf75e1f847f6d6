"""Which operand of which product is cast to which format. Data only: no torch.

A product A W has six operands in training (arXiv 2310.10537, Figure 2): two for each of its
forward, dgrad and wgrad GEMMs. `matmul` is for products of two activations (attention), `storage`
for what is looked up instead of multiplied (embedding tables). An operand that is None stays in
the wider type, and is written "fp32".

`convolution` says what the blocks of a convolution run along: "channels", or the whole "window" of
a group (channels x kernel) as its matrix product sees it. `vector` is the type that products,
softmax, norms, activations and residual adds deliver: "float32" stands for the model's own, and
docs/guide.md lists the functions that "bfloat16" rounds ("bfloat16_away": ties away from zero).
`rotation` "hadamard" turns the inputs and weights of linear layers before their casts
(`microscale.rotation`). `cache` is for the keys and values that a generating model keeps; unlike
`storage` it follows nothing.

As TOML, where what is left out of `matmul` and `storage` follows `forward`:

    storage = "mxfp8_e4m3"
    ignore = ["lm_head"]

    [forward]
    input = "mxfp6_e2m3"
    weight = { format = "mxfp4", rounding = "away" }

    [matmul]
    scores = false

    [overrides]
    "layers.0" = "mxfp8_e4m3/fp32"

    [overrides."layers.*.down_proj".forward]
    input = "mxfp8_e5m2"
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from microscale.errors import MicroscaleError, near_names
from microscale.formats import BlockFormat
from microscale.operands import (
    CHOICES,
    PATHS,
    ROTATIONS,
    SETTINGS,
    WIDE,
    Dgrad,
    Forward,
    Matmul,
    Operand,
    Setting,
    Settings,
    Spelling,
    Wgrad,
    check_setting,
    nested,
    read_settings,
    table,
)
from microscale.profiles import FORMATS, PROFILES, USUAL, policy_files

_BACKWARD = ("dgrad.", "wgrad.")

POLICY_FILES = (".toml", ".json")
"""How names of policy files end."""


@dataclass(frozen=True, slots=True)
class Policy:
    """The operands of every product, modules to leave alone, and overrides by module.

    `ignore` and `overrides` hold patterns as of a shell (`*`, `?`, `[...]`) of qualified module
    names; a pattern that matches a module also covers the modules inside it. Of several overrides
    that match, later ones win.
    """

    forward: Forward = field(default_factory=Forward)
    dgrad: Dgrad = field(default_factory=Dgrad)
    wgrad: Wgrad = field(default_factory=Wgrad)
    matmul: Matmul = field(default_factory=Matmul)
    storage: Operand | None = None
    cache: Operand | None = None
    convolution: str = "channels"
    vector: str = "float32"
    rotation: str = "off"
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Settings], ...] = ()

    def __post_init__(self) -> None:
        """Refuse formats that make no sense for an operand."""
        for path in SETTINGS:
            check_setting(path, self.setting(path))
        for pattern, settings in self.overrides:
            for path, setting in settings:
                check_setting(f"overrides.{pattern!r}.{path}", setting)

    @classmethod
    def of(  # noqa: PLR0913  (everything that can be set)
        cls,
        weight: Spelling = None,
        activation: Spelling = None,
        grad: Spelling = None,
        *,
        storage: Spelling = "weight",
        cache: Spelling = None,
        matmul: Spelling = "activation",
        convolution: str = "channels",
        vector: str = "float32",
        tokens: str = "all",
        rotation: str = "off",
        scores: bool = True,
        values: bool = True,
        ignore: tuple[str, ...] = (),
        overrides: Mapping[str, Spelling | Mapping[str, object]] | None = None,
        **laws: str,
    ) -> "Policy":
        """Fill all operands from the formats of weights, activations and gradients.

        Args:
            weight: of forward.weight, and of dgrad.weight if there is a `grad`.
            activation: of forward.input, and of wgrad.input likewise.
            grad: of dgrad.grad and wgrad.grad; None leaves the backward pass in the wider type.
            storage: of embedding tables; the weight's by default.
            cache: of the keys and values that a generating model keeps.
            matmul: of both sides of products of two activations; the activation's by default.
            convolution: whether blocks run along "channels" or the whole "window".
            vector: the type that vector operations deliver, "float32", "bfloat16" or
                "bfloat16_away" (ties away from zero).
            tokens: whether blocks of wgrad run along the tokens of "all" samples or of each
                "sample" for itself.
            rotation: "hadamard" turns inputs and weights of linear layers before their casts.
            scores: whether attention's product of queries and keys is quantized.
            values: whether attention's product of probabilities and values is quantized.
            ignore: patterns of modules to leave alone.
            overrides: by pattern, a pair such as "mxfp8_e4m3/fp32" or a table of operands.
            laws: the keywords of `cast` of all operands given as formats: rounding, overflow,
                nonfinite, flush_subnormals, prerounding.

        Raises:
            MicroscaleError: formats, keywords or paths that are not known.
        """
        pair = activation if matmul == "activation" else matmul
        data: dict[str, object] = {
            "forward": {"input": activation, "weight": weight},
            "wgrad": {"tokens": tokens},
            "matmul": {"left": pair, "right": pair, "scores": scores, "values": values},
            "storage": weight if storage == "weight" else storage,
            "cache": cache,
            "convolution": convolution,
            "vector": vector,
            "rotation": rotation,
            "ignore": list(ignore),
            "overrides": dict(overrides or {}),
        }
        if grad is not None:
            data["dgrad"] = {"grad": grad, "weight": weight}
            data["wgrad"] = {"input": activation, "grad": grad, "tokens": tokens}
        return _read(data, laws)

    @classmethod
    def named(
        cls,
        profile: str,
        weight: Spelling = None,
        activation: Spelling = None,
        grad: Spelling = None,
        **further: Any,
    ) -> "Policy":
        """Fill all operands as `of` does, with the settings of one of `PROFILES`.

        These are "ocp", "paper", "fp8_amax" and "fp8_cscale"; without formats the last two take
        those of `FORMATS`. `further` are keywords of `of`, which come before the profile's. The
        names of whole policies ("mxfp8", "nvfp4", "mxfp4") stand alone: they are the files of
        `microscale/policies`. Raises MicroscaleError.
        """
        files = policy_files()
        if profile in files:
            if further or any(x is not None for x in (weight, activation, grad)):
                raise MicroscaleError(
                    f"policy {profile!r} says all formats itself; copy {str(files[profile])!r} and "
                    "change that."
                )
            return cls.read(files[profile])
        if profile not in PROFILES:
            near = near_names(profile, [*PROFILES, *files])
            raise MicroscaleError(f"profile {profile!r} is not known.{near}")
        if weight is None and activation is None:
            weight = activation = FORMATS.get(profile)
        return cls.of(weight, activation, grad, **{**PROFILES[profile], **further})

    @classmethod
    def parse(cls, spelling: str) -> "Policy":
        """Read a pair `weight/activation`, or one format for both; "fp32" is not quantized.

        A third format is that of gradients, whose backward products are then quantized too. A
        profile may stand before them, as in `paper:mxfp4/mxfp6_e2m3`, and one with formats of its
        own alone (`fp8_amax`). Raises MicroscaleError for profiles and formats that are not known,
        and formats that activations cannot have.
        """
        if (name := spelling.strip().lower()) in FORMATS:
            return cls.named(name)
        profile, colon, pair = spelling.rpartition(":")
        *forward, grad = pair.split("/") if pair.count("/") == 2 else (pair, WIDE)
        formats = *_pair("/".join(forward)), None if grad.strip().lower() == WIDE else grad.strip()
        return cls.named(profile.strip().lower() if colon else USUAL, *formats)

    @classmethod
    def read(cls, path: str | Path) -> "Policy":
        """Read a policy file, JSON if its name ends so, else TOML; raise MicroscaleError."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MicroscaleError(f"policy {str(path)!r} cannot be read: {error}.") from error
        try:
            return cls.from_json(text) if path.suffix == ".json" else cls.from_toml(text)
        except MicroscaleError as error:
            raise MicroscaleError(f"policy file {str(path)!r}: {error}") from error

    def __str__(self) -> str:
        """Return the spelling that `parse` reads, marked where the policy holds more than that."""
        used = self.forward.weight, self.forward.input, self.dgrad.grad
        formats = [None if x is None else x.format for x in used]
        weight, activation, grad = (str(x) if x else WIDE for x in formats)
        pair = weight if weight == activation and grad == WIDE else f"{weight}/{activation}"
        pair += "" if grad == WIDE else f"/{grad}"
        profiles = [name for name in PROFILES if self == Policy.named(name, *formats)]
        if own := [name for name in profiles if pair == FORMATS.get(name)]:
            return own[0]
        if profiles:
            # fp8_amax and fp8_cscale differ in formats alone: a scale that is settled, or not.
            settled = any(x is not None and x.scale.value is not None for x in formats)
            profile = profiles[-1 if settled else 0]
            return pair if profile == USUAL else f"{profile}:{pair}"
        for name, path in policy_files().items() if self.backward_operands else ():
            if self == Policy.read(path):
                return f"training policy {name}"
        return f"{pair} (with further settings)"

    def setting(self, path: str) -> Setting:
        """Return what stands at one of `SETTINGS`, such as "forward.input"."""
        section, _, key = path.partition(".")
        found: Setting = getattr(getattr(self, section), key) if key else getattr(self, section)
        return found

    def ignores(self, name: str) -> bool:
        """Whether the module called `name` is to be left alone."""
        return any(covers(pattern, name) for pattern in self.ignore)

    def at(self, name: str) -> "Policy":
        """Return the policy of the module called `name`: overrides applied and done with."""
        found = [settings for pattern, settings in self.overrides if covers(pattern, name)]
        return _with(replace(self, ignore=(), overrides=()), (s for each in found for s in each))

    @property
    def rounds_vectors(self) -> bool:
        """Whether any module's vector operations deliver another type than they have."""
        overridden = (setting for _, s in self.overrides for path, setting in s if path == "vector")
        return any(vector != "float32" for vector in (self.vector, *overridden))

    @property
    def rotates(self) -> bool:
        """Whether any module's inputs and weights are turned before their casts."""
        overridden = (setting for _, s in self.overrides for p, setting in s if p == "rotation")
        return any(rotation != "off" for rotation in (self.rotation, *overridden))

    @property
    def backward_operands(self) -> tuple[str, ...]:
        """The paths of operands of dgrad and wgrad that are set, here or in an override."""
        here: Settings = tuple((path, self.setting(path)) for path in PATHS)
        everywhere = [here, *(settings for _, settings in self.overrides)]
        paths = {path for settings in everywhere for path, setting in settings if setting}
        return tuple(sorted(path for path in paths if path.startswith(_BACKWARD)))

    def to_dict(self) -> dict[str, object]:
        """Return plain data that `from_dict` reads back exactly."""
        usual: dict[str, Setting] = {path: words[0] for path, words in CHOICES.items()}
        usual |= {"cache": None, **dict.fromkeys(ROTATIONS, 0)}
        settings = {path: self.setting(path) for path in SETTINGS}
        settings = {k: v for k, v in settings.items() if k not in usual or v != usual[k]}
        data = nested((k, v) for k, v in settings.items() if v or not k.startswith(_BACKWARD))
        if self.ignore:
            data["ignore"] = list(self.ignore)
        if self.overrides:
            data["overrides"] = {pattern: nested(values) for pattern, values in self.overrides}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "Policy":
        """Read what `to_dict` or a policy file holds; raise MicroscaleError naming the place."""
        return _read(table("policy", data), {})

    def to_json(self) -> str:
        """Return the policy as JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Policy":
        """Read a policy from JSON; raise MicroscaleError where it is not one."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise MicroscaleError(f"policy is not JSON: {error}.") from error
        return cls.from_dict(data)

    def to_toml(self) -> str:
        """Return the policy as TOML."""
        import tomli_w

        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str) -> "Policy":
        """Read a policy from TOML; raise MicroscaleError where it is not one."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise MicroscaleError(f"policy is not TOML: {error}.") from error
        return cls.from_dict(data)


def covers(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the module called `name` or one that it is inside of."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: n + 1]), pattern) for n in range(len(parts)))


def _pair(spelling: str) -> tuple[str, str]:
    weight, slash, activation = (part.strip() for part in spelling.partition("/"))
    if not weight or (slash and not activation) or "/" in activation:
        raise MicroscaleError(
            f"policy {spelling!r} is not a format or a pair weight/activation, as in "
            "mxfp4/mxfp6_e2m3."
        )
    return weight, activation if slash else weight


def _read(data: Mapping[str, object], laws: Mapping[str, str]) -> Policy:
    data = dict(data)
    ignore = _patterns("policy ignore", data.pop("ignore", []))
    overrides = table("policy overrides", data.pop("overrides", {}))
    settings = dict(read_settings("policy", data, laws))
    for path in ("matmul.left", "matmul.right"):
        settings.setdefault(path, settings.get("forward.input"))
    settings.setdefault("storage", settings.get("forward.weight"))
    read = ((pattern, _override(pattern, value, laws)) for pattern, value in overrides.items())
    return replace(_with(Policy(), settings.items()), ignore=ignore, overrides=tuple(read))


def _override(pattern: str, value: object, laws: Mapping[str, str]) -> Settings:
    place = f"policy overrides.{pattern!r}"
    if value is not None and not isinstance(value, (str, BlockFormat, Operand)):
        return read_settings(place, table(place, value), laws)
    weight, activation = _pair(value) if isinstance(value, str) else (value, value)
    data: dict[str, object] = {
        "forward": {"input": activation, "weight": weight},
        "matmul": {"left": activation, "right": activation},
        "storage": weight,
    }
    return read_settings(place, data, laws)


def _with(policy: Policy, settings: Iterable[tuple[str, Setting]]) -> Policy:
    changed: dict[str, Any] = {}
    for path, setting in settings:
        section, _, key = path.partition(".")
        held = changed.get(section, getattr(policy, section))
        changed[section] = replace(held, **{key: setting}) if key else setting
    return replace(policy, **changed) if changed else policy


def _patterns(place: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
        raise MicroscaleError(f"{place} is {value!r}; a list of module name patterns is expected.")
    return tuple(value)
