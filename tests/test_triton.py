"""The Triton kernels without a GPU: their values in the interpreter, their machine code from the
compiler, each in a process of its own, because the interpreter changes Triton for a whole process.
On a machine with a GPU the values are computed there."""
import os
import subprocess
import sys

import pytest
import torch

from kernels import attention, linear_logprob
from kernels.backend import has_triton

needs_triton = pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
GPU = torch.cuda.is_available()
COMMANDS = {
    "values": [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning",
               "tests/triton_values.py"],
    "sm_80": [sys.executable, "-m", "tests.compile_only", "80"],
    "sm_90": [sys.executable, "-m", "tests.compile_only", "90"],
    "rehearsal": [sys.executable, "-m", "benchmarks.gpu"],
}


@pytest.fixture(scope="module")
def processes(request):
    """All that were chosen at once, single-threaded: the two cores of a small machine are kept busy."""
    chosen = [item.callspec.params["name"] for item in request.session.items if item.originalname == "test_triton"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DRY": "1"}
    started = {name: subprocess.Popen(COMMANDS[name], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      env=env | {"TRITON_INTERPRET": str(int(name == "values" and not GPU))})
               for name in chosen}
    yield started
    for process in started.values():
        process.kill()


@needs_triton
@pytest.mark.parametrize("name", COMMANDS)
def test_triton(name, processes):
    output, _ = processes[name].communicate()
    print(output)
    assert processes[name].returncode == 0, output
    if name == "values":
        assert " passed" in output
    elif name == "rehearsal":  # of `make gpu`
        assert "| sad | " in output and "| failed |" not in output
    else:
        assert f"compiled for {name}" in output and ", 0 with a problem" in output


@needs_triton
@pytest.mark.parametrize("change, wrong", [
    ({}, None), ({"STACK": 8}, "spills"), ({"SHARED": 100 * 1024}, "shared memory"), ({"HMMA": 0}, "tensor-core"),
    ({"VECTOR_LOAD": 0}, "16-byte load"), ({"VECTOR_STORE": 0}, "16-byte store")])
def test_the_checks_of_machine_code_can_fail(change, wrong):
    from tests.compile_only import problems
    fine = {"STACK": 0, "LOCAL": 0, "SHARED": 50_000, "HGMMA": 0, "HMMA": 9, "VECTOR_LOAD": 1, "VECTOR_STORE": 1}
    found = problems(80, "attention_backward_resident", True, fine | change)
    assert found == [] if wrong is None else len(found) == 1 and wrong in found[0]


def test_the_choice_of_backend():
    """On CPU tensors "auto" is PyTorch; insisting on Triton, or on nonsense, is refused in one line."""
    q, k, v = torch.randn(3, 1, 4, 2, 16)
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="torch"))
    with pytest.raises(ValueError, match="needs Triton and tensors on a GPU"):
        attention(q, k, v, backend="triton")
    with pytest.raises(ValueError, match='backend "?\'?cuda'):
        linear_logprob(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1]), backend="cuda")


def test_the_cpu_path_never_imports_triton():
    """Triton takes a second to import and is not there on every system."""
    code = ("import sys; sys.modules['triton'] = None; import torch, kernels\n"
            "kernels.attention(*torch.randn(3, 1, 4, 2, 16)); print('fine')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr
