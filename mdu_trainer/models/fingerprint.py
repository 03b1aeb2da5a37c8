"""Whether two models have the same weights."""

import hashlib

import torch
from torch import nn


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and bits of all weights, 32 hexadecimal digits. Some seconds for 8B parameters.

    Weights that are not in memory (offloaded ones) count with their names and shapes only.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
