"""Send one request to a served bundle over gRPC, show its progress, keep the result.

    python examples/triton_client.py --model wan --prompt "a red circle moving right" \
        --set policy=teacache --set stream=1 --out video.gif

Needs `tritonclient[grpc]`, and Pillow for .gif. A server without the bundle's tokenizer takes token
ids: --tokenizer names the folder of a tokenizer to make them here (needs `tokenizers`). Interrupt it and the server
stops the run within one step.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

DTYPES = {np.dtype(np.float32): "FP32", np.dtype(np.int64): "INT64", np.dtype(object): "BYTES"}


def text(prompt: str) -> np.ndarray:
    """Return a prompt as the one element of a tensor."""
    return np.array([prompt.encode()], object)


def ids_of(prompt: str, tokenizer: str) -> np.ndarray:
    """Return the token ids of a prompt, its end token included: int64 [tokens]."""
    from tokenizers import Tokenizer

    encoding = Tokenizer.from_file(str(Path(tokenizer) / "tokenizer.json")).encode(prompt)
    return np.array(encoding.ids, np.int64)


def stream(
    client: triton.InferenceServerClient,
    model: str,
    tensors: dict[str, np.ndarray],
    parameters: dict[str, str],
) -> Iterator[triton.InferResult]:
    """Send a request; yield each response, progress first and the result last."""
    inputs = []
    for name, array in tensors.items():
        inputs.append(triton.InferInput(name, list(array.shape), DTYPES[array.dtype]))
        inputs[-1].set_data_from_numpy(array)
    answers: queue.Queue = queue.Queue()
    is_over = False
    client.start_stream(lambda result, error: answers.put(error or result))
    try:
        client.async_stream_infer(model, inputs, parameters=parameters)
        while not is_over:
            answer = answers.get()
            is_over = isinstance(answer, Exception)
            if is_over:
                raise answer
            is_over = json.loads(answer.as_numpy("progress")[0])["event"] == "done"
            yield answer
    finally:
        # Cancelling what has just ended leaves it behind in servers before 25.04.
        client.stop_stream(cancel_requests=not is_over)


def show(progress: dict) -> None:
    """Print a step or the summary."""
    if progress["event"] == "step":
        decisions = "  ".join(f"{n} {b['decision']}" for n, b in progress["branches"].items())
        print(f"step {progress['step_index'] + 1}/{progress['steps']}  {decisions}")
        return
    for name, branch in progress["branches"].items():
        print(f"{name}: {branch['computed_steps']} computed, {branch['reused_steps']} reused")
    print(
        f"{progress['policy']}: {progress['total_seconds']:.2f} s, "
        f"ideal speedup {progress['ideal_speedup']:.2f}"
    )


def save(array: np.ndarray, path: Path) -> None:
    """Write latents or frames; uint8 [frames, height, width, 3] as .gif."""
    if path.suffix != ".gif":
        np.save(path, array)
        return
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in array]
    first.save(path, save_all=True, append_images=rest, duration=125, loop=0)


def main() -> None:
    """Read the command line, send the request."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="127.0.0.1:8001")
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--tokenizer", help="folder with tokenizer.json: send ids, not text")
    parser.add_argument("--embeddings", help=".npy, float32 [tokens, width]")
    parser.add_argument("--negative-embeddings")
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="policy, steps, guidance_scale, threshold, stream, …",
    )
    parser.add_argument("--out", type=Path, required=True, help=".npy, or .gif for frames")
    options = parser.parse_args()
    tensors = {}
    if options.prompt is not None and options.tokenizer is None:
        tensors["text_input"] = text(options.prompt)
        tensors["negative_text_input"] = text(options.negative_prompt)
    elif options.prompt is not None:
        tensors["token_ids"] = ids_of(options.prompt, options.tokenizer)
        tensors["negative_token_ids"] = ids_of(options.negative_prompt, options.tokenizer)
    if options.embeddings:
        tensors["text_states"] = np.load(options.embeddings)
    if options.negative_embeddings:
        tensors["negative_text_states"] = np.load(options.negative_embeddings)
    if options.seed is not None:
        tensors["seed"] = np.array([options.seed], np.int64)
    parameters = dict(pair.split("=", 1) for pair in options.set)
    client = triton.InferenceServerClient(options.url)
    try:
        for answer in stream(client, options.model, tensors, parameters):
            show(json.loads(answer.as_numpy("progress")[0]))
    except triton.InferenceServerException as fault:
        sys.exit(f"error: {fault.message()}")
    frames = answer.as_numpy("frames")
    save(answer.as_numpy("latents") if frames is None else frames, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
