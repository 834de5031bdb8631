# SPDX-License-Identifier: Apache-2.0
"""Answer OpenAI's ``/v1/videos``: create, poll, fetch, list, cancel; one video at a time.

A job waits in a queue for the one worker that owns the pipeline. There is no authentication: what
is to be reached from elsewhere stands behind a proxy that has one.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ..bundle.dims import nearest_video
from ..core.errors import FreewheelError, RequestError, nearest
from ..runtime.pipeline.generate import Generator
from ..runtime.pipeline.request import GenerationRequest
from ..runtime.pipeline.video import write_video
from ..runtime.settings import choose_setting

__all__ = ["VideoJobs", "videos_app"]

MOST_WAITING = 64
MOST_BYTES = 32 << 20
NUMBERS: Mapping[str, Callable[[str], Any]] = {"steps": int, "seed": int, "guidance_scale": float}
"""Fields beyond OpenAI's, as `GenerationRequest` has them; ``cache`` and ``negative_prompt`` are text."""


class _Cancelled(Exception):
    """The job that runs was deleted."""


@dataclass
class _Job:
    request: GenerationRequest
    model: str
    fps: int
    id: str = field(default_factory=lambda: f"video_{uuid.uuid4().hex}")
    status: str = "queued"
    progress: int = 0
    created_at: int = field(default_factory=lambda: int(time.time()))
    completed_at: int | None = None
    error: dict[str, str] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return OpenAI's video object."""
        width, height, frames = (self.request.value(n) for n in ("width", "height", "frames"))
        return {
            "id": self.id, "object": "video", "model": self.model, "status": self.status,
            "progress": self.progress, "created_at": self.created_at, "completed_at": self.completed_at,
            "expires_at": None, "prompt": self.request.prompt, "size": f"{width}x{height}",
            "seconds": f"{(frames - 1) / self.fps:g}", "error": self.error, "remixed_from_video_id": None,
        }  # fmt: skip


class VideoJobs:
    """Jobs by id, and the thread that works them off.

    Args:
        generator: The loaded pipeline; nobody else may use it meanwhile.
        folder: Where videos lie until they are deleted.
        cache: Config or policy of requests that name none; None takes the bundle's default.
        fps: Frames per second.
        check: Raises of a request what its run would, ahead of it: that memory will not hold it.
    """

    def __init__(
        self,
        generator: Generator,
        folder: Path,
        *,
        cache: str | None = None,
        fps: int = 8,
        check: Callable[[GenerationRequest], object] = lambda request: None,
    ) -> None:
        self.model = generator.bundle.folder.resolve().name
        self._generator, self._folder, self._cache, self._fps = generator, folder, cache, fps
        self._check = check
        self._jobs: dict[str, _Job] = {}
        self._waiting: queue.Queue[_Job] = queue.Queue(MOST_WAITING)
        folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._work, daemon=True, name="videos").start()

    def create(self, fields: Mapping[str, str], image: bytes | None = None) -> dict[str, Any]:
        """Check a request and queue it.

        Args:
            fields: OpenAI's ``prompt``, ``model``, ``size`` (``96x64``) and ``seconds``, and ours:
                ``cache``, ``steps``, ``seed``, ``guidance_scale``, ``negative_prompt``.
            image: Its first frame, png or jpeg, for image-to-video.

        Raises:
            ConfigError, RequestError: a field is missing, unknown or out of range, another model is
                asked for, or too many wait.
        """
        known = {"prompt", "model", "size", "seconds", "cache", "negative_prompt", *NUMBERS}
        if unknown := sorted(set(fields) - known):
            raise RequestError(f"field '{unknown[0]}'", "is not known", f"one of {sorted(known)}")
        if not fields.get("prompt"):
            raise RequestError("field 'prompt'", "is missing", "say what to show")
        if fields.get("model", self.model) != self.model:
            raise RequestError(f"model '{fields['model']}'", "is not served", f"'{self.model}' is")
        bundle = self._generator.bundle
        cache = fields.get("cache")
        # A path is the operator's to give, not a stranger's.
        named = {*bundle.manifest.configs, *bundle.manifest.policies}
        if cache is not None and cache not in named:
            raise RequestError(
                f"field 'cache': '{cache}'", "is not known", nearest(cache, sorted(named))
            )
        chosen = choose_setting(bundle, cache or self._cache, {}, lambda _: None)
        values = {n: _number(n, fields[n], kind) for n, kind in NUMBERS.items() if n in fields}
        values |= _size(fields.get("size")) | self._frames(fields.get("seconds"))
        request = GenerationRequest(
            prompt=fields["prompt"],
            negative_prompt=fields.get("negative_prompt", ""),
            cache=chosen.cache,
            defaults=chosen.generation,
            **values,
        )
        job = _Job(request, self.model, self._fps)
        if image is not None:
            path = self._image(job)
            path.write_bytes(image)
            job.request = GenerationRequest(**{**vars(request), "image": path})
        try:
            job.request.check()
            self._check(job.request)
            self._waiting.put_nowait(job)
        except (FreewheelError, queue.Full) as error:
            self._remove(job)
            if isinstance(error, FreewheelError):
                raise
            full = f"{MOST_WAITING} videos wait already"
            raise RequestError("queue", full, "ask again later") from error
        self._jobs[job.id] = job
        return job.as_dict()

    def every(self) -> list[dict[str, Any]]:
        """Return every job, the newest first."""
        return [job.as_dict() for job in reversed(self._jobs.values())]

    def get(self, name: str) -> dict[str, Any]:
        """Return a job.

        Raises:
            RequestError: there is none of this name.
        """
        return self._job(name).as_dict()

    def content(self, name: str) -> Path:
        """Return a finished job's video.

        Raises:
            RequestError: there is no such job, or it has not finished.
        """
        job = self._job(name)
        if job.status != "completed":
            raise RequestError(f"video '{name}'", f"is {job.status}", "ask once it is completed")
        return self._path(job)

    def delete(self, name: str) -> None:
        """Forget a job and its files: one that waits is not begun, one that runs ends at its step.

        Raises:
            RequestError: there is none of this name.
        """
        job = self._job(name)
        self._jobs.pop(name, None)
        self._remove(job)

    def is_known(self, name: str) -> bool:
        """Tell whether there is such a job."""
        return name in self._jobs

    def _job(self, name: str) -> _Job:
        if name not in self._jobs:
            raise RequestError(f"video '{name}'", "is not known", "list them at /v1/videos")
        return self._jobs[name]

    def _path(self, job: _Job) -> Path:
        return self._folder / f"{job.id}.mp4"

    def _image(self, job: _Job) -> Path:
        return self._folder / f"{job.id}.image"

    def _remove(self, job: _Job) -> None:
        for path in (self._path(job), self._image(job)):
            path.unlink(missing_ok=True)

    def _frames(self, seconds: str | None) -> dict[str, int]:
        if seconds is None:
            return {}
        manifest = self._generator.bundle.manifest
        wanted = _number("seconds", seconds, float) * self._fps
        if not 0 < wanted < 1e6:
            raise RequestError(f"field 'seconds': {seconds}", "is no length", "try 2")
        frames = max(round(wanted), manifest.latent_scale.frames + 1)
        return {"frames": nearest_video("frames", frames, manifest.latent_scale, manifest.dims)}

    def _work(self) -> None:
        while True:
            job = self._waiting.get()
            if job.id in self._jobs:
                self._make(job)
            self._waiting.task_done()

    def _make(self, job: _Job) -> None:
        def on_step(done: int, total: int) -> None:
            if job.id not in self._jobs:
                raise _Cancelled
            job.progress = 100 * done // total

        job.status = "in_progress"
        try:
            result = self._generator.generate(job.request, on_step=on_step)
            write_video(result.frames, self._path(job), self._fps)
        except _Cancelled:
            return
        except Exception as error:  # whatever it is: the next job is to run
            job.error = {"code": getattr(error, "code", "internal"), "message": str(error)}
            job.status = "failed"
        else:
            job.progress, job.status = 100, "completed"
        finally:
            self._image(job).unlink(missing_ok=True)
        job.completed_at = int(time.time())
        if job.id not in self._jobs:  # deleted while it was decoded
            self._remove(job)


def videos_app(jobs: VideoJobs) -> Starlette:
    """Return the ASGI application over some jobs."""

    async def create(request: Request) -> Response:
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise RequestError("request", "does not tell its length", "send 'Content-Length'")
        if int(length) > MOST_BYTES:
            raise RequestError("request", f"is above {MOST_BYTES >> 20} MiB", "send less")
        if request.headers.get("content-type", "").startswith("application/json"):
            try:
                given = await request.json()
            except ValueError:
                given = None
            if not isinstance(given, dict):
                raise RequestError("request", "is no JSON object", 'send {"prompt": "…"}')
            return JSONResponse(jobs.create({n: str(v) for n, v in given.items() if v is not None}))
        async with request.form() as form:
            fields = {n: v for n, v in form.items() if isinstance(v, str)}
            upload = form.get("input_reference")
            image = None if upload is None or isinstance(upload, str) else await upload.read()
        return JSONResponse(jobs.create(fields, image))

    async def every(request: Request) -> Response:
        data = jobs.every()
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return JSONResponse({"object": "list", "data": data, "has_more": False, **ends})

    async def one(request: Request) -> Response:
        return JSONResponse(jobs.get(request.path_params["name"]))

    async def content(request: Request) -> Response:
        return FileResponse(jobs.content(request.path_params["name"]), media_type="video/mp4")

    async def delete(request: Request) -> Response:
        name = request.path_params["name"]
        jobs.delete(name)
        return JSONResponse({"id": name, "object": "video.deleted", "deleted": True})

    async def refused(request: Request, error: Exception) -> Response:
        where = getattr(error, "where", "")
        status = 429 if where == "queue" else 400
        if "name" in request.path_params:
            status = 409 if jobs.is_known(request.path_params["name"]) else 404
        told = {"message": str(error), "type": "invalid_request_error", "param": None}
        code = getattr(error, "code", "request")
        return JSONResponse({"error": {**told, "code": code}}, status_code=status)

    routes = [
        Route("/v1/videos", create, methods=["POST"]),
        Route("/v1/videos", every, methods=["GET"]),
        Route("/v1/videos/{name}", one, methods=["GET"]),
        Route("/v1/videos/{name}", delete, methods=["DELETE"]),
        Route("/v1/videos/{name}/content", content, methods=["GET"]),
    ]
    return Starlette(routes=routes, exception_handlers={FreewheelError: refused})


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise RequestError(f"field '{name}': '{text}'", "is no number", "leave it out") from error


def _size(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    width, _, height = text.partition("x")
    return {"width": _number("size", width, int), "height": _number("size", height, int)}
