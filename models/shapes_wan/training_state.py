# SPDX-License-Identifier: Apache-2.0
"""Keep all that a training run needs to go on as if it had never stopped."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

Settings = Mapping[str, int | float | str]


class ResumeError(ValueError):
    """A saved state was made with other settings than this run's."""


@dataclass
class TrainingState:
    """What changes while training.

    Attributes:
        modules: The trained modules by name.
        optimizer: Over the parameters of ``modules``.
        generator: Source of every random number of the run.
        ema: Moving average of the parameters, in ``modules.parameters()`` order; empty if unused.
        iteration: Optimizer steps done.
    """

    modules: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    ema: list[Tensor]
    iteration: int = 0

    def save(self, path: Path, settings: Settings) -> None:
        """Write the state; a reader finds the old file or the new one, never a part."""
        content = {
            "settings": dict(settings),
            "iteration": self.iteration,
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "ema": self.ema,
        }
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def restore(self, path: Path, settings: Settings) -> bool:
        """Take the state from a file, if there is one.

        Returns:
            Whether there was one.

        Raises:
            ResumeError: The file was written under other settings.
        """
        if not path.exists():
            return False
        content = torch.load(path, weights_only=True)
        found = content["settings"]
        names = sorted({*found, *settings})
        faults = [
            f"'{name}' is {found.get(name)} but this run asks for {settings.get(name)}"
            for name in names
            if found.get(name) != settings.get(name)
        ]
        if faults:
            raise ResumeError(
                f"{path}: {'; '.join(faults)}; "
                "repeat the run's settings, or train into another --work-dir"
            )
        self.modules.load_state_dict(content["modules"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.generator.set_state(content["generator"])
        self.ema = content["ema"]
        self.iteration = content["iteration"]
        return True

    def update_ema(self) -> None:
        """Move the average towards the parameters, by a tenth at first, by a thousandth later."""
        decay = min(0.999, (1 + self.iteration) / (10 + self.iteration))
        parameters = [parameter.detach() for parameter in self.modules.parameters()]
        torch._foreach_lerp_(self.ema, parameters, 1 - decay)
