"What is shipped: wheel and sdist with configurations and weights, commands, dependencies, and an import that costs nothing."
import ast, importlib, os, re, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path

import pytest

import ppo_ddpm
from test_drift import links, none, root, settings

# import name -> name of the requirement that brings it, where they differ
BROUGHT_BY = dict(PIL="pillow", yaml="pyyaml", sklearn="scikit-learn", IPython="ipywidgets", traitlets="ipywidgets")


def python(*args, cwd, **env):
    done = subprocess.run([sys.executable, *args], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "(sdist, wheel): the wheel is built from the sdist, as `python -m build` does, in a copy of the checkout."
    folder = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns(".git", ".venv*", "venv", "build", "dist", "*.egg-info", "__pycache__", "_docs", "_proc", "data", "runs", ".*cache*")
    shutil.copytree(root, folder / "project", ignore=skip)
    python("-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "project"), cwd=folder)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def package_files():
    "What git would find there: no compiled code, no caches of tools."
    files = [p.relative_to(root) for p in (root / "ppo_ddpm").rglob("*") if p.is_file()]
    return {p.as_posix() for p in files if not any(part.startswith((".", "__pycache__")) for part in p.parts)}


def test_wheel_and_sdist_hold_every_file_of_the_package(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as z: in_wheel = {n for n in z.namelist() if n.startswith("ppo_ddpm/")}
    with tarfile.open(sdist) as t: in_sdist = {m.name.partition("/")[2] for m in t.getmembers() if m.isfile()}
    assert in_wheel == package_files()
    assert package_files() | {"settings.ini", "setup.py", "README.md", "LICENSE", "CHANGELOG.md", "nbs/index.ipynb", "conftest.py", "tools/nb.py"} <= in_sdist
    assert {"smoke.yaml", "digits.yaml", "default.yaml", "report.html", "card.md"} <= {Path(n).name for n in in_wheel}
    assert any(n.startswith("ppo_ddpm/weights/") and n.endswith(".safetensors") for n in in_wheel)


def test_metadata(built):
    with zipfile.ZipFile(built[1]) as z:
        info = next(n for n in z.namelist() if n.endswith(".dist-info/METADATA")).removesuffix("METADATA")
        metadata, entry_points = z.read(info + "METADATA").decode(), z.read(info + "entry_points.txt").decode()
    assert f"Version: {settings['version']}\n" in metadata and ppo_ddpm.__version__ == settings["version"]
    assert "Requires-Python: >=3.10\n" in metadata and "License: MIT" in metadata or "License-Expression: MIT" in metadata
    assert re.findall(r"Provides-Extra: (\w+)", metadata) == ["dev", "notebooks", "lora"]
    assert "ppo-ddpm = ppo_ddpm.engine.commands:main" in entry_points and "ppo_ddpm = ppo_ddpm._modidx:d" in entry_points
    relative = [link for link in links(metadata.split("\n\n", 1)[1]) if not re.match(r"[a-z]+:|#", link)]
    none([f"{link} leads nowhere on a package index" for link in relative])


def test_an_installed_wheel_works_away_from_the_checkout(built, tmp_path):
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(built[1]), cwd=tmp_path)
    code = """
import ppo_ddpm, sys
from importlib import resources
from ppo_ddpm.engine.options import config_names, load_config
assert ppo_ddpm.__file__.startswith(sys.argv[1]), ppo_ddpm.__file__
for name in config_names(): load_config(name)
print(sorted(config_names()), any(p.name.endswith(".safetensors") for p in (resources.files("ppo_ddpm") / "weights").iterdir()))
"""
    said = python("-c", code, str(tmp_path / "site"), cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "'digits'" in said and said.endswith("True")
    usage = python("-m", "ppo_ddpm", "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    for command in ("train-ddpm", "train-reward", "finetune", "evaluate", "demo"): assert command in usage


def test_import_loads_nothing_heavy():
    "`import ppo_ddpm` costs nothing, nor does asking the command for its usage."
    look = "import sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    heavy = {"torch", "numpy", "pydantic", "torchvision", "matplotlib", "sklearn", "scipy", "IPython", "ipywidgets", "tensorboard", "diffusers", "nbdev"}
    for name in "ppo_ddpm", "ppo_ddpm.engine.commands": # the usage of the command comes at once
        assert not heavy & set(python("-c", f"import {name}; {look}", cwd=root).split())
    assert "matplotlib" in python("-c", f"import ppo_ddpm, matplotlib; {look}", cwd=root).split()   # the check sees what is there


def test_names_of_the_package():
    "Every name that `import ppo_ddpm` offers is there, comes from the module the table says, and hides no module."
    for name, module in ppo_ddpm._home.items():
        assert getattr(ppo_ddpm, name) is getattr(importlib.import_module(f"ppo_ddpm.{module}"), name)
    modules = {p.stem for p in (root / "ppo_ddpm").glob("*.py") if not p.stem.startswith("_")} | {"engine"}
    assert set(ppo_ddpm._modules) == modules and not modules & set(ppo_ddpm._home)
    assert set(ppo_ddpm.__all__) <= set(dir(ppo_ddpm))
    with pytest.raises(AttributeError, match="no attribute 'unett'"): ppo_ddpm.unett


def undeclared(source, requirements, extras=""):
    "Top-level packages that the source imports and no requirement brings; an extra is enough where the source says what to do without."
    tree = ast.parse(source)
    kind = lambda h: getattr(h.type, "id", None)
    optional = {n for t in ast.walk(tree) if isinstance(t, ast.Try) and "ImportError" in map(kind, t.handlers) for n in map(id, t.body)}
    return sorted(_missing((n for n in ast.walk(tree) if id(n) not in optional), requirements) | _missing((n for n in ast.walk(tree) if id(n) in optional), requirements + " " + extras))


def _missing(nodes, requirements):
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import): names |= {n.name.split(".")[0] for n in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: names.add(node.module.split(".")[0])
    known = {re.split(r"[<>=!~]", r)[0].lower() for r in requirements.split()}
    return {n for n in names - set(sys.stdlib_module_names) - {"ppo_ddpm"} if BROUGHT_BY.get(n, n).lower() not in known}


def test_requirements_bring_all_that_is_imported():
    none([f"{p.name} imports {n}, which settings.ini does not require" for p in sorted((root / "ppo_ddpm").rglob("*.py"))
          for n in undeclared(p.read_text(encoding="utf-8"), settings["requirements"], settings["lora_requirements"])])
    assert undeclared("try: import peft\nexcept ImportError: pass\ntry: import keft\nexcept ImportError: pass", "", "peft") == ["keft"]
    assert undeclared("import peft", "", "peft") == ["peft"]
    assert undeclared("import os, yaml\nfrom PIL import Image\ndef f(): import pandas.io", "pyyaml pillow>=10") == ["pandas"]


def bounded(requirements): return [r for r in requirements.split() if re.search(r"<|==|~=", r)]


def test_what_users_install_has_no_upper_bounds():
    "A bound would downgrade what others need, such as fastai in Colab; what the tools of development cannot do with stands in the extra dev."
    none([f"settings.ini: {r} bounds a requirement of users from above" for extra in ("", "notebooks_", "lora_") for r in bounded(settings[f"{extra}requirements"])])
    assert bounded("a b>=1 c<2 d>=1,<2 e==3 f~=4 g!=5") == ["c<2", "d>=1,<2", "e==3", "f~=4"]
