"""What can drift apart: notebooks and modules, notebooks and their outputs, README and index, files and the links between them.

Each checker is a function of what it checks and returns a list of faults, so that it can be shown a planted fault as well."""
import ast, configparser, functools, json, os, re, shutil, subprocess, sys
from pathlib import Path
from urllib.parse import unquote

import nb as nb_tool
import pytest
from check_pages import links

root = Path(__file__).resolve().parents[1]
notebooks = sorted((root / "nbs").glob("*.ipynb"))
settings = configparser.ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
repo_url = settings["git_url"]

MAX_BYTES = 1_500_000      # of a notebook
each_notebook = pytest.mark.parametrize("path", notebooks, ids=lambda p: p.stem)


@functools.lru_cache(maxsize=None)
def read(path): return json.loads(path.read_text(encoding="utf-8"))


def none(faults): assert not faults, "\n" + "\n".join(faults)


def cells(nb, kind=None):
    "(number, source, cell) of the cells of one kind; in code cells they count as in nbval's reports."
    wanted = [c for c in nb["cells"] if kind in (None, c["cell_type"])]
    return [(i, "".join(c["source"]), c) for i, c in enumerate(wanted)]


def output_text(output):
    "All text that an output shows, without pictures."
    shown = {k: v for k, v in output.get("data", {}).items() if k.startswith("text") or k.endswith(("json", "javascript"))}
    text = "\n".join("".join(v) if isinstance(v, list) else str(v) for v in [output.get("text", ""), output.get("traceback", ""), *shown.values()])
    return re.sub(r"base64,[A-Za-z0-9+/=\s]+", "base64,", text)


def notebook(*sources, outputs=()):
    "A notebook for planted faults: str is markdown, (str,) is code; outputs belong to the last cell."
    made = [dict(cell_type="markdown", metadata={}, source=s) if isinstance(s, str)
            else dict(cell_type="code", metadata={}, source=s[0], outputs=[], execution_count=None) for s in sources]
    if outputs: made[-1]["outputs"] = list(outputs)
    return dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5)


def run_python(code, cwd, **env):
    "Run code in a fresh process: nbdev finds its settings from the working directory, and remembers them."
    environ = {k: v for k, v in os.environ.items() if k not in ("IN_TEST", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env={**environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def copy_project(to):
    "What nbdev needs to work on, apart from this checkout."
    shutil.copytree(root / "nbs", to / "nbs", symlinks=True, ignore=shutil.ignore_patterns("data", "runs", ".*", "nbdev.yml"))
    for path in sources(root / "ppo_ddpm"):
        if path.stem not in ("__init__", "__main__"): continue
        (to / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to / path.relative_to(root))
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(root / name, to)
    return to


def sources(folder): return sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)


# --- modules and notebooks -------------------------------------------------------------------------------------------------
def differences(made, kept):
    "Faults where the Python files of two folders differ; `__main__.py` is written by hand."
    texts = [{p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in sources(folder)} for folder in (made, kept)]
    why = lambda name: "is exported by no notebook" if name not in texts[0] else "is missing" if name not in texts[1] else "differs from its notebook"
    return [f"ppo_ddpm/{name} {why(name)}: edit the notebook, then python tools/nb.py --export"
            for name in sorted({*texts[0], *texts[1]}) if name != "__main__.py" and texts[0].get(name) != texts[1].get(name)]


def test_modules_are_what_the_notebooks_export(tmp_path):
    copy = copy_project(tmp_path)
    nb_tool.export(folder=copy)
    none(differences(copy / "ppo_ddpm", root / "ppo_ddpm"))


def test_planted_difference(tmp_path):
    "A line edited in a module, a module too many, a module too few, at any depth."
    for folder in ("made", "kept"):
        (tmp_path / folder / "engine").mkdir(parents=True)
        for name in ("data.py", "engine/board.py", "ppo.py", "__main__.py"): (tmp_path / folder / name).write_text("x = 1\n")
    assert differences(tmp_path / "made", tmp_path / "kept") == []
    (tmp_path / "kept/engine/board.py").write_text("x = 2\n")
    (tmp_path / "kept/orphan.py").write_text("")
    (tmp_path / "kept/ppo.py").unlink()
    assert [f.split(":")[0] for f in differences(tmp_path / "made", tmp_path / "kept")] == [
        "ppo_ddpm/engine/board.py differs from its notebook", "ppo_ddpm/orphan.py is exported by no notebook", "ppo_ddpm/ppo.py is missing"]


def test_export_keeps_what_is_written_by_hand_in_init(tmp_path):
    copy = copy_project(tmp_path)
    init = copy / "ppo_ddpm/__init__.py"
    init.write_text(init.read_text().replace(settings["version"], "0.0.0"))
    run_python("from nbdev.config import add_init; add_init()", copy)
    assert init.read_text() == (root / "ppo_ddpm/__init__.py").read_text()
    assert not (copy / "pyproject.toml").exists()


EXPORT = re.compile(r"^#\s*\|\s*(?:default_exp|exports?|exporti)[ \t]+([\w.]+)", re.M)


def module_numbers(paths):
    "{module: number of the first notebook that exports to it}; a notebook may name a second module behind `#| exports`."
    numbers = {}
    for path in paths:
        for name in EXPORT.findall("\n".join(s for _, s, _ in cells(read(path), "code"))): numbers.setdefault(name, int(re.match(r"\d+", path.stem)[0]))
    return numbers


def imported_modules(name, source, modules):
    "Modules of this package that module `name` imports, at any depth; '' where it takes something from the package itself."
    folder = name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "ppo_ddpm": yield alias.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "ppo_ddpm"):
            above = folder[:len(folder) - node.level + 1] if node.level else (node.module.split(".")[1:])
            module = ".".join([*above, *filter(None, [node.module if node.level else ""])])
            if module in modules: yield module
            else: yield from (".".join(filter(None, [module, alias.name])) for alias in node.names if alias.name != "__version__")


def import_faults(name, source, numbers):
    if name not in numbers: return [f"{name} is exported by no notebook"]
    faults = []
    for other in imported_modules(name, source, numbers):
        if other not in numbers: faults.append(f"{name} imports {other or 'ppo_ddpm'!r} from the package: import from the module that defines it")
        elif numbers[other] > numbers[name] or other == name: faults.append(f"{name} ({numbers[name]:02d}) imports {other} ({numbers[other]:02d}), which is not lower")
    return faults


def modules():
    "{name: path} of the exported modules: `engine.board` for ppo_ddpm/engine/board.py."
    paths = [p for p in sources(root / "ppo_ddpm") if not p.stem.startswith("_")]
    return {".".join(p.relative_to(root / "ppo_ddpm").with_suffix("").parts): p for p in paths}


def test_a_module_imports_only_lower_numbered_ones():
    numbers = module_numbers(notebooks)
    assert modules()
    none([f for name, path in modules().items() for f in import_faults(name, path.read_text(encoding="utf-8"), numbers)])


NUMBERS = {"data": 1, "schedule": 2, "layers": 3, "unet": 3, "engine.settings": 10, "engine.board": 13}


@pytest.mark.parametrize("line", ["from .unet import UNet", "from ppo_ddpm.unet import UNet", "import ppo_ddpm.unet", "from . import unet",
    "from ppo_ddpm import UNet", "import ppo_ddpm", "def f():\n    from .unet import UNet", "from .schedule import x", "from .engine.board import x",
    "from .engine import board", "from ppo_ddpm.engine import board", "import ppo_ddpm.engine.board"])
def test_planted_import(line): assert len(import_faults("schedule", line, NUMBERS)) == 1


def test_imports_that_are_no_fault():
    assert import_faults("unet", "from .data import seeded\nimport torch\nfrom .layers import Norm\nfrom ppo_ddpm import __version__", NUMBERS) == []
    assert import_faults("engine.board", "from ..unet import UNet\nfrom .settings import S\nfrom . import settings\nfrom ppo_ddpm.engine import settings", NUMBERS) == []
    assert len(import_faults("engine.settings", "from .board import x\nfrom ..engine.board import x\nfrom .. import x", NUMBERS)) == 3


# --- stored notebooks ------------------------------------------------------------------------------------------------------
def uncleaned(folder):
    "Notebooks in a project folder that nbdev_clean changes."
    before = {p.name: p.read_bytes() for p in sorted((folder / "nbs").glob("*.ipynb"))}
    run_python("from nbdev.clean import nbdev_clean; nbdev_clean()", folder)
    return [f"nbs/{name}: run nbdev_clean" for name, content in before.items() if (folder / "nbs" / name).read_bytes() != content]


def test_notebooks_are_clean(tmp_path):
    copy = copy_project(tmp_path)
    none(uncleaned(copy))
    planted = copy / "nbs" / notebooks[0].name
    nb = json.loads(planted.read_text())
    next(c for c in nb["cells"] if c["cell_type"] == "code")["execution_count"] = 3
    planted.write_text(json.dumps(nb, indent=1))
    assert uncleaned(copy) == [f"nbs/{planted.name}: run nbdev_clean"]


HERE = re.compile(r"(?<![\w.:/-])/(home|root|tmp|work|usr|opt|var|mnt|private|Users)/[^\s'\"<>]*")


def stored_faults(nb):
    "Stored errors, warnings, paths of a machine, widget state and other metadata; and notebooks that were not run."
    faults = [f"metadata {key!r} is stored" for key in nb["metadata"] if key != "kernelspec"]
    for i, source, cell in cells(nb, "code"):
        for output in cell["outputs"]:
            if output["output_type"] == "error": faults.append(f"code cell {i}: an error is stored ({output['ename']})")
            if output.get("name") == "stderr": faults.append(f"code cell {i}: stderr is stored: {output_text(output)[:80]!r}")
            if found := HERE.search(output_text(output)): faults.append(f"code cell {i}: a path of this machine is stored: {found[0]}")
    if cells(nb, "code") and not any(c["outputs"] for _, _, c in cells(nb, "code")): faults.append("no outputs are stored: run tools/nb.py")
    return faults


@each_notebook
def test_stored(path): none(stored_faults(read(path)))


@pytest.mark.parametrize("output, said", [
    (dict(output_type="error", ename="ValueError", evalue="no", traceback=["no"]), "error is stored (ValueError)"),
    (dict(output_type="stream", name="stderr", text=["UserWarning"]), "stderr is stored"),
    (dict(output_type="stream", name="stdout", text="saved to /tmp/x/model.safetensors"), "path of this machine is stored: /tmp/x/model.safetensors"),
    (dict(output_type="display_data", data={"text/html": ["<a href='/home/me/x'>"]}, metadata={}), "path of this machine"),
])
def test_planted_output(output, said): assert said in stored_faults(notebook(("x",), outputs=[output]))[0]


def test_outputs_that_are_no_fault():
    fine = dict(output_type="stream", name="stdout", text="see https://a.org/home/x, runs/demo/tmp/x and 1/tmp/2")
    html = dict(output_type="display_data", data={"text/html": "<img src='data:image/gif;base64,ab/tmp/cd'>"}, metadata={})
    assert stored_faults(notebook(("x",), outputs=[fine, html])) == []
    assert stored_faults({**notebook(("x",), outputs=[fine]), "metadata": {"widgets": {}}}) == ["metadata 'widgets' is stored"]
    assert stored_faults(notebook(("x",))) == ["no outputs are stored: run tools/nb.py"]


def first_cell_faults(nb, name):
    "Colab badge of this very notebook, first code cell that installs only inside Colab."
    markdown, code = "\n".join(s for _, s, _ in cells(nb)[:3]), [s for _, s, _ in cells(nb, "code") if nb_tool.directives(s)[1]]
    badge = f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/nbs/{name}.ipynb"
    faults = []
    if f"]({badge})" not in markdown: faults.append(f"no Colab badge in the first cells that points to {badge}")
    if not code or not nb_tool.is_install_cell(code[0]) or f"git+{repo_url}" not in code[0]: faults.append("the first code cell does not install inside Colab")
    return faults


@each_notebook
def test_first_cells(path): none(first_cell_faults(read(path), path.stem))


def test_planted_first_cells():
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ppo-ddpm/ppo_ddpm/blob/main/nbs/01_a.ipynb)"
    install = ('if "google.colab" in sys.modules:\n    get_ipython().system("pip install git+https://github.com/ppo-ddpm/ppo_ddpm")',)
    assert first_cell_faults(notebook("# A\n\n> b", badge, ("#| default_exp a",), install), "01_a") == []
    assert len(first_cell_faults(notebook("# A\n\n> b", badge, install), "02_b")) == 1
    assert len(first_cell_faults(notebook("# A", badge, ("import sys",)), "01_a")) == 1


@each_notebook
def test_size(path): assert path.stat().st_size <= MAX_BYTES, f"{path.stat().st_size / 1e6:.1f} MB"


# --- README, files and links -----------------------------------------------------------------------------------------------
def readme_faults(text, pictures, folder):
    "Where README.md and the pictures made for it are not what tools/nb.py --readme writes."
    readme, shown = folder / "README.md", {p.relative_to(folder).as_posix() for p in (folder / "nbs/images").glob("readme-*")}
    faults = [] if readme.exists() and readme.read_text(encoding="utf-8") == text else ["README.md"]
    faults += [path for path, content in pictures.items() if not (folder / path).exists() or (folder / path).read_bytes() != content]
    return [f"{name} is not what nbs/index.ipynb says: run python tools/nb.py --readme" for name in [*faults, *sorted(shown - set(pictures))]]


def test_readme_says_what_index_says(tmp_path):
    text, pictures = nb_tool.readme()
    none(readme_faults(text, pictures, root))
    (tmp_path / "README.md").write_text(text + "More.\n", encoding="utf-8")
    assert "README.md is not" in readme_faults(text, {}, tmp_path)[0]
    assert "readme-1.png is not" in readme_faults(text + "More.\n", {"nbs/images/readme-1.png": b""}, tmp_path)[0]


def test_readme_of_an_index(tmp_path):
    "What is kept, what is left out, where links and pictures go."
    picture = dict(output_type="display_data", metadata={}, data={"image/png": "QUJD", "text/plain": "<Figure>"})
    said = dict(output_type="stream", name="stdout", text="0.25\n")
    nb = notebook("# T\n\n> answer", ('import sys\nif "google.colab" in sys.modules: 1',), ("#| hide\nsecret = 1",),
        "[a](00_core.ipynb), [b](../LICENSE#x), [c](https://d.org), [e](#f), `[g](h)`, <img src=\"images/i.png\">\n\n```\n[j](k)\n```",
        ("#| eval: false\nimport ppo_ddpm",), ("#| echo: false\nhidden = 1",), ("#| fig-alt: \"two lines\"\nplot()",))
    for i, c in enumerate(nb["cells"]): c["id"] = str(i)
    nb["cells"][-2]["outputs"], nb["cells"][-1]["outputs"] = [said], [picture]
    (tmp_path / "index.ipynb").write_text(json.dumps(nb))
    text, pictures = nb_tool.readme(tmp_path / "index.ipynb")
    assert text.split("\n\n", 1)[1] == (
        "# T\n\n> answer\n\n[a](nbs/00_core.ipynb), [b](LICENSE#x), [c](https://d.org), [e](#f), `[g](h)`, <img src=\"nbs/images/i.png\">\n\n```\n[j](k)\n```\n\n"
        "```python\nimport ppo_ddpm\n```\n\n```text\n0.25\n```\n\n```python\nplot()\n```\n\n![two lines](nbs/images/readme-1.png)\n")
    assert pictures == {"nbs/images/readme-1.png": b"ABC"}


def link_faults(markdown, folder):
    "Relative links, and links into this repository on GitHub or Colab, that lead to no file."
    faults = []
    for link in links(markdown):
        inside = re.match(rf"(?:{repo_url}|https://colab.research.google.com/github/{settings['user']}/{settings['repo']})/(?:blob|tree)/{settings['branch']}/(.*)", link)
        if re.match(r"[a-z]+:", link) and not inside: continue
        target = (root / inside[1] if inside else folder / link).as_posix().split("#")[0]
        if not link.startswith("#") and not Path(unquote(target)).exists(): faults.append(f"{link} leads nowhere")
    return faults


pages = [p for p in sorted(root.glob("*.md")) + sorted((root / "ppo_ddpm").rglob("*.md")) + sorted((root / "benchmarks").rglob("*.md")) + notebooks]


@pytest.mark.parametrize("path", pages, ids=lambda p: p.name)
def test_links(path):
    markdown = "\n\n".join(s for _, s, _ in cells(read(path), "markdown")) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    none(link_faults(markdown, path.parent))


@pytest.mark.parametrize("markdown", ["[a](nowhere.ipynb)", "![a](images/nowhere.png)", '<img src="nowhere.png">', "[a]: nowhere.md",
    "[a](https://github.com/ppo-ddpm/ppo_ddpm/blob/main/nowhere.py)", "[a](https://colab.research.google.com/github/ppo-ddpm/ppo_ddpm/blob/main/nbs/nowhere.ipynb)"])
def test_planted_link(markdown):
    assert len(link_faults(markdown, root)) == 1
    assert link_faults("[a](LICENSE) [b](https://a.org/x) [c](#d) `[e](f)`\n```\n[g](h)\n```\n[i](tests/test_drift.py#L1)", root) == []
