"""On a Ray cluster: the same bytes as by one process, whichever process, node or driver is lost."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zeropoint as zp
from tests.models import build, tokenizer
from zeropoint.checkpoints import native
from zeropoint.errors import ClusterError, NonFiniteError, RecipeError
from zeropoint.flows import blocks, calibrate, cluster, writing
from zeropoint.flows.data import Calibration

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'zeropoint[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")

ROOT = Path(__file__).parents[2]
SECONDS = 300  # until what has to happen counts as not happening
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
SHARD_BYTES = 12_000  # of output: several files, and weights whose parts lie in two
CALIBRATED = {
    "weights": "int4",
    "algorithm": "gptq",
    "data": [" ".join(f"w{i * j % 90}" for i in range(200)) for j in (1, 7)],
    "calibration": Calibration(tokens=128, window=16, batch_tokens=32),
}
write_file, find = writing._write_file, calibrate._find


@pytest.fixture(scope="module")
def nodes():
    """A cluster of one node with one CPU, to which the tests are connected."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="zp", ignore_cleanup_errors=True) as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_TMPDIR", folder)  # sockets: their paths have to be short
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")  # this file
            try:
                started = Cluster(initialize_head=True, head_node_args=NODE)
                ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
            except Exception as e:  # Ray's own: a machine that forbids it sockets or processes
                pytest.skip(f"Ray starts no cluster here: {e}")
            yield started
            ray.shutdown()
            started.shutdown()


@pytest.fixture
def folder(tmp_path):
    build("llama-tied").save_pretrained(tmp_path / "float")
    tokenizer().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture(autouse=True)
def much_to_do(monkeypatch):
    """Many files, a task for each linear, which has one CPU."""
    monkeypatch.setattr(native, "MAX_SHARD_BYTES", SHARD_BYTES)
    monkeypatch.setattr(calibrate, "TOGETHER_ELEMENTS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def wait_for(happened):
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


# --- what tasks do in these tests; the tasks import them from here --------------------------------


def killed_once(job, algorithm, groups, folder, *rest):
    """The first task's process dies when it has written three tensors."""
    killed = folder.parent / "killed"
    put, written = writing.Shard.put, []

    def deadly(self, name, tensor):
        put(self, name, tensor)
        written.append(name)
        if len(written) == 3 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    writing.Shard.put = deadly
    try:
        return write_file(job, algorithm, groups, folder, *rest)
    finally:
        writing.Shard.put = put


def waiting_with_the_last(job, algorithm, groups, folder, done, workers, file):
    """All files but the last, which is begun and never ends."""
    if file == max(groups):
        (folder.parent / "begun").touch()
        time.sleep(10 * SECONDS)
    return write_file(job, algorithm, groups, folder, done, workers, file)


def waiting_for_two_nodes(job, algorithm, groups, folder, *rest):
    """No file is written before two nodes are at it."""
    seen = folder.parent / "nodes"
    seen.mkdir(exist_ok=True)
    (seen / ray.get_runtime_context().get_node_id()).touch()
    wait_for(lambda: len(list(seen.iterdir())) == 2)
    return write_file(job, algorithm, groups, folder, *rest)


def drive(source, out, address):
    """A driver, in a process of its own."""
    native.MAX_SHARD_BYTES = SHARD_BYTES
    writing._write_file = waiting_with_the_last
    zp.compress(source, out, ray=address)


def killed_once_with(layer, mark, algorithm, moments, propagate, weights, names, scheme):
    """The process that finds this layer's codes dies, and the next one that does so does not."""
    if names == [layer] and not mark.exists():
        mark.touch()
        die()
    return find(algorithm, moments, propagate, weights, names, scheme)


def unfit(weight, algorithm, moments, propagate, weights, names, scheme):
    if weight == f"{names[0]}.weight":
        raise NonFiniteError(f"{weight}: of this test")
    return find(algorithm, moments, propagate, weights, names, scheme)


def found_by_two_nodes(layer, seen, algorithm, moments, propagate, weights, names, scheme):
    """Linears that read what this layer reads have their codes when two nodes are at them."""
    if any(name.startswith(layer.rpartition(".")[0]) for name in names):
        seen.mkdir(exist_ok=True)
        (seen / ray.get_runtime_context().get_node_id()).touch()
        wait_for(lambda: len(list(seen.iterdir())) == 2)
    return find(algorithm, moments, propagate, weights, names, scheme)


def drive_calibrated(source, out, address):
    """A driver that dies when its first block is in the journal."""
    native.MAX_SHARD_BYTES = SHARD_BYTES
    calibrate.TOGETHER_ELEMENTS = 0
    torch.set_num_threads(1)
    leave = blocks.OnDisk.leave

    def last(self, block, passed):
        leave(self, block, passed)
        die()

    blocks.OnDisk.leave = last
    zp.compress(source, out, **CALIBRATED, ray=address)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# --- the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"weights": "nf4", "group_size": 32, "double_quant": True, "algorithm": "mse"}]
)
def test_it_writes_what_one_process_writes(nodes, folder, tmp_path, options):
    local, units, steps = [], [], []
    zp.compress(folder, tmp_path / "local", **options, on_unit=local.append)
    zp.compress(
        folder,
        tmp_path / "out",
        **options,
        ray=nodes.address,
        on_unit=units.append,
        on_step=lambda *step: steps.append(step),
    )
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert sum(name.endswith(".safetensors") for name in files(tmp_path / "out")) > 3
    assert sorted(u.name for u in units) == sorted(u.name for u in local)
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    names = ["float", "local", "local.quantize.log", "out", "out.quantize.log"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert ray.is_initialized(), "the connection was there before, and stays"


def test_a_run_of_one_process_is_gone_on_with(nodes, folder, tmp_path, monkeypatch):
    zp.compress(folder, tmp_path / "whole")
    put, written = writing.Shard.put, []

    def stopping(self, name, tensor):
        if len(written) >= 9:
            raise KeyboardInterrupt
        written.append(name)
        put(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(writing.Shard, "put", stopping)
        with pytest.raises(KeyboardInterrupt):
            zp.compress(folder, tmp_path / "out", workers=1)
    units = []
    zp.compress(folder, tmp_path / "out", ray="auto", on_unit=units.append)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert any(unit.seconds is None for unit in units), "not done again"


def test_a_weight_that_is_not_finite_is_named(nodes, folder, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match=name):
        zp.compress(folder, tmp_path / "out", ray="auto")
    assert not (tmp_path / "out").exists()


def test_a_calibrated_run_writes_what_one_process_writes(nodes, folder, tmp_path, monkeypatch):
    one = zp.compress(folder, tmp_path / "local", **CALIBRATED)
    submitted = []
    submit = cluster.RayExecutor.submit

    def counted(self, call, *args):
        submitted.append(args[1])  # names
        return submit(self, call, *args)

    monkeypatch.setattr(cluster.RayExecutor, "submit", counted)
    report = zp.compress(folder, tmp_path / "out", **CALIBRATED, ray="auto")
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert report.calibration == one.calibration
    linears = [x.name for x in one.calibration.layers if ".layers." in x.name]
    assert sorted(submitted) == sorted([name] for name in linears) and len(linears) == 14


def test_a_calibrated_run_names_the_weight_that_is_not_finite(nodes, folder, tmp_path, monkeypatch):
    name = "model.layers.1.mlp.down_proj.weight"
    monkeypatch.setattr(calibrate, "_find", partial(unfit, name))
    with pytest.raises(NonFiniteError, match=f"{name}: of this test"):
        zp.compress(folder, tmp_path / "out", **CALIBRATED, ray="auto")
    assert not (tmp_path / "out").exists()


# --- what may be lost -----------------------------------------------------------------------------


def test_a_worker_that_is_killed_loses_nothing(nodes, folder, tmp_path, monkeypatch):
    zp.compress(folder, tmp_path / "local")
    monkeypatch.setattr(writing, "_write_file", killed_once)
    killed = []

    def note(step, done, total):
        killed.append((tmp_path / ".out.unfinished" / "killed").exists())

    zp.compress(folder, tmp_path / "out", ray="auto", on_step=note)
    assert killed[-1] and files(tmp_path / "out") == files(tmp_path / "local")


def test_a_worker_that_is_killed_while_it_calibrates(nodes, folder, tmp_path, monkeypatch):
    zp.compress(folder, tmp_path / "local", **CALIBRATED)
    mark = tmp_path / "killed"
    deadly = partial(killed_once_with, "model.layers.1.self_attn.k_proj", mark)
    monkeypatch.setattr(calibrate, "_find", deadly)
    zp.compress(folder, tmp_path / "out", **CALIBRATED, ray="auto")
    assert mark.exists() and files(tmp_path / "out") == files(tmp_path / "local")


def test_a_driver_that_is_killed_while_it_calibrates(nodes, folder, tmp_path):
    zp.compress(folder, tmp_path / "local", **CALIBRATED)
    program = "import sys; from tests.flows.test_ray import drive_calibrated as drive; "
    command = [sys.executable, "-c", program + "drive(*sys.argv[1:])"]
    command += [folder, tmp_path / "out", nodes.address]
    ran = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, timeout=SECONDS)
    assert ran.returncode == -signal.SIGKILL
    found = []
    submit = cluster.RayExecutor.submit

    def counted(self, call, *args):
        found.append(args[1])
        return submit(self, call, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.RayExecutor, "submit", counted)
        zp.compress(folder, tmp_path / "out", **CALIBRATED, ray="auto")
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert len(found) == 7, "the other block's"


def test_a_driver_that_is_killed_is_gone_on_with(nodes, folder, tmp_path):
    zp.compress(folder, tmp_path / "local")
    working = tmp_path / ".out.unfinished"
    program = "import sys; from tests.flows.test_ray import drive; drive(*sys.argv[1:])"
    command = [sys.executable, "-c", program, folder, tmp_path / "out", nodes.address]
    driver = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: (working / "begun").exists() or driver.poll() is not None)
        parts = sum(name.endswith(".safetensors") for name in files(tmp_path / "local"))
        wait_for(lambda: len(list((working / "checkpoint").glob("*.safetensors"))) == parts - 1)
    finally:
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    units = []
    zp.compress(folder, tmp_path / "out", ray="auto", on_unit=units.append)
    assert files(tmp_path / "out") == files(tmp_path / "local")
    again = [unit for unit in units if unit.seconds is not None]
    assert 0 < len(again) < len(units) / 2


def test_a_node_that_is_added_late_is_used(nodes, folder, tmp_path, monkeypatch):
    zp.compress(folder, tmp_path / "local")
    monkeypatch.setattr(writing, "_write_file", waiting_for_two_nodes)
    seen = tmp_path / ".out.unfinished" / "nodes"
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(zp.compress, folder, tmp_path / "out", ray="auto")
        wait_for(lambda: seen.exists() or run.done())
        added = nodes.add_node(**NODE)
        run.result()
    nodes.remove_node(added)
    assert files(tmp_path / "out") == files(tmp_path / "local")


def test_a_node_that_is_added_while_it_calibrates(nodes, folder, tmp_path, monkeypatch):
    zp.compress(folder, tmp_path / "local", **CALIBRATED)
    seen = tmp_path / "nodes"
    waiting = partial(found_by_two_nodes, "model.layers.0.self_attn.q_proj", seen)
    monkeypatch.setattr(calibrate, "_find", waiting)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(zp.compress, folder, tmp_path / "out", **CALIBRATED, ray="auto")
        wait_for(lambda: seen.exists() or run.done())
        added = nodes.add_node(**NODE)
        run.result()
    nodes.remove_node(added)
    assert files(tmp_path / "out") == files(tmp_path / "local")


# --- what is refused ------------------------------------------------------------------------------


def test_a_task_that_is_lost_too_often_ends_the_run(nodes, monkeypatch):
    monkeypatch.setattr(cluster, "RETRIES", 0)
    with cluster.RayExecutor("auto", 1) as executor:
        with pytest.raises(ClusterError, match="lost 1 times.*the same call goes on"):
            executor.submit(die).result()


def test_another_cluster_than_the_one_connected_to(nodes):
    with pytest.raises(ClusterError, match=f"at {nodes.address}, not to '10.0.0.1:6379'"):
        cluster.RayExecutor("10.0.0.1:6379", 1)


def test_no_cluster(folder, tmp_path, monkeypatch):
    def unreachable(**options):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(ClusterError, match="reached at 'auto': nobody there.*ray start --head"):
        zp.compress(folder, tmp_path / "out", ray="auto")
    assert [p.name for p in tmp_path.iterdir()] == ["float"]


def test_without_ray_the_error_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ClusterError, match=r"not installed; pip install 'zeropoint\[ray\]'"):
        zp.compress(folder, tmp_path / "out", ray="auto")
    assert [p.name for p in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"delete_source": True}, "leave delete_source"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_what_makes_no_sense_on_a_cluster(folder, tmp_path, options, says):
    with pytest.raises(RecipeError, match=says):
        zp.compress(folder, tmp_path / "out", ray="auto", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["float"]


def test_a_node_that_is_not_like_the_others(tmp_path):
    with pytest.raises(ClusterError, match=f"{tmp_path}/no is not there on the node .* share"):
        writing._check_shared([tmp_path, tmp_path / "no"])
    with pytest.raises(ClusterError, match="has torch .*, but the run was started by 1.0"):
        cluster._called(cluster._versions() | {"torch": "1.0"}, 1, print, (), {})


def test_more_cpus_than_any_node_has(nodes):
    with pytest.raises(ClusterError, match="takes 7 CPUs, and no node .* has more than 1;"):
        cluster.RayExecutor("auto", 7)
    assert ray.is_initialized()
