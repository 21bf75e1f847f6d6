"""Products from packed weights beside torch's dense ones: python benchmarks/products.py.

Every call gets another copy of its weight, more of them than the caches hold, as in a model that is
read from end to end for every token. One process, in turns, medians; `limit` is the share of the
bandwidth with which the same run reads memory (8 streams a thread would be a little faster). Peers:
torch's linear and mv in bfloat16, its linear with int8 weights, torchao's MX linear if asked.
`--decoder` generates with a decoder of 8 layers of 1024, packed and in bfloat16.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interleaved import Timing, measure
from microscale.kernels.native.loader import current, native
from microscale.tensor import BlockTensor, quantize

FORMATS = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "nvfp4",
           "int8-channel", "int4-channel")  # fmt: skip
INTEGERS = ("mxfp4", "mxfp6_e2m3", "mxint8")
SHAPES = ((4096, 4096), (4096, 14336))
BATCHES = (1, 8, 64, 512)
COLD = 2**27
"""Bytes of copies of one weight: several times the third cache of most machines."""

Functions = dict[str, Callable[[], object]]


def copies(q: BlockTensor) -> Iterator[BlockTensor]:
    """The same weight in ever other memory."""
    count = max(2, COLD // q.storage_bytes)
    made = [q.clone() for _ in range(count)]
    return itertools.cycle([w for w in made if isinstance(w, BlockTensor)])


def dense(values: Tensor) -> Iterator[Tensor]:
    """The same, unpacked."""
    count = max(2, COLD // (values.numel() * values.element_size()))
    return itertools.cycle([values.clone() for _ in range(count)])


def _linear(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return F.linear(x, next(weights))


def _vector(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return torch.mv(next(weights), x[0])


def _on_the_fly(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return quantize(x, "mxint8") @ next(weights).T


def _int8(x: Tensor, weights: Iterator[Tensor], scales: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x, next(weights), scales)  # noqa: SLF001


def peers(values: Tensor, x: Tensor, *, torchao: bool) -> Functions:
    """What torch and torchao do with the same weight."""
    found: Functions = {"torch bfloat16 linear": partial(_linear, x, dense(values))}
    if x.shape[0] == 1:
        found["torch bfloat16 mv"] = partial(_vector, x, dense(values))
    scales = values.float().abs().amax(1) / 127
    eight = (values.float() / scales[:, None]).round().to(torch.int8)
    found["torch int8 weight"] = partial(_int8, x, dense(eight), scales.bfloat16())
    if torchao:
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        held = MXTensor.to_mx(values, torch.float8_e4m3fn, 32)
        found["torchao mxfp8_e4m3 linear"] = partial(F.linear, x, held)
    return found


def products(values: Tensor, batch: int, formats: tuple[str, ...]) -> Functions:
    """Ours: bfloat16 and float32 activations, and activations quantized on the way."""
    wide = torch.randn(batch, values.shape[1])
    narrow = wide.bfloat16()
    found: Functions = {}
    for fmt in formats:
        half, single = quantize(values, fmt), quantize(values.float(), fmt)
        found[f"{fmt}, bfloat16"] = partial(_linear, narrow, copies(half))
        if batch <= 8:
            found[f"{fmt}, float32"] = partial(_linear, wide, copies(single))
        if batch == 1 and fmt in INTEGERS:
            found[f"{fmt}, mxint8 on the fly"] = partial(_on_the_fly, narrow, copies(half))
    return found


def table(
    shape: tuple[int, int], batch: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Measure and print one shape and batch."""
    values = torch.randn(shape).bfloat16()
    x = torch.randn(batch, shape[1]).bfloat16()
    memory = torch.zeros(COLD // 4)
    functions: Functions = {"read (sum)": memory.sum}
    functions |= peers(values, x, torchao=options.torchao)
    functions |= products(values, batch, tuple(options.formats))
    times = measure(functions, options.repeats)
    limit = COLD / times["read (sum)"].median
    print(f"\n{shape[0]} x {shape[1]}, batch {batch}; memory is read with {limit / 1e9:.1f} GB/s")
    print(f"{'':32}{'ms':>9}{'low':>8}{'high':>8}{'/ linear':>10}{'/ mv':>7}{'limit':>7}  kept")
    for name, timing in times.items():
        print(_line(name, timing, times, _bytes(name, shape) / limit))
    return {f"{shape} {batch} {name}": timing.to_dict() for name, timing in times.items()}


def _bytes(name: str, shape: tuple[int, int]) -> float:
    """Bytes of the weight, 0 where the line is none of a weight."""
    if name.startswith("read"):
        return COLD
    if name.startswith("torch"):
        return shape[0] * shape[1] * (2 if "bfloat16" in name else 1)
    fmt = name.partition(",")[0]
    return quantize(torch.zeros(1, shape[1]), fmt).storage_bytes * shape[0]


def _line(name: str, timing: Timing, times: dict[str, Timing], least: float) -> str:
    ratios = [timing.median / times["torch bfloat16 linear"].median]
    mv = times.get("torch bfloat16 mv")
    beside = f"{timing.median / mv.median:7.2f}" if mv else " " * 7
    return (
        f"{name:32}{timing.median * 1e3:9.3f}{timing.low * 1e3:8.3f}{timing.high * 1e3:8.3f}"
        f"{ratios[0]:10.2f}{beside}{least / timing.median:7.2f}  {timing.kept}"
    )


# ---------------------------------------------------------------- a whole decoder


class Layer(nn.Module):
    """One layer of a decoder with a cache of keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        """One token [1, 1, width]; the cache grows."""
        parts = self.qkv(self.norms[0](x)).view(1, 1, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        cache[:] = [torch.cat(pair, 2) for pair in zip(cache, parts[1:], strict=True)]
        mixed = F.scaled_dot_product_attention(parts[0], cache[0], cache[1])
        x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
        added: Tensor = self.down(F.gelu(self.up(self.norms[1](x))))
        return x + added


class Decoder(nn.Module):
    """8 layers of 1024, a vocabulary of 32000."""

    def __init__(self, layers: int = 8, width: int = 1024, words: int = 32000) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        self.layers = nn.ModuleList(Layer(width, 16) for _ in range(layers))

    @torch.inference_mode()
    def generate(self, tokens: int = 8) -> Tensor:
        """Generate so many tokens, each the likeliest."""
        caches = [[torch.zeros(1, 16, 0, 64).to(self.head.weight.dtype)] * 2 for _ in self.layers]
        token = torch.zeros(1, 1, dtype=torch.long)
        for _ in range(tokens):
            x = self.embedding(token)
            for layer, cache in zip(self.layers, caches, strict=True):
                x = layer(x, cache)
            token = self.head(x).argmax(-1)
        return token


def packed(fmt: str) -> Decoder:
    """The decoder with every linear layer packed."""
    torch.manual_seed(0)
    model = Decoder().bfloat16().requires_grad_(requires_grad=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = quantize(module.weight, fmt)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def decoder(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens a second."""
    tokens = 8
    model = Decoder().bfloat16().requires_grad_(requires_grad=False)
    functions: Functions = {"bfloat16": model.generate}
    functions |= {fmt: packed(fmt).generate for fmt in options.formats}
    times = measure(functions, options.repeats)
    print(f"\ndecoder of 8 layers of 1024{'tokens/s':>12}{'/ bfloat16':>12}  kept")
    for name, timing in times.items():
        ratio = times["bfloat16"].median / timing.median
        print(f"{name:26}{tokens / timing.median:13.1f}{ratio:12.2f}  {timing.kept}")
    return {f"decoder {name}": timing.to_dict() for name, timing in times.items()}


def main() -> None:
    """Print the tables, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="so many of the shapes")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--decoder", action="store_true")
    parser.add_argument("--torchao", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = native()
    kernels = current(found.library) if found.library else f"reference: {found.reason}"
    print(f"{torch.get_num_threads()} threads, kernels {kernels}, torch {torch.__version__}")
    results: dict[str, dict[str, float]] = {}
    for shape, batch in itertools.product(SHAPES[: options.shapes], options.batches):
        results |= table(shape, batch, options)
    if options.decoder:
        results |= decoder(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
