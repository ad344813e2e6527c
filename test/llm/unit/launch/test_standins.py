"""What a CPU server runs with: stand-ins for what is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from helpers.standins import run
from torchrl_sglang.launch.commands import CPU_SERVE


@pytest.fixture
def real_torchvision(tmp_path: Path) -> Path:
    """A folder with an installed ``torchvision`` that has one submodule."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '1.2.3'\n")
    (package / "transforms.py").write_text("def resize(): return 'resized'\n")
    return tmp_path


@pytest.mark.parametrize("name", ["torchvision", "sgl_kernel"])
def test_without_the_stand_ins_there_is_nothing(name: str) -> None:
    look = f"refused(lambda: importlib.import_module({name!r}), ModuleNotFoundError)"
    run("sys.meta_path[:] = before[1]\n" + look)


@pytest.mark.parametrize(
    "code",
    [
        "import torchvision; torchvision.ops.nms()",
        "from torchvision.ops import nms; nms([1], scores=2)",
        "import torchvision.ops.boxes as b; b.nms()",
    ],
)
def test_a_call_raises_with_its_name(code: str) -> None:
    said = run(f"print(refused(lambda: exec({code!r}, {{}}), RuntimeError))")
    assert said.startswith("StandInError: torchvision.ops")
    assert "nms was called" in said
    assert "Install the real 'torchvision'" in said


def test_a_kernel_raises_with_its_name() -> None:
    said = run("import sgl_kernel; print(refused(lambda: sgl_kernel.rmsnorm(1), RuntimeError))")
    assert said.startswith("StandInError: sgl_kernel.rmsnorm was called, but 'sgl_kernel' is not")


def test_submodules_can_be_imported() -> None:
    code = """
import torchvision.transforms.functional, sgl_kernel.elementwise
from torchvision.io import decode_jpeg
print(torchvision.transforms.functional.__name__, decode_jpeg.__module__)
"""
    assert run(code) == "torchvision.transforms.functional torchvision.io"


def test_placeholders_can_be_named_and_subclassed() -> None:
    code = """
from torchvision.transforms import Compose
class Mine(Compose): pass
def typed(value: Compose | None) -> Compose.Inner: return value
assert isinstance(typed(None), Compose) is False
print(refused(Mine, RuntimeError).split(":")[0])
"""
    assert run(code) == "StandInError"


def test_the_table_of_interpolation_modes() -> None:
    code = """
from torchvision.transforms import InterpolationMode as M
print(len(M), M.BICUBIC.value, M("nearest-exact").name)
"""
    assert run(code) == "7 bicubic NEAREST_EXACT"


def test_dunders_are_not_made_up() -> None:
    code = """
import torchvision as tv
print(tv.__version__, hasattr(tv, "__wrapped__"), hasattr(tv.x, "__len__"))
"""
    assert run(code) == "0.0.0+standin False False"


@pytest.mark.parametrize(
    "code", ["import sgl_kernel.scalar_type", "from sgl_kernel.scalar_type import ScalarType"]
)
def test_scalar_type_is_absent(code: str) -> None:
    said = run(f"import sgl_kernel\nprint(refused(lambda: exec({code!r}), ImportError))")
    assert "sgl_kernel.scalar_type" in said


def test_a_real_package_is_found_first(real_torchvision: Path) -> None:
    code = """
import torchvision, torchvision.transforms
print(torchvision.__version__, torchvision.transforms.resize(), torchvision.__file__)
print(refused(lambda: importlib.import_module("torchvision.nowhere"), ModuleNotFoundError))
print(hasattr(torchvision, "nowhere"))
import sgl_kernel
print(type(sgl_kernel).__name__)
"""
    version, missing, has, kernel = run(code, real_torchvision).splitlines()
    assert version == f"1.2.3 resized {real_torchvision}/torchvision/__init__.py"
    assert missing == "ModuleNotFoundError: No module named 'torchvision.nowhere'"
    assert (has, kernel) == ("False", "StandInModule")


def test_other_imports_are_left_alone() -> None:
    for name in ("torchvision_extra", "sgl_kernels", "flash_attn"):
        run(f"refused(lambda: importlib.import_module({name!r}), ModuleNotFoundError)")


def test_nothing_but_one_finder_at_the_end_is_added() -> None:
    code = f"""
assert (sys.path, sys.meta_path[:-1]) == before, sys.path
runpy.run_path({str(CPU_SERVE)!r}, run_name="__mp_main__")
print(len(sys.meta_path) - len(before[1]), "torchvision" in sys.modules)
"""
    assert run(code) == "1 False"


def test_this_process_has_none() -> None:
    assert "StandInFinder" not in [type(finder).__name__ for finder in sys.meta_path]
    assert not [name for name in sys.modules if name.startswith("_torchrl_sglang")]
    assert not hasattr(torch.zeros, "__wrapped__")
