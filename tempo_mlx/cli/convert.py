"""`tempo-mlx convert`: write a model as a directory that mlx-lm reads too, quantised or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tempo_mlx.cli.console import make_consoles, progress_bar


def convert(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A name, a Hugging Face repo id, a directory or a .gguf file."),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="The directory to write; it must not exist.")
    ],
    quantize: Annotated[
        int | None, typer.Option(metavar="BITS", help="Quantise to 2, 3, 4, 5, 6 or 8 bits a weight.")
    ] = None,
    group_size: Annotated[
        int, typer.Option(metavar="N", help="Weights that share a scale: 32, 64 or 128; needs --quantize.")
    ] = 64,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(
            help="Type of what is not quantised, and of scales; alone: everything dense in this type."
        ),
    ] = None,
) -> None:
    """Write a model as a directory that mlx-lm reads too.

    Without options every number stays what it is: GGUF's Q4_0, Q4_1 and Q8_0 become MLX's own layout.
    """
    from tempo_mlx.weights import open_checkpoint
    from tempo_mlx.weights.convert import convert as write

    out, err = make_consoles()
    with progress_bar(err, f"Fetching {source}") as progress:
        open_checkpoint(source, progress=progress)
    with progress_bar(err, f"Writing {destination}") as progress:
        path = write(
            source, destination, bits=quantize, group_size=group_size, dtype=dtype, progress=progress
        )
    out.print(str(path), soft_wrap=True)
