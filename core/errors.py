# SPDX-License-Identifier: Apache-2.0
"""The errors a caller may handle, one class per thing they would do about it.

Every message reads: where (file, segment, tensor, field), what (found and expected), what to do.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "BuildError",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DependencyError",
    "ExportError",
    "FreewheelError",
    "MismatchError",
    "NotFiniteError",
    "OutputError",
    "PassError",
    "RankError",
    "RequestError",
    "guess",
    "nearest",
]


class FreewheelError(Exception):
    """Base of every expected failure; carries the three parts of its message.

    Args:
        where: The file, segment, tensor or field path at fault.
        what: What was found and what was expected, with values.
        hint: What to do: a command, flag or edit.
    """

    code = "failed"
    exit_code = 1

    def __init__(self, where: str, what: str, hint: str = "") -> None:
        self.where, self.what, self.hint = where, what, hint
        super().__init__(f"{where}: {what}; {hint}" if hint else f"{where}: {what}")


class ConfigError(FreewheelError):
    """A caching config, a policy name or a parameter is wrong."""

    code, exit_code = "config", 3


class CheckpointError(FreewheelError):
    """A checkpoint is missing, truncated or of another architecture."""

    code, exit_code = "checkpoint", 3


class BundleError(FreewheelError):
    """A bundle can't be read, or is not what its manifest says."""

    code, exit_code = "bundle", 3


class RequestError(FreewheelError):
    """A run was asked for something the bundle can't do (shape, step count, prompt)."""

    code, exit_code = "request", 3


class RankError(FreewheelError):
    """Of several processes of one job, one is gone, silent, failed, or does something else."""

    code, exit_code = "rank", 1


class OutputError(FreewheelError):
    """A file or folder can't be written."""

    code, exit_code = "output", 3


class ExportError(FreewheelError):
    """A segment could not be traced to ONNX."""

    code, exit_code = "export", 1


class PassError(FreewheelError):
    """A graph pass found a graph it can't work on, or broke its own promise."""

    code, exit_code = "pass", 1


class BuildError(FreewheelError):
    """A backend refused to compile a graph."""

    code, exit_code = "build", 1


class BackendUnavailable(FreewheelError):
    """The wanted backend is not installed or can't run on this machine."""

    code, exit_code = "backend", 4


class DependencyError(FreewheelError):
    """A command wants a package that is not installed; the hint names the extra that brings it."""

    code, exit_code = "dependency", 4


class MismatchError(FreewheelError):
    """`verify` found an output that differs from the reference."""

    code, exit_code = "mismatch", 5


class NotFiniteError(FreewheelError):
    """A run made values that are not finite; names branch, step and segment."""

    code, exit_code = "not_finite", 5


def nearest(name: str, known: list[str]) -> str:
    """Say which names are known and which one ``name`` most resembles, for an error's hint."""
    match = guess(name, known).removeprefix("; ")
    return f"{match}{' ' if match else ''}known: {', '.join(sorted(known))}"


def guess(name: str, known: list[str]) -> str:
    """Ask whether the name that ``name`` most resembles was meant; empty where none does."""
    from difflib import get_close_matches

    match = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
