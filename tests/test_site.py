"""The site without Quarto: what nbdev and tools/pages.py make of the notebooks, and what of it a reader would miss.

tools/check_pages.py holds the checkers; here they meet the pages of today and planted faults."""
import os, shutil, subprocess, sys, warnings
from pathlib import Path

import check_pages
import pages
import pytest
import yaml
from test_drift import cells, copy_project, none, notebook, notebooks, read, repo_url, root, settings

LONG_SHARE = 0.05      # of the code lines of a notebook may be longer than fits: above that a warning
each_notebook = pytest.mark.parametrize("name", [p.name for p in notebooks])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The project's copy with pages for Quarto in _proc/ and plain ones in plain/."
    copy = copy_project(tmp_path_factory.mktemp("site"))
    for folder in ("ppo_ddpm", "tools"): shutil.copytree(root / folder, copy / folder, dirs_exist_ok=True)
    environ = {**os.environ, "PYTHONPATH": str(copy)}
    environ.pop("IN_TEST", None)
    done = subprocess.run([sys.executable, "tools/pages.py", "--plain", "plain"], cwd=copy, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr[-1500:]}\nnbdev runs the cells that export or import, and no others: an import stands in a cell of its own"
    return copy


# --- settings --------------------------------------------------------------------------------------------------------------
def sidebar_faults(sections, names):
    "Notebooks that the sidebar lacks, shows twice, out of order, or in the wrong section; entries without notebook."
    shown = [name for _, contents in sections for name in contents]
    faults = [f"the sidebar lacks {name}" for name in sorted(set(names) - set(shown))]
    faults += [f"there is no {name}, which the sidebar shows" for name in sorted(set(shown) - set(names))]
    if shown != sorted(set(shown), key=lambda name: (name != "index.ipynb", name)): faults.append("the sidebar is not in the order of the numbers, or shows one twice")
    groups = [("Start", ""), ("Start", "00"), *(("Tutorial", f"0{i}") for i in range(1, 10)), ("Engine room", "1"), ("Case studies", "2"), ("Reference", "3")]
    for section, contents in sections:
        for name in contents:
            number = "" if name == "index.ipynb" else name.split("_")[0]
            if (section, number) not in groups and (section, number[:1]) not in groups: faults.append(f"{name} stands under {section}")
    return faults


def test_sidebar(): none(sidebar_faults(pages.sections(), [p.name for p in notebooks]))


def test_planted_sidebar():
    good = [("Start", ["index.ipynb", "00_a.ipynb"]), ("Tutorial", ["01_b.ipynb"]), ("Engine room", ["12_c.ipynb"])]
    names = ["00_a.ipynb", "01_b.ipynb", "12_c.ipynb", "index.ipynb"]
    assert sidebar_faults(good, names) == []
    assert sidebar_faults(good, [*names, "20_d.ipynb"]) == ["the sidebar lacks 20_d.ipynb"]
    assert sidebar_faults(good, names[1:]) == ["there is no 00_a.ipynb, which the sidebar shows"]
    assert sidebar_faults([*good, ("Case studies", ["12_c.ipynb"])], names)[1:] == ["12_c.ipynb stands under Case studies"]
    assert sidebar_faults([("Start", ["index.ipynb"]), ("Tutorial", ["00_a.ipynb", "01_b.ipynb", "12_c.ipynb"])], names) == [
        "00_a.ipynb stands under Tutorial", "12_c.ipynb stands under Tutorial"]


def test_quarto_settings():
    quarto = yaml.safe_load((root / "_quarto.yml").read_text(encoding="utf-8"))
    assert (root / "nbs/_quarto.yml").resolve() == root / "_quarto.yml"
    assert quarto["project"]["output-dir"] == settings["doc_path"] and quarto["metadata-files"] == ["nbdev.yml"]
    site = quarto["website"]
    assert (site["title"], site["repo-url"], site["repo-branch"]) == (settings["title"], repo_url, settings["branch"])
    assert site["site-url"] == settings["doc_host"] + settings["doc_baseurl"]
    files = [quarto["format"]["html"]["css"], site["favicon"], site["open-graph"]["image"], site["twitter-card"]["image"], "404.qmd"]
    none([f"nbs/{name} is missing" for name in files if not (root / "nbs" / name).is_file()])
    shown = [entry["href"] for entry in site["page-footer"]["right"] + site["navbar"]["left"]]
    none([f for href in shown for f in check_pages.page_link_faults(notebook(f"[x]({href})"), root / "nbs")])
    assert "custom_quarto_yml" not in settings, "nbdev deletes nbs/_quarto.yml where this is set"


# --- pages -----------------------------------------------------------------------------------------------------------------
@each_notebook
def test_page(site, name):
    original, page = read(root / "nbs" / name), read(site / "_proc" / name)
    none(check_pages.page_faults(original, page, site / "_proc"))
    prose = "\n".join(pages.text(c["source"]) for c in page["cells"])
    first = [s for _, s, _ in cells(original, "markdown")][1].splitlines()[0].replace("](../", "](")
    assert first in prose, "the page lacks its opening"
    if (share := check_pages.long_share(original)) > LONG_SHARE:
        warnings.warn(f"{name}: {share:.0%} of its code lines are longer than the {check_pages.FITS} characters that fit on the site")


@each_notebook
def test_title(site, name):
    front = yaml.safe_load(pages.text(read(site / "_proc" / name)["cells"][0]["source"]).strip("-\n"))
    assert front["title"] and front["description"]
    assert name == "index.ipynb" or front["title"].startswith(name.split("_")[0] + ". ")
    assert front["output-file"] == pages.address(name)


def test_files(site):
    for name in ("llms.txt", "404.qmd", "favicon.svg", "styles.css", "images/card.png", "_quarto.yml", "nbdev.yml"): assert (site / "_proc" / name).is_file()
    text = (site / "_proc/llms.txt").read_text(encoding="utf-8")
    assert text.startswith(f"# {settings['title']}\n\n> {settings['description']}\n")
    assert all(f"/{pages.address(p)}): " in text for p in notebooks)


FINE = ("# Title\n\n> answer", "opening", ("#| exports\nx = 1",))


@pytest.mark.parametrize("cell", ["# Title\n\n> answer\n\nMore.", "# Title", "Title\n\n> answer", ("x = 1",)])
def test_planted_opening(cell):
    assert len(check_pages.opening_faults(notebook(cell, "more"))) == 1
    assert check_pages.opening_faults(notebook(*FINE)) == []


def test_planted_code():
    assert check_pages.code_faults(notebook(*FINE), notebook(("x = 1",))) == []
    assert "does not show this code" in check_pages.code_faults(notebook(*FINE), notebook(("y = 1",)))[0]
    assert "0% of the code" in check_pages.code_faults(notebook(("#| export\nx = 1",)), notebook())[0]
    assert "111 characters" in check_pages.code_faults(notebook(("x" * 111,)), notebook())[0]
    assert check_pages.long_share(notebook(("x" * 84 + "\ny\n\n",))) == 0.5


@pytest.mark.parametrize("path", notebooks, ids=lambda p: p.stem)
def test_imports_stand_alone(path): none(check_pages.import_faults(read(path)))


def test_planted_import_among_code():
    export = ("#| exports\nimport a\nx = 1",)
    for source in ("import a\nx = 1", "def f():\n    import a\nf()"):
        assert len(check_pages.import_faults(notebook(export, (source,)))) == 1
        assert check_pages.import_faults(notebook((source,))) == []
    assert check_pages.import_faults(notebook(export, ("import a\nfrom b import c",), ("x = 1",), ("#| eval: false\nimport a\nx = 1",), ("%pip x",))) == []


def picture(kind="image/png", **more): return dict(output_type="display_data", metadata={}, data={kind: "QUJD", "text/plain": "<Figure>", **more})


@pytest.mark.parametrize("source, output, said", [
    ("plot()", picture(), "without `#| fig-alt"),
    ('#| fig-alt: ""\nplot()', picture(), "without `#| fig-alt"),
    ('#| fig-alt: "a"\nplot()', picture("image/gif"), "Quarto shows no image/gif"),
    ("show()", dict(output_type="execute_result", metadata={}, data={"text/plain": "<IPython.core.display.Image object>"}), "an object without picture"),
    ("show()", picture("text/html", **{"text/html": "<img src='data:image/png;base64,QUJD'>"}), "has no alt"),
    ("show()", picture("text/html", **{"text/html": '<img alt="" src="x.png">'}), "has no alt"),
])
def test_planted_picture(source, output, said, tmp_path):
    faults = check_pages.picture_faults(notebook((source,), outputs=[output]), tmp_path)
    assert len(faults) == 1 and said in faults[0]


@pytest.mark.parametrize("markdown, said", [
    ('<img src="images/no.png" alt="a">', "there is no picture images/no.png"), ('<img src="images/i.png">', "has no alt"),
    ("![a](images/i.png)", "has no alt text on the site"), ("see ![](images/i.png)", "without alt text"), ("see ![a](images/no.png)", "there is no picture images/no.png"),
])
def test_planted_picture_in_markdown(markdown, said, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/i.png").write_bytes(b"")
    faults = check_pages.picture_faults(notebook(markdown), tmp_path)
    assert len(faults) == 1 and said in faults[0]


def test_pictures_that_are_no_fault(tmp_path):
    (tmp_path / "i.png").write_bytes(b"")
    sources = ['<img src="i.png" alt="a">', '![a](i.png){fig-alt="b"}', "[![badge](https://a.org/b.svg)](https://a.org)", "`![](no.png)`\n\n```\n![](no.png)\n```"]
    assert check_pages.picture_faults(notebook(*sources, ('#| fig-alt: "a"\nplot()',), outputs=[picture()]), tmp_path) == []
    assert check_pages.picture_faults(notebook(("show()",), outputs=[picture("text/html", **{"text/html": '<img src="x" alt="a">'})]), tmp_path) == []


def test_planted_link(tmp_path):
    (tmp_path / "05_a.ipynb").write_text("{}")
    faults = lambda *links: check_pages.page_link_faults(notebook(*[f"[x]({link})" for link in links]), tmp_path)
    assert faults("05_a.ipynb#b", "a.html#c", "#d", "https://a.org/x", f"{repo_url}/blob/main/LICENSE", settings["doc_host"] + settings["doc_baseurl"] + "/a.html#b") == []
    assert len(faults("06_b.ipynb", "b.html", "images/no.png", f"{repo_url}/blob/main/no.md", settings["doc_host"] + settings["doc_baseurl"] + "/no.html")) == 5


# --- what is mended --------------------------------------------------------------------------------------------------------
def page_of(*sources, outputs=()): return notebook("---\ntitle: T\n---\n", *sources, outputs=outputs)


def test_mend_numbers_links_and_gifs():
    page = page_of("[a](../LICENSE) [b](05_x.ipynb) [c](%s/unet.html#unet.to)" % pages.settings()["site"], ('import sys\nif "google.colab" in sys.modules: 1',), ('#| fig-alt: "a"\nshow()',), outputs=[picture("image/gif")])
    front, prose, show = pages.mend(page, "03_unet")["cells"]
    assert "title: 03. T\n" in front["source"] and "title: T\n" in pages.mend(page_of(), "index")["cells"][0]["source"]
    assert prose["source"] == f"[a]({repo_url}/blob/main/LICENSE) [b](05_x.ipynb) [c]({pages.settings()['site']}/unet.html#unet)"
    assert show["outputs"][0]["data"]["text/html"] == '<img src="data:image/gif;base64,QUJD" alt="a">' and "image/gif" not in show["outputs"][0]["data"]


def test_mend_shows_code_once():
    signature = "---\n\n[source](https://a.org)\n\n### f\n\n```python\ndef f(\n    x, # See [`g`](https://a.org/g)\n)\n```\n\n*Doc with [`g`](https://a.org/g)*"
    doc = lambda name: ("#| echo: false\n#| output: asis\nshow_doc(%s)" % name,)
    code = ('#| code-fold: show\n#| code-summary: "Exported source"\n#| exports\ndef f(x): 1',)
    page = page_of(doc("f"), code, doc("g"), "prose", doc("hidden"))
    for cell in page["cells"]:
        if "show_doc" in cell["source"]: cell["outputs"] = [dict(output_type="display_data", metadata={}, data={"text/markdown": signature})]
    _, f, g, shown, _, hidden = pages.mend(page, "03_unet")["cells"]
    markdown = [c["outputs"][0]["data"]["text/markdown"] for c in (f, g, hidden)]
    assert markdown[0] == markdown[1] == "---\n\n[source](https://a.org)\n\n### f\n"
    assert "See `g`\n" in markdown[2] and "Doc with [`g`]" in markdown[2]
    assert shown["source"] == "#| exports\ndef f(x): 1"


# --- HTML ------------------------------------------------------------------------------------------------------------------
def test_planted_html(tmp_path):
    card = f'<meta property="og:image" content="{settings["doc_host"]}{settings["doc_baseurl"]}/%s">'
    (tmp_path / "a.html").write_text(card % "i.png" + '<a href="b.html#here">x</a><a href="#top">y</a><a href="https://a.org/no">z</a><img src="i.png"><p id="top">')
    (tmp_path / "b.html").write_text('<h2 id="here">x</h2>')
    (tmp_path / "i.png").write_bytes(b"")
    assert check_pages.html_faults(tmp_path) == []
    (tmp_path / "b.html").write_text(card % "no.png" + '<a href="a.html#no">x</a><a href="no.html">y</a><img src="no.gif"><a href="?q">')
    assert len(check_pages.html_faults(tmp_path)) == 5     # a.html points to #here, which is gone


@pytest.fixture(scope="module")
def phone():
    "A page in Chromium; where there is none CI fails, and others learn what to install."
    playwright = pytest.importorskip("playwright.sync_api") if not os.environ.get("CI") else __import__("playwright.sync_api").sync_api
    with playwright.sync_playwright() as started:
        chromium = check_pages.browser(started)
        if chromium is None:
            said = "no Chromium was found: apt-get install -y chromium, or python -m playwright install chromium"
            pytest.fail(said) if os.environ.get("CI") else pytest.skip(said)
        yield chromium.new_page()
        chromium.close()


def test_a_phone_scrolls_no_page_sideways(site, phone):
    found = sorted((site / "plain").glob("*.html"))
    assert len(found) == len(notebooks)
    faults = []
    for path in found:
        phone.goto(path.as_uri())
        faults += check_pages.wide_faults(phone, path.name)
    none(faults)


def test_planted_wide_page(phone):
    style = f"<style>{(root / 'nbs/styles.css').read_text()}</style><main>"
    wide = {"table": f"<table><tr>{'<td>' + 'x' * 20 + '</td>'}{'<td>y</td>' * 60}</table>", "pre": f"<pre>{'x' * 200}</pre>",
            "formula": f"<p><span class='math display'>{'x' * 200}</span>", "code": f"<p><code>{'x' * 200}</code>", "picture": "<img width=1000 height=9>"}
    for name, html in wide.items():
        phone.set_content(style + html)
        none(check_pages.wide_faults(phone, name))
        phone.set_content(html)
        assert len(check_pages.wide_faults(phone, name)) == 1
    phone.set_content(style + f"<pre>{'x' * 200}</pre><p>{'y' * 200}")
    assert "<p>yyy" in check_pages.wide_faults(phone, "both")[0] and "xxx" not in check_pages.wide_faults(phone, "both")[0]
