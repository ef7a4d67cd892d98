"""What a reader of the site would miss: faults of its pages.

    python tools/check_pages.py _docs       a rendered site: links, pictures, width on a phone and, where axe is installed, accessibility

`page_faults` needs no Quarto: it reads a notebook and the page that tools/pages.py makes of it.
"""
import ast, functools, http.server, os, re, shutil, sys, threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from pages import address, directives, root, settings, text

PHONE = 390             # pixels
FITS, MAX = 83, 110     # characters of a code line: what the site shows without wrapping, and the most


# --- one page, before Quarto -----------------------------------------------------------------------------------------------
def opening_faults(notebook):
    first = text(notebook["cells"][0]["source"])
    if notebook["cells"][0]["cell_type"] == "markdown" and re.fullmatch(r"# .+\n+> .+\n*", first): return []
    return ["the first cell is not '# Title' and '> answer in one line' and nothing else: nbdev drops the rest of it from the page"]


def code_faults(notebook, page):
    "Exported code that its page does not show, and lines that are too long."
    shown = "\n".join(text(c["source"]) for c in page["cells"] if c["cell_type"] == "code")
    faults, sizes = [], dict(export=0, exports=0)
    for i, cell in enumerate(c for c in notebook["cells"] if c["cell_type"] == "code"):
        code = "\n".join(line for line in text(cell["source"]).splitlines() if not line.startswith("#|")).strip()
        kind = next((kind for kind in sizes if kind in directives(cell["source"])), None)
        if kind: sizes[kind] += len(code)
        if kind == "exports" and code not in shown: faults.append(f"code cell {i}: the page does not show this code")
        faults += [f"code cell {i}: a line has {len(line)} characters, more than {MAX}" for line in code.splitlines() if len(line) > MAX]
    plumbing = any(directives(text(c["source"])).get("default_exp") == "engine.commands" for c in notebook["cells"] if c["cell_type"] == "code")
    if not plumbing and sum(sizes.values()) and sizes["exports"] < sum(sizes.values()) / 2:
        faults.append(f"the page shows {sizes['exports'] / sum(sizes.values()):.0%} of the code that it exports: mark what it explains `#| exports`")
    return faults


def import_faults(notebook):
    "Cells that nbdev runs, without the cells between them, because they import, although they do more."
    cells = [text(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    if not any({"export", "exports"} & set(directives(source)) for source in cells): return []      # then it runs none
    faults = []
    for i, source in enumerate(cells):
        options = directives(source)
        if {"export", "exports", "exporti"} & set(options) or options.get("eval") == "false" or '"google.colab" in sys.modules' in source: continue
        try: tree = ast.parse(source)
        except SyntaxError: continue
        imports = any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree))
        more = [n for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))]
        if imports and more: faults.append(f"code cell {i}: nbdev runs a cell that imports, and not those above it: imports stand in a cell of their own")
    return faults


def long_share(notebook):
    "Share of code lines that the site has to wrap."
    lines = [line for c in notebook["cells"] if c["cell_type"] == "code" for line in text(c["source"]).splitlines() if line.strip()]
    return sum(len(line) > FITS for line in lines) / max(1, len(lines))


def picture_faults(page, folder):
    "Pictures that are no file, that Quarto cannot show, or that a blind reader learns nothing of."
    faults = []
    for i, cell in enumerate(page["cells"]):
        source = text(cell["source"])
        if cell["cell_type"] == "markdown": faults += [f"cell {i}: {fault}" for fault in markdown_picture_faults(source, folder)]
        for data in (output.get("data", {}) for output in cell.get("outputs", [])):
            kinds = {kind for kind in data if kind.startswith("image/")}
            html = text(data.get("text/html", ""))
            if kinds and not html and not directives(source).get("fig-alt"): faults.append(f'cell {i}: a picture without `#| fig-alt: "..."`')
            if kinds and not html and not kinds & {"image/png", "image/jpeg", "image/svg+xml"}: faults.append(f"cell {i}: Quarto shows no {kinds.pop()}")
            if re.search(r"<IPython.core.display.\w+ object>", text(data.get("text/plain", ""))) and not kinds and not html and "text/markdown" not in data:
                faults.append(f"cell {i}: an object without picture is shown")
            faults += [f"cell {i}: {tag[:60]} has no alt" for tag in re.findall(r"<img\b[^>]*>", html) if not re.search(r"""\balt=["'][^"']""", tag)]
    return faults


def markdown_picture_faults(source, folder):
    prose = without_code(source)
    tags = re.findall(r"<img\b[^>]*>", prose)
    faults = [f"{tag[:60]} has no alt" for tag in tags if not re.search(r"""\balt=["'][^"']""", tag)]
    # a picture that is a paragraph becomes a figure, whose text is a caption: its alt needs saying
    for whole, target in re.findall(r"^(!\[[^\]]*\]\(([^)\s]+)\)(?:\{[^}]*\})?)\s*$", prose, re.M):
        if "fig-alt" not in whole: faults.append(f'{target} has no alt text on the site: write <img src="{target}" alt="...">')
    faults += [f"a picture without alt text: {target}" for target in re.findall(r"!\[\s*\]\(([^)\s]+)", prose)]
    for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", prose) + re.findall(r'<img[^>]*\bsrc="([^"]+)', prose):
        if not re.match(r"[a-z]+:", target) and not (folder / unquote(target)).is_file(): faults.append(f"there is no picture {target}")
    return faults


def without_code(markdown): return re.sub(r"^```.*?^```|`[^`\n]+`", "", markdown, flags=re.M | re.S)


def links(markdown):
    "Targets of links and pictures outside code."
    prose = without_code(markdown)
    return re.findall(r"\]\(([^)\s]+)", prose) + re.findall(r"\b(?:src|href)=\"([^\"]+)", prose) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", prose, re.M)


def page_link_faults(page, folder):
    "Links that lead to no page or file of the site, to no name on it, or to no file of the repository."
    faults, blob = [], f"{settings()['git_url']}/blob/{settings()['branch']}/"
    notebooks = {address(p.name): p for p in folder.glob("*.ipynb")}
    for cell in page["cells"]:
        shown = [text(o["data"].get("text/markdown", "")) + text(o["data"].get("text/html", "")) for o in cell.get("outputs", []) if "data" in o]
        for link in links("\n".join([text(cell["source"]) if cell["cell_type"] == "markdown" else "", *shown])):
            target = unquote(link.split("#")[0].split("?")[0])
            if target.startswith(blob): good = (root / target.removeprefix(blob)).exists()
            elif target.startswith(settings()["site"] + "/"): good = target.removeprefix(settings()["site"] + "/") in {"", "index.html", "llms.txt", *notebooks}
            else: good = bool(re.match(r"[a-z]+:", link)) or link.startswith("#") or (folder / target).is_file() or target in notebooks
            if not good: faults.append(f"{link} leads nowhere")
    return faults


def page_faults(notebook, page, folder):
    return opening_faults(notebook) + code_faults(notebook, page) + picture_faults(page, folder) + page_link_faults(page, folder)


# --- HTML ------------------------------------------------------------------------------------------------------------------
class Names(HTMLParser):
    "What an HTML page refers to, and the names within it."
    def __init__(self, html):
        super().__init__()
        self.targets, self.names = [], {""}
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.names |= {attrs.get("id", ""), attrs.get("name", "")}
        self.targets += [attrs[key] for key in ("href", "src") if attrs.get(key)]
        if attrs.get("property") == "og:image": self.targets.append(attrs["content"])


def html_faults(folder):
    "Links and pictures of a rendered site that lead nowhere; a social card that is no file."
    parsed = {path.relative_to(folder).as_posix(): Names(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    faults, site = [], settings()["site"] + "/"
    for name, page in parsed.items():
        for target in dict.fromkeys(page.targets):
            url = urlsplit(urljoin(site + name, target))
            if not url.geturl().startswith(site): continue
            path = unquote(url.path).removeprefix(urlsplit(site).path) or "index.html"
            if not (folder / path).exists(): faults.append(f"{name}: {target} leads nowhere")
            elif path in parsed and unquote(url.fragment) not in parsed[path].names: faults.append(f"{name}: {target}: no such place on the page")
    return faults


def browser(playwright):
    "The system's Chromium or Chrome, else the one that Playwright has installed; None where there is none."
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    try: return playwright.chromium.launch(executable_path=path, args=arguments)
    except Exception: return None


WIDE = """limit => {
    const right = e => e.getBoundingClientRect().right, scrolls = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
    const wide = e => right(e) > limit + 1, boxed = e => e.parentElement && (scrolls(e.parentElement) || boxed(e.parentElement));
    if (document.documentElement.scrollWidth <= limit) return null;
    const found = [...document.querySelectorAll("body *")].filter(e => !boxed(e) && (wide(e) || e.scrollWidth > limit && !scrolls(e)));
    return found.filter(e => !found.some(other => e !== other && e.contains(other))).map(e => e.outerHTML.slice(0, 80)).slice(0, 3);
}"""


def wide_faults(page, name):
    "A page that a phone scrolls sideways, with what makes it wide."
    page.set_viewport_size(dict(width=PHONE, height=800))
    wide = page.evaluate(WIDE, PHONE)
    return [] if wide is None else [f"{name}: wider than a phone of {PHONE} pixels: {wide}"]


def axe_faults(page, name):
    "What axe finds serious or critical; nothing where the package axe-playwright-python is not installed."
    try: from axe_playwright_python.sync_playwright import Axe
    except ImportError: return []
    found = Axe().run(page).response["violations"]
    return [f"{name}: axe, {v['impact']}: {v['help']}: {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in ("serious", "critical")]


def serve(folder):
    "A site on this machine: (server, address)."
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def browser_faults(folder):
    "Every page on a phone; on a desk in both themes, through axe."
    from playwright.sync_api import sync_playwright
    server, url = serve(folder)
    faults = []
    with sync_playwright() as playwright:
        chromium = browser(playwright)
        if chromium is None: sys.exit("no Chromium was found: apt-get install -y chromium, or playwright install chromium")
        for theme in ("light", "dark"):
            page = chromium.new_page(color_scheme=theme, viewport=dict(width=1400, height=900))
            for path in sorted(folder.glob("*.html")):
                page.goto(url + path.name)
                page.set_viewport_size(dict(width=1400, height=900))
                faults += axe_faults(page, f"{path.name}, {theme}")
                if theme == "light": faults += wide_faults(page, path.name)
        chromium.close()
    server.shutdown()
    return faults


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir(): sys.exit(__doc__)
    folder = Path(sys.argv[1]).resolve()
    faults = html_faults(folder) + browser_faults(folder)
    print("\n".join(faults) or f"{len(list(folder.glob('*.html')))} pages, no faults")
    sys.exit(bool(faults))


if __name__ == "__main__": main()
