# SPDX-License-Identifier: Apache-2.0
"""The diffusers drop-in: put a bundle where a pipeline's transformer was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...bundle.reader import Bundle
from ...bundle.streams import check_samples_one
from ...core.errors import RequestError
from ...policies.setting import CacheSetting
from ..distributed.layout import Layout, layout_of
from ..distributed.ranks import Ranks, facts_of
from ..distributed.sequence import SharedModel
from ..lora import check_parts, parse_lora
from ..model import DeviceOptions, Model
from .adapters import Adapters, check_transformer
from .transformer import FreewheelTransformer

__all__ = ["attach", "attached"]


def attach(
    pipe: Any,
    bundle: Bundle | Path | str,
    cache: CacheSetting | str | Path | None = None,
    *,
    backend: str | None = None,
    loras: Sequence[str] = (),
    options: DeviceOptions | None = None,
    ranks: Ranks | None = None,
    guidance_ranks: int | None = None,
) -> FreewheelTransformer:
    """Replace ``pipe.transformer`` by the engines of a bundle.

    Schedulers, callbacks, guidance, VAE and every verb of the pipeline's LoRA interface keep
    working; adapters that are loaded already are taken over. Pipelines made of this one
    (``from_pipe``, ``components``, ``copy.deepcopy``) run on the engines too. A bundle with two
    experts replaces both transformers; each keeps a cache and statistics of its own over the
    timesteps that it denoises.

    Args:
        pipe: A diffusers pipeline of the bundle's family, with the weights that the bundle was
            built from.
        bundle: What `build` wrote.
        cache: A config name or file, a policy name, or a resolved setting; None takes the
            bundle's default config. Change it between runs with `FreewheelTransformer.use`.
        backend: Name of a backend the bundle has engines for; None takes its first.
        loras: ``FILE[:scale]``, fused into the weights: they stay whatever the pipeline loads and
            unloads later. ``transformer_2=FILE[:scale]`` is of the second expert.
        options: How engines are driven: weights kept in host memory, CUDA graphs.
        ranks: Of `join_ranks`: processes that share the runs, each of which runs this same script. None
            runs all here.
        guidance_ranks: Groups of ranks that branches of guidance are shared out over, 1 or 2; the ranks
            of a group share a sequence, for which the bundle must have been built. None takes 2, or 1
            where the bundle was built so.

    Returns:
        What chooses the cache, of two experts for both, and tells what the last run did. Of two
        experts it tells of that of the high noise levels; ``pipe.transformer.freewheel`` is the
        same, and ``pipe.transformer_2.freewheel`` chooses and tells for the other alone.

    Raises:
        BundleError, BackendUnavailable, ConfigError: as their classes say.
        RequestError: the pipeline's transformer is not the bundle's, a LoRA can't be applied, ranks
            are to share a model that samples several things at once, or can't share what they are to.
        RankError: another rank attaches something else, or is lost.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
    files = [parse_lora(lora) for lora in loras]
    if ranks is not None:
        check_samples_one(
            opened.manifest.latents, f"bundle '{opened.folder}'", "ranks trade one output a branch"
        )
        ranks.compare({**facts_of(opened, backend), "guidance_ranks": str(guidance_ranks)})
    layout = None if ranks is None else layout_of(ranks, opened.manifest, guidance_ranks)
    _check_boundary(pipe, opened)
    _check_timesteps(pipe)
    experts = opened.manifest.experts
    parts = [expert.part for expert in experts] or ["transformer"]
    check_parts(files, parts)
    made: dict[str, FreewheelTransformer] = {}
    for index, part in enumerate(parts):
        model = _model(opened, backend, options, index, layout)
        standing = getattr(pipe, part, None)
        known = getattr(standing, "freewheel", None)
        if known is not None and known.is_fused:
            raise RequestError(
                f"pipeline, '{part}'",
                "has adapters fused into it",
                "call pipe.unfuse_lora() before attach, or attach to a pipeline loaded anew",
            )
        if standing is not None and known is None:
            check_transformer(opened, model.prefix, standing)
        made[part] = FreewheelTransformer(
            model, pipe, Adapters(opened, model.prefix, standing), layout
        )
    first = made[parts[0]]
    first.experts = list(made.values())
    first.use(cache)
    before = {part: getattr(pipe, part, None) for part in parts}
    first.remember(before)
    try:
        for part, transformer in made.items():
            setattr(pipe, part, transformer.module)
        for part, transformer in made.items():
            transformer.fuse(pipe, [file for file in files if file.part == part])
    except BaseException:
        for part, standing in before.items():
            setattr(pipe, part, standing)
        raise
    return first


@contextmanager
def attached(
    pipe: Any,
    bundle: Bundle | Path | str,
    cache: CacheSetting | str | Path | None = None,
    *,
    backend: str | None = None,
    loras: Sequence[str] = (),
    options: DeviceOptions | None = None,
    ranks: Ranks | None = None,
    guidance_ranks: int | None = None,
) -> Iterator[FreewheelTransformer]:
    """Attach for the length of a ``with`` block; keeps the pipeline's own transformers in memory.

    Args and raises: as `attach`.
    """
    parts = ("transformer", "transformer_2")
    before = {part: getattr(pipe, part) for part in parts if hasattr(pipe, part)}
    try:
        yield attach(
            pipe,
            bundle,
            cache,
            backend=backend,
            loras=loras,
            options=options,
            ranks=ranks,
            guidance_ranks=guidance_ranks,
        )
    finally:
        for part, standing in before.items():
            setattr(pipe, part, standing)


def _model(
    bundle: Bundle,
    backend: str | None,
    options: DeviceOptions | None,
    expert: int,
    layout: Layout | None,
) -> Model:
    if layout is None or layout.sequence is None:
        return Model(bundle, backend, options, expert)
    return SharedModel(bundle, backend, options, expert, ranks=layout.sequence)


def _check_boundary(pipe: Any, bundle: Bundle) -> None:
    """Raise `RequestError` where the pipeline would switch experts elsewhere than the bundle."""
    experts = bundle.manifest.experts
    ratio = pipe.config.get("boundary_ratio")
    found = None if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps
    wanted = experts[0].from_timestep if experts else None
    if found != wanted:
        raise RequestError(
            "pipeline, 'boundary_ratio'",
            f"switches transformers at timestep {found}, the bundle at {wanted}",
            "attach to the pipeline that the bundle was built from",
        )


def _check_timesteps(pipe: Any) -> None:
    """Raise `RequestError` where the pipeline would give tokens timesteps of their own.

    Wan 2.2 TI2V's text-to-video gives every token the step's one, which is the same as none.
    """
    takes_image = "image" in inspect.signature(type(pipe).__call__).parameters
    if pipe.config.get("expand_timesteps") and takes_image:
        raise RequestError(
            "pipeline, 'expand_timesteps'",
            "gives the first frame's tokens a timestep of their own, and a cut model has one per step",
            "attach to the text-to-video pipeline of this checkpoint",
        )
