"""Predictions of theta_0, the model with its weights at the start."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from peft import PeftModel, PeftType
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from ..divergence import Prediction, Projection, TokenNLL
from ..files import UserError
from ..models import evaluation_mode, hidden_at, measure_at
from ..models.head import Clean
from .distributed import DistributedBackend, is_partitioned


class Reference:
    """Predictions of the model as it was at the start, without gradient.

    A PEFT model holds theta_0 already: its base weights with the adapters switched off or, if the adapters change
    something at the start (they had been trained before, or begin so), with their first weights put back for the pass.
    Any other model is copied once and frozen.

    Where the model is going to be sharded, so is the copy, but for a head whose predictions are compared: that is kept
    in one piece by every process. Predictions are compared outside the copy's forward, where sharded weights are gone,
    and as logits they would take more room than the head.

    Args:
        model: the model at the start, not wrapped yet.
        distributed: of the trainer; gives the copy its device, mixed precision and sharding.
        keep_copy: False if the model is asked before it is trained only, while its weights are theta_0 themselves.
        precision: of the copy: "full", or "8bit" for the linear layers but the head (bitsandbytes).
        device: of the copy: the accelerator's if None. A copy on the CPU costs the GPU only its head.

    Raises:
        ImportError: 8 bit without bitsandbytes.
        ValueError: a precision or device for the copy that a PEFT model does without or a sharded copy cannot have,
            or adapters trained before whose weights are going to be sharded.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        distributed: DistributedBackend,
        keep_copy: bool = True,
        precision: str = "full",
        device: str | None = None,
    ):
        self.distributed, self.accelerator = distributed, distributed.accelerator
        self.device = torch.device(device) if device else self.accelerator.device
        self.frozen: nn.Module | None = None
        self.head: Projection | None = None  # the copy's, where predictions are compared
        self.first_adapter: dict[str, Tensor] = {}  # what is trained of adapters that are part of theta_0
        self.switches_off = False  # adapters, which change nothing at the start
        if isinstance(model, PeftModel):
            if precision != "full" or device is not None:
                raise UserError(
                    "reference_precision and reference_device are of the copy of a model without adapters; a PEFT "
                    "model needs none. Leave them out."
                )
            self.switches_off = _adapter_is_identity(model)
            if not self.switches_off:
                self.first_adapter = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
                _check_unsharded(distributed, self.first_adapter)
        elif keep_copy:
            self.frozen = self._copy(model, precision, device)

    @classmethod
    def of_frozen(
        cls,
        frozen: PreTrainedModel,
        distributed: DistributedBackend,
        precision: str = "full",
        device: str | None = None,
        whole: bool = False,
    ) -> "Reference":
        """Predictions of a model that was loaded for this alone, instead of a copy; it is put where a copy would be.

        Args:
            frozen: the model.
            distributed, precision, device: as for a copy.
            whole: keep it in one piece in every process.
        """
        reference = cls(frozen, distributed, keep_copy=False, device=device)
        _check_in_one_piece(distributed, precision, device)
        frozen = frozen.requires_grad_(False).eval()
        if whole or not distributed.shards:
            frozen.to(reference.device)
        reference.frozen = frozen if whole else reference._placed(frozen, precision, device)
        return reference

    def projection(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        selected: Tensor,
        *,
        logit_shift: bool = False,
        clean: Clean | None = None,
        position_ids: Tensor | None = None,
    ) -> Prediction:
        """theta_0's predictions of the selected tokens, to be compared with others; see `hidden_at`.

        Args:
            model: the live model as the trainer wraps it. Its forward is what runs if there is no copy.
        """
        places = None if position_ids is None else position_ids.to(self.device)
        form = {"logit_shift": logit_shift, "clean": clean and clean.to(self.device)}
        with self._weights(model) as theta_0:
            inputs = (x.to(self.device) for x in (input_ids, attention_mask, selected))
            prediction = hidden_at(theta_0, *inputs, position_ids=places, **form)
        if not isinstance(prediction, Projection):
            return prediction.to(input_ids.device)
        if self.frozen is not None and self.head is None:
            head = _linear_head(self.accelerator.unwrap_model(self.frozen))
            self.head = _weights_of(head, self.accelerator.device, self.distributed.whole)
        return (self.head or prediction)._replace(hidden=prediction.hidden.to(input_ids.device))

    def nll(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        selected: Tensor,
        targets: Tensor,
        *,
        logit_shift: bool = False,
        clean: Clean | None = None,
    ) -> Tensor:
        """-log p of the selected tokens under theta_0, `[N]`. Arguments as for `projection`."""
        form = {"logit_shift": logit_shift, "clean": clean and clean.to(self.device)}
        with self._weights(model) as theta_0:
            inputs = (x.to(self.device) for x in (input_ids, attention_mask, selected))
            nll = measure_at(theta_0, *inputs, TokenNLL(targets.to(self.device)), **form).value
        return nll.to(input_ids.device)

    def _copy(self, model: nn.Module, precision: str, device: str | None) -> nn.Module:
        _check_in_one_piece(self.distributed, precision, device)
        own = precision == "full" and device is None
        return self._placed(_frozen_copy(model, self.distributed, None if own else self.device), precision, device)

    def _placed(self, frozen: nn.Module, precision: str, device: str | None) -> nn.Module:
        """A frozen model in the form in which it stays: sharded as the live one, or in the precision that is named."""
        if precision == "full" and device is None:
            return self.distributed.prepare_frozen(frozen)
        if precision == "8bit":
            _to_8bit(frozen)
            frozen.to(self.device)
        return frozen

    @contextmanager
    def _weights(self, model: nn.Module) -> Iterator[nn.Module]:
        with ExitStack() as stack:
            if self.frozen is not None:
                stack.enter_context(torch.no_grad())
                stack.enter_context(self.accelerator.autocast())
                yield self.frozen
                return
            unwrapped = self.accelerator.unwrap_model(model)
            if self.switches_off:
                stack.enter_context(_adapters_off(unwrapped))
            elif self.first_adapter:
                stack.enter_context(self._first_weights(unwrapped))
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluation_mode(model))
            yield model

    @contextmanager
    def _first_weights(self, model: nn.Module) -> Iterator[None]:
        live = {name: p for name, p in model.named_parameters() if name in self.first_adapter}
        now = {name: p.data for name, p in live.items()}
        for name, p in live.items():
            p.data = self.first_adapter[name].to(p.device)
        try:
            yield
        finally:
            for name, p in live.items():
                p.data = now[name]


@contextmanager
def _adapters_off(model: PeftModel) -> Iterator[None]:
    """Switch the adapters off, and leave alone which of them are trained.

    PEFT marks those that are off as not trained, which FSDP would take over for the passes that follow, and afterwards
    those that are on as trained, though the user may have frozen some.
    """
    trained = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            _restore(trained)
            yield
    finally:
        _restore(trained)


def _restore(trained: list[tuple[nn.Parameter, bool]]) -> None:
    for p, requires_grad in trained:
        if p.requires_grad != requires_grad:
            p.requires_grad_(requires_grad)


def _check_unsharded(distributed: DistributedBackend, first_adapter: dict[str, Tensor]) -> None:
    if distributed.shards and first_adapter:
        raise UserError(
            "The adapters were trained before, so theta_0 is their weights as they are now; under FSDP2 and ZeRO-3 "
            "these cannot be put back for a pass. Merge them into the model (merge_and_unload) and add new ones, or "
            "use DDP or ZeRO-2."
        )


def _check_in_one_piece(distributed: DistributedBackend, precision: str, device: str | None) -> None:
    if distributed.shards and (precision != "full" or device is not None):
        raise UserError(
            "reference_precision and reference_device are of a copy in one piece; under FSDP2 and ZeRO-3 the copy "
            "is sharded over the processes. Leave them out, or use DDP or ZeRO-2."
        )


def trained_head(model: nn.Module, device: torch.device) -> Projection | None:
    """A copy of the head's weights as they are, or None if they are not trained."""
    head = _linear_head(model)
    trained = head is not None and any(p.requires_grad for p in head.parameters())
    return _weights_of(head, device, lambda weight: weight.detach().clone()) if trained else None


def head_of(model: nn.Module, device: torch.device) -> Projection | None:
    """The head's weights of a model that is never trained, None if it is no plain linear layer."""
    head = _linear_head(model)
    return None if head is None else _weights_of(head, device, lambda weight: weight.detach())


def _linear_head(model: nn.Module) -> nn.Linear | None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head if isinstance(head, nn.Linear) else None


def _weights_of(head: nn.Linear, device: torch.device, read: Callable[[Tensor], Tensor]) -> Projection:
    """The weights, as `read` returns them, as a `Projection` of nothing yet."""
    weight, bias = (x if x is None else read(x).to(device) for x in (head.weight, head.bias))
    return Projection(weight.new_zeros(0, weight.shape[1]), weight, bias)


def _frozen_copy(model: nn.Module, distributed: DistributedBackend, device: torch.device | None = None) -> nn.Module:
    """A copy whose tensors are made where they are to stay, not first beside the original's.

    Without a device that is the accelerator's or, for a copy that is going to be sharded, the original's.
    """
    if device is None and not distributed.shards:
        device = distributed.accelerator.device
    memo: dict[int, Tensor] = {id(b): b.detach().to(device or b.device, copy=True) for b in model.buffers()}
    for p in model.parameters():
        whole = distributed.whole(p) if is_partitioned(p) else p.detach()
        memo[id(p)] = nn.Parameter(whole.to(device or p.device, copy=True), requires_grad=False)
    return copy.deepcopy(model, memo).eval()


def _to_8bit(model: nn.Module) -> None:
    """Quantise the linear layers, the head left as it is."""
    if not is_bitsandbytes_available():
        raise ImportError(
            "reference_precision='8bit' needs bitsandbytes, which is not installed: "
            "pip install mdu-trainer[quantization], or keep the copy in full precision."
        )
    from bitsandbytes.nn import Linear8bitLt

    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            quantised = Linear8bitLt(
                layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
            )
            quantised.load_state_dict(layer.state_dict())
            model.set_submodule(name, quantised.requires_grad_(False))


def _adapter_is_identity(model: PeftModel) -> bool:
    """Whether the adapters change nothing yet, frozen ones among them.

    These are LoRA layers with one factor that is zero (A in embeddings), and copies that still equal their modules.
    """
    named = list(model.named_parameters())
    is_lora = all("lora_" in name or "modules_to_save" in name for name, p in named if p.requires_grad)
    zero_at_first = [p for name, p in named if "lora_B" in name or "lora_embedding_A" in name]
    kinds = {config.peft_type for config in model.peft_config.values()}
    if kinds != {PeftType.LORA} or not is_lora or not zero_at_first or any(p.any() for p in zero_at_first):
        return False
    return all(
        torch.equal(copied, original)
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper)
        for module in wrapper.modules_to_save.values()
        for copied, original in zip(module.parameters(), wrapper.original_module.parameters(), strict=True)
    )
