"""How a command ends: what the user can mend is one sentence on stderr and exit code 2."""

from __future__ import annotations

import sys
from typing import NoReturn

import torch
import typer
from rich.console import Console

from minmo_kernels.dispatch import BackendError

err = Console(stderr=True)


def run(app: typer.Typer) -> None:
    """Runs a command line as this process and ends it."""
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        _refuse(f"the GPU's memory is full ({str(error):.100}…); use a smaller model, bfloat16, or fewer tokens")
    except (ValueError, OSError, FloatingPointError, BackendError) as error:
        _refuse(str(error))
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's own: their class has moved between its versions
        if usage is None:
            raise
        _refuse(f"{usage().rstrip('.')}; see minmo --help")
    sys.exit(code or 0)


def shown(text: str) -> str:
    """Text that may be anybody's, without what would command a terminal: of characters that do not print, lines alone
    are kept."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _refuse(sentence: str) -> NoReturn:
    err.print(f"minmo: {shown(sentence)}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(2)
