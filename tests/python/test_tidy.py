"""House rules that no linter knows: who may include whom, how long a function may be.

The direction of dependency is the architecture; it is read here from the #include lines and the
imports, so that it cannot drift. See CONTRIBUTING.md.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES_MAX = 70  # of a function, so that it is seen whole

# Each file of the core includes only files of layers above its own in this list.
LAYERS = [
    {"types", "error", "process"},
    {"backend"},
    {"backends", "parallel", "attention"},
    {"frame_pool", "layer_kernel", "options", "tables"},
    {"block_map"},
    {"policy", "adapting"},
    {"trace"},
    {"event_log"},
    {"transfers", "reading"},
    {"ring", "controller"},
    {"scheduler"},
    {"planning", "room", "sequences", "budgets", "built_in_kernels", "resolve"},
    {"cache"},
]
LAYER_OF = {name: depth for depth, names in enumerate(LAYERS) for name in names}
# What sits beside the core, on the seam, knows nothing of what is above it.
SEAM = {"types", "error", "process", "backend", "backends", "parallel", "attention"}
SEAM |= {"ledger", "plugin"}

# The same for the modules of the package.
PARTS = ["_core", "sizes", "memory", "threads", "gpu", "ops", "stats", "trace", "policy"]
PARTS += ["cache", "info", "report", "hf", "cli"]


def files(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


CORE = files("cpp/include/pie/*.hpp", "cpp/src/*.?pp")
SEAM_SIDE = files(
    "cpp/src/backends/*.?pp", "cpp/src/attention/*.?pp", "cuda/**/*.?pp", "cuda/**/*.cu"
)
CPP = [
    *CORE,
    *SEAM_SIDE,
    *files("python/pie/*.?pp", "tests/cpp/*.?pp", "examples/embed/*.cpp", "bench/*.cpp"),
]
PACKAGE = files("python/pie/**/*.py")
PYTHON = [*PACKAGE, *files("tests/python/*.py", "examples/*.py", "bench/*.py")]
OTHERS = files(
    "Makefile", ".ci/run", "CMakeLists.txt", "cmake/*", "*.toml", "constraints.txt", ".clang-*"
)
OTHERS += files("*.md", "docs/*.md", "*/README.md", "tests/embed/*", "examples/embed/*")

every = pytest.mark.parametrize


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^">]+)[">]', path.read_text(), re.MULTILINE)


def own_includes(path: Path) -> list[str]:
    """Stems of the headers of ours that `path` includes, other than its own."""
    stems = [Path(name).stem for name in includes(path) if name.endswith(".hpp")]
    return [stem for stem in stems if stem != path.stem]


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def imports_at_start(path: Path) -> set[str]:
    """Packages that importing the file itself brings, not what its functions bring later."""
    tree = ast.parse(path.read_text())
    later: list[ast.AST] = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    later += [
        n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)
    ]
    for node in later:
        node.body = []  # type: ignore[attr-defined]
    return {name.split(".")[0] for name in imported(tree)}


@every("path", CORE, ids=name_of)
def test_core_depends_downwards(path: Path) -> None:
    assert path.stem in LAYER_OF, f"{name_of(path)} has no layer: place it in LAYERS"
    depth = LAYER_OF[path.stem]
    for stem in own_includes(path):
        assert stem in LAYER_OF, f"{stem}.hpp is not a header of the core"
        assert LAYER_OF[stem] < depth, f"{name_of(path)} includes {stem}.hpp against the direction"


@every("path", SEAM_SIDE, ids=name_of)
def test_seam_side_knows_the_seam_only(path: Path) -> None:
    siblings = {sibling.stem for sibling in path.parent.glob("*.hpp")}
    for stem in own_includes(path):
        assert stem in SEAM | siblings, f"{name_of(path)} includes {stem}.hpp, which is above it"


@every("path", [*CORE, *files("cpp/src/attention/*.?pp")], ids=name_of)
def test_core_reads_no_clock(path: Path) -> None:
    assert not re.search(
        r"\b(\w+_clock::now|clock_gettime|gettimeofday|__rdtsc)\b", path.read_text()
    ), "time enters through Backend::now() alone"


@every(
    "path", [p for p in CPP if "cuda" not in p.parts and "fake_driver" not in p.parts], ids=name_of
)
def test_cuda_stays_in_its_directory(path: Path) -> None:
    assert not [name for name in includes(path) if re.match(r"cuda|cublas|nv", name)]


def part_of(path: Path) -> str:
    """`hf` for python/pie/hf.py and for every file of python/pie/hf/."""
    return path.relative_to(ROOT / "python/pie").parts[0].removesuffix(".py")


@every("path", PACKAGE, ids=name_of)
def test_package_depends_downwards(path: Path) -> None:
    part = part_of(path)
    if part in {"__init__", "__main__"}:  # what names the others
        return
    assert part in PARTS, f"{name_of(path)} has no place: give it one in PARTS"
    text = path.read_text()
    used = re.findall(r"^ *(?:from|import) pie\.(\w+)", text, re.MULTILINE)
    used += re.findall(r"^ *from pie import (.+)$", text, re.MULTILINE)
    for name in re.findall(r"\w+", " ".join(used)):
        if name in PARTS and name != part:
            assert PARTS.index(name) < PARTS.index(part), f"{name_of(path)} imports pie.{name}"


@every("path", PACKAGE, ids=name_of)
def test_transformers_stays_in_its_files(path: Path) -> None:
    if part_of(path) not in {"hf", "cli"}:
        names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert not names & {"transformers", "accelerate", "gguf"}


def test_import_pie_is_light() -> None:
    assert not imports_at_start(ROOT / "python/pie/__init__.py") & {
        "torch",
        "numpy",
        "transformers",
    }


def cpp_code(text: str) -> str:
    """The text with comments, literals and preprocessor lines blanked, line numbers kept."""
    pattern = (
        r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|^[ \t]*#(?:\\\n|[^\n])*'
    )
    return re.sub(
        pattern, lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE
    )


def cpp_functions(text: str) -> Iterator[tuple[int, int]]:
    """(line, lines) of every brace block at the level of a namespace or class that is neither.

    A block counts from the first line of its declaration.
    """
    scope = re.compile(r"(^|\s)(namespace|class|struct|union|enum|extern)\b[^()]*$")
    code = cpp_code(text)
    opened: list[tuple[int, bool]] = []  # (where the declaration starts, whether it is a scope)
    statement = 0  # where the current declaration starts
    for match in re.finditer(r"[{};]", code):
        at = match.start()
        if match[0] == "{":
            outside = all(is_scope for _, is_scope in opened)
            opened.append((statement, outside and bool(scope.search(code[statement:at]))))
        elif match[0] == "}" and opened:
            start, is_scope = opened.pop()
            if not is_scope and all(outer for _, outer in opened):
                start += len(code[start:]) - len(code[start:].lstrip())
                yield code.count("\n", 0, start) + 1, code.count("\n", start, at) + 1
        if all(is_scope for _, is_scope in opened):
            statement = match.end()


@every("path", CPP, ids=name_of)
def test_cpp_functions_are_short(path: Path) -> None:
    long = [(line, size) for line, size in cpp_functions(path.read_text()) if size > LINES_MAX]
    assert not long, f"(line, lines) over {LINES_MAX}: {long}"


@every("path", PYTHON, ids=name_of)
def test_python_functions_are_short(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # A kernel has an argument a line.
            begin = node.body[0] if path.name == "kernels.py" else node
            size = (node.end_lineno or node.lineno) - begin.lineno + 1
            assert size <= LINES_MAX, f"{node.name} has {size} lines"


@every(
    "path", [*CPP, *PYTHON, *files("cmake/*", "CMakeLists.txt", "Makefile", "*.toml")], ids=name_of
)
def test_files_say_why_they_exist(path: Path) -> None:
    first = path.read_text().lstrip("\n").split("\n", 1)[0]
    assert re.match(r"//|#|\"\"\"|'''", first), "begins without a comment"


@every("path", [*CPP, *PYTHON, *OTHERS], ids=name_of)
def test_nothing_is_left_over(path: Path) -> None:
    if path == Path(__file__).resolve():
        return
    found = re.findall(
        r"\b(?:TODO|FIXME|XXX)\b|(?<![\w.$])/(?:work|home|root)/\S*", path.read_text()
    )
    assert not found


def test_the_measure_of_functions_works() -> None:
    scopes = "namespace a {\nstruct B {\n  int c() {\n    if (1) {\n    }\n  }\n};\n"
    late_brace = "int d = 1;\nint\ne()\n{\n}\n}\n"
    assert list(cpp_functions(scopes + late_brace)) == [(3, 4), (9, 4)]
