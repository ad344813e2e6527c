"""Writes the names of an SGLang environment's options as JSON, from its source alone.

Run by the engine's interpreter (``python -c <this file>``), which has no ``torchrl_sglang``. To
import SGLang and ask its parser takes ten seconds and more; to read the files takes 0.2. The answer
may hold words that are no options: it serves to find names that are certainly none.
"""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import sys

# Files, or folders of them, in which options are declared, by package.
DECLARED = {
    "sglang": ("srt/server_args.py", "srt/arg_groups"),
    "sglang_router": ("router_args.py", "launch_router.py"),
}
# A flag in quotes, with the router's f"--{prefix}"; and a field of a dataclass.
FLAG = re.compile(r"""["']--(?:\{prefix\})?([a-z][a-z0-9-]*)["']""")
FIELD = re.compile(r"^    ([a-z]\w*): (.*(?:\n(?:     .*|    [\])]+.*|))*)", re.M)


def declared(package: str) -> dict[str, list[str]]:
    """Options of a package, and those of them that have a ``--no-`` form."""
    spec = importlib.util.find_spec(package)
    options: set[str] = set()
    negatable: set[str] = set()
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for name in DECLARED[package]:
            path = pathlib.Path(root, name)
            for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
                text = file.read_text(encoding="utf-8", errors="replace")
                options.update(word.replace("-", "_") for word in FLAG.findall(text))
                for field, annotation in FIELD.findall(text):
                    options.add(field)
                    if "BooleanOptionalAction" in annotation:
                        negatable.add(field)
    return {"options": sorted(options), "negatable": sorted(negatable)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps({package: declared(package) for package in DECLARED}))
