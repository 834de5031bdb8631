# SPDX-License-Identifier: Apache-2.0
"""The command line: its verbs, and what a failure exits with."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Annotated

import typer

from freewheel.commands.bench import bench
from freewheel.commands.build import build
from freewheel.commands.calibrate import calibrate
from freewheel.commands.configs import configs
from freewheel.commands.doctor import doctor
from freewheel.commands.inspect import inspect
from freewheel.commands.lora import lora
from freewheel.commands.parsing import Command, Commands
from freewheel.commands.policies import policies
from freewheel.commands.replay import replay
from freewheel.commands.run import run
from freewheel.commands.screen import Screen, may_speak
from freewheel.commands.serve import serve
from freewheel.commands.tune import tune
from freewheel.commands.verify import verify
from freewheel.commands.videos import videos
from freewheel.core.errors import FreewheelError

app = typer.Typer(
    name="freewheel",
    cls=Commands,
    help="Compile diffusion transformers at their cache boundaries, and run them with a cache policy per request.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
VERBS = (
    build, run, replay, inspect, verify, bench, calibrate, tune, lora, serve, videos, policies, configs, doctor,
)  # fmt: skip
for verb in VERBS:
    app.command(cls=Command)(verb)


class Bug(FreewheelError):
    """A failure that nobody expected; its traceback is printed too."""

    code, exit_code = "bug", 70


def _print_version(wanted: bool) -> None:
    if wanted:
        from freewheel import __version__

        sys.stdout.write(f"freewheel {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version, and stop.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Take the options that come before a verb."""


def main() -> None:
    """Run the command line; a bug of ours exits with 70 and its traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # nothing half written is left
    try:
        app()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        speaks = may_speak()
        traceback.print_exc()
        if speaks and "--json" in sys.argv:
            what = f"internal error: {type(error).__name__}: {error}"
            Screen(as_json=True).error(Bug("freewheel", what, "report the traceback"))
        raise SystemExit(Bug.exit_code) from None


if __name__ == "__main__":
    main()
