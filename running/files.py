"""Files that are written whole or not at all, and the state from which --resume goes on."""
import json
import os
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes

from running.processes import gather, world


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UserError(otherwise)


def write(path: Path, data: bytes | str, sync: bool = True) -> None:
    """To a temporary name, then rename: `path` holds the old or the new content, whole; with sync
    after a power cut too. Of several processes the first writes, and the others return when it has.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    if world()[0] == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                f.write(data.encode() if isinstance(data, str) else data)
                f.flush()
                if sync:
                    os.fsync(f.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            error.filename = str(path)
            raise
    if dist.is_initialized():
        dist.barrier()


def remove(folder: Path, pattern: str) -> None:
    """Delete the files in a folder whose names match."""
    for path in folder.glob(pattern):
        if world()[0] == 0:
            path.unlink()


# ---- Tensors by name, with a JSON header ---------------------------------------------------------
def write_tensors(path: Path, tensors: dict[str, torch.Tensor], sync=True, **header) -> None:
    data = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write(path, safetensors_bytes(data, metadata={"rlhf-shakespeare": json.dumps(header)}), sync)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """-> tensors by name, header. To be called inside `readable`."""
    with safe_open(path, "pt") as f:
        return ({name: f.get_tensor(name) for name in f.keys()},
                json.loads((f.metadata() or {})["rlhf-shakespeare"]))


@contextmanager
def readable(path: Path, made_by: str):
    """Raises UserError if the file is missing, or if the reading inside finds it truncated or not
    ours; made_by: the command that writes it."""
    require(Path(path).exists(), f"{path} is missing: run {made_by} first")
    try:
        yield
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is truncated or damaged, or was not written by this version of "
                        f"the project: delete it and run {made_by} again") from error


# ---- Resuming ------------------------------------------------------------------------------------
def settings_of(cfg) -> dict:
    """Those that a resumed run may not change: all but where files lie, how often it measures and
    saves, and where it ends."""
    free = ("corpus", "labels", "out", "resume", "measure_every", "save_s", "kl_stop",
            "max_iterations")
    return {k: v for k, v in asdict(cfg).items() if k not in free}


class State:
    """What --resume goes on from, in one file: weights, optimizers, and `memory`, whatever else the
    run must know, JSON-able. Written every cfg.save_s seconds."""

    def __init__(self, cfg, name: str, inputs: dict, model, optimizers, **memory):
        """memory: as at the start of a run. With cfg.resume, model, optimizers and memory are
        filled from the file, unless it is missing or stems from other inputs. Raises UserError if
        settings have changed."""
        self.path = cfg.out / f"{name}-state.safetensors"
        self.header = {"settings": settings_of(cfg), "inputs": inputs}
        self.model, self.optimizers = model, optimizers
        self.memory = SimpleNamespace(**memory)
        self.save_s, self.began = cfg.save_s, time.time()
        self.saved = self.began
        self.earlier_s = 0.0  # seconds, to its last state, of the run that this one resumes
        if not cfg.resume:
            self.delete()  # else an earlier run's would outlive the log that this run writes
        elif self.path.exists():
            with readable(self.path, "the same command without --resume"):
                self.fill(*read_tensors(self.path))
        else:
            print(f"there is no {self.path} to resume: starting from the beginning")

    def fill(self, tensors: dict[str, torch.Tensor], header: dict) -> None:
        if header["inputs"] != self.header["inputs"]:
            print(f"{self.path} stems from other inputs: starting from the beginning")
            self.delete()
            return
        settings = self.header["settings"]
        differ = [k for k in settings if header["settings"].get(k) != settings[k]]
        require(not differ, f"{self.path} was written with another {', '.join(differ)}: use the "
                            "same settings, or delete it to start anew")
        self.model.load_state_dict({k: tensors["model." + k] for k in self.model.state_dict()})
        for i, optimizer in enumerate(self.optimizers):
            state = optimizer.state_dict()
            for name, tensor in tensors.items():
                if name.startswith(f"optimizer.{i}."):
                    _, _, parameter, key = name.split(".")
                    state["state"].setdefault(int(parameter), {})[key] = tensor
            optimizer.load_state_dict(state)
        self.memory = SimpleNamespace(**header["memory"])
        self.earlier_s = header["seconds"]
        print(f"resuming at step {self.memory.step}")

    def save(self, now: bool = False, **changed) -> None:
        """If it is time to, or `now`. changed: entries of memory to set first."""
        vars(self.memory).update(changed)
        device = next(self.model.parameters()).device
        seconds = gather(torch.tensor([time.time() - self.saved], device=device))
        if not now and seconds[0] < self.save_s:  # all processes by the first one's clock
            return
        self.saved = time.time()
        tensors = {"model." + k: v for k, v in self.model.state_dict().items()}
        for i, optimizer in enumerate(self.optimizers):
            for parameter, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{parameter}.{k}": v for k, v in state.items()}
        write_tensors(self.path, tensors, sync=False, memory=vars(self.memory),
                      seconds=self.earlier_s + self.saved - self.began, **self.header)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
