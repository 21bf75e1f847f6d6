"""`ranges`: a model whose scales cover ranges that were estimated beforehand, in place.

Weights are packed with the scales that an estimator finds for each of their blocks. Inputs of
layers with one scale for the tensor get a scale for all data, from what the calibration data shows
in the network whose weights are rounded already and whose activations are not: one for each
module, whatever the number of its products. It becomes a part of the module's policy
(`int8-tensor-at0.0371`), so it is saved, loaded and compiled like any other format.

Scales of products of two activations (attention) and of inputs with several scales (tokens,
groups) go on following the data; the report says where.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from microscale.checkpoint.state import joined
from microscale.conversion import Conversion
from microscale.convert import convert, revert
from microscale.errors import MicroscaleError
from microscale.formats import UNIT
from microscale.ledger import text_table
from microscale.nn.site import Site
from microscale.operands import Operand, Setting
from microscale.policy import Policy
from microscale.ranges import (
    TAIL,
    Estimator,
    Sample,
    check_ranged,
    quantize_ranged,
    with_any_exponent,
)
from microscale.recipes.batch import Batch, mask_of, read, run
from microscale.recipes.packing import Places
from microscale.recipes.part import masked
from microscale.recipes.progress import Progress, digest
from microscale.scope import site_of
from microscale.suite.measure import evaluating
from microscale.survey import weights as weights_of
from microscale.tensor import BlockTensor
from microscale.watch import Product, watching_products
from microscale.weights import forget, uncast


@dataclass(frozen=True, slots=True)
class WeightRange:
    """One weight: its format, and ||W - Q||^2 / ||W||^2 of it; a note where it was left."""

    name: str
    format: str
    error: float
    note: str = ""


@dataclass(frozen=True, slots=True)
class InputRange:
    """The inputs of one module: how many values were seen, their ends, and the format."""

    module: str
    format: str
    values: int
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Ranging:
    """What `ranges` did to a model; `str()` is a table of it.

    Attributes:
        conversion: what `convert` did, with the settled formats.
        estimators: of weights and of inputs.
        weights: one for each parameter that modules of known classes multiply with.
        inputs: one for each module whose inputs got a scale for all data.
        batch_norms: how many batch norms were estimated again.
        dynamic: modules whose inputs have scales that follow the data, with the reason.
    """

    conversion: Conversion
    estimators: tuple[str, str]
    weights: tuple[WeightRange, ...]
    inputs: tuple[InputRange, ...]
    batch_norms: int
    dynamic: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "method": "ranges",
            "estimators": {"weights": self.estimators[0], "inputs": self.estimators[1]},
            "conversion": self.conversion.to_dict(),
            "weights": [asdict(weight) for weight in self.weights],
            "inputs": [asdict(one) for one in self.inputs],
            "batch_norms": self.batch_norms,
            "dynamic": dict(self.dynamic),
        }

    def __str__(self) -> str:
        """Return two tables, and what is to be said."""
        weights = ((w.name, w.format, f"{w.error:.3e}", w.note) for w in self.weights)
        inputs = (
            (one.module or "(model)", one.format, f"{one.low:.4g}", f"{one.high:.4g}")
            for one in self.inputs
        )
        tables = (
            text_table([("weight", "format", "error", "note"), *weights]),
            text_table([("input of", "format", "least", "greatest"), *inputs]),
        )
        return "\n".join([*tables, "", *self._remarks()])

    def _remarks(self) -> Iterator[str]:
        yield (
            f"Ranges of {len(self.weights)} weights by {self.estimators[0]}, of "
            f"{len(self.inputs)} inputs by {self.estimators[1]}."
        )
        if self.batch_norms:
            yield f"{self.batch_norms} batch norms estimated again."
        few = [one for one in self.inputs if one.values * TAIL < 1]
        if few and self.estimators[1] == Estimator.PERCENTILE:
            least = min(few, key=lambda one: one.values)
            yield (
                f"{len(few)} inputs have fewer than {1 / TAIL:g} values "
                f"({least.module or '(model)'} {least.values}), so their percentile is minmax; "
                "give more data."
            )
        for name, reason in self.dynamic.items():
            yield f"Scales follow the data: {name or '(model)'}: {reason}."


def ranges(
    model: nn.Module,
    policy: Policy | str,
    batches: Iterable[Batch],
    *,
    weights: str = "mse",
    inputs: str = "mse",
    batch_norm: bool = False,
    exponents: bool = False,
    progress: Path | None = None,
) -> Ranging:
    """Convert a model, its scales settled by the ranges of its weights and of calibration data.

    Args:
        model: any module; changed in place as `convert` does, its weights replaced by packed ones.
        policy: or its spelling, such as "int8-channel/int8-tensor-zero_point".
        batches: as in `error_diffusion`. Masked positions do not count.
        weights: the estimator of weights, one of `microscale.ranges.Estimator`.
        inputs: that of inputs.
        batch_norm: whether mean and variance of batch norms are estimated again from the data,
            after the weights are rounded.
        exponents: whether each weight and each input gets the number of exponent bits of the least
            squared error, from 2 to 5, at the width of its format.
        progress: a folder for the weights packed so far: the same call, after this one was killed,
            goes on where it was and ends with the same bits. Emptied at the end.

    Returns:
        What was settled, and what was left.

    Raises:
        MicroscaleError: bad data, formats without ranges, a policy that cannot be carried out. The
            model is then as it was.
    """
    estimators = str(Estimator(weights)), str(Estimator(inputs))
    kept = read(batches)
    policy = Policy.parse(policy) if isinstance(policy, str) else policy
    check_policy(policy, exponents=exponents)
    settings = policy, estimators, exponents
    run = "" if progress is None else digest(model, kept, settings)
    convert(model, policy, verbose=False)
    with undone(model), _saved(progress, run) as done, evaluating(model, 0):
        settled = settle_weights(model, weights, exponents=exponents, done=done)
        norms = reestimate_batch_norms(model, kept) if batch_norm else 0
        samples = gather(model, kept)
        found, static = settle_inputs(model, samples, inputs, exponents=exponents)
        conversion = convert(model, found, verbose=False)
    return Ranging(conversion, estimators, settled, static, norms, _dynamic(model))


@contextmanager
def _saved(folder: Path | None, run: str) -> Iterator[Progress | None]:
    """Progress in a folder, which is gone at the end and after an error of the user's."""
    if folder is None:
        yield None
        return
    done = Progress(folder, run)
    try:
        yield done
    except MicroscaleError:
        done.remove()
        raise
    done.remove()


def check_policy(policy: Policy, *, exponents: bool = False) -> None:
    """Refuse formats without ranges, or without a choice of exponent bits, naming the place."""
    paths = ("forward.weight", "storage", "forward.input")
    places: list[tuple[str, Setting]] = [(path, policy.setting(path)) for path in paths]
    for pattern, settings in policy.overrides:
        places += [(f"overrides.{pattern!r}.{p}", s) for p, s in settings if p in paths]
    for place, setting in places:
        if not isinstance(setting, Operand):
            continue
        # Inputs may have scales that follow the data, and none at all.
        ranged = not place.endswith("input") or setting.format.block == "tensor"
        try:
            if not place.endswith("input"):
                check_ranged(setting.format)
            if exponents and ranged:
                with_any_exponent(setting.format)
        except MicroscaleError as error:
            raise MicroscaleError(f"policy {place}: {error}") from error


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Take back weights, statistics and conversion if something is raised inside."""
    places = Places(model)
    held = {name: places.parameter(name) for name, _ in model.named_parameters()}
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    except BaseException:
        for name, parameter in held.items():
            places.put(name, parameter)
        for name, buffer in model.named_buffers():
            buffer.copy_(statistics[name])
        revert(model)
        raise


# ---------------------------------------------------------------- weights


def settle_weights(
    model: nn.Module, estimator: str, *, exponents: bool = False, done: Progress | None = None
) -> tuple[WeightRange, ...]:
    """Pack the weights of a converted model with scales of estimated ranges."""
    places = Places(model)
    found = []
    for number, name in enumerate(places.expected):
        original, note = places.parameter(name), _why_left(places, name)
        if note:
            operand = places.operand(name)
            fmt = original.format if isinstance(original, BlockTensor) else operand
            found.append(WeightRange(name, str(fmt or "-"), 0.0, note))
            continue
        if done is not None and done.has(number):
            parameter = done.read(number)[0][name]
        else:
            parameter = _packed(places, name, estimator, exponents=exponents)
            if done is not None:
                done.write(number, {name: parameter}, [])
        places.put(name, parameter)
        forget([original])
        packed = parameter.data
        assert isinstance(packed, BlockTensor)
        error = _lost(original.detach(), packed)
        energy = float(original.detach().double().square().sum())
        found.append(WeightRange(name, str(packed.format), error / energy if energy else 0.0))
    return tuple(found)


def _why_left(places: Places, name: str) -> str:
    """Why a weight is not packed here, or ""."""
    if isinstance(places.parameter(name), BlockTensor):
        return "packed already"
    if places.operand(name) is None:
        return "modules cast it differently: by their rules at use"
    if places.axis(name) is None:
        return "not packed: by the format's rule at each use"
    return ""


def _packed(places: Places, name: str, estimator: str, *, exponents: bool) -> nn.Parameter:
    original, operand, axis = (
        places.parameter(name).detach(),
        places.operand(name),
        places.axis(name),
    )
    assert operand is not None
    assert axis is not None
    formats = with_any_exponent(operand.format) if exponents else (operand.format,)
    try:
        tried = (
            quantize_ranged(original, replace(operand, format=fmt), axis, estimator)
            for fmt in formats
        )
        packed = min(tried, key=lambda one: _lost(original, one))
    except MicroscaleError as error:
        raise MicroscaleError(f"weight {name!r}: {error}") from error
    return nn.Parameter(packed, requires_grad=False)


def _lost(original: Tensor, packed: BlockTensor) -> float:
    """The squared error."""
    return float((original.double() - packed.dequantize().double()).square().sum())


def reestimate_batch_norms(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Replace mean and variance of all batch norms by averages over the data; return how many.

    Each batch counts the same; activations are not cast meanwhile. To be called in eval mode.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum, module.training = None, True  # None: the average of all batches
    try:
        with torch.no_grad(), uncast():
            for batch in batches if norms else ():
                run(model, batch)
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum, module.training = momentum, False
    return len(norms)


# ---------------------------------------------------------------- inputs


def gather(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Sample]:
    """What the inputs of weights are, by module, for inputs with one scale for the tensor.

    Nothing is cast meanwhile, except for what is stored packed.
    """
    samples: dict[str, Sample] = {}

    def see(site: Site, _: Product, x: Tensor) -> None:
        if _why_dynamic(site):
            return
        try:
            samples.setdefault(site.name, Sample()).add(x)
        except MicroscaleError as error:
            raise MicroscaleError(f"inputs of {site.name or 'the model'!r}: {error}") from error

    watch_inputs(model, batches, see)
    return {name: sample for name, sample in samples.items() if sample.count}


SeeInput = Callable[[Site, Product, Tensor], None]
"""Called with the module that runs, its product, and the input without masked positions."""


def watch_inputs(model: nn.Module, batches: Sequence[Batch], see: SeeInput) -> None:
    """Run a converted model on data, nothing cast, and show the inputs of all weights."""
    frames: list[Site] = []
    mask: Tensor | None = None

    def meet(product: Product) -> None:
        if product.kind == "table" or not frames:
            return
        x = product.source
        if mask is not None and x.dim() > 1:
            x = masked(x.reshape(1, -1, x.shape[-1]), x, mask)
        see(frames[-1], product, x)

    with torch.no_grad(), uncast(), _following(model, frames), watching_products(meet):
        for batch in batches:
            mask = mask_of(batch)
            run(model, batch)


@contextmanager
def _following(model: nn.Module, frames: list[Site]) -> Iterator[None]:
    """Keep the sites of the modules that run, the innermost last."""
    with ExitStack() as stack:
        for module in model.modules():
            site = site_of(module)
            if site is None:
                continue

            def enter(*_: object, site: Site = site) -> None:
                frames.append(site)

            def leave(*_: object) -> None:
                frames.pop()

            stack.enter_context(module.register_forward_pre_hook(enter))
            stack.enter_context(module.register_forward_hook(leave, always_call=True))
        yield


def settle_inputs(
    model: nn.Module,
    samples: Mapping[str, Sample],
    estimator: str,
    wide: Collection[str] = (),
    *,
    exponents: bool = False,
) -> tuple[Policy, tuple[InputRange, ...]]:
    """The policy of a converted model with settled inputs, and what was settled.

    Inputs of the modules called `wide` are left in the wider type.
    """
    sites = {name: site for name, x in model.named_modules() if (site := site_of(x)) is not None}
    policies = {name: site.policy for name, site in sites.items() if not site.reason}
    static = []
    for name in wide:
        forward = replace(policies[name].forward, input=None)
        policies[name] = replace(policies[name], forward=forward)
    for name, sample in samples.items():
        if name in wide:
            continue
        policy = policies[name]
        operand = policy.forward.input
        assert operand is not None
        fmt = operand.format
        formats = with_any_exponent(fmt) if exponents else (fmt,)
        settled = replace(operand, format=sample.settle_any(formats, estimator))
        policies[name] = replace(policy, forward=replace(policy.forward, input=settled))
        ends = sample.low, sample.high
        static.append(InputRange(name, str(settled), sample.count, *ends))
    ignored = tuple(name for name, site in sites.items() if site.reason)
    return joined(policies, ignored), tuple(static)


def _why_dynamic(site: Site) -> str:
    """Why a module's inputs get no scale for all data, or ""."""
    operand = site.policy.forward.input
    if site.reason or operand is None:
        return "its inputs are not quantized"
    fmt = operand.format
    if fmt.block != "tensor" or fmt.tensor_scale is not None:
        return f"{fmt} has more than one scale for a tensor"
    if fmt.scale == UNIT or fmt.scale.value is not None:
        return f"{fmt} has a fixed scale"
    return ""


def _dynamic(model: nn.Module) -> dict[str, str]:
    """Modules of known classes whose inputs have scales that follow the data, with the reason."""
    found = {}
    for name, module in model.named_modules():
        site, tables = site_of(module), (nn.Embedding, nn.EmbeddingBag)
        if site is None or site.reason or isinstance(module, tables):
            continue
        operand = site.policy.forward.input
        if operand is None or operand.format.scale == UNIT or operand.format.scale.value:
            continue
        if any(True for _ in weights_of(module, site.policy)):
            found[name] = _why_dynamic(site) or "the calibration data never reaches it"
    return found
