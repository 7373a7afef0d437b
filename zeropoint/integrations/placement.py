"""A model over several devices, by accelerate: what does not fit one stays in main memory or on
disk and is fetched when it runs.

accelerate looks up a module's tensors by attribute, and `weight` of a frozen module is a QTensor;
so frozen modules are placed here and all others by accelerate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zeropoint.errors import SourceError
from zeropoint.model.walk import named_modules
from zeropoint.nn import QModule

_AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def several_devices(device_map: Any) -> bool:
    """Whether the map names more than one device, or leaves the choice to accelerate."""
    if isinstance(device_map, str):
        return device_map in _AUTOMATIC
    if isinstance(device_map, Mapping):
        return len({str(d) for d in device_map.values()}) > 1 or "disk" in device_map.values()
    return False


def place(model: Any, device_map: Any, offload_folder: str | Path | None = None) -> None:
    """Put the parts of a model where `device_map` says. In place.

    device_map: a device for all; a mapping of module names to devices, "cpu" or "disk"; or "auto":
    as much on the accelerators as fits, then in main memory. offload_folder: where modules of
    "disk" are kept. Raises SourceError.
    """
    if device_map is None:
        return
    if not several_devices(device_map):
        one = next(iter(device_map.values())) if isinstance(device_map, Mapping) else device_map
        model.to(one)
        return
    from accelerate import dispatch_model, infer_auto_device_map

    if isinstance(device_map, str):
        no_split = list(getattr(model, "_no_split_modules", None) or [])
        device_map = infer_auto_device_map(model, no_split_module_classes=no_split)
    devices = set(map(str, device_map.values()))
    if "disk" in devices and offload_folder is None:
        raise SourceError(
            "device_map puts modules on disk; give offload_folder=, a folder for them"
        )
    if len(devices) == 1 and "disk" not in devices:
        model.to(next(iter(device_map.values())))
        return
    main = next((d for d in device_map.values() if d not in ("cpu", "disk")), "cpu")
    with _without_parts(model):
        dispatch_model(model, dict(device_map), main_device=main, offload_dir=offload_folder)
    for module, names in named_modules(model).items():
        if isinstance(module, QModule) and module.tied_to is None:
            where = _device_of(names[0], device_map)
            _place_parts(model, module, names[0], where, main, offload_folder)
    model.hf_device_map = dict(device_map)


def _device_of(name: str, device_map: Mapping[str, Any]) -> Any:
    """The device of the longest prefix of the name."""
    while name not in device_map:
        if not name:
            raise SourceError("device_map names no device for the whole model; add {'': 'cpu'}")
        name = name.rpartition(".")[0]
    return device_map[name]


@contextmanager
def _without_parts(model: nn.Module) -> Iterator[None]:
    """The model while its frozen modules hold no tensors."""
    kept = {m: dict(m._buffers) for m in model.modules() if isinstance(m, QModule)}
    for module in kept:
        module._buffers.clear()
    try:
        yield
    finally:
        for module, buffers in kept.items():
            module._buffers.update(buffers)


def _place_parts(
    model: nn.Module, module: QModule, name: str, where: Any, main: Any, folder: Any
) -> None:
    """The parts of one module on a device, or in a store from which they are fetched when used."""
    if where not in ("cpu", "disk") or where == main:
        module._buffers.update({n: p.to(where) for n, p in _parts(module).items()})
        module.loaded()
        return
    if where == "disk":
        file = Path(folder) / f"{name}.zeropoint.safetensors"
        save_file({n: p.contiguous() for n, p in _parts(module).items()}, file)
        store: Path | dict[str, Tensor] = file
    else:
        store = _parts(module)
    users = [m for m in model.modules() if isinstance(m, QModule) and m.tied_to in (module,)]
    module._buffers.update({n: p.to("meta") for n, p in _parts(module).items()})
    fetched = _Fetched(module, store, main)
    for user in (module, *users):
        user.choose_kernel_for(torch.device(main).type)
        user.register_forward_pre_hook(fetched.fetch)
        user.register_forward_hook(fetched.drop, always_call=True)


def _parts(module: QModule) -> dict[str, Tensor]:
    return {name: part for name, part in module._buffers.items() if part is not None}


class _Fetched:
    """Parts that are on the main device only while their module runs."""

    def __init__(self, module: QModule, store: Path | dict[str, Tensor], main: Any) -> None:
        self._module, self._store, self._main = module, store, main

    def fetch(self, *_: Any) -> None:
        parts = load_file(self._store) if isinstance(self._store, Path) else self._store
        self._module._buffers.update({n: p.to(self._main) for n, p in parts.items()})

    def drop(self, *_: Any) -> None:
        self._module._buffers.update({n: p.to("meta") for n, p in _parts(self._module).items()})
