"""Measurements around a network: sizes, unstable units, memory, and what it all ran on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import certify
import models
from certify.bounds import Network, attach
from certify.bounds.activations import ReLU
from certify.bounds.interval import intervals
from certify.perturbations import Perturbation
from methods import masks
from runs import plugins
from runs.cell import OUTSIDE, SEMANTIC, Perturb

JOINT_CONTRAST = 2.55
"""Contrast radius of the joint perturbation over its brightness radius: the USN paper trains at 1/255 with 0.01."""

LIBRARIES = ("torch", "torchvision", "numpy", "scipy", "torch-pruning", "timm")


def sizes(model: nn.Module, mask: masks.Mask, image: Tensor) -> dict[str, float | int]:
    """Parameters and multiply-adds, dense and left. ``image``: one input (1, C, H, W).

    ``parameters_left`` and ``flops_nonzero`` count what the mask leaves; ``parameters_executed`` and ``flops_executed``
    what is there and runs after pruned channels are removed physically, which takes the inputs of the next layer along
    and for an unstructured mask is everything.
    """
    shape = tuple(image.shape[1:])
    total = models.count(model)
    small = masks.remove(model, mask, image) if mask.structured and mask.density < 1 else model
    return {
        "parameters": total,
        "parameters_left": round(mask.density_over(model) * total),
        "parameters_executed": models.count(small),
        "prunable": mask.total,
        "prunable_left": mask.kept,
        "flops": models.flops(model, shape),
        "flops_nonzero": models.flops(model, shape, nonzero=True),
        "flops_executed": models.flops(small, shape),
    }


def unstable_relus(model: nn.Module, x: Tensor, p: Perturbation) -> Tensor:
    """ReLUs of each image (N,) whose sign interval bounds over ``p`` leave open."""
    with torch.no_grad():
        p.check(x)
        graph, region = attach(Network(model, x[:2]).graph, x, p, hull=True)
        found = intervals(graph, region)
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for node in graph.nodes:
            if isinstance(node.op, ReLU):
                low, high = found[node.inputs[0]]
                count += ((low < 0) & (high > 0)).flatten(1).sum(1)
    return count


def relus(model: nn.Module, x: Tensor) -> int:
    """How many ReLUs an image of ``x`` (N, C, H, W) passes through."""
    return sum(math.prod(node.shape) for node in Network(model, x[:2]).graph.nodes if isinstance(node.op, ReLU))


class Peak:
    """Peak memory while a block runs: of the device on CUDA, else of the process (resident set), in MB."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mb: float | None = None

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_resident_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self.mb = torch.cuda.max_memory_allocated(self.device) / 1e6
        else:
            self.mb = _resident_peak()


def _reset_resident_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident_peak() -> float | None:
    for name, value in _proc_status():
        if name == "VmHWM":
            return int(value.split()[0]) * 1024 / 1e6
    return None


def _proc_status() -> Iterator[tuple[str, str]]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            yield name, value


def environment(device: torch.device) -> dict[str, Any]:
    """Library versions, device name, thread count and plug-ins, for the record."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    found = {"versions": versions, "device": device_name(device), "threads": torch.get_num_threads()}
    return found | {"plugins": outside} if (outside := plugins.loaded()) else found


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {available_cores()} cores"


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def perturbation(named: Perturb) -> Perturbation:
    """The ``certify`` perturbation that a cell names.

    Raises:
        TypeError: a perturbation from outside the tree made something else.
        ValueError: it can only be drawn from at random.
    """
    kind, magnitude = named.kind, named.magnitude
    if kind in SEMANTIC:
        raise ValueError(
            f"the perturbation {kind!r} is a law of random edits, which no bounds cover; use --verifier probabilistic"
        )
    if kind in OUTSIDE:
        made = OUTSIDE[kind](magnitude)
        if not isinstance(made, Perturbation):
            raise TypeError(f"the perturbation {kind!r} made {type(made).__name__}, expected a certify.Perturbation")
        return made
    kinds = {
        "linf": certify.Linf,
        "l2": certify.L2,
        "brightness": certify.Brightness,
        "contrast": certify.Contrast,
        "rotation": certify.Rotation,
        "scale": certify.Scale,
        "hue": certify.Hue,
        "saturation": certify.Saturation,
    }
    if kind == "joint":
        return certify.BrightnessContrast(magnitude, JOINT_CONTRAST * magnitude)
    return kinds[kind](magnitude)
