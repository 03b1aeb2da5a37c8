"""Set a model back towards its checkpoint from before fine-tuning, once, before it is made to forget.

    theta <- theta_pre + (1 - a) (theta - theta_pre)          a = rewind_share

Of a LoRA adapter theta_pre is the base, and theta - theta_pre = scaling * B A: B is multiplied by 1 - a.
The anchor and all that the loss compares with stay those of the model as it was given.
"""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ..files import UserError
from ..models import is_adapter, load_model
from ..models.checks import some
from .other_checkpoint import config_of, tokenizer_of
from .updates import CHUNK

logger = logging.get_logger(__name__)

NAME_IT = "Name the checkpoint that the model in training was fine-tuned from."
# First weights of an adapter that change the base, which is not theta_pre then
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# Options of LoRA by which the adapter is not scaled with its B
NOT_SCALED = ("use_dora", "trainable_token_indices", "kasa_config", "monteclora_config", "arrow_config")


def check_rewind(trainer: Trainer) -> None:
    """Refuse a checkpoint to rewind to that does not fit the model in training, as far as its config tells.

    Args:
        trainer: whose `args.rewind_to` is read, unless the model was set back already or a run is resumed.

    Raises:
        UserError: the checkpoint cannot be read, is an adapter, or has another vocabulary; weights that are not whole
            in each process; an adapter other than plain LoRA on this checkpoint.
    """
    if not _is_due(trainer):
        return
    name, model = trainer.args.rewind_to, trainer.model
    if trainer.distributed.shards or any(p.is_meta for p in model.parameters()):
        raise UserError(
            "rewind_to needs whole weights in every process, and FSDP2, ZeRO-3 and offloading take them apart. Use "
            "DDP or ZeRO-2, or rewind in one process, save the model and start from there."
        )
    if isinstance(model, PeftModel):
        _check_adapter(model, name)
    else:
        _check_vocabulary(trainer)


def rewind(trainer: Trainer) -> None:
    """Set the model in training back, unless it was already or a run is resumed.

    The checkpoint is loaded on the CPU in its own precision, and each of its tensors is let go once it was used.

    Raises:
        UserError: tensors of other names or shapes; or none differs, so that there is nothing to rewind.
    """
    if _is_due(trainer):
        name, keep = trainer.args.rewind_to, 1 - trainer.args.rewind_share
        adapted = isinstance(trainer.model, PeftModel)
        differed = _scale_adapter(trainer.model, keep) if adapted else _rewind_weights(trainer, keep)
        if not differed:
            raise UserError(
                f"rewind_to: the model in training equals {name} in every weight, so there is nothing to rewind. "
                f"{NAME_IT}"
            )
        logger.info(f"The weights are set back by {trainer.args.rewind_share:g} of the way to {name}.")
    trainer._rewound = True


def _is_due(trainer: Trainer) -> bool:
    """Whether the model is still to be set back: a resumed run goes on with weights that were."""
    return trainer.args.rewind_to is not None and not trainer._rewound and trainer._resumed_from is None


def _check_vocabulary(trainer: Trainer) -> None:
    name, where = trainer.args.rewind_to, f"rewind_to: {trainer.args.rewind_to}"
    if is_adapter(name):
        raise UserError(f"{where} is an adapter and the model in training is none. {NAME_IT}")
    config_of(trainer, name, f"{where} cannot be read", where, NAME_IT)
    tokenizer = tokenizer_of(trainer, name)
    ids, others = trainer.processing_class.get_vocab(), {} if tokenizer is None else tokenizer.get_vocab()
    moved = sum(ids.get(token, number) != number for token, number in others.items())
    if moved:
        raise UserError(
            f"{where} has another vocabulary: {moved} of its {len(others)} tokens have other ids in the tokenizer of "
            f"the model in training. {NAME_IT}"
        )


def _check_adapter(model: PeftModel, name: str) -> None:
    """Refuse all adapters but one of plain LoRA on the checkpoint, which can be scaled."""
    configs = list(model.peft_config.values())
    kinds = [str(getattr(config.peft_type, "value", config.peft_type)) for config in configs]
    if kinds != ["LORA"]:
        raise UserError(
            f"rewind_to sets back a model without adapters, or with one of LoRA; this one has {', '.join(kinds)}. "
            "Merge them into the model (merge_and_unload)."
        )
    config: LoraConfig = configs[0]
    odd = [option for option in NOT_SCALED if getattr(config, option, None)]
    odd += ["bias"] if config.bias != "none" else []
    odd += ["init_lora_weights"] if config.init_lora_weights not in PLAIN_STARTS else []
    if odd:
        raise UserError(
            f"rewind_to: LoRA with {' and '.join(f'{option}={getattr(config, option)!r}' for option in odd)} is no "
            "change of the base that can be scaled. Merge the adapter into the model (merge_and_unload)."
        )
    frozen = [n for n, p in model.named_parameters() if _is_scaled(n) and not p.requires_grad]
    if frozen:
        raise UserError(f"rewind_to sets back what is trained, and of the adapter is not: {some(frozen)}.")
    base = config.base_model_name_or_path
    if not base or not (base == name or Path(base).exists() and Path(name).exists() and Path(base).samefile(name)):
        raise UserError(
            f"rewind_to: {name} is not the base of the adapter in training, which is {base or 'not known'}. An "
            "adapter is set back towards its base: name that one, as the adapter does."
        )


def _is_scaled(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B." in name


def _scale_adapter(model: PeftModel, keep: float) -> bool:
    """Return whether the adapter changed anything before."""
    differed = [_blend(p, torch.zeros(()).expand(p.shape), keep) for n, p in model.named_parameters() if _is_scaled(n)]
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for module in wrapper.modules_to_save.values():
                pairs = zip(module.parameters(), wrapper.original_module.parameters(), strict=True)
                differed += [_blend(copied, original, keep) for copied, original in pairs]
    return any(differed)


def _rewind_weights(trainer: Trainer, keep: float) -> bool:
    """Return whether any weight differed. Tied weights have one name, and are set back once."""
    name, weights = trainer.args.rewind_to, dict(trainer.model.named_parameters())
    earlier = _weights_of(load_model(name, trust_remote_code=trainer.args.trust_remote_code))
    faults = {"lacks": weights.keys() - earlier.keys(), "has in addition": earlier.keys() - weights.keys()}
    for fault, names in faults.items():
        if names:
            raise UserError(f"rewind_to: {name} is another model than the one in training: it {fault} {some(names)}.")
    shapes = {n: (tuple(earlier[n].shape), tuple(p.shape)) for n, p in weights.items()}
    other = [f"{n} {was} instead of {now}" for n, (was, now) in shapes.items() if was != now]
    if other:
        raise UserError(f"rewind_to: {name} has tensors of other shapes than the model: {some(other)}. {NAME_IT}")
    return any([_blend(p, earlier.pop(n), keep) for n, p in weights.items()])


def _weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@torch.no_grad()
def _blend(weight: Tensor, earlier: Tensor, keep: float) -> bool:
    """Set a weight to `earlier + keep (weight - earlier)`, computed in float64. Return whether the two differed."""
    weight, earlier, differed = torch.atleast_1d(weight.detach()), torch.atleast_1d(earlier.detach()), False
    step = max(1, CHUNK * len(weight) // max(1, weight.numel()))  # rows at a time
    for now, before in zip(weight.split(step), earlier.split(step), strict=True):
        differed |= not torch.equal(now.cpu(), before.to("cpu", now.dtype))
        before = before.to("cpu", torch.float64)
        now.copy_(before + keep * (now.to("cpu", torch.float64) - before))
    return differed
