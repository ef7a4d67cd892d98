"Builds ppo_ddpm; every field comes from settings.ini, which nbdev reads too."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def long_description() -> str:
    "README.md with links that also work away from the repository: pictures as raw files, pages as GitHub shows them."
    readme = root / "README.md"
    if not readme.exists(): return cfg["description"]
    raw = cfg["git_url"].replace("github.com", "raw.githubusercontent.com") + f"/{cfg['branch']}/"
    blob = f"{cfg['git_url']}/blob/{cfg['branch']}/"
    prose_and_code, relative = re.split(r"(^```.*?^```)", readme.read_text(encoding="utf-8"), flags=re.M | re.S), r"(?![a-z]+:|#|/)"
    for i in range(0, len(prose_and_code), 2):
        text = re.sub(rf'(!\[[^\]]*\]\(|<img[^>]*?src="){relative}', lambda m: m[1] + raw, prose_and_code[i])
        prose_and_code[i] = re.sub(rf"(?<!!)(\[[^\]\[]*\]\(){relative}", lambda m: m[1] + blob, text)
    return "".join(prose_and_code)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    license={"mit": "MIT"}[cfg["license"]],
    license_files=["LICENSE"],
    url=cfg["git_url"],
    project_urls={
        "Documentation": cfg["doc_host"] + cfg["doc_baseurl"],
        "Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
        "Issues": f"{cfg['git_url']}/issues",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_namespace_packages(include=["ppo_ddpm", "ppo_ddpm.*"], exclude=["*.__pycache__", "*.__pycache__.*"]),
    package_data={"ppo_ddpm.configs": ["*.yaml"], "ppo_ddpm.templates": ["*.html", "*.md"], "ppo_ddpm.weights": ["*.safetensors", "*.json", "*.md"]},
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "notebooks", "lora")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
