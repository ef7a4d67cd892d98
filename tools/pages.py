"""Make the site.

    python tools/pages.py --plain FOLDER    without Quarto: every page as plain HTML with the site's styles, to look at
    python tools/pages.py --render          with Quarto: the site, in _docs/; tools/check_pages.py checks it

nbdev turns notebooks into pages, and `mend` adds what it leaves out.
"""
import argparse, configparser, functools, json, os, re, shutil, subprocess, sys
from pathlib import Path

import yaml

root = Path(__file__).resolve().parents[1]
pages = root / "_proc"


@functools.lru_cache(maxsize=None)
def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(root / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"], site=parser["DEFAULT"]["doc_host"] + parser["DEFAULT"]["doc_baseurl"])


def read(path): return json.loads(path.read_text(encoding="utf-8"))


def text(source): return "".join(source) if isinstance(source, list) else source or ""


def directives(source):
    "{name: value} of the `#| name: value` lines of a cell."
    return dict(re.findall(r"^#\s*\|\s*([\w-]+):?[ \t]*[\"']?(.*?)[\"']?\s*$", text(source), re.M))


# --- make ------------------------------------------------------------------------------------------------------------------
def make_pages():
    "Pages for Quarto in _proc/: what nbdev_docs does before it calls Quarto, then `mend`."
    os.chdir(root)      # nbdev finds its settings from the working directory
    from nbdev.doclinks import _build_modidx
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    _build_modidx()
    shutil.rmtree(pages, ignore_errors=True)
    proc_nbs(n_workers=1)
    shutil.copytree(root / "nbs/images", pages / "images", dirs_exist_ok=True)
    for path in pages.glob("*.ipynb"):
        page = mend(read(path), path.stem)
        path.write_text(json.dumps(page, indent=1, ensure_ascii=False), encoding="utf-8")
    (pages / "llms.txt").write_text(llms_txt(), encoding="utf-8")


def mend(page, name):
    "What nbdev leaves: numbers in titles, links out of nbs/, links inside signatures, signatures above the code that shows them."
    number = re.match(r"(\d+)_", name)
    repository = f"{settings()['git_url']}/blob/{settings()['branch']}/"
    title = text(page["cells"][0]["source"])
    if number: page["cells"][0]["source"] = re.sub(r"^title: '?(?!\d)", rf"\g<0>{number[1]}. ", title, flags=re.M)
    for cell in page["cells"]:
        cell.pop("has_sd", None)        # nbdev's own mark
        source = cell["source"] = text(cell["source"])
        if cell["cell_type"] == "markdown": cell["source"] = to_class(re.sub(r'(\]\(|(?:src|href)=")\.\./', rf"\1{repository}", source))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = to_class(unlink_code(text(data["text/markdown"])))
            if "image/gif" in data: data["text/html"] = gif(data.pop("image/gif"), directives(source).get("fig-alt", ""))
    page["cells"] = beside_code([cell for cell in page["cells"] if '"google.colab" in sys.modules' not in cell["source"]])
    return page


def to_class(markdown):
    "Links to a method lead to its class, which has a heading on its page."
    return re.sub(rf"(\({settings()['site']}/\w+\.html#\w+)\.[\w.]+\)", r"\1)", markdown)


def unlink_code(markdown):
    "nbdev links names in backticks even within fenced code, where a reader sees the markup."
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)
    parts[1::2] = [re.sub(r"\[(`[^`\n]+`)\]\([^)\s]+\)", r"\1", part) for part in parts[1::2]]
    return "".join(parts)


def gif(data, alt):
    "Quarto shows no GIF of an output, only its text."
    data = text(data).replace("\n", "")
    return f'<img src="data:image/gif;base64,{data}" alt="{alt}">'


def is_signature(cell): return cell["cell_type"] == "code" and re.search(r"^show_doc\(", cell["source"], re.M)


def is_shown(cell): return 'code-summary: "Exported source"' in cell["source"]


def beside_code(cells):
    "Where a page shows a function's code, its headings come first, without signature and docstring, which the code has."
    done, i = [], 0
    while i < len(cells):
        end = i
        while end < len(cells) and (is_signature(cells[end]) or is_shown(cells[end])): end += 1
        group = cells[i:end]
        if any(map(is_shown, group)):
            for cell in group:
                if is_shown(cell): cell["source"] = re.sub(r"^#\| code-(fold|summary):.*\n", "", cell["source"], flags=re.M)
                else: heading_only(cell)
            group.sort(key=lambda cell: not is_signature(cell))
        done += group or [cells[i]]
        i = max(end, i + 1)
    return done


def heading_only(cell):
    for output in cell["outputs"]:
        markdown = output.get("data", {}).get("text/markdown", "")
        if heading := re.search(r"^#+ .*$", markdown, re.M): output["data"]["text/markdown"] = markdown[:heading.end()] + "\n"


def sections():
    "[(title, [notebook, ...]), ...] as the sidebar shows them."
    sidebar = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    return [(section["section"], section["contents"]) for section in sidebar]


def address(notebook):
    "Where nbdev puts a notebook's page."
    return re.sub(r"^\d+[a-z]*_", "", Path(notebook).stem) + ".html"


def llms_txt():
    "https://llmstxt.org: what the site holds, for programs that read it."
    lines = [f"# {settings()['title']}", "", f"> {settings()['description']}", ""]
    for section, notebooks in sections():
        lines += [f"## {section}", ""]
        for name in filter(lambda name: (root / "nbs" / name).exists(), notebooks):
            opening = text(read(root / "nbs" / name)["cells"][0]["source"])
            title, answer = re.match(r"# (.*)\n+(?:> (.*))?", opening + "\n").groups()
            lines.append(f"- [{title}]({settings()['site']}/{address(name)}): {answer}")
        lines.append("")
    return "\n".join(lines + [f"Source: {settings()['git_url']}", ""])


def plain(folder):
    "Every page as HTML with the site's styles and none of Quarto's."
    import nbformat
    from nbconvert import HTMLExporter
    folder.mkdir(parents=True, exist_ok=True)
    styles = (root / "nbs/styles.css").read_text(encoding="utf-8")
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    for path in sorted(pages.glob("*.ipynb")):
        page = read(path)
        front = yaml.safe_load(page["cells"].pop(0)["source"].strip("-\n"))
        for cell in page["cells"]:
            if "echo: false" in cell["source"]: cell["source"] = ""
            if cell["cell_type"] == "code": cell["source"] = re.sub(r"^#\s*\|.*\n?", "", cell["source"], flags=re.M)
        body, _ = exporter.from_notebook_node(nbformat.reads(json.dumps(page), 4))
        body = re.sub(r"\$\$.*?\$\$", r'<span class="math display">\g<0></span>', body, flags=re.S)
        body = re.sub(r'(href="[\w.]*?)(?:\d+_)?(\w+)\.ipynb', r"\1\2.html", body)
        (folder / front["output-file"]).write_text(
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<title>{front["title"]}</title><style>body {{ max-width: 50rem; margin: auto; padding: 0 1rem; font-family: sans-serif }}\n{styles}</style>'
            f'<main><h1>{front["title"]}</h1><p>{front["description"]}</p>\n{body}</main></html>', encoding="utf-8")
    shutil.copytree(pages / "images", folder / "images", dirs_exist_ok=True)


def render():
    if not shutil.which("quarto"): sys.exit("Quarto is not installed: see https://quarto.org/docs/get-started, or look at pages with --plain FOLDER")
    make_pages()
    subprocess.run(["quarto", "render", "--no-cache"], cwd=pages, check=True)
    shutil.rmtree(root / "_docs", ignore_errors=True)
    shutil.move(pages / "_docs", root / "_docs")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=Path, metavar="FOLDER", help="make the pages and turn them into plain HTML")
    parser.add_argument("--render", action="store_true", help="make the pages and the site")
    args = parser.parse_args()
    if not (args.plain or args.render): parser.error("nothing to do: give --plain FOLDER or --render")
    if args.plain:
        args.plain = args.plain.resolve()
        make_pages()
        plain(args.plain)
    if args.render: render()


if __name__ == "__main__": main()
