"""Something to do as soon as another library's module is imported, without importing it.

transformers and peft have no entry points: a quantization method exists for them once somebody has
registered it. `import zeropoint` must not import them, and whoever imports both expects
`from_pretrained` to know our checkpoints and `get_peft_model` our layers, in whichever order they
are imported.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType


def import_after(module: str, ours: str) -> None:
    """Import our module `ours` right after `module`, at once if that is imported already."""
    if module in sys.modules:
        importlib.import_module(ours)
    else:
        sys.meta_path.insert(0, _Finder(module, ours))


class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, with a loader that also imports ours. It stays
    until the module is really imported: many only ask whether there is one.
    """

    def __init__(self, module: str, ours: str) -> None:
        self._module, self.ours = module, ours
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Runs a module as its own loader does, then imports ours."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._loader.exec_module(module)
        spec = module.__spec__
        assert spec is not None
        module.__loader__ = spec.loader = self._loader
        importlib.import_module(self._finder.ours)
