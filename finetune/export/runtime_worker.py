"""A llama.cpp server in a process of its own, for `finetune.export.runtime`; never imported.

The first line of standard input is a JSON object::

    {"model": path, "adapter": path or null, "context": tokens, "threads": how many,
     "host": address, "port": 0 for any, "exact": whether for comparisons}

One line ``{"address": "http://127.0.0.1:port"}`` or ``{"error": message}`` answers it. The process lives until its
standard input is closed, so it cannot outlive its parent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    """Load what standard input asks for and serve it; the exit code is 0 if it loaded."""
    # A terminal's Ctrl-C reaches parent and child alike: the parent decides what ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())

    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    if request["adapter"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["adapter"], 1.0)]
    params.n_ctx = request["context"]
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = request["threads"]
    params.cpuparams_batch.n_threads = request["threads"]
    params.warmup = False
    params.hostnames = [request["host"]]
    params.port = request["port"]
    params.model_alias = {Path(request["model"]).stem}
    params.ui = not request["exact"]
    params.fit_params = False
    if request["exact"]:
        # Half-precision caches and fused attention cost digits that a comparison needs.
        params.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        # llama.cpp writes its log, which says why, from a thread of its own.
        time.sleep(0.2)
        answers.write(json.dumps({"error": str(error)}) + "\n")
        answers.flush()
        return 1
    answers.write(json.dumps({"address": server.listening_address}) + "\n")
    answers.flush()
    sys.stdin.read()
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # The server's threads need no farewell, and waiting for them could hang.
    os._exit(code)
