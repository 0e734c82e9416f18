import os

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
