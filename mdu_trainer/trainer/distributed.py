"""The backends of accelerate (DDP, FSDP2, DeepSpeed ZeRO): every branch between them is here.

Under FSDP2 and ZeRO-3 a process holds a share of each weight, and the whole only while the weight's module runs.
"""

from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..files import UserError


class DistributedBackend:
    """How a run is spread over processes.

    Args:
        accelerator: of the trainer.
        layer_class: name of the class of the model's layers, which FSDP shards one by one. A class that the user has
            set in `fsdp_transformer_layer_cls_to_wrap` comes first.

    Attributes:
        shards: whether weights are whole only while their module runs (FSDP2, ZeRO-3).

    Raises:
        ValueError: FSDP1, whose flattened weights the LM head's hooks cannot read.
    """

    def __init__(self, accelerator: Accelerator, layer_class: str | None = None):
        self.accelerator = accelerator
        self.fsdp = getattr(accelerator.state, "fsdp_plugin", None)
        deepspeed = accelerator.state.deepspeed_plugin
        self.zero_stage = deepspeed.zero_stage if deepspeed else 0
        self.shards = self.fsdp is not None or self.zero_stage == 3
        if self.fsdp is None:
            return
        if self.fsdp.fsdp_version != 2:
            raise UserError(
                "FSDP1 is not supported. Set fsdp_version: 2 in the accelerate config (fsdp_config={'version': 2} in "
                "the training arguments); examples/accelerate_configs/fsdp2.yaml is a ready one."
            )
        if self.fsdp.transformer_cls_names_to_wrap is None and layer_class is not None:
            self.fsdp.transformer_cls_names_to_wrap = [layer_class]

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """A model that is never trained, spread as the one in training is; as it was where nothing is sharded."""
        if self.fsdp is not None:
            return fsdp2_prepare_model(self.accelerator, model).eval()
        if not self.zero_stage:
            return model
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, self.accelerator)

    def whole(self, weight: Tensor) -> Tensor:
        """A weight in one piece: itself if it is, a copy if it is sharded. All processes must ask for it together."""
        if self.zero_stage == 3:
            from deepspeed.zero import GatheredParameters

            with GatheredParameters([weight]):
                return weight.detach().clone()
        if isinstance(weight, DTensor):
            return weight.detach().full_tensor()
        # FSDP2 keeps some weights whole between passes, but their memory is its own
        return weight.detach().clone() if self.fsdp is not None else weight.detach()

    def place_whole(
        self,
        model: nn.Module,
        option: str = "precompute_anchor",
        instead: str = "precompute_anchor=False, which keeps a sharded frozen copy instead",
    ) -> None:
        """Put a model that is not wrapped yet on this process's device, where it takes part in no communication.

        Args:
            option, instead: what the message says needs it, and what does not.

        Raises:
            ValueError: this process does not hold the whole model.
        """
        loaded_once = self.fsdp is not None and self.fsdp.cpu_ram_efficient_loading
        weights = list(model.parameters())
        if loaded_once or any(hasattr(p, "ds_id") or isinstance(p, DTensor) or p.is_meta for p in weights):
            raise UserError(
                f"{option} needs the whole model in every process before training, but it was sharded while "
                "it was loaded. Set fsdp_cpu_ram_efficient_loading: false (FSDP2) or zero3_init_flag: false (ZeRO-3), "
                f"or {instead}."
            )
        device = self.accelerator.device
        if any(p.device.type != device.type for p in weights):
            model.to(device)


def is_partitioned(weight: Tensor) -> bool:
    """Whether ZeRO-3 has taken the weight apart already."""
    return hasattr(weight, "ds_id")
