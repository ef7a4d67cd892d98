"What `pytest` does with notebooks: a wrong stored output fails, an exception fails, and directives do what they say."
import json, os, shutil, subprocess, sys
from pathlib import Path
from xml.etree import ElementTree

root = Path(__file__).resolve().parents[1]


def code(source, printed=""):
    outputs = [dict(output_type="stream", name="stdout", text=printed + "\n")] if printed else []
    return dict(cell_type="code", metadata={}, source=source, execution_count=None, outputs=outputs)


CELLS = [
    (code("print(1 + 1)", "2"), "passed"),
    (code("print(1 + 2)", "4"), "failed"),
    (code("print('not stored')"), "failed"),
    (code("x = 1", "no longer printed"), "failed"),
    (code("1 / 0"), "failed"),
    (code("#| nbval: ignore\nprint('new')", "old"), "passed"),
    (code("#| nbval: ignore\n1 / 0", "old"), "failed"),
    (code("#| eval: false\nraise SystemExit"), "skipped"),
    (code("print(object())", "<object object>"), "passed"),
    (code("import sys; print('a warning', file=sys.stderr)"), "passed"),
    (code("import os; print(os.path.basename(os.getcwd()), os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'] == '')", "nbs 1 True"), "passed"),
    (code("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()"), "failed"),   # its figure is not stored
]


def test_what_fails_and_what_passes(tmp_path):
    for name in ("conftest.py", "pytest.ini"): shutil.copy(root / name, tmp_path)
    for name in ("tools", "tests"): shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "test_*"))
    (tmp_path / "nbs").mkdir()
    nb = dict(cells=[c for c, _ in CELLS], metadata={}, nbformat=4, nbformat_minor=5)
    for i, cell in enumerate(nb["cells"]): cell["id"] = f"cell-{i}"
    (tmp_path / "nbs/00_a.ipynb").write_text(json.dumps(nb))
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-n", "0", "--junitxml=report.xml", "--color=no", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-1000:]
    found = {case.get("name"): next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
             for case in ElementTree.parse(tmp_path / "report.xml").iter("testcase")}
    expected = {f"Cell {i}": word.replace("failed", "failure") for i, (_, word) in enumerate(CELLS)}
    assert found == expected, done.stdout[-3000:]
