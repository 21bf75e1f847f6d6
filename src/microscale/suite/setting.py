"""How a comparison is run: counts, seed, device and dtype, checked before any work."""

from dataclasses import dataclass

import torch

from microscale.errors import MicroscaleError, near_names

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """`limit` None: the task's own number of units; `batch_size` None: its own batch."""

    limit: int | None
    batch_size: int | None
    seed: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def parse(
        cls,
        *,
        limit: int | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> "Setting":
        """Check the values of the command line's options."""
        for name, value in (("--limit", limit), ("--batch-size", batch_size)):
            if value is not None and value < 1:
                raise MicroscaleError(f"{name} {value} must be at least 1; leave it out for all.")
        if not 0 <= seed < 2**63:
            raise MicroscaleError(f"--seed {seed} must be from 0 to 2^63 - 1.")
        if dtype not in DTYPES:
            raise MicroscaleError(f"--dtype {dtype!r} is not known.{near_names(dtype, DTYPES)}")
        return cls(limit, batch_size, seed, _device(device), DTYPES[dtype])


def _device(name: str) -> torch.device:
    """A device that can hold a tensor now: the only honest test of its presence."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # torch says that a device is absent by any of these, depending on the device and its build.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise MicroscaleError(
            f"--device {name!r} is not available here ({reason}); use cpu."
        ) from error
    if device.type == "meta":
        raise MicroscaleError("--device 'meta' holds no values; use cpu.")
    return device
