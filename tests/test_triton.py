"""Checks the Triton kernels without a GPU: their values in the interpreter, their compiled form
executed in bf16, and the machine code that the compiler makes. If there is a GPU, it computes the
values. Each part runs in its own process, because the interpreter changes Triton for a whole
process."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import attention, linear_logprob
from kernels.backend import has_triton

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
TTSEM = Path(__file__).parent.parent / ".ttsem"  # with a Triton of its own
FIRST, SECOND = "attention or decode", "logprob"
PARTS = {"attention": FIRST, "logprob": f"({SECOND}) and not ({FIRST})",
         "the rest": f"not ({FIRST}) and not ({SECOND})"}


def output_of(*command, **env) -> str:
    """What the command prints; fails if it fails."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.parametrize("part", PARTS)
def test_values(part):
    said = output_of("pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning",
                     "tests/triton_values.py", "-k", PARTS[part],
                     TRITON_INTERPRET=str(int(not torch.cuda.is_available())))
    assert " passed" in said


@pytest.mark.skipif(not TTSEM.exists(), reason="ttsem is not installed: `make test` does it, where "
                    "there is a Triton")
def test_compiled():
    """In bf16, by executing what Triton compiles for sm_90."""
    said = output_of("ttsem.sanitize", "pytest", "tests/triton_compiled.py", "-q", "-p",
                     "no:cacheprovider", PYTHONPATH=f"{TTSEM}:{TTSEM.parent}")
    assert " passed" in said and "skipped" not in said
    print(said)


@needs_triton
@pytest.mark.parametrize("capability", (80, 90))
def test_machine_code(capability):
    said = output_of("tests.compile_only", str(capability))
    assert f"compiled for sm_{capability}" in said and ", 0 with a problem" in said


@needs_triton
@pytest.mark.parametrize("change, wrong", [
    ({}, None), ({"STACK": 8}, "spills"), ({"SHARED": 100 * 1024}, "shared memory"),
    ({"HMMA": 6}, "6 tensor-core instructions for 7"), ({"VECTOR_LOAD": 0}, "16-byte load"),
    ({"VECTOR_STORE": 2}, "2 16-byte stores for 3")])
def test_the_checks_of_machine_code_can_fail(change, wrong):
    from tests.compile_only import problems
    fine = {"STACK": 0, "LOCAL": 0, "SHARED": 50_000, "HGMMA": 0, "HMMA": 9, "VECTOR_LOAD": 1,
            "VECTOR_STORE": 3}
    found = problems(80, "attention_backward", True, fine | change)
    assert found == [] if wrong is None else len(found) == 1 and wrong in found[0]


def test_the_choice_of_backend():
    """On CPU tensors "auto" is PyTorch. To insist on Triton, or on nonsense, is refused in one
    line."""
    q, k, v = torch.randn(3, 1, 4, 2, 16)
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="torch"))
    with pytest.raises(ValueError, match="needs Triton and tensors on a GPU"):
        attention(q, k, v, backend="triton")
    with pytest.raises(ValueError, match='backend "?\'?cuda'):
        linear_logprob(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1]), backend="cuda")


def test_the_cpu_path_never_imports_triton():
    """Triton takes a second to import, and not every system has it."""
    code = ("import sys; sys.modules['triton'] = None; import torch, kernels\n"
            "kernels.attention(*torch.randn(3, 1, 4, 2, 16)); print('fine')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
