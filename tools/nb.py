"""Run notebooks in place, and write README.md from nbs/index.ipynb.

    python tools/nb.py nbs/05_sampling.ipynb ...    export, execute in place, clean
    python tools/nb.py --py /tmp/05_sampling.py     the same, after turning this py:percent file into nbs/05_sampling.ipynb
    python tools/nb.py --no-run nbs/*.ipynb         export and clean only
    python tools/nb.py --export                     every module from its notebook
    python tools/nb.py --readme                     README.md from nbs/index.ipynb
"""
import argparse, base64, os, posixpath, re, subprocess, sys, time
from pathlib import Path

root = Path(__file__).resolve().parents[1]
nbs = root / "nbs"


def quiet_environment():
    "What notebooks run under, here and in the tests: the same numbers and the same text whatever machine and shell this is."
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    if not os.environ.get("PPO_DDPM_GPU"): os.environ["CUDA_VISIBLE_DEVICES"] = ""   # outputs are those of a CPU
    for name in ("MPLBACKEND", "FORCE_COLOR", "CLICOLOR_FORCE"): os.environ.pop(name, None)


def directives(source):
    "The `#| name: value` lines at the top of a cell: ({name: value}, the rest of the cell)."
    found, lines = {}, source.splitlines()
    while lines and (m := re.match(r"#\s*\|\s*([\w-]+):?\s*(.*)", lines[0])):
        found[m[1]] = m[2].strip().strip("\"'")
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def is_install_cell(source): return '"google.colab" in sys.modules' in source


def is_widget(output): return any("jupyter.widget" in mime for mime in output.get("data", {}))


# --- run -------------------------------------------------------------------------------------------------------------------
def from_percent(py):
    "Turn a py:percent file into nbs/NAME.ipynb; cells that did not change keep their ids and outputs."
    notebook = nbs / f"{Path(py).stem}.ipynb"
    update = ["--update"] if notebook.exists() else []
    subprocess.run([sys.executable, "-m", "jupytext", "-q", *update, "--to", "ipynb", str(py), "-o", str(notebook)], check=True)
    return notebook


EXPORT = """
import sys
from nbdev.config import add_init
from nbdev.doclinks import _build_modidx
from nbdev.export import nb_export
from nbdev.maker import ModuleMaker
fresh = lambda **how: ModuleMaker(**how | dict(is_new=True))   # nbdev_export would append to a notebook's second module
for path in sys.argv[2:]: nb_export(path, "ppo_ddpm", mod_maker=fresh)
if sys.argv[1] == "all":
    add_init("ppo_ddpm")
    _build_modidx()
"""


def export(*notebooks, folder=root):
    "Write the modules of these notebooks, or of all, in a process of its own because nbdev finds its settings from the working directory."
    which = "some" if notebooks else "all"
    notebooks = notebooks or sorted((Path(folder) / "nbs").glob("*.ipynb"))
    if which == "all": (Path(folder) / "ppo_ddpm/_modidx.py").unlink(missing_ok=True)   # it would keep modules that are gone
    subprocess.run([sys.executable, "-c", EXPORT, which, *map(str, notebooks)], cwd=folder, check=True)


def execute(notebook, timeout=900):
    "Execute in place, except cells with `#| eval: false`; raises nbclient's CellExecutionError and then writes nothing."
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, *args, **kwargs):
            if cell.cell_type == "code" and directives(cell.source)[0].get("eval") == "false": return cell
            return await super().async_execute_cell(cell, *args, **kwargs)

    nb = nbformat.read(notebook, 4)
    Client(nb, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(notebook.parent)}}, store_widget_state=False,
           extra_arguments=["--log-level=ERROR"]).execute()
    for cell in nb.cells:   # a widget lives in its kernel: stored, it is a random id that nothing can show
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if not is_widget(o)]
    nb.metadata = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nbformat.write(nb, notebook)


def clean(path):
    subprocess.run([sys.executable, "-c", "import sys; from nbdev.clean import nbdev_clean; nbdev_clean(sys.argv[1])", str(path)], cwd=root, check=True)


# --- README ----------------------------------------------------------------------------------------------------------------
def relink(markdown):
    "Make links that are relative to nbs/ relative to the repository; code is left alone."
    def fix(m):
        target = m[2]
        return m[0] if re.match(r"[a-z]+:|#|/", target) else m[1] + posixpath.normpath(posixpath.join("nbs", target))
    parts = re.split(r"(^```.*?^```|`[^`\n]+`)", markdown, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(\]\()([^)\s]+)", fix, parts[i])
        parts[i] = re.sub(r"(\b(?:src|href)=\")([^\"]+)", fix, parts[i])
    return "".join(parts)


def readme(index=nbs / "index.ipynb"):
    """What README.md must be: (text, {path: bytes of a picture it shows}).

    Markdown cells as they are, code cells as fenced blocks followed by their outputs; without raw cells, front matter, the cell that
    installs in Colab, cells with `#| hide` or `#| include: false`, and directives (`echo: false` and `output: false` are obeyed)."""
    import nbformat
    blocks, pictures = [], {}
    for cell in nbformat.read(index, 4).cells:
        if cell.cell_type == "markdown" and not cell.source.startswith("---\n"): blocks.append(relink(cell.source.strip()))
        if cell.cell_type != "code": continue
        opts, source = directives(cell.source)
        if {"hide", "default_exp", "export"} & set(opts) or opts.get("include") == "false" or is_install_cell(source): continue
        if source and opts.get("echo") != "false": blocks.append(f"```python\n{source}\n```")
        for output in cell.outputs if opts.get("output") != "false" else []: blocks.append(_shown(output, opts, pictures))
    text = "\n\n".join(["<!-- Made by tools/nb.py from nbs/index.ipynb: edit that and run `python tools/nb.py --readme`. -->", *filter(None, blocks)])
    return text + "\n", pictures


def _shown(output, opts, pictures):
    "One output as markdown; pictures are collected as files."
    data = output.get("data", {"text/plain": output.get("text", "") if output.get("name") == "stdout" else ""})
    for mime, suffix in (("image/png", "png"), ("image/gif", "gif"), ("image/jpeg", "jpg")):
        if mime in data:
            path = f"nbs/images/readme-{len(pictures) + 1}.{suffix}"
            pictures[path] = base64.b64decode(data[mime])
            return f"![{opts.get('fig-alt', '')}]({path})"
    if is_widget(output): return ""
    if "text/markdown" in data: return relink(data["text/markdown"].strip())
    if "text/html" in data: return data["text/html"].strip()
    text = re.sub(r"\x1b\[[0-9;]*m", "", data.get("text/plain", "")).rstrip()
    return f"```text\n{text}\n```" if text else ""


def write_readme():
    text, pictures = readme()
    for old in (nbs / "images").glob("readme-*"): old.unlink()
    for path, content in pictures.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes(content)
    (root / "README.md").write_text(text, encoding="utf-8", newline="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--py", nargs="+", default=[], metavar="FILE", help="py:percent files to turn into notebooks first")
    parser.add_argument("--no-run", action="store_true", help="do not execute")
    parser.add_argument("--export", action="store_true", help="export every notebook")
    parser.add_argument("--readme", action="store_true", help="write README.md")
    args = parser.parse_args()
    if not (args.notebooks or args.py or args.readme or args.export): parser.error("nothing to do: give notebooks, --py FILE, --export or --readme")
    for path in [*args.notebooks, *map(Path, args.py)]:
        if not path.is_file(): parser.error(f"{path}: there is no such file")
    quiet_environment()
    notebooks = [*(p.resolve() for p in args.notebooks), *map(from_percent, args.py)]
    if notebooks: export(*notebooks)
    if args.export: export()
    for notebook in notebooks:
        start = time.time()
        if not args.no_run:
            try: execute(notebook)
            except Exception as e: sys.exit(f"{notebook.name} failed and keeps its old outputs:\n{e}")
            print(f"{notebook.name} ran in {time.time() - start:.0f} s")
        clean(notebook)
    if args.readme: write_readme()


if __name__ == "__main__": main()
