"""Policies: what they mean, how they are written, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microscale.errors import MicroscaleError
from microscale.formats import MXFP4, MXFP6_E2M3, NAMED
from microscale.operands import CHOICES, PATHS, Forward, Operand
from microscale.policy import Policy, covers
from microscale.profiles import PROFILES
from microscale.rounding import LAWS, Options, Rounding
from microscale.spelling import get_block_format

TOKENS = [name for name in NAMED if not name.endswith("-channel")]

operands = st.builds(
    Operand,
    st.sampled_from(TOKENS).map(get_block_format),
    st.builds(Options, *(st.sampled_from(law) for law in LAWS)),
)
AWAY = Operand(MXFP4, Options(Rounding.AWAY))
maybe = st.none() | operands
patterns = st.text("ab.*[]?'\" é", min_size=1)
settings = st.fixed_dictionaries(
    {},
    optional={
        "forward": st.fixed_dictionaries({}, optional={"input": maybe, "weight": maybe}),
        "matmul": st.fixed_dictionaries({}, optional={"left": maybe, "scores": st.booleans()}),
        "storage": maybe,
        "cache": maybe,
        "vector": st.sampled_from(CHOICES["vector"]),
    },
)
policies = st.builds(
    Policy.of,
    maybe,
    maybe,
    maybe,
    storage=maybe,
    cache=maybe,
    convolution=st.sampled_from(["channels", "window"]),
    vector=st.sampled_from(CHOICES["vector"]),
    scores=st.booleans(),
    values=st.booleans(),
    ignore=st.lists(patterns).map(tuple),
    overrides=st.dictionaries(patterns, maybe | settings),
)


def test_a_pair_names_weight_and_activation() -> None:
    policy = Policy.parse("mxfp4/mxfp6_e2m3")
    assert policy.forward == Forward(input=Operand(MXFP6_E2M3), weight=Operand(MXFP4))
    assert policy.matmul.left == policy.matmul.right == Operand(MXFP6_E2M3)
    assert policy.matmul.scores
    assert policy.matmul.values
    assert policy.storage == Operand(MXFP4)
    assert policy.backward_operands == ()


@pytest.mark.parametrize("weight", ["mxfp4", "nvfp4", "int8-channel", "e3m0-16-bf16", "fp32"])
@pytest.mark.parametrize("activation", ["mxfp6_e2m3-rceil", "int8-token", "int8-tensor", "FP32"])
def test_spelling_is_read_back(weight: str, activation: str) -> None:
    policy = Policy.parse(f" {weight} / {activation}")
    assert Policy.parse(str(policy)) == policy


@pytest.mark.parametrize("fmt", TOKENS)
def test_one_format_is_for_both(fmt: str) -> None:
    assert Policy.parse(fmt) == Policy.parse(f"{fmt}/{fmt}")
    assert str(Policy.parse(fmt)) == fmt


def test_what_is_more_than_a_pair_is_marked() -> None:
    assert str(Policy.of("mxfp4", "mxfp6", ignore=("head",))).startswith("mxfp4/mxfp6_e2m3 (")
    assert str(Policy.of("mxfp4", "mxfp4", rounding="away")).startswith("mxfp4 (")
    assert str(Policy.parse("fp32/fp32")) == "fp32"


@given(policies)
def test_written_policies_are_read_back_exactly(policy: Policy) -> None:
    assert Policy.from_dict(policy.to_dict()) == policy
    assert Policy.from_json(policy.to_json()) == policy
    assert Policy.from_toml(policy.to_toml()) == policy
    assert hash(Policy.from_toml(policy.to_toml())) == hash(policy)


def test_what_a_file_leaves_out_follows_forward() -> None:
    policy = Policy.from_toml('[forward]\ninput = "mxfp8"\nweight = "mxfp4"')
    assert policy == Policy.of("mxfp4", "mxfp8")
    off = Policy.from_toml('storage = "fp32"\nforward.weight = "mxfp4"\nmatmul.left = "mxfp8"')
    assert off.storage is None
    assert off.matmul.right is None
    assert str(off.setting("matmul.left")) == "mxfp8_e4m3"


def test_example_in_the_documentation_reads() -> None:
    from microscale import policy

    assert policy.__doc__ is not None
    text = policy.__doc__.partition("follows `forward`:")[2]
    read = Policy.from_toml("\n".join(line.strip() for line in text.splitlines()))
    assert read.forward.weight == AWAY
    assert read.at("layers.0.down_proj").forward.weight is not None
    assert str(read.at("layers.1.down_proj").forward.input) == "mxfp8_e5m2"
    assert not read.matmul.scores


def test_laws_apply_to_all_formats_given_as_such() -> None:
    table = {"format": "mxfp8", "rounding": "zero"}
    policy = Policy.of("mxfp4", table, rounding="away", overrides={"a": "mxfp6"})
    assert policy.forward.weight == AWAY
    assert policy.matmul.left is not None
    assert policy.matmul.left.options.rounding is Rounding.ZERO
    overridden = policy.at("a").forward.input
    assert overridden is not None
    assert overridden.options.rounding is Rounding.AWAY
    assert overridden.laws.keys() == {law.argument() for law in LAWS}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_stands_before_the_pair(profile: str) -> None:
    policy = Policy.parse(f"{profile}:mxfp4/mxfp6_e2m3")
    assert policy == Policy.named(profile, "mxfp4", "mxfp6_e2m3")
    assert Policy.parse(str(policy)) == policy
    assert Policy.from_toml(policy.to_toml()) == Policy.from_json(policy.to_json()) == policy


def test_the_usual_profile_is_not_written() -> None:
    assert str(Policy.parse("ocp:mxfp4")) == "mxfp4"
    assert str(Policy.parse("Paper: mxfp4")) == "paper:mxfp4"


def test_what_is_given_comes_before_the_profile() -> None:
    policy = Policy.named("paper", "mxfp4", "mxfp4", rounding="even", storage="mxfp8")
    assert policy.forward.weight is not None
    assert policy.forward.weight.laws == {
        "rounding": "even",
        "overflow": "saturate",
        "nonfinite": "block",
        "flush_subnormals": "block",
        "prerounding": "bfloat16",
    }
    assert str(policy.storage).startswith("mxfp8_e4m3 ")
    assert str(policy).endswith("(with further settings)")


def test_gradient_format_fills_the_backward_operands() -> None:
    policy = Policy.of("mxfp4", "mxfp6", "mxfp8_e5m2")
    assert str(policy.dgrad.weight) == "mxfp4"
    assert str(policy.wgrad.input) == "mxfp6_e2m3"
    assert policy.dgrad.grad == policy.wgrad.grad
    assert set(policy.backward_operands) == {p for p in PATHS if p.startswith(("dgrad", "wgrad"))}
    hidden = Policy.of("mxfp4", overrides={"a": {"wgrad": {"grad": "mxfp4"}}})
    assert hidden.backward_operands == ("wgrad.grad",)


def test_later_overrides_win() -> None:
    policy = Policy.of(
        "mxfp4",
        "mxfp4",
        ignore=("head",),
        overrides={"layers.*": "mxfp8", "layers.1": {"forward": {"weight": "fp32"}}},
    )
    assert policy.at("embed") == Policy.parse("mxfp4")
    assert policy.at("layers.0.up") == Policy.parse("mxfp8")
    one = policy.at("layers.1.up")
    assert one.forward.weight is None
    assert one.forward.input == policy.at("layers.0").forward.input


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers", "layers.0.up", True),
        ("layers.0", "layers.01", False),
        ("layers.?", "layers.3.up", True),
        ("*.up", "layers.0.up", True),
        ("*", "", True),
        ("up", "layers.0.up", False),
        ("layers.[01].up", "layers.2.up", False),
    ],
)
def test_patterns_cover_what_is_inside(pattern: str, name: str, expected: bool) -> None:
    assert covers(pattern, name) == expected
    assert Policy.of(ignore=(pattern,)).ignores(name) == expected


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ('forward.inptu = "mxfp4"', "unknown key 'forward.inptu'. Did you mean forward.input"),
        ('foward.input = "mxfp4"', "unknown key 'foward'"),
        ('forward = "mxfp4"', "policy forward is 'mxfp4'; a table"),
        ('forward.input = "mxpf4"', "policy forward.input: format 'mxpf4' is not known"),
        ('forward.input = "e4m3"', "policy forward.input: e4m3 is an element format"),
        ('forward.input = { format = "mxfp4", roundin = "even" }', "key 'roundin'. Did you mean"),
        ('forward.input = { rounding = "even" }', "names no format"),
        ('forward.input = { format = "mxfp4", rounding = "up" }', "rounding='up' is not known"),
        ("forward.input = 4", "format 4 is neither"),
        ('matmul.scores = "no"', "policy matmul.scores is 'no'; write true or false"),
        ('ignore = "head"', "policy ignore is 'head'; a list"),
        ("ignore = [1]", "policy ignore is [1]; a list"),
        ("overrides = 1", "policy overrides is 1; a table"),
        ("overrides.head = 1", "policy overrides.'head' is 1; a table"),
        ('overrides.head.storage = "x"', "policy overrides.'head' storage: format 'x'"),
        ('matmul.right = "int8-channel"', "activations have no output channels"),
        ('overrides.a.forward.input = "int8-channel"', "overrides.'a'.forward.input is int8-ch"),
        ("forward", "policy is not TOML"),
        ('convolution = "windows"', "policy convolution is 'windows'; write channels or window"),
        ("vector = 16", "policy vector is '16'; write float32 or bfloat16"),
        ('overrides.a.vector = "bf16"', "policy overrides.'a'.vector is 'bf16'; write float32"),
        ('cache = "int8-channel"', "policy cache is int8-channel, but activations have no"),
    ],
)
def test_bad_files_are_refused_by_place(toml: str, says: str) -> None:
    with pytest.raises(MicroscaleError) as raised:
        Policy.from_toml(toml)
    assert says in str(raised.value)


@pytest.mark.parametrize("spelling", ["papre:mxfp4", ":mxfp4", "a:b:mxfp4"])
def test_unknown_profiles_are_refused(spelling: str) -> None:
    with pytest.raises(MicroscaleError, match=r"profile .* is not known\."):
        Policy.parse(spelling)


@pytest.mark.parametrize("spelling", ["", "/", "mxfp4/", "/mxfp4", "mxfp4/mxfp4/mxfp4/mxfp4"])
def test_bad_pairs_are_refused(spelling: str) -> None:
    with pytest.raises(MicroscaleError, match="not a format or a pair"):
        Policy.parse(spelling)


def test_channel_blocks_are_for_weights() -> None:
    with pytest.raises(MicroscaleError, match="write int8-channel/int8-token or int8-channel/int8"):
        Policy.parse("int8-channel")
    assert str(Policy.parse("int8-channel/int8-token").storage) == "int8-channel"


def test_unknown_keywords_are_refused() -> None:
    with pytest.raises(MicroscaleError, match=r"unknown key 'roundng'\. Did you mean rounding"):
        Policy.of("mxfp4", roundng="even")


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_json_that_is_no_policy_is_refused(text: str) -> None:
    with pytest.raises(MicroscaleError, match="policy is"):
        Policy.from_json(text)
