"""The documentation as readers see it: its links, and its pages in a browser of desktop and phone width."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import browsers
import pytest
import yaml


pytest.importorskip("mkdocs", reason="needs mkdocs")

ROOT = Path(__file__).parents[2]
WIDTHS = {"desk": 1280, "phone": 390}
WIDE_TABLES = {"architectures"}  # name dozens of layers, and may scroll on a desktop as well

# Finds elements that overflow their column. On phones code and tables may scroll; nothing else may overflow.
FIND = """is_desk => {
    const found = [];
    const wide = element => element.scrollWidth > element.clientWidth + 1;
    const name = element => `${element.tagName}: ${(element.innerText || element.src || "").slice(0, 80)}`;
    const root = document.documentElement;
    if (wide(root)) found.push(`the page is ${root.scrollWidth} wide`);
    for (const each of document.querySelectorAll(".md-content *")) {
        if (each.closest("pre, .md-typeset__scrollwrap")) continue;
        const box = each.getBoundingClientRect();
        if (box.width && box.right > root.clientWidth + 1) found.push(name(each));
    }
    const scrolled = [...document.querySelectorAll("pre > code, .md-typeset__scrollwrap")];
    if (is_desk) found.push(...scrolled.filter(wide).map(name));
    for (const each of document.images) if (!each.naturalWidth) found.push(`not shown: ${each.src}`);
    return found;
}"""


class Page(HTMLParser):
    """Collects a page's links and anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("href", "src") and value and not (tag == "link" and "canonical" in dict(attrs).values()):
                self.targets.append(value)
            elif key == "srcset" and value:
                self.targets += [part.split()[0] for part in value.split(",")]
            elif key in ("id", "name") and value:
                self.anchors.add(value)


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-f", ROOT / "mkdocs.yml", "-d", folder]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def names(site) -> list[str]:
    """Return the paths of the pages without surrounding slashes."""
    found = sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    assert {".", "serving", "explanation/bank"} <= set(found)
    return found


def broken(site: Path, path: Path, pages: dict[Path, Page], config: dict) -> list[str]:
    """Return the broken links of a page, within the site or to files of the repository."""
    found = []
    for target in pages[path].targets:
        url = urlsplit(target)
        if target.startswith(config["repo_url"]):
            kind, _, rest = target.removeprefix(config["repo_url"]).strip("/").partition("/main/")
            if kind in ("blob", "edit", "raw", "tree") and not (ROOT / unquote(urlsplit(rest).path)).exists():
                found.append(target)
        elif not url.scheme and not url.netloc:
            place = (site / url.path.lstrip("/")) if url.path.startswith("/") else (path.parent / url.path)
            place = (path if not url.path else place / "index.html" if place.is_dir() else place).resolve()
            if not place.exists() or (url.fragment and unquote(url.fragment) not in pages[place].anchors):
                found.append(target)
    return found


def test_links_lead_somewhere(site, config):
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    assert sum(len(page.targets) for page in pages.values()) > 1000
    # the 404 page contains the site's own address in its links
    found = {str(path): broken(site, path, pages, config) for path in pages if path.name != "404.html"}
    assert not {path: targets for path, targets in found.items() if targets}


def test_a_link_that_leads_nowhere_is_found(tmp_path, config):
    path = tmp_path / "index.html"
    links = [
        "#here",
        "#there",
        "other/",
        f"{config['repo_url']}/blob/main/README.md",
        f"{config['repo_url']}/blob/main/R",
    ]
    path.write_text('<p id="here">' + "".join(f'<a href="{link}"></a>' for link in links))
    assert broken(tmp_path, path, {path.resolve(): Page(path)}, config) == ["#there", "other/", links[-1]]


def test_only_pages_and_what_they_show_are_published(site):
    inside = [path for path in site.rglob("*") if path.is_file() and "assets" not in path.parts]
    assert {path.suffix for path in inside} <= {".html", ".css", ".png", ".svg", ".json", ".xml", ".gz", ".inv"}


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser():
    with browsers.started() as found:
        yield found


def opened(browser, width: int, address: str):
    """Open a page; returns it and its errors. Requests to other hosts, such as GitHub for its stars, are blocked."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.route(lambda url: not url.startswith(address), lambda route: route.fulfill(json={}))
    return page, browsers.listen(page)


@pytest.mark.parametrize("screen", WIDTHS)
def test_nothing_sticks_out(browser, address, names, screen):
    page, problems = opened(browser, WIDTHS[screen], address)
    found = {}
    for name in names:
        page.goto(f"{address}/{name}/", wait_until="load")
        found[name] = page.evaluate(FIND, screen == "desk" and name not in WIDE_TABLES)
    assert not {name: each for name, each in found.items() if each}
    assert not problems


@pytest.mark.parametrize("screen", WIDTHS)
def test_what_sticks_out_is_found(browser, address, screen):
    page, _ = opened(browser, WIDTHS[screen], address)
    page.goto(address, wait_until="load")
    page.evaluate("""() => {
        document.querySelector(".md-content p").innerHTML += '<img src="none.png">';
            document.querySelector(".md-content h2").innerHTML = '<b style="padding-right: 1500px">wide</b>';
        document.querySelector("pre > code").textContent += "y".repeat(300);
    }""")
    page.wait_for_function("[...document.images].every(image => image.complete)")
    found = "\n".join(page.evaluate(FIND, screen == "desk"))
    assert "B: wide" in found and "not shown" in found and "none.png" in found
    assert ("yyy" in found) == (screen == "desk")


def test_light_and_dark(browser, address):
    page, _ = opened(browser, WIDTHS["desk"], address)
    page.goto(address, wait_until="load")
    seen = []
    for _ in range(3):
        seen.append(
            page.evaluate("document.body.dataset.mdColorScheme + getComputedStyle(document.body).backgroundColor")
        )
        page.locator("form[data-md-component=palette] label:visible").click()
    assert len({each for each in seen if each.startswith("slate")}) == 1
    assert any(each.startswith("default") for each in seen)
