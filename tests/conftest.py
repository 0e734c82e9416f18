import os
import shutil

# Several processes run at once in these tests: one thread each, or they fight over the cores.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    from tests.test_pipeline import make_corpus
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text(make_corpus())
    return path


@pytest.fixture(scope="session")
def pipeline(corpus, tmp_path_factory):
    """out/ after an uninterrupted run of all five scripts, and what they printed."""
    from tests.test_pipeline import STAGES, run
    out, printed = tmp_path_factory.mktemp("pipeline") / "out", {}
    for script in STAGES:
        done = run(script, out, *(["--corpus", str(corpus)] if script.startswith("01") else []))
        assert done.returncode == 0, done.stderr
        printed[script] = done.stdout
    return out, printed


@pytest.fixture
def browser(tmp_path):
    """Opens a page in headless Chromium with a profile that outlives it, as a person's does."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    opened = []

    def open_page(path, size="1000,800"):
        for old in opened:
            old.quit()
        options = webdriver.ChromeOptions()
        options.binary_location = program
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={size}", f"--user-data-dir={tmp_path / 'profile'}"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        page.get(path.as_uri())
        opened[:] = [page]
        return page
    yield open_page
    for old in opened:
        old.quit()
