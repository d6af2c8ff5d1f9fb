"""`torchrun --nproc-per-node N -m minmo.training STAGE ...`: `minmo train` in each of N processes."""

import typer

from minmo import console
from minmo.training.command import train

if __name__ == "__main__":
    app = typer.Typer()
    app.command()(train)
    console.run(app)
