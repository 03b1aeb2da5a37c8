"""The losses by their formulas: one row at a time, without padding, hooks or shared code."""

import copy

import torch
from torch.nn.functional import logsigmoid

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def batch_of(trainer, epoch=0):
    trainer.state.epoch = epoch
    return next(iter(trainer.get_train_dataloader()))


def perturb(model, scale=0.05):
    """Move trained weights, so that the live model differs from theta_0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def log_probs(model, ids, shift=False):
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    return torch.cat([logits[:1], logits[:-1]]) if shift else logits


def expected_row(trainer, initial, name, batch, i, loss_type):
    """One row of the forget loss (or of a retain loss) by its formula; also the weight of the row."""
    args = trainer.args
    part = batch[name]
    length = int(part["attention_mask"][i].sum())
    ids, response = part["input_ids"][i, :length], part["completion_mask"][i, :length].bool()
    t, noise = part["t"][i].double().item(), part["noise"][i, :length]
    drawn = response & (noise < t)
    masked = drawn.clone()
    if not masked.any():
        masked[torch.where(response, noise, torch.tensor(2.0)).argmin()] = True
    counted = response
    if name != "retain" and (args.forget_masking != "random" or not args.mask_special_tokens):
        drawn, counted = masks_of(trainer, ids, response, noise < t)
        masked, t = drawn, t if args.forget_masking == "random" else drawn.sum().item() / counted.sum().item()
        if not masked.any():
            masked = torch.arange(length) == torch.where(counted, noise, torch.tensor(2.0)).argmin()
    noisy = torch.where(masked, trainer.backbone.mask_token_id, ids)
    anchor_ids = torch.where(response, noisy, trainer.backbone.mask_token_id)
    model = trainer.model.eval()
    shift = trainer.backbone.logit_shift
    p = log_probs(model, noisy, shift)[masked]
    weight = 1 / t if drawn.any() else 0.0

    def bound(log_p):
        return -weight * log_p.gather(1, ids[masked][:, None]).sum()

    if loss_type == "mdu":
        live = {"initial": initial, "current": model}.get(args.anchor_source) or trainer.expected_source
        if args.anchor_input == "counterfactual":
            how = part["secrets"][i, :length], args.strike_quantile, trainer.backbone.mask_token_id, shift
            logits = counterfactual(live, noisy, ids, response, *how)[masked]
        else:
            shown = {"masked_prompt": anchor_ids, "prompt": noisy, "hidden_prompt": noisy[response]}[args.anchor_input]
            logits = log_probs(live, shown)[masked[-len(shown) :]]
        q = (args.tau * logits).log_softmax(-1)
        return divergence(p, q, args.kl_direction) / masked.sum(), masked.sum()
    if loss_type == "kl":
        q = log_probs(initial, noisy)[masked]
        return (p.exp() * (p - q)).sum() / masked.sum(), 1
    if loss_type in ("nelbo", "ga"):
        return (bound(p) if loss_type == "nelbo" else -bound(p)) / counted.sum(), 1
    if loss_type == "simnpo":
        return -2 / 2.5 * logsigmoid(2.5 * bound(p) / counted.sum() - args.gamma), 1
    if loss_type in ("wga", "bounded_ga"):
        truth = p.gather(1, ids[masked][:, None])
        cap = args.loss_options and args.loss_options["cap"]
        per_token = truth.clamp(-cap) if cap else (args.alpha * truth).exp() * truth
        return weight * per_token.sum() / counted.sum(), 1
    log_ratio = bound(log_probs(initial, noisy)[masked]) - bound(p)
    if loss_type == "log_ratio":
        return log_ratio, 1
    if loss_type == "npo":
        return -2 / 0.2 * logsigmoid(-0.2 * log_ratio), 1
    preferred, _ = expected_row(trainer, initial, "preferred", batch, i, "log_ratio")
    return -logsigmoid(0.1 * (preferred - log_ratio)), 1


def divergence(p, q, direction):
    """Of log-probabilities `[N, V]`, summed over tokens."""
    if direction == "js":
        m = (p.exp() / 2 + q.exp() / 2).log()
        return (divergence(p, m, "reverse") + divergence(q, m, "reverse")) / 2
    large, other = (q, p) if direction == "forward" else (p, q)
    return (large.exp() * (large - other)).sum()


def masks_of(trainer, ids, response, drawn):
    """The masked tokens of a row, where special ones stay visible, and those that could be."""
    special = {*trainer.processing_class.all_special_ids}
    counted = torch.tensor([bool(r) and i not in special for i, r in zip(ids.tolist(), response, strict=True)])
    if trainer.args.forget_masking == "random":
        return drawn & counted, counted
    if trainer.args.forget_masking == "generated":
        own = own_tokens(trainer, ids[~response].tolist())
        found = torch.tensor([i in own for i in ids.tolist()]) & counted
        return found if found.any() else counted, counted
    return counted, counted


def own_tokens(trainer, prompt):
    """What the model generates, one token a step: the most probable token of the position it is surest of."""
    mask_id, ends = trainer.backbone.mask_token_id, trainer.backbone.end_token_ids
    length = max(len(row) for row in trainer.train_dataset.parts["forget"].completion_ids)
    ids = torch.tensor([*prompt, *[mask_id] * length])
    for _ in range(length):
        p = log_probs(trainer.model.eval(), ids, trainer.backbone.logit_shift)
        p[:, [mask_id, *({trainer.backbone.pad_token_id} - {*ends})]] = -torch.inf
        surest, tokens = p.log_softmax(-1).max(-1)
        place = torch.where(ids == mask_id, surest, -torch.inf).argmax()
        ids[place] = tokens[place]
    written = ids[len(prompt) :].tolist()
    return set(written[: min([written.index(end) for end in ends if end in written], default=length)])


def averaged(model, live, decay):
    """A model with the weights decay w + (1 - decay) w_live."""
    average = copy.deepcopy(model)
    with torch.no_grad():
        for mean, p in zip(average.parameters(), live.parameters(), strict=True):
            mean.copy_(decay * mean + (1 - decay) * p)
    return average


def counterfactual(model, noisy, ids, response, marks, quantile, mask_id, shift):
    """Logits (up to a constant) of a row: 2 stands for stored, 1 for in context; a row without a 2 is uniform."""
    asked = torch.tensor(
        [mask_id if mark else token for token, mark in zip(noisy.tolist(), marks.tolist(), strict=True)]
    )
    logits = log_probs(model, asked, shift)
    secret = [i for i, mark in enumerate(marks.tolist()) if mark == 2 and response[i]]
    for i in secret if quantile is not None else ():
        ordered = sorted(logits[i].tolist())
        logits[i, ids[i]] = ordered[int(quantile * (len(ordered) - 1))]
    return logits if secret else torch.zeros_like(logits)


def expected_loss(trainer, initial, batch):
    rows = range(len(batch["forget"]["t"]))
    forget = [expected_row(trainer, initial, "forget", batch, i, trainer.args.loss_type) for i in rows]
    if trainer.args.kl_reduction == "token":
        total = sum(value * weight for value, weight in forget) / sum(weight for _, weight in forget)
    else:
        total = sum(value for value, _ in forget) / len(forget)
    if "retain" in batch:
        kind = trainer.args.retain_loss_type
        rows = range(len(batch["retain"]["t"]))
        retain = [expected_row(trainer, initial, "retain", batch, i, kind)[0] for i in rows]
        total = total + trainer.args.retain_weight * sum(retain) / len(retain)
    return total


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def trained(trainer):
    """The weights at the end of a run."""
    trainer.train()
    return weights(trainer)
