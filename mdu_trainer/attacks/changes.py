"""Changes of a model for the time of an attack, and the layers that are changed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..models import evaluation_mode


def linear_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a model but the head, and without those of adapters."""
    head = model.get_output_embeddings()
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is merged into the model's weights."""
    return any(getattr(module, "merged", False) for module in model.modules())


@contextmanager
def merged_adapters(model: nn.Module) -> Iterator[None]:
    """Merge the adapters that a model may have into its weights; all is as it was afterwards, to the bit."""
    merge = None if is_merged(model) else getattr(model, "merge_adapter", None)
    if merge is None:
        yield
        return
    with restored([layer.weight for layer in linear_layers(model)]):
        merge()
        try:
            yield
        finally:
            model.unmerge_adapter()


@contextmanager
def restored(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Put back the values of these tensors afterwards, to the bit."""
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)


@contextmanager
def trained_alone(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to these parameters of a model alone, without dropout; all is as it was afterwards."""
    state = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with evaluation_mode(model):
        try:
            for p, _, _ in state:
                p.requires_grad_(False)
                p.grad = None
            for p in parameters:
                p.requires_grad_(True)
            yield
        finally:
            for p, requires_grad, grad in state:
                p.requires_grad_(requires_grad)
                p.grad = grad
