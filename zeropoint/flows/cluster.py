"""Calls on the nodes of a Ray cluster, where `ThreadPoolExecutor` makes them in this process.

    submit(function, name) --task--> function(name), on a node with a free CPU --> Future

The only file that knows Ray, which comes with `pip install 'zeropoint[ray]'`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

import torch

from zeropoint.errors import ClusterError, ZeropointError

T = TypeVar("T")

RETRIES = 5  # of a task whose worker or node died
_VERSIONS = ("zeropoint", "torch")  # that decide which codes are chosen


class RayExecutor(Executor):
    """Makes each call as a task, and again when its worker or node dies.

    address: of the cluster; "auto": the one that this machine is a node of; "local": one of this
    machine, for this run. cpus: that a task takes, and threads that torch has in it. A Ray that
    the process is connected to already is used, and stays connected.
    Raises ClusterError: no ray, no cluster, no node with so many CPUs, a task that was lost too
    often, a node with another version; and ZeropointError and OSError as the call raised them.
    """

    def __init__(self, address: str, cpus: int) -> None:
        try:
            import ray
        except ImportError as e:
            raise ClusterError(
                f"ray={address!r} (--ray) runs on Ray, which is not installed; "
                "pip install 'zeropoint[ray]'"
            ) from e
        self._ray = ray
        self._connected = not ray.is_initialized()
        if not self._connected and address not in ("auto", _address_of(ray)):
            raise ClusterError(
                f"this process is connected to the Ray cluster at {_address_of(ray)}, not to "
                f"{address!r}; give ray='auto', or call ray.shutdown() before"
            )
        if self._connected:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError) as e:
                raise ClusterError(
                    f"no Ray cluster can be reached at {address!r}: {e}; start one by "
                    "`ray start --head`, and give its address, or run this on one of its nodes"
                ) from e
        self._running: set[Any] = set()
        largest = max((n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]), default=0)
        if largest < cpus:
            self.shutdown()
            raise ClusterError(
                f"a task takes {cpus} CPUs, and no node of the cluster has more than {largest:g}; "
                "use fewer workers, or in a calibrated run fewer threads (OMP_NUM_THREADS), or add "
                "such a node first"
            )
        self._task = ray.remote(num_cpus=cpus, max_retries=RETRIES)(_called)
        self._threads = cpus
        self._versions = _versions()
        self._function: Callable[..., Any] | None = None
        self._sent: Any = None  # that function, in Ray's store

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """As `ThreadPoolExecutor.submit`. A function is sent once as long as it is the same."""
        if fn is not self._function:
            self._function, self._sent = fn, self._ray.put(fn)
        task = self._task.remote(self._versions, self._threads, self._sent, args, kwargs)
        self._running.add(task)
        future: Future[T] = Future()

        def settle(answer: Future[T]) -> None:
            self._running.discard(task)
            error = answer.exception()
            if error is None:
                future.set_result(answer.result())
            else:
                future.set_exception(self._of_ours(error))

        task.future().add_done_callback(settle)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the tasks that have not come to their end, and leave the cluster."""
        for task in tuple(self._running):
            self._ray.cancel(task)
        if self._connected:
            self._ray.shutdown()

    def _of_ours(self, error: BaseException) -> BaseException:
        cause = getattr(error, "cause", None)  # of a RayTaskError: what the call raised
        if isinstance(cause, (ZeropointError, OSError)):
            return cause
        failed = self._ray.exceptions
        if isinstance(error, failed.RayError) and not isinstance(error, failed.RayTaskError):
            return ClusterError(
                f"a task was lost {RETRIES + 1} times, or Ray itself failed: {error}; what is done "
                "is kept, and the same call goes on with it"
            )
        return error


def _address_of(ray: Any) -> str:
    return str(ray.get_runtime_context().gcs_address)


def _called(
    versions: dict[str, str],
    threads: int,
    function: Callable[..., T],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> T:
    """The call, on a node. Sums of more threads may be rounded otherwise: hence their number."""
    for package, here in _versions().items():
        if here != versions[package]:
            raise ClusterError(
                f"the node {platform.node()} has {package} {here}, but the run was started by "
                f"{versions[package]}; install the same on all nodes"
            )
    torch.set_num_threads(threads)
    return function(*args, **kwargs)


def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in _VERSIONS}
