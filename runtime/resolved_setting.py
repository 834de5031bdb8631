# SPDX-License-Identifier: Apache-2.0
"""A cache setting against a bundle: its policy's signal and parameters, and whether it folds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..bundle.manifest import Manifest, PolicyEntry, SignalEntry
from ..bundle.sections import Sections, divide
from ..core.errors import ConfigError, nearest
from ..policies.setting import CacheSetting
from ..policies.spec import PolicySpec, Value
from ..policies.stretch import Stretch
from .settings import carried_policy

__all__ = ["ResolvedSetting", "resolve"]


@dataclass(frozen=True)
class ResolvedSetting:
    """A cache setting checked against the bundle.

    Attributes:
        setting: As asked for, and a bound's number of computed steps.
        policy: The policy's entry in the manifest.
        parameters: Every parameter, defaults filled in.
        signal_name: Signal kind given to the policy, or None.
        signal: The signal's entry, or None.
        sections: Where the body divides, if the signal is what its first blocks add, or None.
    """

    setting: CacheSetting
    policy: PolicyEntry
    parameters: Mapping[str, Value]
    signal_name: str | None
    signal: SignalEntry | None
    sections: Sections | None = None

    @property
    def is_folded(self) -> bool:
        """Whether decisions depend on timesteps alone, and so can be taken ahead of the loop."""
        if self.policy.spec.content is not None or self.setting.deadline is not None:
            return False
        return self.signal is None or self.signal.known == "run"

    def check_whole(self, stretch: Stretch | None) -> None:
        """Refuse a run of other steps than those that its bound's quality was measured at.

        Args:
            stretch: Of the run over the setting's tables.

        Raises:
            ConfigError: as said.
        """
        bound = self.setting.min_psnr
        if bound is None or stretch is None or stretch.is_whole:
            return
        made, steps = stretch.made, stretch.steps
        where = f"min_psnr {bound:g}"
        if stretch.first:
            raise ConfigError(
                where,
                f"was measured for whole runs of {made} steps, and this one begins at step "
                f"{stretch.first} of these",
                "give no bound to a run that begins in the midst",
            )
        raise ConfigError(
            where,
            f"was measured for runs of {made} steps, and this one has {steps}",
            f"run {made} steps, or calibrate with --steps {steps}",
        )

    @property
    def always_run(self) -> float:
        """Part of the body that a reused step runs, 0 to below 1."""
        return 0.0 if self.sections is None else self.sections.always_run

    @property
    def depth(self) -> int:
        """Residuals that the policy mixes."""
        return self.policy.spec.history.kept(self.parameters)


def _check_deadline(manifest: Manifest, policy: PolicyEntry) -> None:
    """Refuse a deadline where no policy looks at it, or two transformers would each have it."""
    where = f"deadline of policy '{policy.spec.name}'"
    if "seconds_left" not in manifest.graphs[policy.graph].inputs:
        raise ConfigError(
            where,
            "can't be kept: the policy does not choose its computed steps by the time left",
            "take a 'solved' config, as 'freewheel calibrate' writes them, or give no deadline",
        )
    if len(manifest.experts) > 1:
        raise ConfigError(
            where,
            "can't be kept: the bundle has two transformers, and each plans its own steps",
            "give no deadline, or set computed_steps",
        )


def resolve(manifest: Manifest, setting: CacheSetting) -> ResolvedSetting:
    """Check a setting against a bundle and fill its defaults in.

    Args:
        manifest: The bundle's.
        setting: As asked for; what it becomes in every branch is checked too.

    Raises:
        ConfigError: unknown policy or parameter, a signal that the model does not give it, blocks
            that can't always run, or a deadline or a bound that the policy can't keep.
    """
    setting = setting.keeping_bound()
    policy = carried_policy(manifest, setting.policy)
    if setting.deadline is not None:
        _check_deadline(manifest, policy)
    spec = policy.spec
    name = spec.signal_of(setting.signal, manifest.signals)
    if name is None and spec.signals:
        name = spec.signals[0]
    if name is not None and name not in manifest.signals:
        known = [s for s in spec.signals if s in manifest.signals]
        hint = "use another policy; a probe of the first block needs --weights inputs"
        raise ConfigError(
            f"signal '{name}'",
            f"can't be given to policy '{setting.policy}' on this model",
            nearest(name, known) if known else hint,
        )
    signal = manifest.signals[name] if name is not None else None
    of_branches = [spec.resolve(one.parameters) for one in setting.every_branch()]
    parameters = of_branches[0]
    sections, *_ = [_sections(manifest, spec, signal, own) for own in of_branches]
    return ResolvedSetting(setting, policy, parameters, name, signal, sections)


def _sections(
    manifest: Manifest,
    spec: PolicySpec,
    signal: SignalEntry | None,
    parameters: Mapping[str, Value],
) -> Sections | None:
    """Return where the body divides for a policy whose signal is what its first blocks add."""
    graphs = manifest.graphs
    probes = (g.outputs for g in graphs.values() if g.runs == "probe")
    if signal is None or not any(signal.value in outputs for outputs in probes):
        return None
    found = divide(manifest.stages, graphs, manifest.cached, *spec.always_run(parameters))
    lacking = [s for s in found.streams[len(manifest.cached) :] if f"delta.{s}" not in graphs]
    if lacking:
        raise ConfigError(
            f"policy '{spec.name}', stream '{lacking[0]}'",
            "has no graphs that keep what cached blocks change of it, and the last blocks read it",
            "build the bundle again",
        )
    return found
