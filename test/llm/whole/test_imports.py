"""Who imports whom: DESIGN.md's rules, read from the source by ``ast``."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchrl_sglang

ROOT = "torchrl_sglang"

FOLDER = Path(torchrl_sglang.__file__).parent

MAX_LINES = 500

# To be split; nothing joins this list.
LONGER: set[str] = set()


def module_name(path: Path) -> str:
    """``weights/plan.py`` is ``weights.plan``, ``weights/__init__.py`` is ``weights``."""
    parts = path.relative_to(FOLDER).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for path in sorted(FOLDER.rglob("*.py"))}

MODULES = sorted(PATHS)


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain, or an empty string."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def imports_of(tree: ast.AST, package: str) -> Iterator[str]:
    """Everything that a module imports, wherever in it; ``package`` is what ``.`` means there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(up if node.level else []), *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith(
            ("import_module", "__import__")
        ):
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))
        elif isinstance(node, ast.Attribute) and dotted(node).startswith("torch."):
            yield dotted(node)  # `import torch` is enough to use torch.distributed


def package_of(name: str) -> str:
    is_package = PATHS[name].name == "__init__.py"
    parent = name if is_package else name.rpartition(".")[0]
    return f"{ROOT}.{parent}" if parent else ROOT


def is_part_of(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


TREES = {name: ast.parse(path.read_text()) for name, path in PATHS.items()}

IMPORTS = {name: set(imports_of(tree, package_of(name))) for name, tree in TREES.items()}


def offenders(package: str, modules: list[str]) -> dict[str, set[str]]:
    """Which of the modules import something of ``package``."""
    found = {m: {i for i in IMPORTS[m] if is_part_of(i, package)} for m in modules}
    return {module: imports for module, imports in found.items() if imports}


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import a.b as c, d", "p", {"a.b", "d"}),
        ("from a import b", "p", {"a.b"}),
        ("from .a import b", "p", {"p.a.b"}),
        ("from ..a import b", "p.q", {"p.a.b"}),
        ("from . import a", "p.q", {"p.q.a"}),
        ("def f():\n    from a import b", "p", {"a.b"}),
        ("import importlib\nimportlib.import_module('a')", "p", {"importlib", "a"}),
        ("__import__('a')", "p", {"a"}),
        ("import torch\ntorch.distributed.barrier()", "p", {"torch.distributed"}),
    ],
)
def test_the_walk_sees_every_form_of_import(source: str, package: str, expected: set[str]) -> None:
    assert expected <= set(imports_of(ast.parse(source), package))


ROOMS = [
    {"errors"},
    {"config"},
    {"launch"},
    {"servers"},
    {"generate", "weights"},
    {"service"},
    {"policy", "sync"},
]

FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def room_of(name: str) -> str:
    """The first part of a module's name; empty for the package itself."""
    return name.removeprefix(ROOT).lstrip(".").partition(".")[0]


def modules_of(imports: set[str]) -> set[str]:
    """The package's own modules among what is imported."""
    own = {name.removeprefix(ROOT + ".") for name in imports if is_part_of(name, ROOT)}
    return {m for name in own for m in (name, name.rpartition(".")[0]) if m in PATHS and m}


def test_every_room_has_its_floor() -> None:
    folders = {path.parent.name for path in FOLDER.glob("*/__init__.py")}
    modules = {path.stem for path in FOLDER.glob("*.py")}
    assert (folders | modules) - {"__init__"} == FLOORS.keys()


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_rooms_import_rooms_below_them(module: str) -> None:
    floor = FLOORS[room_of(module)]
    found = {room_of(name) for name in IMPORTS[module] if is_part_of(name, ROOT)}
    assert {room for room in found - {room_of(module)} if FLOORS.get(room, 99) >= floor} == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    """At run time or for types."""
    left = {module: modules_of(IMPORTS[module]) - {module} for module in MODULES if module}
    packages = {module for module in left if PATHS[module].name == "__init__.py"}
    left = {m: needs - packages for m, needs in left.items() if m not in packages}
    while ready := {module for module, needs in left.items() if not needs & left.keys()}:
        left = {module: needs for module, needs in left.items() if module not in ready}
    assert left == {}


@pytest.mark.parametrize(
    ("package", "homes"),
    [
        ("aiohttp", {"generate.client"}),
        ("requests", {"servers.http"}),
        ("orjson", {"generate.client"}),
        ("http", set()),
        ("httpx", set()),
        ("urllib.request", set()),
        ("urllib3", set()),
        ("subprocess", {"launch.process", "launch.guard"}),
        ("multiprocessing", {"launch.cpu.forking"}),
        ("torch.distributed", {"weights.carry.group", "weights.source.ranks"}),
        ("torch._C._distributed_c10d", {"weights.carry.group"}),
        ("sglang", set()),
        ("sglang_router", set()),
        (ROOT + ".launch.cpu", set()),
        (ROOT + ".generate.processors.remote", set()),
    ],
)
def test_one_home_for_each_outside_thing(package: str, homes: set[str]) -> None:
    assert set(offenders(package, MODULES)) == homes


def test_torchrl_is_known_at_its_end_alone() -> None:
    assert {room_of(module) for module in offenders("torchrl", MODULES)} == {"policy", "sync"}


@pytest.mark.parametrize(
    "module", [m for m in MODULES if m.startswith("launch") and ".cpu." not in m]
)
def test_launch_needs_no_torch(module: str) -> None:
    assert not offenders("torch", [module])


@pytest.mark.parametrize(
    "module",
    [
        *("errors", "servers.info", "servers.gate"),
        *("servers.hosts", "servers.lora_folder", "generate.completion", "generate.request"),
        *("generate.parse", "generate.partial", "generate.room", "generate.experts"),
        *("generate.seeds", "generate.two_parts", "generate.check", "generate.loop"),
        # These run where torchrl_sglang is not installed.
        *("launch.cpu.serve", "launch.cpu.standins", "launch.guard"),
    ],
)
def test_needs_the_standard_library_alone(module: str) -> None:
    """Nor does anything of the package that it imports."""
    seen, left = set[str](), {module}
    while left:
        one = left.pop()
        seen.add(one)
        left |= modules_of(IMPORTS[one]) - seen
    found = {name.partition(".")[0] for one in seen for name in IMPORTS[one]}
    assert found - {ROOT} <= sys.stdlib_module_names
    assert module.startswith("launch.") <= (len(seen) == 1)


ROUTE = re.compile(r"/(?:v1/|workers/)?[a-z]+(?:_[a-z]+)*(?:\.json)?")

# `info` reads which routes a server lists; the client generates; a start is waited for.
WITH_PATHS = {"servers.control", "servers.info", "generate.client", "launch.commands"}


def routes_in(tree: ast.AST) -> set[str]:
    """Strings that look like a route of a server."""
    found = {
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) if isinstance(n.value, str)
    }
    return {text for text in found if ROUTE.fullmatch(text)} - {"/proc", "/dev", "/stat"}


@pytest.mark.parametrize("module", [m for m in MODULES if m not in WITH_PATHS])
def test_one_module_knows_the_routes(module: str) -> None:
    """Beside the client of generation, and what waits for a start."""
    assert routes_in(TREES[module]) == set()


def test_routes_are_seen() -> None:
    assert routes_in(ast.parse("post('/flush_cache'); get(f'{url}/health'); x = '/v1/models'")) == {
        "/flush_cache",
        "/health",
        "/v1/models",
    }


WRITES = ("update", "setdefault", "pop", "popitem", "clear", "__setitem__", "__delitem__")


def environment_writes(tree: ast.AST) -> list[int]:
    """Lines that change this process's environment."""
    environs = ("os.environ", "environ", "os.environb")
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            written = dotted(node.value) in environs
        elif isinstance(node, ast.Call):
            owner, _, method = dotted(node.func).rpartition(".")
            changes = owner in environs and method in WRITES
            written = changes or dotted(node.func) in ("os.putenv", "os.unsetenv")
        elif isinstance(node, ast.AugAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            written = any(dotted(target) in environs for target in targets)
        else:
            continue
        if written:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "line",
    [
        "os.environ['A'] = '1'",
        "del os.environ['A']",
        "os.environ.setdefault('A', '1')",
        "os.environ.update(A='1')",
        "os.environ |= {'A': '1'}",
        "os.putenv('A', '1')",
    ],
)
def test_writes_to_the_environment_are_seen(line: str) -> None:
    assert environment_writes(ast.parse(line)) == [1]
    assert environment_writes(ast.parse("env = dict(os.environ)\nenv['A'] = '1'")) == []


@pytest.mark.parametrize("module", MODULES)
def test_nothing_writes_the_environment(module: str) -> None:
    assert environment_writes(TREES[module]) == []


# Switches of other libraries that act on the whole process, for good or while a call lasts: other
# threads see them flip.
SWITCHES = {
    "tensordict": ("set_list_to_stack", "set_lazy_legacy", "set_capture_non_tensor_stack"),
    "torch": ("set_default_device", "set_default_dtype", "set_num_threads", "manual_seed"),
}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_flips_a_switch_of_the_process(module: str) -> None:
    switches = {f"{package}.{name}" for package, names in SWITCHES.items() for name in names}
    assert not switches & IMPORTS[module]


@pytest.mark.parametrize("module", MODULES)
def test_length(module: str) -> None:
    num_lines = len(PATHS[module].read_text().splitlines())
    if module in LONGER:
        assert num_lines > MAX_LINES, f"{module} is short now: take it out of LONGER"
    else:
        assert num_lines <= MAX_LINES


FRESH = """
import sys, torchrl_sglang
for name in torchrl_sglang.__all__:
    getattr(torchrl_sglang, name)
print([name for name in sys.modules if name.partition(".")[0].startswith("sglang")])
"""


def test_a_fresh_import_brings_no_sglang() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def sort_key(name: str) -> tuple[int, str]:
    """The order of ruff's RUF022: constants, classes, the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_the_public_list() -> None:
    public = torchrl_sglang.__all__
    assert public == sorted(set(public), key=sort_key)
    assert [name for name in public if not hasattr(torchrl_sglang, name)] == []


def test_public_names_are_loaded_from_where_they_are() -> None:
    """What type checkers read and what is loaded when a name is used."""
    body = TREES[""].body
    (for_types,) = [node for node in body if isinstance(node, ast.If)]
    loaded = imported_names(for_types.body)
    assert loaded == torchrl_sglang.HOMES
    assert {*loaded, *imported_names(body)} - {"import_module", "TYPE_CHECKING", "Any"} == {
        *torchrl_sglang.__all__
    }


def imported_names(nodes: list[ast.stmt]) -> dict[str, str]:
    """Names and the modules that they come from."""
    return {
        alias.name: str(node.module)
        for node in nodes
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


LIGHT = """
import sys
import torchrl_sglang, torchrl_sglang.errors, torchrl_sglang.config
print([name for name in ("torch", "tensordict", "requests", "numpy") if name in sys.modules])
"""


def test_errors_and_config_come_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        torchrl_sglang.Nothing  # noqa: B018
    assert {*torchrl_sglang.__all__} <= {*dir(torchrl_sglang)}
