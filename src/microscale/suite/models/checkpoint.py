"""Read a safetensors file into a module; say which tensor does not fit."""

from collections.abc import Mapping
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
    shape.
    """
    wanted = {
        name: tensor
        for name, tensor in module.state_dict().items()
        if tensor.dim() or name in tensors
    }
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [
        f"{name} has no place in {type(module).__name__}" for name in tensors if name not in wanted
    ]
    faults += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise MicroscaleError(
            f"checkpoint {str(path)!r} does not fit {type(module).__name__}: "
            f"{'; '.join(faults[:3])}{more}."
        )
    module.load_state_dict(dict(tensors), strict=False)
