"""Our own layout: docs/checkpoint.md. It carries every format."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from microscale.checkpoint.header import KEY, stored_parts
from microscale.checkpoint.layouts.base import Content, Found, Item, Parts
from microscale.tensor import BlockTensor


class Microscale:
    """Codes and scales under NAME.codes and NAME.scales, described by the file's own header."""

    name = "microscale"

    def refusal(self, item: Item) -> str:  # noqa: ARG002
        """Nothing is refused."""
        return ""

    def encode(self, name: str, q: BlockTensor) -> dict[str, Tensor]:
        """The parts."""
        return {f"{name}.{part}": q.stored[i] for part, i in stored_parts(q.format).items()}

    def find(self, parts: Parts, config: Mapping[str, Any]) -> Iterator[tuple[str, Found]]:  # noqa: ARG002
        """Nothing: the headers say it."""
        yield from ()

    def describe(
        self,
        content: Content,  # noqa: ARG002
        carried: Mapping[str, Item],  # noqa: ARG002
    ) -> dict[str, dict[str, Any]]:
        """Only that the model is quantized by us."""
        return {"config.json": {"quantization_config": {"quant_method": KEY}}}
