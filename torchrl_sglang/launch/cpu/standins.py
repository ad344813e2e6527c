"""Import stand-ins for the two CUDA-only packages that SGLang imports on a CPU-only machine.

SGLang's wheel is a CUDA build. On its CPU path it still *imports* ``torchvision`` (vision
processors, pulled in by its model configs) and ``sgl_kernel`` (compiled kernels), and never calls
into them for a dense text model served with ``--attention-backend torch_native``.

``install()`` appends one finder to the end of ``sys.meta_path``. Python asks it last, so a package
that is really installed is always found first and the stand-in steps aside. What an import of a
stand-in yields is a `Placeholder`: it can be named, subclassed and used as a decorator-free
constant, and raises `StandInError` with its dotted name as soon as it is called.

This file needs only the standard library: it also runs in an engine environment that has no
``torchrl_sglang``.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

STAND_INS = ("torchvision", "sgl_kernel")

# SGLang probes these with try/except ImportError and has a fallback of its own.
ABSENT_SUBMODULES = ("sgl_kernel.scalar_type",)


class StandInError(RuntimeError):
    """A CUDA-only function was called on a machine that has only its import stand-in."""

    def __init__(self, name: str) -> None:
        root = name.partition(".")[0]
        super().__init__(
            f"{name} was called, but {root!r} is not installed here: torchrl_sglang put an import "
            f"stand-in in its place so that SGLang can serve text models on CPU. Install the real "
            f"{root!r}, or use a model and options that do not need it."
        )


class InterpolationMode(enum.Enum):
    """``torchvision.transforms.InterpolationMode``, of which transformers builds a table."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _PlaceholderMeta(type):
    """Makes a placeholder *class*, so that SGLang may subclass it or name it in a type hint."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return placeholder(f"{cls.__qualname__}.{name}")

    def __call__(cls, *args: object, **kwargs: object) -> object:
        raise StandInError(cls.__qualname__)


def placeholder(qualified_name: str) -> type:
    """A class that stands for ``qualified_name`` and raises `StandInError` when called."""
    root, _, name = qualified_name.rpartition(".")
    made = _PlaceholderMeta(name, (), {"__module__": root})
    made.__qualname__ = qualified_name
    return made


class StandInModule(types.ModuleType):
    """A module whose every public attribute is a placeholder."""

    # Parsed by transformers; older than every release, so that no newer feature is looked for.
    __version__ = "0.0.0+standin"

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(f"stand-in module {self.__name__!r} has no attribute {name!r}")
        if name == "InterpolationMode":
            return InterpolationMode
        return placeholder(f"{self.__name__}.{name}")


class StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the stand-ins; asked only after every real finder has said no."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for a stand-in, None for everything else."""
        root = fullname.partition(".")[0]
        if root not in STAND_INS or fullname in ABSENT_SUBMODULES:
            return None
        parent = sys.modules.get(root)
        if fullname != root and not isinstance(parent, StandInModule):
            return None  # the real package is here and simply lacks this submodule
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """An empty stand-in."""
        return StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to execute: attributes are made when they are asked for."""


def install() -> None:
    """Appends the finder to ``sys.meta_path`` once."""
    if not any(type(finder).__name__ == StandInFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())
