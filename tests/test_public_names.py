"""The public names and signatures. To add one is a line here; none is ever taken away."""

import inspect
import subprocess
import sys
from importlib import import_module
from types import FunctionType

import pytest

import microscale

RECORDS = {
    "BlockFormat": "(element, scale, block, rule=None, tensor_scale=None, zero_point=False)",
    "ElementFormat": "(exponent_bits, mantissa_bits, specials, bias)",
}
FUNCTIONS = {
    "cast": (
        "(x, fmt, axis=-1, *, rounding='even', overflow='saturate', nonfinite='block', "
        "flush_subnormals='off', prerounding='off', gradient='identity', seed=None, dtype=None, "
        "out=None)"
    ),
    "compare": (
        "(model, evaluate, formats=('mxint8', 'mxfp8_e4m3', 'mxfp8_e5m2', 'mxfp6_e2m3', "
        "'mxfp6_e3m2', 'mxfp4', 'mxfp4/mxfp6_e2m3', 'nvfp4'), *, name='model', seed=0, "
        "progress=None)"
    ),
    "convert": "(model, policy, *, verbose=True)",
    "dequantize": "(q, dtype=None, *, out=None)",
    "get_format": "(spelling)",
    "info": "()",
    "inspect": (
        "(model, evaluate, fmt='mxfp4', *, batches=4, name='model', seed=0, progress=None)"
    ),
    "load": "(path, model=None, *, device='cpu')",
    "quantize": (
        "(x, fmt, axis=-1, *, rounding='even', overflow='saturate', nonfinite='block', "
        "flush_subnormals='off', prerounding='off', seed=None)"
    ),
    "quantize_both": (
        "(x, fmt, axes=(-1, -2), *, rounding='even', overflow='saturate', nonfinite='block', "
        "flush_subnormals='off', prerounding='off', seed=None)"
    ),
    "revert": "(model)",
    "save": "(source, path)",
}
OTHERS = {"BlockTensor", "MicroscaleError", "Policy", "__version__"}


def signature(value: object) -> str:
    """Names, kinds and defaults of the parameters, without annotations."""
    assert callable(value)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(value).parameters.values()
    ]
    return str(inspect.Signature(parameters))


def test_names() -> None:
    assert set(microscale.__all__) == {*RECORDS, *FUNCTIONS, *OTHERS}
    assert set(microscale.__all__) <= set(dir(microscale))


@pytest.mark.parametrize(("name", "expected"), (RECORDS | FUNCTIONS).items())
def test_signature(name: str, expected: str) -> None:
    assert signature(getattr(microscale, name)) == expected


def test_policy_has_its_readers() -> None:
    readers = {
        "of",
        "parse",
        "to_dict",
        "from_dict",
        "to_toml",
        "from_toml",
        "to_json",
        "from_json",
    }
    assert readers <= set(dir(microscale.Policy))


def test_errors_are_value_errors() -> None:
    assert issubclass(microscale.MicroscaleError, ValueError)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = getattr(microscale, "quantise")  # noqa: B009 (mypy would refuse the attribute)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_win_over_modules_of_their_name(name: str) -> None:
    assert isinstance(getattr(microscale, name), FunctionType)


@pytest.mark.parametrize("name", ["cast", "convert"])
def test_submodules_stay_reachable(name: str) -> None:
    module = import_module(f"microscale.{name}")
    assert getattr(module, name) is getattr(microscale, name)
    assert sys.modules[f"microscale.{name}"] is module


def run(code: str) -> str:
    """Run `code` in a fresh interpreter and return what it printed."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "first",
    [
        "import microscale.cast",
        "from microscale.cast import cast",
        "import microscale.convert",
        "from microscale import cast",
        "import importlib; importlib.import_module('microscale.cast')",
    ],
)
def test_functions_win_in_every_order(first: str) -> None:
    code = f"{first}; import microscale; print(type(microscale.cast), type(microscale.convert))"
    assert run(code) == "<class 'function'> <class 'function'>\n"


def test_import_is_light() -> None:
    heavy = "{'torch', 'numpy', 'rich', 'typer', 'transformers', 'matplotlib'}"
    assert run(f"import microscale, sys; print({heavy} & set(sys.modules))") == "set()\n"


def test_formats_need_no_torch() -> None:
    code = "import microscale, sys; microscale.get_format('mxfp4'); print('torch' in sys.modules)"
    assert run(code) == "False\n"
