"""How much a reader has to read: sizes of modules, functions, cells and chapters, and what the spine may import.

Numbers are indicators; where one is in the way, first look for what can go. Each checker returns faults and is shown a planted one."""
import ast, io, re, statistics, tokenize

import pytest
from test_drift import cells, imported_modules, modules, none, notebook, notebooks, read, root

SPINE_TOKENS, TOKENS = 14_100, 35_000       # Python's tokens without comments, docstrings and line ends; of the whole package with the spine
LINE, FILE = 110, 250                       # characters; lines
FUNCTION, PARAMETERS = 40, 10               # of the spine: lines; parameters with `self`
CELL, LONGEST_CELL = 230, 2_000             # characters of code: median of all cells, most
FIRST_UPDATE, WHOLE_SPINE = 120, 156        # minutes of reading from the index's end
WORDS, CHARACTERS = 200, 1_000              # of prose and of code in a minute
UNCOUNTED = ("10_settings", "17_commands", "30_reference", "31_all_settings")  # notebooks that list what there is

spine = {name: path for name, path in modules().items() if not name.startswith("engine.") and name not in ("core", "cli")}


def is_text(node): return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def count_tokens(source):
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and n.body]
    docstrings = {(n.body[0].lineno, n.body[0].col_offset) for n in nodes if is_text(n.body[0])}
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(t.type not in skip and not (t.type == tokenize.STRING and t.start in docstrings) for t in found)


def size_faults(name, source):
    "A file that is too long, lines that are too long, and statements packed into one line; nbdev writes the first line and `__all__`."
    lines, body = source.splitlines(), ast.parse(source).body
    made = {1} if body and is_text(body[0]) else set()
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__": made |= set(range(node.lineno, node.end_lineno + 1))
    faults = [f"{name} has {len(lines)} lines, more than {FILE}"] if len(lines) > FILE else []
    faults += [f"{name}:{i} has {len(line)} characters, more than {LINE}" for i, line in enumerate(lines, 1) if len(line) > LINE and i not in made]
    packed = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.OP and t.string == ";"}
    return faults + [f"{name}:{i} joins statements by a semicolon" for i in sorted(packed)]


def function_faults(name, source):
    faults = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        lines, args = node.end_lineno - node.lineno + 1, node.args
        parameters = len(args.posonlyargs + args.args + args.kwonlyargs)
        if lines > FUNCTION: faults.append(f"{name}.{node.name} has {lines} lines, more than {FUNCTION}")
        if parameters > PARAMETERS: faults.append(f"{name}.{node.name} has {parameters} parameters, more than {PARAMETERS}")
    return faults


def code_of(nb):
    "Sources of the code cells, without directives, and without empty cells and the one that installs in Colab."
    bare = [re.sub(r"^#\s*\|.*\n?", "", s, flags=re.M).strip() for _, s, _ in cells(nb, "code")]
    return [s for s in bare if s and '"google.colab" in sys.modules' not in s]


def cell_faults(nb):
    sizes = [len(s) for s in code_of(nb)]
    faults = [f"a code cell has {n} characters, more than {LONGEST_CELL}: split it" for n in sizes if n > LONGEST_CELL]
    return faults


def minutes(nb):
    return sum(len(s.split()) for _, s, _ in cells(nb, "markdown")) / WORDS + sum(map(len, code_of(nb))) / CHARACTERS


def until(nb, call):
    "The notebook up to the first cell that calls a function."
    for i, cell in enumerate(nb["cells"]):
        if cell["cell_type"] == "code" and re.search(rf"(?<!def )\b{call}\(", "".join(cell["source"])): return {**nb, "cells": nb["cells"][:i + 1]}
    raise AssertionError(f"no cell calls {call}")


def test_tokens():
    counts = {name: count_tokens(path.read_text(encoding="utf-8")) for name, path in modules().items()}
    inside = sum(counts[name] for name in spine)
    assert inside <= SPINE_TOKENS, f"the spine has {inside} tokens: {counts}"
    assert sum(counts.values()) <= TOKENS, f"the package has {sum(counts.values())} tokens: {counts}"


def test_sizes():
    none([f for path in sorted((root / "ppo_ddpm").rglob("*.py")) if path.name != "_modidx.py"
          for f in size_faults(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))])


def test_functions_of_the_spine(): none([f for name, path in spine.items() for f in function_faults(name, path.read_text(encoding="utf-8"))])


def engine_faults(name, source, names):
    return [f"{name} imports {other}" for other in imported_modules(name, source, names) if other.split(".")[0] == "engine"]


def test_the_spine_imports_nothing_of_the_engine_room():
    none([f for name, path in spine.items() for f in engine_faults(name, path.read_text(encoding="utf-8"), modules())])


@pytest.mark.parametrize("path", [p for p in notebooks if p.stem not in UNCOUNTED], ids=lambda p: p.stem)
def test_cells(path): none(cell_faults(read(path)))


def test_the_median_cell():
    sizes = [len(s) for p in notebooks if p.stem not in UNCOUNTED for s in code_of(read(p))]
    assert statistics.median(sizes) <= CELL


def test_minutes_of_reading():
    "From the end of the index, the one page included, to the first PPO update of the spine, and to the spine's end."
    numbered = [p for p in notebooks if re.match(r"0\d_", p.stem)]
    taken = {p.stem: minutes(read(p)) for p in numbered}
    first = sum(m for name, m in taken.items() if name < "07") + minutes(until(read(next(p for p in numbered if p.stem.startswith("07"))), "ppo_update"))
    shown = ", ".join(f"{name} {m:.0f}" for name, m in taken.items())
    none([f"{m:.0f} minutes to {where}, more than {most} ({shown})" for where, m, most in
          (("the first PPO update", first, FIRST_UPDATE), ("the end of the spine", sum(taken.values()), WHOLE_SPINE)) if m > most])


def test_planted_sizes():
    assert size_faults("a.py", f"'{'doc' * 50}'\n__all__ = ['{'x' * 110}',\n'{'y' * 110}']\nx = ';'  # a; b\n") == []
    assert size_faults("a.py", "x = 1; y = 2\n") == ["a.py:1 joins statements by a semicolon"]
    assert size_faults("a.py", "x = 1\n" * 251) == ["a.py has 251 lines, more than 250"]
    assert size_faults("a.py", f"x = '{'y' * 110}'\n") == ["a.py:1 has 116 characters, more than 110"]
    assert count_tokens('"doc"\ndef f(x): # why\n    "doc"\n    return x + 1\n') == 10


def test_planted_functions():
    many = ", ".join(f"x{i}" for i in range(11))
    assert function_faults("a", f"def f({many}): pass\nclass A:\n    def g(self):\n" + "        x = 1\n" * 40) == [
        "a.f has 11 parameters, more than 10", "a.g has 41 lines, more than 40"]
    assert function_faults("a", "def f(x, *, y=1): return x") == []


@pytest.mark.parametrize("line", ["from .engine.board import Board", "from .engine import board", "from ppo_ddpm.engine import board", "import ppo_ddpm.engine.board",
    "def f():\n    from ppo_ddpm.engine.board import Board", "import ppo_ddpm.engine"])
def test_planted_engine(line):
    assert len(engine_faults("ppo", line, {"data", "ppo", "engine.board"})) == 1
    assert engine_faults("ppo", "from .data import seeded\nimport torch", {"data", "ppo", "engine.board"}) == []


def test_planted_cells():
    install = ('import sys\nif "google.colab" in sys.modules:\n    1',)
    assert cell_faults(notebook(install, ("#| exports\n" + "x" * 200,), ("y",))) == []
    assert cell_faults(notebook(("x" * 2001,), ("x",), ("y",))) == ["a code cell has 2001 characters, more than 2000: split it"]


def test_planted_minutes():
    nb = notebook("word " * 400, ("x" * 1000,), ("ppo_update(1)",), "word " * 400)
    assert minutes(nb) == pytest.approx(5.013)
    assert minutes(until(nb, "ppo_update")) == pytest.approx(3.013)
    assert len(until(notebook(("def ppo_update(x): 1",), ("ppo_update(x)",), "more"), "ppo_update")["cells"]) == 2
