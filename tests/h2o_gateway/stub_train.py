"""Trains nothing, but behaves as the experiment's name says: ``python stub_train.py -Y cfg.yaml``.

quick: finishes at once; wait: finishes when a file ``go`` appears in the output directory; fail: raises;
deaf: waits and ignores SIGTERM; fork: waits, and so does a child; empty: finishes without an adapter; torn: with
half of one. Each start leaves a file behind.
"""

import json
import os
import signal
import struct
import sys
import time
from pathlib import Path

import yaml

cfg = yaml.safe_load(Path(sys.argv[2]).read_text(encoding="utf-8"))
output = Path(cfg["output_directory"])
behaviour = cfg["experiment_name"].partition(" ")[0]
begun = {"device": os.environ["CUDA_VISIBLE_DEVICES"], "environment": sorted(os.environ), "begun": time.time()}
(output / f"start-{os.getpid()}.json").write_text(json.dumps(begun))
print("the stub begins", flush=True)
if behaviour == "fail":
    raise RuntimeError("CUDA out of memory: 80 GiB wanted")
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (output / "deaf").touch()
if behaviour == "fork" and (child := os.fork()):
    (output / "child").write_text(str(child))
while behaviour in ("wait", "deaf", "fork") and not (output / "go").exists():
    time.sleep(0.02)
if behaviour != "empty":
    (output / "adapter_model").mkdir()
    header = json.dumps({"weight": {"dtype": "U8", "shape": [300_000], "data_offsets": [0, 300_000]}}).encode()
    content = struct.pack("<Q", len(header)) + header + os.urandom(150_000 if behaviour == "torn" else 300_000)
    (output / "adapter_model" / "adapter_model.safetensors").write_bytes(content)
    (output / "adapter_model" / "adapter_model.bin").write_bytes(b"pickle")
    (output / "adapter_model" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
(output / "checkpoint.pth").write_bytes(b"pickle")
(output / "flags.json").write_text('{"status": "finished", "info": "Runtime: 00:00:00"}')
