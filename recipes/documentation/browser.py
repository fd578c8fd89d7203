"""TensorBoard in a headless Chromium, to look at what a run has logged. Needs selenium, chromium
and chromedriver."""

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from selenium import webdriver
from selenium.common.exceptions import (
    JavascriptException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

# Text of the page as shown, through the shadow roots of its components and a plugin's frame.
_TEXT = """
const parts = [];
const walk = node => {
  if (node.nodeType === Node.TEXT_NODE) { parts.push(node.textContent); return; }
  if (['STYLE', 'SCRIPT', 'TEMPLATE'].includes(node.nodeName)) return;
  if (node.nodeType === Node.ELEMENT_NODE && getComputedStyle(node).display === 'none') return;
  if (node.value && ['INPUT', 'TEXTAREA'].includes(node.nodeName)) parts.push(node.value);
  if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk);
  if (node.nodeName === 'IFRAME' && node.contentDocument) walk(node.contentDocument.body);
  node.childNodes.forEach(walk);
};
walk(document.body);
return parts.join(' ').replace(/\\s+/g, ' ');
"""
_FIND_ALL = """
const found = [];
const walk = root => {
  found.push(...root.querySelectorAll(arguments[0]));
  root.querySelectorAll('*').forEach(node => {
    if (node.shadowRoot) walk(node.shadowRoot);
    if (node.nodeName === 'IFRAME' && node.contentDocument) walk(node.contentDocument);
  });
};
walk(document);
return found;
"""


def is_available() -> bool:
    """Whether there is a browser to look with."""
    return shutil.which("chromium") is not None and shutil.which("chromedriver") is not None


@contextmanager
def serving(logdir: Path, timeout: float = 60.0) -> Iterator[str]:
    """The address of a TensorBoard that shows ``logdir`` on a free loopback port in the block.

    Raises:
        RuntimeError: it does not answer in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={logdir}", f"--port={port}"]
    command += ["--host=127.0.0.1", "--load_fast=false", "--reload_interval=5"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + timeout
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"TensorBoard does not answer at {url} (exit status {server.poll()})."
                )
            time.sleep(0.3)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@contextmanager
def chromium(width: int = 1500, height: int = 1000, scale: float = 1.0) -> Iterator["Page"]:
    """A headless Chromium; its window in CSS pixels, ``scale`` picture pixels each."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        f"--window-size={width},{height}",
        f"--force-device-scale-factor={scale}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_script_timeout(60)
    try:
        yield Page(driver)
    finally:
        driver.quit()


class Page:
    """A browser window, searched through shadow roots and frames.

    Args:
        driver: of the window.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Goes to ``url``, also where only its fragment is another."""
        self.driver.get("about:blank")
        self.driver.get(url)

    def text(self) -> str:
        """All text that is shown."""
        return str(self.driver.execute_script(_TEXT))

    def find_all(self, selector: str) -> list[webdriver.remote.webelement.WebElement]:
        """Every element that a CSS selector matches."""
        return list(self.driver.execute_script(_FIND_ALL, selector))

    def click_all(self, selector: str, text: str) -> None:
        """Clicks every element that a CSS selector matches and that shows ``text``."""
        for element in self.find_all(selector):
            if text in str(element.get_property("textContent")):
                self.driver.execute_script("arguments[0].click()", element)

    def until(self, condition: Callable[[], object], what: str, timeout: float = 60.0) -> None:
        """Waits until ``condition()`` is true.

        Raises:
            TimeoutException: it did not become so; the message tells ``what``.
        """
        ignored = (JavascriptException, NoSuchElementException, StaleElementReferenceException)
        wait = WebDriverWait(self.driver, timeout, poll_frequency=0.5, ignored_exceptions=ignored)
        wait.until(lambda _: condition(), f"not seen in {timeout:.0f} s: {what}")

    def until_text(self, *expected: str) -> None:
        """Waits until all of these are shown."""
        self.until(lambda: all(part in self.text() for part in expected), f"text {expected}")


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False
