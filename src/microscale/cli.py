"""The command line. Each command's work is in `microscale.commands`, imported when it runs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from microscale.errors import MicroscaleError
from microscale.version import __version__

USER_ERROR = 2
INTERRUPTED = 130

app = typer.Typer(
    name="microscale",
    help="Microscaling (MX) and other narrow number formats: what they are and what they do to "
    "models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is standard output."),
]
Picture = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE", help="Draw the result (PNG, SVG, PDF).")
]

Text = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="What a model of Hugging Face is tried on: UTF-8 text, or for an encoder .tsv or "
        ".jsonl of sentences or pairs.",
    ),
]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Use N samples, drawn with --seed.")]
BatchSize = Annotated[int | None, typer.Option(metavar="N", help="Samples that run at once.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, cuda:1.")]
Dtype = Annotated[str, typer.Option(help="Type of everything that is not quantized.")]


@contextmanager
def _clean_exit() -> Iterator[None]:
    """Turn user errors and Ctrl-C into one line on standard error and an exit status."""
    try:
        yield
    except MicroscaleError as error:
        typer.echo(f"microscale: {error}", err=True)
        raise typer.Exit(USER_ERROR) from None
    except KeyboardInterrupt:
        typer.echo("microscale: interrupted; nothing was left half-written.", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command()
def formats(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A spelling such as mxfp4 or e2m3.")
    ] = None,
    *,
    json_file: JsonFile = None,
    picture: Picture = None,
) -> None:
    """List the formats, or show one in full with its number line."""
    with _clean_exit():
        from microscale.commands.formats import show_format, show_formats

        if name is None:
            show_formats(json_file=json_file, picture=picture)
        else:
            show_format(name, json_file=json_file, picture=picture)


@app.command()
def info(*, json_file: JsonFile = None) -> None:
    """Show versions, devices, and which kernels run."""
    with _clean_exit():
        from microscale.commands.info import show_info

        show_info(json_file=json_file)


@app.command()
def compare(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face causal language model (directory or name) or a model of the "
            "suite; by default the embedded models.",
        ),
    ] = None,
    *,
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Formats, weight/activation pairs or policy files, separated by commas: "
            "mxint8,mxfp4/mxfp6_e2m3,mix.toml,paper:mxfp4 (with the paper's own rounding).",
        ),
    ] = None,
    text: Text = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_file: JsonFile = None,
    picture: Picture = None,
) -> None:
    """Compare what formats do to a model: quality against bits, by direct cast."""
    with _clean_exit():
        from microscale.commands.compare import run_compare

        run_compare(
            model,
            formats=formats,
            text=text,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            json_file=json_file,
            picture=picture,
        )


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face model (directory or name) or a model of the suite, as in compare; "
            "or a packed checkpoint of any layout that export knows.",
        ),
    ],
    *,
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="A format, a weight/activation pair or a policy file.",
        ),
    ] = "mxfp4",
    sort: Annotated[
        str,
        typer.Option(
            metavar="BY",
            help="error, order, sqnr, saturated, flushed, crest, kurtosis or outliers.",
        ),
    ] = "error",
    text: Text = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    diff: Annotated[
        Path | None,
        typer.Option(metavar="OTHER", help="Of two checkpoints: how their values differ."),
    ] = None,
    json_file: JsonFile = None,
    picture: Picture = None,
) -> None:
    """Show what one format does to each layer of a model, or what a packed checkpoint holds."""
    with _clean_exit():
        from microscale.commands.look import is_packed, run_look

        if diff is not None or is_packed(Path(model)):
            run_look(Path(model), diff, json_file, picture)
            return
        from microscale.commands.inspect import run_inspect

        run_inspect(
            model,
            fmt=fmt,
            sort=sort,
            text=text,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            json_file=json_file,
            picture=picture,
        )


@app.command()
def fp8_vs_int8(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A model as in compare; by default none."),
    ] = None,
    *,
    text: Text = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_file: JsonFile = None,
    picture: Picture = None,
) -> None:
    """Show which format of 8 bits holds distributions, and a model, best (arXiv 2303.17951)."""
    with _clean_exit():
        from microscale.commands.fp8_vs_int8 import run_fp8_vs_int8

        run_fp8_vs_int8(
            model,
            text=text,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            json_file=json_file,
            picture=picture,
        )


@app.command()
def scaling_bias(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model as in compare.")],
    *,
    element: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="e4m3fnuz (bias 8, largest 240, as the paper) or OCP's e4m3."
        ),
    ] = "e4m3fnuz",
    text: Text = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_file: JsonFile = None,
    picture: Picture = None,
) -> None:
    """Show which constant scaling biases of FP8 hold a model's score (arXiv 2309.17224)."""
    with _clean_exit():
        from microscale.commands.scaling_bias import run_scaling_bias

        run_scaling_bias(
            model,
            element=element,
            text=text,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            json_file=json_file,
            picture=picture,
        )


@app.command()
def quantize(  # noqa: PLR0913  (its options)
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face model directory of safetensors; with --data also a causal "
            "language model by name, or a model of the suite.",
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the packed model.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Calibration data: UTF-8 text for a language model, else a .npy, .npz or "
            ".safetensors of inputs. Without it weights are cast directly, tensor by tensor.",
        ),
    ] = None,
    fmt: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="A format or a weight/activation pair."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A policy as TOML or JSON, instead.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --data: error_diffusion (the default), gptq, qronos, rtn or ranges.",
        ),
    ] = None,
    scales: Annotated[
        str, typer.Option(metavar="HOW", help="Search scales (mse), or follow the format's rule.")
    ] = "mse",
    settle: Annotated[
        str,
        typer.Option(
            metavar="WHEN",
            help="Settle a block's scale when it is entered, or from the original weights.",
        ),
    ] = "entered",
    order: Annotated[
        bool, typer.Option("--order", help="Go by falling energy of the inputs, block by block.")
    ] = False,
    sweeps: Annotated[
        int | None, typer.Option(metavar="N", help="Go over all columns N more times.")
    ] = None,
    correction: Annotated[
        float | None,
        typer.Option(metavar="C", help="How far a layer makes up for earlier ones, 0 to 1."),
    ] = None,
    rotation: Annotated[
        str,
        typer.Option(metavar="HOW", help="Turn blocks of linear layers first: off or hadamard."),
    ] = "off",
    weight_range: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="With ranges: minmax, percentile or mse (the default)."),
    ] = None,
    input_range: Annotated[
        str | None,
        typer.Option(
            metavar="HOW", help="With ranges: minmax, running, percentile or mse (the default)."
        ),
    ] = None,
    batch_norm: Annotated[
        bool,
        typer.Option("--batch-norm", help="With ranges: estimate batch norms again."),
    ] = False,
    exponents: Annotated[
        bool,
        typer.Option(
            "--exponents", help="With ranges: search the exponent bits of each weight and input."
        ),
    ] = False,
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Write a model's weights packed: rounded with calibration data, or cast directly."""
    with _clean_exit():
        from microscale.commands.quantize import run_quantize

        run_quantize(
            model,
            fmt=fmt,
            policy=policy,
            method=method,
            data=data,
            out=out,
            scales=scales,
            settle=settle,
            order=order,
            sweeps=sweeps,
            correction=correction,
            rotation=rotation,
            weight_range=weight_range,
            input_range=input_range,
            batch_norm=batch_norm,
            exponents=exponents,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
        )


@app.command()
def finetune(  # noqa: PLR0913  (its options)
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face causal language model (directory or name) or a model of the "
            "suite.",
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the packed model.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What to train on: UTF-8 text for a language model, else an .npz or .safetensors "
            "of inputs and labels. Digits and keyword models bring their own.",
        ),
    ] = None,
    text: Text = None,
    fmt: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="A format or a weight/activation pair."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A policy as TOML or JSON, instead.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N", help="Batches to train with; 200 by default.")
    ] = None,
    lr: Annotated[
        str | None, typer.Option(metavar="X", help="Learning rate of AdamW; 1e-4 by default.")
    ] = None,
    learn: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="off, ranges (of INT8, INT4, FP8) or exponents (ranges and exponent bits).",
        ),
    ] = "off",
    range_lr: Annotated[
        str | None,
        typer.Option(metavar="X", help="Learning rate of ranges (SGD); 1e-2 by default."),
    ] = None,
    gradient: Annotated[
        str,
        typer.Option(metavar="HOW", help="Of casts: identity, or clipped where they saturate."),
    ] = "identity",
    weight_decay: Annotated[float, typer.Option(metavar="X", help="Of AdamW.")] = 0.0,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Try several --lr, --steps and --range-lr (separated by commas), choose on data "
            "held back.",
        ),
    ] = False,
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_file: JsonFile = None,
    picture: Picture = None,
) -> None:
    """Train a model on with quantized forward passes, and write it packed."""
    with _clean_exit():
        from microscale.commands.finetune import run_finetune

        run_finetune(
            model,
            fmt=fmt,
            policy=policy,
            data=data,
            text=text,
            out=out,
            steps=steps,
            lr=lr,
            learn=learn,
            range_lr=range_lr,
            gradient=gradient,
            weight_decay=weight_decay,
            sweeping=sweep,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            json_file=json_file,
            picture=picture,
        )


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="A directory or file of any of the layouts.")
    ],
    *,
    target: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="LAYOUT",
            help="microscale, compressed-tensors, gpt-oss, quark, modelopt, mlx, gguf or onnx.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="PATH", help="A new folder; for gguf and onnx a new file.")
    ],
    json_file: JsonFile = None,
) -> None:
    """Write a packed checkpoint in another layout, and compare every value."""
    with _clean_exit():
        from microscale.commands.export import run_export

        run_export(source, target=target, out=out, json_file=json_file)


@app.command()
def search(  # noqa: PLR0913  (its options)
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face causal language model (directory or name) or a model of the "
            "suite.",
        ),
    ],
    *,
    budget: Annotated[
        str,
        typer.Option(
            metavar="AMOUNT",
            help="Average bits of a stored weight, scales included (4.6bits), or the size of the "
            "whole model (250KB).",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the policy: .toml or .json.")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="Average bits of an activation, if not those of a weight; fp32 leaves them alone.",
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="What may be chosen: formats or pairs, separated by commas."
        ),
    ] = None,
    measure: Annotated[
        str, typer.Option(metavar="NAME", help="divergence, output or gradient.")
    ] = "divergence",
    solver: Annotated[str, typer.Option(metavar="NAME", help="exact or greedy.")] = "exact",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Calibration data as for quantize; by default the model's own, as in compare.",
        ),
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    json_file: JsonFile = None,
    picture: Picture = None,
) -> None:
    """Choose a format for each layer, so that least is lost within a budget of bits."""
    with _clean_exit():
        from microscale.commands.search import run_search

        run_search(
            model,
            budget=budget,
            out=out,
            activations=activations,
            formats=formats,
            measure=measure,
            solver=solver,
            data=data,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            json_file=json_file,
            picture=picture,
        )


@app.command()
def train(
    config: Annotated[
        Path, typer.Option(metavar="FILE", help="Settings of the run (TOML); docs/training.md.")
    ],
    *,
    steps: Annotated[
        str | None,
        typer.Option(metavar="N", help="Number of steps; auto reckons by Kaplan's rule."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="A training policy (mxfp8, nvfp4, mxfp4), a file, or formats such as "
            "mxfp4/mxfp6_e3m2 (weight/activation; gradients as activations).",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the run.")] = None,
    monitor: Annotated[
        int | None,
        typer.Option(metavar="N", help="Look at what the casts lose every N steps; a picture."),
    ] = None,
    json_file: JsonFile = None,
    picture: Picture = None,
) -> None:
    """Train a small GPT from scratch in narrow formats; the same command goes on after a kill."""
    with _clean_exit():
        from microscale.commands.train import run_train

        run_train(
            config,
            steps=steps,
            policy=policy,
            out=out,
            monitor=monitor,
            json_file=json_file,
            picture=picture,
        )


def main() -> None:
    """Run the command line."""
    # Threads that spin while they wait make a busy machine many times slower (docs/log.md). The
    # library that torch computes with reads this when it is loaded, so it is set before.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
