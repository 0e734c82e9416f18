import json
import os
import shutil

import pytest
import torch
from filelock import FileLock

# These tests run several processes at once: one thread each, or they fight over the cores.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    from tests.test_pipeline import make_corpus
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(make_corpus())
    return path


@pytest.fixture(scope="session")
def pipeline(corpus, tmp_path_factory):
    """out/ after an uninterrupted run of all five scripts and the report, and what they printed.
    The workers of pytest-xdist share one run; tests change copies of it only."""
    from tests.test_pipeline import STAGES, run
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out, log = shared / "pipeline", shared / "pipeline.json"
    with FileLock(shared / "pipeline.lock"):
        if not log.exists():
            printed = {}
            for script in STAGES:
                more = ["--corpus", str(corpus)] if script.startswith("01") else []
                done = run(script, out, *more)
                assert done.returncode == 0, done.stderr
                printed[script] = done.stdout
            log.write_text(json.dumps(printed))
    return out, json.loads(log.read_text())


@pytest.fixture
def browser(tmp_path):
    """Opens a page in headless Chromium. Its profile outlives the page, as a person's does."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = (shutil.which("chromium") or shutil.which("google-chrome"),
                       shutil.which("chromedriver"))
    if not program or not driver:
        pytest.skip("needs chromium and chromedriver "
                    "(Debian: apt-get install chromium chromium-driver)")
    opened = []

    def open_page(path, size="1000,800"):
        for old in opened:
            old.quit()
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
                     f"--user-data-dir={tmp_path / 'profile'}"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {
            "download.default_directory": str(tmp_path / "downloads")})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        page.get(path.as_uri())
        opened[:] = [page]
        return page
    yield open_page
    for old in opened:
        old.quit()
