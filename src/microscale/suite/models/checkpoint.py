"""Read a safetensors file into a module; say which tensor does not fit."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from microscale.errors import MicroscaleError
from microscale.suite.extras import require


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    if not path.is_file():
        raise MicroscaleError(f"checkpoint {str(path)!r} does not exist.")
    library = require("safetensors", "reading a checkpoint")
    reader = require("safetensors.torch", "reading a checkpoint")
    try:
        tensors: dict[str, Tensor] = reader.load_file(path)
    except library.SafetensorError as error:
        raise MicroscaleError(
            f"checkpoint {str(path)!r} is no readable safetensors file ({error}); fetch it again."
        ) from error
    return tensors


def fit(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load `tensors` (from `path`) into `module`, which must have exactly these.

    Raises MicroscaleError that names the first tensors that are missing, left over, or of another
    shape or kind.
    """
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if tensor.dim() or name in tensors
    }
    expect(tensors, wanted, path, type(module).__name__)
    module.load_state_dict(dict(tensors), strict=False)


def expect(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], path: Path, model: str
) -> None:
    """Refuse `tensors` (from `path`) that are not floating ones of exactly these names and shapes.

    For models that store their weights otherwise than the checkpoint does: its own names are said.
    """
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{name} has no place in {model}" for name in tensors if name not in wanted]
    for name in wanted:
        tensor = tensors.get(name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != wanted[name]:
            faults.append(f"{name} has shape {tuple(tensor.shape)}, not {wanted[name]}")
        elif not tensor.is_floating_point():
            faults.append(f"{name} is {tensor.dtype}, not a floating type")
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise MicroscaleError(
            f"checkpoint {str(path)!r} does not fit {model}: {'; '.join(faults[:3])}{more}."
        )


def named(tensors: Mapping[str, Tensor], names: Sequence[str], path: Path) -> list[Tensor]:
    """The tensors of these names from `path`; MicroscaleError that names those that are missing."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise MicroscaleError(f"{str(path)!r} lacks the tensors {' and '.join(missing)}.")
    return [tensors[name] for name in names]
