# SPDX-License-Identifier: Apache-2.0
"""`freewheel verify`: check a bundle."""

from __future__ import annotations

from .options import (
    BackendOption,
    BundleArgument,
    CudaGraphsOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    OffloadOption,
    QuietOption,
)
from .screen import reporting

__all__ = ["verify"]


def verify(
    bundle: BundleArgument,
    backend: BackendOption = None,
    offload: OffloadOption = False,
    cuda_graphs: CudaGraphsOption = False,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Check digests, every engine against PyTorch, every compiled policy against its law.

    Example: freewheel verify out/bundle
    """
    with reporting("verify", as_json, quiet, debug) as screen:
        from ..core.extras import require_extra

        require_extra("verify", "verify")
        from ..bundle.reader import Bundle
        from ..compiler.verify.bundle import verify_bundle
        from ..runtime.model import DeviceOptions

        options = DeviceOptions(offload=offload, cuda_graphs=cuda_graphs, device=device)
        with screen.progress():
            report = verify_bundle(Bundle(bundle), backend, screen, options=options)
        data = report.as_dict()
        screen.table(
            "engines",
            ["graph", "block", "output", "relative error", "tolerance", "ok"],
            report.rows(),
        )
        screen.result(data, [report.summary()])
        report.raise_on_mismatch()
