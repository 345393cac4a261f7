"""What `multiprocessing` says in a worker: its name, its parent, the owner's key.

A child of `multiprocessing` has these from its parent; a worker has them from the pool's owner:
proxies of its `Manager` are let in, `parent_process()` is the owner, and a process that the worker
starts is like one that the owner starts. No fork server and no worker imports `multiprocessing`
for that, which takes longer than all the rest of a worker's start: they are told when, and if, it
is imported.
"""

from __future__ import annotations

import sys

from whitepool_mp.wire.boot import Boot

TYPE_CHECKING = False  # as in `wire.boot`
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_NAME = "multiprocessing"


def introduce(name: str, boot: Boot, lifeline: int) -> None:
    """Have `multiprocessing` know who this process is, now if it is imported or else when it is.

    Args:
        name: what this process is called there.
        boot: what the pool's processes were told at the start.
        lifeline: a descriptor that becomes readable when the owner ends; it has to stay open.
    """
    module = sys.modules.get(_NAME)
    if module is not None:
        _tell(module, name, boot, lifeline)
        return
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):  # that of the process which forked this one
            finder.told = name, boot, lifeline
            return
    sys.meta_path.insert(0, _Finder(name, boot, lifeline))


def _tell(module: ModuleType, name: str, boot: Boot, lifeline: int) -> None:
    if not hasattr(module, "parent_process"):
        return  # another module of that name
    key, parent, start_method, level, to_stderr = boot.family
    me = module.current_process()
    me.name, me.authkey = name, key
    if start_method is not None:
        module.set_start_method(start_method, force=True)
    if to_stderr:
        module.log_to_stderr(level or None)
    elif level:
        module.get_logger().setLevel(level)
    # There is no public way to say who the parent is. Its sentinel is to multiprocessing what the
    # lifeline is to a worker: it becomes readable when that process ends.
    process: Any = module.process
    process._parent_process = process._ParentProcess(parent, boot.owner, lifeline)


class _Finder:
    """Finds `multiprocessing` by way of the other finders, until it has been imported."""

    def __init__(self, name: str, boot: Boot, lifeline: int) -> None:
        self.told = name, boot, lifeline

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec; its loader tells the module what there is to tell."""
        if name != _NAME:
            return None
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                    return spec
        return None


class _Loader:
    """Loads a module as its own loader does, and then has no part in it any more."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As `importlib.abc.Loader`."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As `importlib.abc.Loader`."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _tell(module, *self._finder.told)
