import os

# Several processes run at once in these tests: one thread each, or they fight over the cores.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch  # noqa: E402

torch.set_num_threads(1)
