"""Who may import whom: the picture in the README stays true only while this passes."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import trimkv

ROOT = Path(trimkv.__file__).parent
EVERYTHING = None

# A room is a folder or a single file right under src/trimkv. What is not listed here may import nothing of ours.
MAY_IMPORT = {
    "budget": set(),
    "ranks": set(),
    "embedded": set(),
    "texts": set(),
    "extras": set(),
    "fingerprint": set(),
    "hf": set(),
    "gates": {"ranks", "hf"},
    "device": set(),
    "overlap": set(),
    "attention": {"linear", "device", "overlap"},
    "linear": {"device", "overlap"},
    "cache": {"attention", "linear", "budget", "ranks", "device", "hf"},
    "engine": {"cache", "gates", "attention", "budget", "embedded", "ranks", "hf"},
    "train": {"gates", "attention", "budget", "ranks", "texts", "device", "extras", "fingerprint", "hf"},
    "eval": {"engine", "cache", "gates", "budget", "texts", "hf"},
    "server": {"engine"},
    "bench": {"cache", "gates", "attention", "linear", "budget", "train", "device", "hf"},
    "viz": set(),
    # the import names of the published Quick Start: one room in two places
    "models": {"gates", "cache", "budget", "cache_utils", "embedded", "extras", "hf"},
    "cache_utils": {"gates", "cache", "budget", "hf"},
    "cli": EVERYTHING,
    "__main__": {"cli"},
    "__init__": set(),  # names its public objects as text and imports them on first use
}
NEEDS_NO_TORCH = ["cli", "embedded", "budget", "texts", "viz", "extras", "fingerprint"]


def sources():
    return sorted(ROOT.rglob("*.py"))


def room_of(path, root=ROOT):
    return path.relative_to(root).parts[0].removesuffix(".py")


def imported_modules(source, module, is_package):
    """Dotted names that ``source`` imports, relative ones resolved, those inside functions included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def rooms_imported(source, module, is_package, rooms):
    names = imported_modules(source, module, is_package)
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "trimkv" and len(part) > 1 and part[1] in rooms}


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_only_what_it_may(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"{room} is a new room: say here what it may import"
    if MAY_IMPORT[room] is EVERYTHING:
        return
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    rooms = {room_of(other) for other in sources()} | set(MAY_IMPORT)
    found = rooms_imported(path.read_text(encoding="utf-8"), module, is_package, rooms) - {room}
    allowed = MAY_IMPORT[room]
    assert found <= allowed, f"{room} imports {sorted(found - allowed)}; it may import {sorted(allowed) or 'nothing'}"


@pytest.mark.parametrize(
    "source",
    [
        "import trimkv.cli",
        "import trimkv.cli.app as app",
        "from trimkv import cli",
        "from trimkv.cli import main",
        "from .. import cli",
        "from ..cli.app import main",
        "def late():\n    from ..cli import main",
        "import importlib\nimportlib.import_module('trimkv.cli')",
    ],
)
def test_every_way_of_importing_is_seen(source):
    assert rooms_imported(source, "trimkv.gates.attach", False, {"cli", "gates"}) == {"cli"}


def test_a_room_may_import_its_own_files():
    source = "from .gate import RetentionGate\nfrom . import files"
    assert rooms_imported(source, "trimkv.gates", True, {"cli", "gates"}) == {"gates"}
    assert rooms_imported(source, "trimkv.gates.attach", False, {"cli", "gates"}) == {"gates"}


def test_viz_reads_files_and_never_touches_torch():
    for path in sources():
        if room_of(path) == "viz":
            module = ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
            names = {name.split(".")[0] for name in imported_modules(path.read_text(), module, False)}
            assert not names & {"torch", "transformers"}, path


def test_drawing_a_saved_result_loads_no_torch(tmp_path):
    """`trimkv compare --from RESULT --figure FILE` answers in the time that matplotlib takes."""
    row = {"policy": "random", "budget": 8, "kl": 0.5, "perplexity": 2.0, "top1_agreement": 0.5}
    rows = [
        {**row, "tokens": 9, "peak_tokens_per_head": 8},
        {**row, "budget": 16, "kl": 0.1, "peak_tokens_per_head": 16},
    ]
    result = {"rows": rows, "full_perplexity": 1.5, "model": "m", "context": 10, "sequences": 1}
    (tmp_path / "result.json").write_text(json.dumps(result))
    arguments = ["compare", "--from", str(tmp_path / "result.json"), "--figure", str(tmp_path / "f.svg")]
    program = (
        "import sys\n"
        "from trimkv.cli.app import run\n"
        f"code = run({arguments})\n"
        "print(code, [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
    assert (tmp_path / "f.svg").stat().st_size > 1000


@pytest.mark.parametrize("room", NEEDS_NO_TORCH)
def test_importing_a_light_room_loads_no_torch(room):
    """`trimkv --help` must answer at once, and importing torch alone takes seconds."""
    if not (ROOT / room).is_dir() and not (ROOT / f"{room}.py").is_file():
        pytest.skip(f"{room} does not exist yet")
    program = f"import sys, trimkv.{room}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    if room == "viz":
        program = program.replace(", 'numpy'", "")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
