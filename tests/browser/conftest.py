import re
import shutil

import pytest

FLAGS = (
    "--no-sandbox",  # CI runs as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")  # no longer than needed: playwright's event loop runs in this thread until it ends
def chromium():
    """A headless Chromium of the system, driven by playwright; skips if either is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("Chromium is missing: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Return a function that opens an address, and gives the page and the list of what it asks the network for."""
    contexts = []

    def visit(url, width=1280, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page, asked = context.new_page(), []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(f"error: {error}"))
        page.goto(url)
        return page, asked

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture
def overflow():
    """Return a function that gives by how many pixels a page is wider than its window."""
    return lambda page: page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.fixture
def background():
    """Return a function that gives the opacity of an element's background."""

    def opacity(element):
        colour = element.evaluate("element => getComputedStyle(element).backgroundColor")
        numbers = [float(number) for number in re.findall(r"[\d.]+", colour)]
        return numbers[3] if len(numbers) == 4 else 1.0

    return opacity
