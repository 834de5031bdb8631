"""OpenAI's own client against a server on this machine: create, poll, fetch, list, cancel."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from freewheel.core.errors import RequestError
from freewheel.runtime.pipeline.generate import Generator

openai = pytest.importorskip("openai", reason="the package 'openai' is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra 'videos' is not installed")
pytest.importorskip("starlette", reason="the extra 'videos' is not installed")

from freewheel.serving.videos import MOST_WAITING, VideoJobs, videos_app  # noqa: E402

HANG_SECONDS = 300
"""A test that hangs fails then."""

SMALL = {"size": "48x32", "seconds": "0.5", "extra_body": {"steps": "3", "seed": "7"}}


class Gate:
    """A generator that waits at each step until it is let on."""

    def __init__(self, generator: Generator) -> None:
        self._generator, self.bundle = generator, generator.bundle
        self.opened, self.reached = threading.Event(), threading.Event()
        self.opened.set()
        self.steps = 0

    def generate(self, request: Any, *, on_step: Any) -> Any:
        def held(done: int, total: int) -> None:
            self.steps += 1
            self.reached.set()
            assert self.opened.wait(HANG_SECONDS)
            on_step(done, total)

        return self._generator.generate(request, on_step=held)


@pytest.fixture(scope="module")
def gate(generator: Generator) -> Gate:
    return Gate(generator)


@pytest.fixture(scope="module")
def jobs(gate: Any, tmp_path_factory: pytest.TempPathFactory) -> VideoJobs:
    return VideoJobs(gate, tmp_path_factory.mktemp("videos") / "new")


@pytest.fixture(scope="module")
def client(jobs: VideoJobs) -> Iterator[Any]:
    server = uvicorn.Server(uvicorn.Config(videos_app(jobs), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.should_exit = True
    thread.join(10)


def until(holds: Any, seconds: float = HANG_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_a_video_is_created_polled_and_fetched(
    client: Any, jobs: VideoJobs, tmp_path: Path
) -> None:
    made = client.videos.create_and_poll(
        model=jobs.model, prompt="a red circle", poll_interval_ms=50, **SMALL
    )
    assert (made.status, made.progress, made.error) == ("completed", 100, None)
    assert (made.size, made.model, made.prompt) == ("48x32", jobs.model, "a red circle")
    path = tmp_path / "video.mp4"
    client.videos.download_content(made.id).write_to_file(path)
    import imageio.v3 as iio

    frames = iio.imread(path)
    assert frames.shape == (5, 32, 48, 3), "half a second of 8 frames, 1 more than a multiple of 4"
    assert float(made.seconds) == 0.5
    assert frames.std() > 5
    assert next(v.id for v in client.videos.list()) == made.id
    client.videos.delete(made.id)
    with pytest.raises(openai.NotFoundError, match="is not known"):
        client.videos.retrieve(made.id)
    assert list(jobs._folder.iterdir()) == []


@pytest.mark.parametrize(("seconds", "frames"), [("0.1", 5), ("1", 9), ("1.2", 9), ("1.4", 13)])
def test_a_length_is_the_nearest_that_the_model_takes(
    jobs: VideoJobs, seconds: str, frames: int
) -> None:
    assert jobs._frames(seconds) == {"frames": frames}


def test_a_running_video_is_cancelled_within_a_step_and_the_next_one_runs(
    client: Any, gate: Gate
) -> None:
    gate.opened.clear()
    gate.reached.clear()
    gate.steps = 0
    first = client.videos.create(prompt="first", **{**SMALL, "extra_body": {"steps": "20"}})
    second = client.videos.create(prompt="second", **SMALL)
    assert gate.reached.wait(HANG_SECONDS)
    assert client.videos.retrieve(first.id).status == "in_progress"
    assert client.videos.retrieve(second.id).status == "queued"
    with pytest.raises(openai.ConflictError, match="is in_progress"):
        client.videos.download_content(first.id).read()
    client.videos.delete(first.id)
    gate.opened.set()
    until(lambda: client.videos.retrieve(second.id).status == "completed")
    assert gate.steps == 1 + 3, "one step of the first, and all of the second"


def test_a_waiting_video_that_is_deleted_never_begins(client: Any, gate: Gate) -> None:
    gate.opened.clear()
    gate.reached.clear()
    gate.steps = 0
    first = client.videos.create(prompt="first", **SMALL)
    assert gate.reached.wait(HANG_SECONDS)
    second = client.videos.create(prompt="second", **SMALL)
    client.videos.delete(second.id)
    third = client.videos.create(prompt="third", **SMALL)
    gate.opened.set()
    until(lambda: client.videos.retrieve(third.id).status == "completed")
    assert client.videos.retrieve(first.id).status == "completed"
    assert gate.steps == 6


def test_what_only_the_run_refuses_is_a_failed_video(client: Any) -> None:
    made = client.videos.create_and_poll(
        prompt="p", poll_interval_ms=50, size="49x32", extra_body={"steps": "2"}
    )
    assert made.status == "failed"
    assert "is no multiple of" in made.error.message


def test_an_image_is_the_first_frame_and_refused_by_a_text_model(client: Any) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(stream, "PNG")
    made = client.videos.create_and_poll(
        prompt="p", poll_interval_ms=50, input_reference=("a.png", stream.getvalue()), **SMALL
    )
    assert made.status == "failed"
    assert "--image: is nothing that WanPipeline takes" in made.error.message


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": ""}, "field 'prompt': is missing"),
        ({"model": "sora-2"}, "model 'sora-2': is not served"),
        ({"size": "wide"}, "is no number"),
        ({"seconds": "nan"}, "is no length"),
        ({"extra_body": {"steps": "0"}}, r"outside \[1, 1000\]"),
        ({"extra_body": {"steps": "many"}}, "is no number"),
        ({"extra_body": {"cache": "/etc/passwd"}}, "field 'cache': '/etc/passwd': is not known"),
        ({"extra_body": {"sampler": "x"}}, "field 'sampler': is not known"),
        ({"input_reference": ("a.png", b"no picture")}, "can't be read"),
    ],
)
def test_a_bad_request_is_refused_at_once(
    client: Any, jobs: VideoJobs, fields: dict[str, Any], says: str
) -> None:
    before = {j["id"] for j in jobs.every()}
    with pytest.raises(openai.BadRequestError, match=says):
        client.videos.create(**{"prompt": "p", **fields})
    assert {j["id"] for j in jobs.every()} == before
    assert not list(jobs._folder.glob("*.image"))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"prompt": ', "is no JSON object"),
        ('["p"]', "is no JSON object"),
        ([b'{"prompt": "p"}'], "does not tell its length"),
    ],
    ids=["cut off", "a list", "in chunks"],
)
def test_a_body_that_cannot_be_read_is_refused(jobs: VideoJobs, body: Any, says: str) -> None:
    testclient = pytest.importorskip("starlette.testclient", reason="httpx is not installed")
    content = body if isinstance(body, str) else iter(body)
    answer = testclient.TestClient(videos_app(jobs)).post(
        "/v1/videos", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_the_policy_of_a_request_is_the_one_that_runs(jobs: VideoJobs) -> None:
    made = jobs.create({"prompt": "p", "cache": "taylorseer", "steps": "2"})
    assert jobs._jobs[made["id"]].request.cache.policy == "taylorseer"
    jobs.delete(made["id"])


def test_a_full_queue_refuses(gate: Any, tmp_path: Path) -> None:
    gate.opened.clear()
    own = VideoJobs(gate, tmp_path)
    try:
        for _ in range(MOST_WAITING):
            own.create({"prompt": "p", "steps": "1"})
        until(lambda: own._waiting.qsize() == MOST_WAITING - 1)  # one is at work
        own.create({"prompt": "p", "steps": "1"})
        with pytest.raises(RequestError, match=f"queue: {MOST_WAITING} videos wait already"):
            own.create({"prompt": "p", "steps": "1"})
    finally:
        for job in own.every():
            own.delete(job["id"])
        gate.opened.set()
    own._waiting.join()
    assert list(tmp_path.iterdir()) == []
