"""How `pytest` runs here: one thread per process, notebooks on the CPU, and what nbval needs to compare cleaned notebooks.

The environment is set before anything imports torch, and the kernels that nbval starts inherit it."""
import atexit, os, shutil, tempfile

import nb as nb_tool   # pytest.ini puts tools/ on the path

nb_tool.quiet_environment()
os.environ.setdefault("PPO_DDPM_QUICK", "1")      # the long runs of some notebooks stop after two rounds
if "PYTEST_XDIST_WORKER" not in os.environ:      # workers and their kernels use the folder that the first process made
    os.environ["IPYTHONDIR"] = tempfile.mkdtemp(prefix="ipython-")   # no start-up files of the user, no shared history
    atexit.register(shutil.rmtree, os.environ["IPYTHONDIR"], ignore_errors=True)


def pytest_collection_modifyitems(items):
    "nbdev_clean drops execution counts, without which nbval compares nothing; directives say what to skip and what not to compare."
    for item in items:
        if not hasattr(item, "cell"): continue
        if item.cell.execution_count is None: item.cell.execution_count = 1
        if "stderr" not in item.parent.skip_compare: item.parent.skip_compare += ("stderr",)   # warnings differ between versions
        opts, _ = nb_tool.directives(item.cell.source)
        if opts.get("eval") == "false": item.options["skip"] = True
        if opts.get("nbval") == "ignore": item.options["check"] = False
