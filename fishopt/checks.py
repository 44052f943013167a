"""Checks of models and of single arguments: each error names the argument, its value and the mend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fishopt.passes import unwrapped


def check_flag(name: str, value: Any) -> None:
    """Checks for True or False: any other object would be taken for one of the two.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: pass True or False")


def check_trainable(name: str, p: Tensor) -> None:
    """Checks for a parameter with a dense real gradient.

    Raises:
        TypeError: If it is complex or sparse.
        ValueError: If it was made in inference mode.
    """
    if p.is_complex() or p.layout != torch.strided:
        kind = "complex" if p.is_complex() else "sparse"
        raise TypeError(f"model parameter {name!r} is {kind}; fishopt needs dense real parameters")
    if p.is_inference():
        raise ValueError(f"model parameter {name!r} was made in inference mode; build the model outside of it")


def check_dense(name: str, x: Tensor) -> None:
    """Checks for a tensor with values that can be computed with.

    Raises:
        TypeError: If it is sparse, nested, quantized or of fewer than 16 bits.
        ValueError: If it is on the meta device.
    """
    if x.is_nested or x.layout != torch.strided:
        raise TypeError(f"{name} holds a {'nested' if x.is_nested else 'sparse'} tensor; pass a dense one")
    if x.is_quantized or (x.is_floating_point() and torch.finfo(x.dtype).bits < 16):
        raise TypeError(f"{name} holds a tensor of type {x.dtype}; pass float32, or another that torch computes in")
    if x.is_meta:
        raise ValueError(f"{name} holds a tensor on the meta device, which has no values; pass one that has")


def checked_model(model: Any) -> nn.Module:
    """The model, if curvature can be computed for it.

    Raises:
        TypeError: If it is not a module, is compiled by TorchScript, or has sparse or complex parameters.
        ValueError: If nothing in it is trainable, it has parameters without values, or it couples inputs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: pass the torch.nn.Module itself, not its parameters")
    _check_parts(model)
    check_whole(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no trainable parameter; set requires_grad on what is to be trained")
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"model parameter {name!r} is not initialized; run one forward pass first")
        if p.is_meta:
            raise ValueError(f"model parameter {name!r} is on the meta device; give it values first, by model.to_empty")
        if p.requires_grad:
            check_trainable(name, p)
    return model


def check_whole(model: nn.Module) -> None:
    """Whether this process has all of a model's parameters.

    Raises:
        TypeError: If they are spread over several processes.
    """
    for path, module in unwrapped(model).named_modules():
        is_flat = getattr(module, "_is_fsdp_managed_module", False)
        for name, p in module._parameters.items():
            # By what it has: to import the class, DTensor, takes longer than all else here.
            if p is not None and (is_flat or hasattr(p, "placements")):
                whole = f"{path}.{name}".replace("_fsdp_wrapped_module.", "").removeprefix(".")
                raise TypeError(
                    f"model parameter {whole!r} is spread over processes (by fully_shard, FullyShardedDataParallel or "
                    "tensor parallelism), and its curvature needs all of it; wrap the model in "
                    "torch.nn.parallel.DistributedDataParallel instead"
                )


def _check_parts(model: nn.Module) -> None:
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise TypeError(
                f"model part {path!r} is in DistributedDataParallel, and model as a whole is not; wrap it as a whole, "
                "or pass that part"
            )
        if isinstance(module, torch.jit.ScriptModule) and any(p.requires_grad for p in module.parameters()):
            what = f"model part {path!r}" if path else "model"
            raise TypeError(f"{what} is a ScriptModule, which cannot be copied with shared weights; use the nn.Module")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise ValueError(
                f"model part {path!r} normalises by the batch in eval mode too, which couples inputs; build it with "
                "track_running_stats=True"
            )
        if getattr(module, "sparse", False) is True:
            raise TypeError(f"model part {path!r} has sparse gradients; build it with sparse=False")


def checked_targets(targets: Any, count: int) -> Tensor:
    """The data's labels, if there is one for each input.

    Raises:
        TypeError: If they are not a tensor.
        ValueError: If there are more or fewer.
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets is a {type(targets).__name__}; pass a tensor with one label per input")
    check_dense("targets", targets)
    if targets.ndim == 0 or len(targets) != count:
        raise ValueError(f"targets has shape {tuple(targets.shape)} for {count} inputs; pass one label per input")
    return targets


def checked_samples(samples: Any) -> int:
    """The number of labels per input.

    Raises:
        ValueError: If it is not a whole number of at least 1.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples={samples!r}: pass a whole number of labels per input, 1 or more")
    return samples


def checked_generator(generator: Any) -> torch.Generator | None:
    """The source of randomness, None for torch's own.

    Raises:
        TypeError: If it is something else.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator={generator!r}: pass a torch.Generator, such as torch.Generator().manual_seed(0)")
    return generator


def checked_option(name: str, value: Any, known: Sequence[str]) -> str:
    """``value`` if it is one of ``known``.

    Raises:
        ValueError: Naming the argument, the value and what is known.
    """
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r} is unknown; pass one of {', '.join(map(repr, known))}")
    return value
