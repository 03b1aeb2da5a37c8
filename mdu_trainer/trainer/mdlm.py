"""Fine-tuning of masked diffusion language models: the Trainer hooks and wiring that unlearning shares."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..config import DiffusionConfig, MDLMConfig
from ..data.rows import (
    DataCollatorForUnlearning,
    EpochSampler,
    RowPairs,
    TokenizedRows,
    check_rows,
    in_order,
    length_grouped,
    shuffled,
    tokenize_rows,
)
from ..divergence import TokenNLL
from ..files import UserError
from ..masking import forward_process
from ..models import (
    Backbone,
    base_of,
    is_adapter,
    load_checkpoint,
    load_model,
    load_tokenizer,
    measure_at,
    resolve_backbone,
)
from ..models.backbone import target_modules_of
from ..models.checks import check_finite
from ..models.refusals import refuse_adapter, refuse_split
from ..objectives import diffusion_bound, mean_by_example
from .checkpoints import make_writable
from .distributed import DistributedBackend
from .evaluating import EvaluatingTrainer, Score, Scores, schedules
from .reference import Reference
from .run_record import RunRecord, start_digest

logger = logging.get_logger(__name__)

Batch = dict[str, Tensor]
C = TypeVar("C", bound=DiffusionConfig)
READ_ONCE = ("max_length", "pad_with_end_tokens", "anchor_input")  # arguments that a search cannot vary
# adapters whose targets are no linear layers; PEFT knows which
OTHER_TARGETS = (PeftType.ADAPTION_PROMPT, PeftType.LN_TUNING, PeftType.TRAINABLE_TOKENS)


class MDLMTrainer(EvaluatingTrainer):
    """Fine-tune a masked diffusion language model on prompt-completion rows.

        L = E_t [ 1/t * sum_{i in M_t} CE_i / |y| ]          (LLaDA, arXiv 2502.09992, eq. 5)

    Args:
        model: a model's name or path, a `PreTrainedModel`, or a `PeftModel`.
        args: the configuration.
        train_dataset: rows in a format of `mdu_trainer.data.rows`.
        eval_dataset: rows, or a dict of names and rows. Their masks are fixed by the seed. The loss is `eval_loss`, of
            the set `dev` among others `eval_dev_loss`.
        processing_class: the tokenizer; the model's own if not given.
        peft_config: wraps the model in an adapter. Without `target_modules`, the backbone's are taken.
        data_collator: in place of `DataCollatorForUnlearning`.
        callbacks, optimizers: as in `Trainer`.
        model_init: makes the model, in place of `model`; every `train` then starts from a new one. For
            `hyperparameter_search`.

    Example:

        trainer = MDLMTrainer("GSAI-ML/LLaDA-8B-Base", MDLMConfig("out"), train_dataset=rows)
        trainer.train()
    """

    model: PreTrainedModel | PeftModel
    train_dataset: RowPairs | None
    config_class: type[DiffusionConfig] = MDLMConfig
    reference: Reference | None = None  # theta_0, where the loss compares with it
    _doing = "fine-tuning"
    # compute_loss returns a mean over a micro-batch, so the Trainer divides it by the number of micro-batches
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | None = None,
        args: DiffusionConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        model_init: Callable[..., PreTrainedModel] | None = None,
    ):
        self.args = args = self._config(args)
        _check_source(model, model_init, optimizers)
        self._check_eval_sets(eval_dataset)
        if args.should_save and train_dataset is not None:
            make_writable(str(args.output_dir))
        if args.n_gpu > 1:
            logger.warning(f"{args.n_gpu} GPUs are visible and one is used; `accelerate launch` uses all of them.")
            args._n_gpu = 1
        set_seed(args.seed)  # the Trainer does so too, but after the adapter's first weights are drawn
        if model is None:
            self.model_init = model_init
            model = cast(PreTrainedModel, super().call_model_init())
        processing_class = processing_class or _load_tokenizer_of(model, args)
        if isinstance(model, str):  # a long load comes after what can be refused without it
            self._check_rows(train_dataset, eval_dataset)
        model = _load(model, args, peft_config)
        self.backbone = resolve_backbone(model, processing_class)
        self._tokenizer, self._peft_config = processing_class, peft_config
        self._metrics: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, device=args.device))
        parts = self._tokenize_train(train_dataset)
        filler = self.backbone.end_token_ids[0] if isinstance(args, MDLMConfig) and args.pad_with_end_tokens else None
        super().__init__(
            model=_with_adapter(model, peft_config, args, self.backbone),
            args=args,
            data_collator=data_collator or DataCollatorForUnlearning(self.backbone.pad_token_id, filler),
            train_dataset=_pairs(parts, args) if parts else None,
            eval_dataset=self._tokenize_eval(eval_dataset),
            processing_class=processing_class,
            callbacks=callbacks,
            compute_metrics=self._mean_scores,
            optimizers=optimizers,
        )
        self.model_init = model_init  # the Trainer would make another model at once
        self._read_once = {name: value for name, value in vars(args).items() if name in READ_ONCE}
        self.model_accepts_loss_kwargs = False
        self.distributed = DistributedBackend(self.accelerator, self.backbone.layer_class)

    @classmethod
    def _config(cls, args: C | None) -> C:
        config: Any = cls.config_class("trainer_output") if args is None else args
        if not isinstance(config, cls.config_class):
            raise TypeError(f"args must be a {cls.config_class.__name__}, got a {type(args).__name__}.")
        return cast(C, config)

    def call_model_init(self, trial: Any = None) -> PreTrainedModel | PeftModel:
        """A new model, with a new adapter if there is to be one."""
        model = cast(PreTrainedModel, super().call_model_init(trial))
        return _with_adapter(model, self._peft_config, self.args, self.backbone)

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if self.model_init is not None:  # the model is new, and a trial may have set arguments
            self._start_over()
            self._begin()

    def _start_over(self) -> None:
        """Make what depends on arguments and model anew."""
        args = self.args
        args.check_values()
        changed = [name for name, value in self._read_once.items() if getattr(args, name) != value]
        if changed:
            raise UserError(f"{changed[0]} was read when the rows were prepared: make a trainer for each value of it.")
        self.guard.accelerator = self.accelerator
        self.distributed = DistributedBackend(self.accelerator, self.backbone.layer_class)
        self._metrics.clear()
        if self.train_dataset is not None:
            self.train_dataset = _pairs(self.train_dataset.parts, args)
        self._renew_eval_sets()

    def _check_run(self) -> None:
        args = self.args
        if self.train_dataset is None:
            raise UserError("There are no rows to train on: pass train_dataset.")
        rows = args.train_batch_size * args.world_size
        if args.dataloader_drop_last and len(self.train_dataset) < rows:
            raise UserError(
                f"dataloader_drop_last leaves out all {len(self.train_dataset)} rows: a batch takes {rows}. Set it to "
                "False, or lower per_device_train_batch_size."
            )
        if args.metric_for_best_model is not None and args.eval_strategy != IntervalStrategy.NO:
            self._check_metric(args.metric_for_best_model)

    # The loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Batch], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor | tuple[Tensor, Scores]:
        """The loss of a micro-batch of B examples, and with `return_outputs` the scores of each.

            L = E_t [ 1/t * sum_{i in M_t} CE_i / |y| ], without time weighting E_t [ 1/|M_t| * sum_{i in M_t} CE_i ]

        Args:
            num_items_in_batch: name of a loss -> weight of the examples in its mean, as `get_batch_samples` counts it.
        """
        assert isinstance(self.args, MDLMConfig)
        # 1. The forward process: y_t is y with the positions M_t masked, N in all
        noised, weight = forward_process(inputs["train"], self.backbone.mask_token_id), inputs["train"]["weight"]

        # 2. The prediction p_theta(. | x, y_t): of each masked token -log p and the entropy, [N]
        share = noised.weight / noised.num_response if self.args.time_weighting else 1 / noised.num_masked  # [B]
        where = (noised.input_ids, noised.attention_mask, noised.masked)  # [B, L]
        measure = TokenNLL(noised.targets, share[noised.batch_index])
        nll, entropy = measure_at(model, *where, measure, logit_shift=self.backbone.logit_shift)

        # 3. One loss an example [B], then the mean over the update
        if self.args.time_weighting:
            loss = diffusion_bound(nll, noised.batch_index, noised.weight) / noised.num_response
        else:
            loss = mean_by_example(nll, noised.batch_index, noised.num_masked)
        entropy = mean_by_example(entropy, noised.batch_index, noised.num_masked)
        fraction = noised.num_masked / noised.num_response
        values = {"loss": loss, "entropy": entropy, "masked_fraction": fraction}
        scores = {name: Score(value, weight) for name, value in values.items()}
        loss = (loss * weight).sum() / (num_items_in_batch or {"loss": weight.sum()})["loss"]
        self._record(loss, scores)
        return (loss, scores) if return_outputs else loss

    # Data

    def _check_rows(self, dataset: Dataset | None, evaluated: Dataset | dict[str, Dataset] | None) -> None:
        sets = [(name, rows, [name]) for name, rows in self._train_sets(dataset).items()]
        several = evaluated if isinstance(evaluated, dict) else {None: evaluated}
        sets += [("eval", rows, self._eval_parts(name)) for name, rows in several.items()]
        for name, rows, parts in sets:
            if rows is not None and not isinstance(rows, RowPairs):
                check_rows(rows, name, **self._columns(parts))

    def _train_sets(self, dataset: Dataset | None) -> dict[str, Dataset | None]:
        return {"train": dataset}

    def _tokenize_train(self, dataset: Dataset | None) -> dict[str, TokenizedRows]:
        sets = {} if dataset is None else self._train_sets(dataset)
        given = {name: rows for name, rows in sets.items() if rows is not None}
        return {name: self._tokenize(rows, name, [name]) for name, rows in given.items()}

    def _tokenize(self, dataset: Dataset, name: str, parts: list[str], **options: Any) -> TokenizedRows:
        options |= {"name": name, "max_length": self.args.max_length} | self._columns(parts)
        return tokenize_rows(dataset, self._tokenizer, self.backbone, **options)

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        # state.epoch is a whole number when an epoch starts, and its floor is the epoch a resumed run goes on in
        size, several = len(train_dataset or self.train_dataset or ()), self.args.world_size > 1
        rows = self.args.train_batch_size * self.args.world_size
        filled = several and not self.args.dataloader_drop_last
        return EpochSampler(size, epoch=lambda: int(self.state.epoch or 0), multiple=rows if filled else 1)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, dict[str, Tensor]]:
        """The micro-batches of an update, and the mean weight of one, by which losses are divided.

        So a row weighs the same however the rows of an update are split into micro-batches and processes.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, self._update_sizes(batches) if batches else {}

    def _update_sizes(self, batches: list[dict[str, Batch]]) -> dict[str, Tensor]:
        return {"loss": self._mean_over_update([batch["train"]["weight"].sum() for batch in batches])}

    def _mean_over_update(self, counts: list[Tensor]) -> Tensor:
        total = torch.stack(counts).sum().float().to(self.args.device)
        return cast(Tensor, self.accelerator.reduce(total, "mean")) / len(counts)

    def floating_point_ops(self, inputs: dict[str, Batch]) -> int:
        """Estimate of the forward and backward passes on every part of a batch."""
        return sum(super(MDLMTrainer, self).floating_point_ops(part) for part in inputs.values())

    def _track_num_input_tokens(self, inputs: dict[str, Batch]) -> None:
        """Count the tokens of every part of a batch, but for rows that only fill it up."""
        if self.args.include_num_input_tokens_seen == "no":
            return
        total = torch.zeros((), dtype=torch.int64, device=self.args.device)
        for part in inputs.values():
            tokens = part["attention_mask"]
            if self.args.include_num_input_tokens_seen == "all":
                tokens = torch.ones_like(tokens)
            total += tokens[part["weight"] > 0].sum().to(total.device)
        self.state.num_input_tokens_seen += int(cast(Tensor, self.accelerator.reduce(total, "sum")))

    # The record of the run, and logging

    @property
    def loss_options(self) -> dict[str, float]:
        """The constants of the loss."""
        return {}

    def _current_record(self, key: str | None = None) -> RunRecord:
        self._start_digest = self._start_digest or start_digest(self.model, self.reference)
        model, sets = self.accelerator.unwrap_model(self.model), {"train": self.train_dataset} | self._eval_sets
        return RunRecord.of(self.args, model, sets, self.loss_options, self._start_digest, key)

    @torch.no_grad()
    def _record(self, loss: Tensor, scores: Scores) -> None:
        """Sum up the scores of a training step until they are logged, and show its loss to the guard."""
        if not self.model.training:
            return
        self.guard.see(loss)
        for name, (value, weight) in scores.items():
            if name != "loss":
                total = torch.stack([(value * weight).sum(), weight.sum()]).float()
                keep = total.isfinite().all() | (not self.args.logging_nan_inf_filter)
                self._metrics[name] += torch.where(keep, total, 0.0)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with the means of the scores since the last training log."""
        if "loss" in logs and self._metrics:
            totals = self.accelerator.reduce(torch.stack(list(self._metrics.values())), "sum")
            logs |= {name: (total / count).item() for name, (total, count) in zip(self._metrics, totals, strict=True)}
            self._metrics.clear()
        super().log(logs, start_time)


def _check_source(model: Any, model_init: Callable | None, optimizers: tuple) -> None:
    """Refuse a model that is given twice or not at all, and optimizers of one that is made anew for each run."""
    if (model is None) == (model_init is None):
        raise UserError("Pass the model to train, or as model_init a function that makes it; one of the two.")
    if model_init is not None and any(part is not None for part in optimizers):
        raise UserError("optimizers are of one model, and model_init makes a new one for each run. Leave them out.")


def _load(
    model: str | PreTrainedModel | PeftModel, args: DiffusionConfig, peft_config: PeftConfig | None
) -> PreTrainedModel | PeftModel:
    if isinstance(model, str):
        how = args.load_options
        if is_adapter(model):
            return load_checkpoint(model, is_trainable=True, **how)[0]
        given = {"dtype", "torch_dtype", "quantization_config", "load_in_8bit", "load_in_4bit"} & how.keys()
        if peft_config is None and not given:
            how["dtype"] = torch.float32
        model = load_model(model, **how)
    elif args.model_init_kwargs:
        raise UserError("model_init_kwargs are for a model given by name; this one is loaded already.")
    else:
        refuse_split(model)
        check_finite(model, "The model")
    if peft_config is None and not isinstance(model, PeftModel):
        _warn_of_rounding(model, args)
    return model


def _warn_of_rounding(model: PreTrainedModel, args: DiffusionConfig) -> None:
    """Say so if all weights are trained in half precision, where most updates round to nothing."""
    trained = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
    if trained and not args.deepspeed:  # which keeps float32 copies of its own
        logger.warning(
            f"All weights are trained in {str(trained.pop()).removeprefix('torch.')}. At a learning rate of 1e-5 ten "
            "updates moved 3 % of a small model's weights, and 94 % in float32: most updates are smaller than what "
            "rounding keeps. Load the model in float32 (bf16=True still computes in bfloat16), or train an adapter."
        )


def _load_tokenizer_of(model: str | PreTrainedModel | PeftModel, args: DiffusionConfig) -> PreTrainedTokenizerBase:
    name = base_of(model) if isinstance(model, str) else model.config._name_or_path
    if not name:
        raise UserError("The model was not loaded from a name or path, so pass its tokenizer as processing_class.")
    revision = args.load_options.get("revision") or "main"
    return load_tokenizer(name, trust_remote_code=args.trust_remote_code, revision=revision)


def _with_adapter(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: DiffusionConfig, backbone: Backbone
) -> PreTrainedModel | PeftModel:
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise UserError("The model is a PeftModel already; pass peft_config only with a plain model.")
        refuse_adapter(peft_config)
        peft_config = _with_targets(copy.copy(peft_config), backbone)
        if peft_config.task_type == "CAUSAL_LM" and not hasattr(model, "prepare_inputs_for_generation"):
            peft_config.task_type = None  # TRL's default, of which PEFT asks what a *ForMaskedLM does not have
        model = get_peft_model(model, peft_config)
    if isinstance(model, PeftModel) and args.gradient_checkpointing:
        # the embeddings' output must carry a gradient, or checkpointed layers below the first adapter have none
        model.enable_input_require_grads()
    return model


def _pairs(parts: dict[str, TokenizedRows], args: DiffusionConfig) -> RowPairs:
    rows, counts = args.train_batch_size * args.world_size, args.rows_a_counter
    by_length = {name: length_grouped(rows * counts.get(name, 1)) for name in parts}
    orders = {"random": shuffled, "sequential": in_order, "group_by_length": by_length}
    seed = args.seed if args.data_seed is None else args.data_seed
    return RowPairs(parts, seed, orders[args.train_sampling_strategy], schedules(args, parts), counts)


def _with_targets(peft_config: Any, backbone: Backbone) -> PeftConfig:
    """Make the backbone's linear layers the targets, unless the config has others or is of a kind without any."""
    if getattr(peft_config, "target_modules", None) is not None or peft_config.peft_type in OTHER_TARGETS:
        return peft_config
    if backbone.lora_target_modules is None:
        raise UserError("This model has no linear layers that are known to PEFT: name target_modules in peft_config.")
    layers = getattr(peft_config, "layers_to_transform", None)
    peft_config.target_modules = target_modules_of(backbone, layers)
    if layers is not None and isinstance(peft_config.target_modules, str):
        peft_config.layers_to_transform = peft_config.layers_pattern = None
    return peft_config
