"""`zeropoint quantize --ray` on clusters of 1, 2 ... workers of one CPU each, all on this machine.

    python bench/cluster.py                    # 12 GB of bfloat16, as bench/stream.py writes it
    python bench/cluster.py --algorithm gptq   # two layers half as wide, on 8192 tokens of no text

The workers share this machine's disk and its CPUs, so that more of them than CPUs say nothing.
Clusters take turns, on a page cache that is as cold as one may make it, after a run without Ray,
whose output all others have to equal. A cluster is started before the time begins; the time has
Python's start, in the driver and in the workers. One JSON line for each size is appended to
bench/results/cluster.jsonl.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from _common import RESULTS, append, circumstances
from ray.cluster_utils import Cluster
from stream import VOCABULARY, forget, write_checkpoint

from zeropoint.algorithms import get_algorithm

FILE = RESULTS / "cluster.jsonl"
STORE_BYTES = 4_000_000_000  # Ray's object store: the moments and weights of a calibrated task
# What `--data` of the command line needs a tokenizer for, which random weights do not have.
CALIBRATED = """
import sys, torch, zeropoint as zp
source, out, weights, algorithm, ray, vocabulary = sys.argv[1:]
torch.manual_seed(0)
data = torch.randint(int(vocabulary), (16, 512))
torch.set_num_threads(1)
zp.compress(source, out, weights, algorithm=algorithm, data=data, ray=ray or None)
"""


@contextmanager
def cluster(workers: int) -> Iterator[str]:
    """The address of a cluster, each of whose nodes is a worker."""
    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    started = Cluster(initialize_head=True, head_node_args=node)
    try:
        for _ in range(workers - 1):
            started.add_node(**node)
        yield started.address
    finally:
        started.shutdown()


def quantize(source: Path, out: Path, weights: str, algorithm: str, address: str) -> float:
    """Seconds. address: of the cluster, empty for this process alone."""
    command = [sys.executable, "-m", "zeropoint", "quantize", str(source), "-o", str(out)]
    command += ["--weights", weights, "--algorithm", algorithm]
    command += ["--ray", address] if address else []
    if get_algorithm(algorithm).needs != "nothing":
        given = (str(source), str(out), weights, algorithm, address, str(VOCABULARY))
        command = [sys.executable, "-c", CALIBRATED, *given]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=None)
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--algorithm", default="rtn")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory(prefix="zp") as name:
        root = Path(name)
        os.environ["RAY_TMPDIR"] = name
        source = root / "source"
        source.mkdir()
        calibrated = get_algorithm(arguments.algorithm).needs != "nothing"
        if calibrated:
            write_checkpoint(source, arguments.gigabytes or 0.48, width=2048)
        else:
            write_checkpoint(source, arguments.gigabytes or 12.0)
        how = (arguments.weights, arguments.algorithm)
        here: list[float] = []
        seconds: dict[int, list[float]] = {workers: [] for workers in arguments.workers}
        for _ in range(arguments.rounds):
            forget(source)
            here.append(quantize(source, root / "here", *how, ""))
            written = sum(p.stat().st_size for p in (root / "here").glob("*.safetensors"))
            manifest = (root / "here" / "zeropoint.json").read_bytes()  # has a hash of every file
            shutil.rmtree(root / "here")
            for workers in arguments.workers:
                forget(source)
                with cluster(workers) as address:
                    seconds[workers].append(quantize(source, root / "out", *how, address))
                assert (root / "out" / "zeropoint.json").read_bytes() == manifest
                shutil.rmtree(root / "out")
        figures = [
            {
                "bench": "cluster",
                "weights": arguments.weights,
                "algorithm": arguments.algorithm,
                "workers": workers,
                "bytes_read": sum(p.stat().st_size for p in source.glob("*.safetensors")),
                "bytes_written": written,
                "seconds": seconds[workers],
                "seconds_without_ray": here,
            }
            for workers in arguments.workers
        ]
        for workers in arguments.workers:
            print(f"{workers} workers: {statistics.median(seconds[workers]):.1f} s")
        print(f"without Ray: {statistics.median(here):.1f} s")
        append(FILE, figures, circumstances(("torch", "safetensors", "ray")))


if __name__ == "__main__":
    main()
