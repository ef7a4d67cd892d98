"""What can drift apart: notebooks and modules, notebooks and their outputs, README and index, pages and the links between them.

Each checker is a function of what it checks and returns a list of faults, so that it can be shown a planted fault as well."""
import ast, configparser, functools, json, os, re, shutil, statistics, subprocess, sys
from pathlib import Path
from urllib.parse import unquote

import nb as nb_tool
import pytest
import yaml

root = Path(__file__).resolve().parents[1]
notebooks = sorted((root / "nbs").glob("*.ipynb"))
settings = configparser.ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
repo_url = settings["git_url"]

MAX_LINES, MAX_CLASS_LINES, MEDIAN_LINES, MAX_BYTES = 30, 40, 8, 1_500_000
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
    shutil.copytree(root / "nbs", to / "nbs", symlinks=True, ignore=shutil.ignore_patterns("data", "runs", ".*", "sidebar.yml", "nbdev.yml"))
    (to / "ppo_ddpm").mkdir()
    shutil.copy(root / "ppo_ddpm/__init__.py", to / "ppo_ddpm")
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(root / name, to)
    return to


# --- modules and notebooks -------------------------------------------------------------------------------------------------
def differences(made, kept):
    "Faults where the Python files of two folders differ; `__main__.py` is written by hand."
    names = sorted({p.name for folder in (made, kept) for p in folder.glob("*.py")} - {"__main__.py"})
    text = lambda folder, name: (folder / name).read_text(encoding="utf-8") if (folder / name).exists() else None
    why = lambda name: "is exported by no notebook" if text(made, name) is None else "is missing" if text(kept, name) is None else "differs from its notebook"
    return [f"ppo_ddpm/{name} {why(name)}: edit the notebook, then nbdev_export" for name in names if text(made, name) != text(kept, name)]


def test_modules_are_what_the_notebooks_export(tmp_path):
    copy = copy_project(tmp_path)
    run_python("from nbdev.doclinks import nbdev_export; nbdev_export()", copy)
    none(differences(copy / "ppo_ddpm", root / "ppo_ddpm"))
    # planted: a line edited in the module, a module too many, a module too few
    shutil.copytree(root / "ppo_ddpm", tmp_path / "planted")
    exported = sorted(p for p in (tmp_path / "planted").glob("*.py") if not p.name.startswith("_"))
    exported[0].write_text(exported[0].read_text() + "# edited\n")
    (tmp_path / "planted/orphan.py").write_text("")
    assert [f.split(":")[0] for f in differences(copy / "ppo_ddpm", tmp_path / "planted")] == [
        f"ppo_ddpm/{exported[0].name} differs from its notebook", "ppo_ddpm/orphan.py is exported by no notebook"]
    (tmp_path / "planted/orphan.py").unlink()
    exported[0].unlink()
    assert f"{exported[0].name} is missing" in differences(copy / "ppo_ddpm", tmp_path / "planted")[0]


def test_export_keeps_what_is_written_by_hand_in_init(tmp_path):
    copy = copy_project(tmp_path)
    init = copy / "ppo_ddpm/__init__.py"
    init.write_text(init.read_text().replace(settings["version"], "0.0.0"))
    run_python("from nbdev.config import add_init; add_init()", copy)
    assert init.read_text() == (root / "ppo_ddpm/__init__.py").read_text()
    assert not (copy / "pyproject.toml").exists()


def module_numbers(paths):
    "{module: number of the notebook that exports it}"
    numbers = {}
    for path in paths:
        for _, source, _ in cells(read(path), "code"):
            name = nb_tool.directives(source)[0].get("default_exp")
            if name: numbers[name] = int(re.match(r"\d+", path.stem)[0])
    return numbers


def imported_modules(source):
    "Modules of this package that the source imports, at any depth; a name taken from the package itself counts as ''."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.split(".")[0] == "ppo_ddpm": yield name.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "ppo_ddpm"):
            module = node.module or "" if node.level else node.module.partition(".")[2]
            yield from [module] if module else [n.name for n in node.names]


def import_faults(name, source, numbers):
    if name not in numbers: return [f"{name} is exported by no notebook"]
    faults = []
    for other in imported_modules(source):
        if other == "__version__": continue
        if other not in numbers: faults.append(f"{name} imports {other or 'ppo_ddpm'!r} from the package: import from the module that defines it")
        elif numbers[other] >= numbers[name]: faults.append(f"{name} ({numbers[name]:02d}) imports {other} ({numbers[other]:02d}), which is not lower")
    return faults


def test_a_module_imports_only_lower_numbered_ones():
    numbers = module_numbers(notebooks)
    modules = [p for p in sorted((root / "ppo_ddpm").glob("*.py")) if not p.stem.startswith("_")]
    assert modules
    none([f for p in modules for f in import_faults(p.stem, p.read_text(encoding="utf-8"), numbers)])


@pytest.mark.parametrize("line", ["from .unet import UNet", "from ppo_ddpm.unet import UNet", "import ppo_ddpm.unet", "from . import unet",
    "from ppo_ddpm import UNet", "import ppo_ddpm", "def f():\n    from .unet import UNet", "from .schedule import x"])
def test_planted_import(line):
    assert import_faults("schedule", line, dict(core=0, schedule=1, unet=2))
    assert not import_faults("unet", "from .core import seeded\nimport torch\nfrom ppo_ddpm import __version__", dict(core=0, schedule=1, unet=2))


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
    "Title with its one-line answer, Colab badge of this very notebook, first code cell that installs only inside Colab."
    markdown, code = "\n".join(s for _, s, _ in cells(nb)[:3]), [s for _, s, _ in cells(nb, "code")]
    badge = f"https://colab.research.google.com/github/{settings['user']}/{settings['repo']}/blob/{settings['branch']}/nbs/{name}.ipynb"
    faults = []
    if not re.fullmatch(r"# .+\n+> .+\n*", cells(nb)[0][1]): faults.append("the first cell is not '# Title' and '> answer in one line', which is all that the site shows of it")
    if f"]({badge})" not in markdown: faults.append(f"no Colab badge in the first cells that points to {badge}")
    if not code or not nb_tool.is_install_cell(code[0]) or f"git+{repo_url}" not in code[0]: faults.append("the first code cell does not install inside Colab")
    return faults


@each_notebook
def test_first_cells(path): none(first_cell_faults(read(path), path.stem))


def test_planted_first_cells():
    badge = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/ppo-ddpm/ppo_ddpm/blob/main/nbs/01_a.ipynb)"
    install = ('if "google.colab" in sys.modules:\n    get_ipython().system("pip install git+https://github.com/ppo-ddpm/ppo_ddpm")',)
    assert first_cell_faults(notebook("# A\n\n> b", badge, install), "01_a") == []
    assert len(first_cell_faults(notebook("# A\n\n> b", badge, install), "02_b")) == 1
    assert len(first_cell_faults(notebook("# A", badge, ("import sys",)), "01_a")) == 2
    assert "all that the site shows" in first_cell_faults(notebook(f"# A\n> b\n\n{badge}", install), "01_a")[0]


def alt_faults(name, source):
    "Pictures of IPython that are given `alt=`, which older versions (7.34 in Colab) do not know."
    try: tree = ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.M))
    except SyntaxError as e: return [f"{name} does not parse: {e}"]
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and "Image" in (getattr(n.func, "id", ""), getattr(n.func, "attr", ""))]
    return [f"{name}, line {n.lineno}: Image(alt=...) fails in IPython 7; write metadata={{\"alt\": ...}}" for n in calls if "alt" in {k.arg for k in n.keywords}]


def test_pictures_show_in_older_ipython():
    none([f for p in sorted((root / "ppo_ddpm").glob("*.py")) for f in alt_faults(p.name, p.read_text(encoding="utf-8"))])
    none([f for p in notebooks for i, s, _ in cells(read(p), "code") for f in alt_faults(f"{p.stem}, code cell {i}", s)])
    assert len(alt_faults("x", "%time\nIPython.display.Image(data=b'', alt='a')\nImage('b', alt='b')\nImage('c', metadata={'alt': 'c'})")) == 2


def test_the_board_says_what_it_shows(monkeypatch):
    "The description goes where IPython 7 and 9 both look for it."
    import IPython.display
    from ppo_ddpm.core import Board
    def image(data=None, url=None, filename=None, format=None, embed=None, width=None, height=None, retina=False, unconfined=False, metadata=None):   # of IPython 7.34
        return data, format, metadata
    shown = []
    monkeypatch.setattr(IPython.display, "Image", image)
    monkeypatch.setattr(IPython.display, "display", lambda o, **k: shown.append(o))
    board = Board(n_epochs=2)
    board.show = True
    board.update({"epoch": 0, "reward": 1.})
    board.close()
    (data, kind, metadata), = shown
    assert data.startswith(b"\x89PNG") and kind == "png" and metadata["alt"].startswith("Samples beside curves")


def code_lines(source):
    "Lines that hold code: no blank lines, comments or directives, and none of a signature's or docstring's."
    counted = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.strip().startswith(("#", "%", "!"))}
    try: tree = ast.parse(source)
    except SyntaxError: return len(counted)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): counted -= set(range(node.lineno + 1, node.body[0].lineno))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            counted -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(counted)


def length_faults(nb):
    lines = [code_lines(s) for _, s, _ in cells(nb, "code")]
    holds_class = [bool(re.search(r"^class ", s, re.M)) for _, s, _ in cells(nb, "code")]
    faults = [f"code cell {i} has {n} lines of code: split it" for i, (n, c) in enumerate(zip(lines, holds_class)) if n > (MAX_CLASS_LINES if c else MAX_LINES)]
    if lines and statistics.median(lines) > MEDIAN_LINES: faults.append(f"the median code cell has {statistics.median(lines):g} lines, more than {MEDIAN_LINES}")
    return faults


@each_notebook
def test_cells_are_short(path):
    none(length_faults(read(path)))
    assert path.stat().st_size <= MAX_BYTES, f"{path.stat().st_size / 1e6:.1f} MB"


def test_planted_length():
    long, short = ("x = 1\n" * (MAX_LINES + 1),), ("x = 1",)
    assert length_faults(notebook(short, short, long)) == [f"code cell 2 has {MAX_LINES + 1} lines of code: split it"]
    assert len(length_faults(notebook(long))) == 2
    assert length_faults(notebook(("class A:\n" + "    x = 1\n" * 30,), short, short)) == []
    assert code_lines('#| export\ndef f(\n    a, # one\n    b, # two\n):\n    "Doc"\n    # why\n    return a\n') == 2


# --- README, pages and links -----------------------------------------------------------------------------------------------
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


def links(markdown):
    "Targets of links and pictures outside code."
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", markdown, flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)", prose) + re.findall(r"\b(?:src|href)=\"([^\"]+)", prose) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, re.M)


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


def test_quarto_settings():
    quarto = yaml.safe_load((root / "_quarto.yml").read_text())
    assert (root / "nbs/_quarto.yml").resolve() == root / "_quarto.yml"
    assert quarto["project"]["output-dir"] == settings["doc_path"] and quarto["metadata-files"] == ["nbdev.yml", "sidebar.yml"]
    site = quarto["website"]
    assert (site["title"], site["repo-url"], site["repo-branch"]) == (settings["title"], repo_url, settings["branch"])
    assert site["site-url"] == settings["doc_host"] + settings["doc_baseurl"]
    assert (root / "nbs" / quarto["format"]["html"]["css"]).exists()
    assert "custom_quarto_yml" not in settings, "nbdev deletes nbs/_quarto.yml where this is set"


PAGES = """
from nbdev.quarto import refresh_quarto_yml, nbdev_sidebar
from nbdev.serve import proc_nbs
if __name__ == "__main__":
    refresh_quarto_yml(); nbdev_sidebar.__wrapped__(); proc_nbs(n_workers=1)
"""


def test_site(tmp_path):
    "All that nbdev_docs does before it calls Quarto; then every page it would render becomes HTML."
    import nbformat
    from nbconvert import HTMLExporter
    copy = copy_project(tmp_path)
    shutil.copytree(root / "ppo_ddpm", copy / "ppo_ddpm", dirs_exist_ok=True)
    (copy / "pages.py").write_text(PAGES)
    run_python("import runpy; runpy.run_path('pages.py', run_name='__main__')", copy, PYTHONPATH=str(copy))
    for name in ("nbdev.yml", "sidebar.yml", "_quarto.yml"): assert yaml.safe_load((copy / "nbs" / name).read_text())
    sidebar = yaml.safe_load((copy / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    assert sidebar == sorted((p.name for p in notebooks), key=lambda name: (name != "index.ipynb", name))
    for name in sidebar:
        page = json.loads((copy / "_proc" / name).read_text(encoding="utf-8"))
        for cell in page["cells"]: cell.pop("has_sd", None)   # nbdev's own mark
        front = yaml.safe_load("".join(page["cells"][0]["source"]).strip("-\n"))
        assert front["title"] and front["description"], f"{name} needs '# Title' and '> answer in one line'"
        assert any("colab-badge.svg" in "".join(c["source"]) for c in page["cells"][:4]), f"{name} loses its opening: end the first cell after the '>' line"
        none([f"{name}: {f}" for f in stored_faults(page) if "is stored (" in f])
        html, _ = HTMLExporter().from_notebook_node(nbformat.reads(json.dumps(page), 4))
        assert len(html) > 10_000
