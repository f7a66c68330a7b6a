"""``lora-assets experiment PROTOCOL``, killed in the first training that begins after a moment of its progress.

It kills itself: whoever reads its progress on a busy machine comes too late, when small trainings have ended.
"""

import importlib
import os
import signal
import sys

from finetune.progress import ProgressEvent
from lora_assets.cli.app import app


def main(moment: str, protocol: str, specification: str) -> None:
    """Run the command until the first step of a training, after the progress has told of `moment`."""
    told: list[str] = []

    def tell(event: ProgressEvent) -> None:
        print(event, file=sys.stderr, flush=True)
        told.append(str(event))
        if event.stage == "training" and event.done == 1 and any(each.startswith(moment) for each in told):
            os.kill(os.getpid(), signal.SIGKILL)

    vars(importlib.import_module(f"lora_assets.cli.{protocol}"))["progress"] = lambda quiet: tell
    app(["experiment", protocol, specification])


if __name__ == "__main__":
    main(*sys.argv[1:])
