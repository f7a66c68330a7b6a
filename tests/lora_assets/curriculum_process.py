"""A process that runs a curriculum in children of its own, each killed at a moment of its progress."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from finetune.dataset.scripts import count_letters
from finetune.progress import ProgressEvent
from finetune.search.curriculum.spec import CurriculumSpec
from finetune.search.spec import spec_of
from finetune.training import monitor
from lora_assets.curriculum import open_curriculum, run_curriculum
from lora_assets.definitions import open_run_log
from lora_assets.laboratory import make_bench
from lora_assets.settings import Settings


def run(root: Path, content: dict[str, object], moment: str) -> None:
    """Run the curriculum, until the progress tells of `moment`."""

    def tell(event: ProgressEvent) -> None:
        if moment and str(event).startswith(moment):
            os.kill(os.getpid(), signal.SIGKILL)

    settings = Settings(data_root=root, checkpoint_seconds=0)
    spec = spec_of(content, CurriculumSpec, where="test")
    bench = make_bench(settings, spec, tell, weights=True)
    with open_run_log(settings) as run_log:
        run_curriculum(settings, open_curriculum(settings, spec, bench, tell), run_log, tell)


def main(root: Path, content: dict[str, object], moments: list[str]) -> None:
    """A child for each moment, which is killed then; with an empty one it is left alone. Prints how each ended."""
    # Told of every step, a child can be killed at any.
    monitor._REPORT_SECONDS = 0.0
    # What takes long is done before the children are made, which share it; PyTorch computes nothing here.
    import torch
    from matplotlib.figure import Figure  # noqa: F401
    from peft import PeftModel  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    count_letters([])
    for moment in moments:
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            run(root, content, moment)
            os._exit(0)
        print(f"{moment}: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
