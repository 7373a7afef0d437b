"""Something to do as soon as another library's module is imported, without importing it.

transformers has no entry points: a quantization method exists for it once somebody has registered
it. `import zeropoint` must not import transformers, and whoever imports both expects
`from_pretrained` to know our checkpoints, in whichever order they are imported.
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
    """Finds one module as the other finders do, and removes itself."""

    def __init__(self, module: str, ours: str) -> None:
        self._module, self._ours = module, ours

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._ours)
        return spec


class _Loader(Loader):
    """Runs a module as its own loader does, then imports ours."""

    def __init__(self, loader: Loader, ours: str) -> None:
        self._loader, self._ours = loader, ours

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        spec = module.__spec__
        assert spec is not None
        module.__loader__ = spec.loader = self._loader
        importlib.import_module(self._ours)
