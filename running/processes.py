"""Several processes, started by torchrun, that act as one: each takes its share of every minibatch.

With a single process all of this is the identity.
"""
import torch
import torch.distributed as dist
import torch.nn as nn


def world() -> tuple[int, int]:
    """The number of this process, and how many there are: (0, 1) unless torchrun started it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(numbers: torch.Tensor, minibatch: int) -> torch.Tensor:
    """This process's part of `numbers` (N,): an equal slice of each minibatch, so that several
    processes make the same updates as one. Raises ValueError if it does not divide."""
    rank, size = world()
    if minibatch % size or len(numbers) % minibatch:
        raise ValueError(f"a minibatch of {minibatch} does not divide among {size} processes")
    return numbers.view(-1, size, minibatch // size)[:, rank].flatten()


def gather(x: torch.Tensor) -> torch.Tensor:
    """x (n, ...), of one shape in all processes -> (size n, ...), all of them, the same everywhere:
    what is decided by it is decided alike."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(world()[1])]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def means(**figures: torch.Tensor) -> dict[str, float]:
    """The mean of each tensor over all processes."""
    return {name: gather(x).mean().item() for name, x in figures.items()}


def errors(**figures: torch.Tensor) -> dict[str, float]:
    """The standard error of each tensor's mean over all processes, as name_se."""
    every = {name: gather(x) for name, x in figures.items()}
    return {f"{name}_se": (x.std() / len(x) ** 0.5).item() for name, x in every.items()}


def average_gradients(model: nn.Module) -> None:
    """Mean over the processes, in place."""
    if dist.is_initialized():
        for p in model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= world()[1]
