import math
from dataclasses import replace

import pytest
import torch
from published import Shifted
from torch import nn

from mdu_trainer.inference.generation import DiffusionGenerationConfig, generate, generate_ids
from mdu_trainer.inference.schedule import reveal_schedule
from mdu_trainer.models import Backbone

VOCABULARY, END, PAD, MASK = 12, 0, 10, 11
SCRIPTED = Backbone("scripted", MASK, (END,), PAD, False, VOCABULARY, None, [], None)

PROMPTS = [[20, 21, 22], [30], [40, 41, 42, 43, 44, 45, 46], [60, 61, 62, 63, 64], [50, 51]]
SAMPLERS = [
    {},
    {"block_length": 5},
    {"block_length": 5, "steps": 6},
    {"schedule": "dllm", "block_length": 5, "steps": 6},
    {"remasking": "margin", "steps": 4},
    {"remasking": "entropy", "schedule": "dream", "steps": 5},
    {"remasking": "random", "block_length": 4},
    {"remasking": "random", "schedule": "dream", "steps": 5},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 0.8, "schedule": "dream", "position_temperature": 0.3},
    {"cfg_scale": 1.5, "steps": 3},
]


class Scripted(nn.Module):
    """Predicts the given logits `[N, V]` at the positions after a prompt of given length, and remembers its inputs."""

    def __init__(self, logits: torch.Tensor, prompt_length: int = 0):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.prompt_length = prompt_length
        self.seen: list[torch.Tensor] = []

    def forward(self, input_ids, attention_mask):
        self.seen.append(input_ids.clone())
        logits = torch.zeros(*input_ids.shape, VOCABULARY)
        logits[:, self.prompt_length : self.prompt_length + len(self.logits)] = self.logits
        return (logits,)

    def revealed(self, row: int = 0) -> list[int]:
        """How many tokens were revealed when each forward pass began."""
        return [int((ids[row] != MASK).sum()) - self.prompt_length for ids in self.seen]


def preferring(tokens: list[int], strength: list[float]) -> torch.Tensor:
    logits = torch.zeros(len(tokens), VOCABULARY)
    logits[torch.arange(len(tokens)), tokens] = torch.tensor(strength)
    return logits


@torch.no_grad()
def naive_decode(model, prompt, config, backbone):
    """One prompt, full logits, no tricks."""
    n, p = config.max_new_tokens, len(prompt)
    ids = torch.tensor([prompt + [backbone.mask_token_id] * n])
    masked = torch.tensor([False] * p + [True] * n)
    for (start, stop), steps in zip(config.blocks, block_steps(config), strict=True):
        left = stop - start
        for step in range(steps):
            if config.schedule == "linear":
                count = (stop - start) // steps + (step < (stop - start) % steps)
            else:
                t, s = (1 - (1 - 1e-3) * torch.tensor([step, step + 1]) / steps).tolist()
                count = left if step == steps - 1 else math.floor(left * (1 - s / t) + 1e-6)
            left -= count
            logits = model(input_ids=ids).logits[0]
            if config.cfg_scale:
                blind = ids.clone()
                blind[:, :p] = backbone.mask_token_id
                unconditional = model(input_ids=blind).logits[0]
                logits = unconditional + (config.cfg_scale + 1) * (logits - unconditional)
            logits[:, [backbone.mask_token_id, backbone.pad_token_id]] = -torch.inf
            probability = logits.softmax(dim=-1)
            top = probability.sort(dim=-1, descending=True).values
            score = {
                "low_confidence": top[:, 0],
                "margin": top[:, 0] - top[:, 1],
                "entropy": (probability * (probability + 1e-10).log()).sum(dim=-1),
            }[config.remasking]
            block = torch.arange(p + n)
            score[~masked | (block < p + start) | (block >= p + stop)] = -torch.inf
            for position in score.topk(count).indices:
                ids[0, position] = logits[position].argmax()
                masked[position] = False
    response = ids[0, p:].tolist()
    ends = [i for i, token in enumerate(response) if token in backbone.end_token_ids]
    return response[: ends[0]] if ends else response


def block_steps(config):
    if config.steps is None:
        return [stop - start for start, stop in config.blocks]
    blocks = len(config.blocks)
    return [config.steps // blocks + (i < config.steps % blocks) for i in range(blocks)]


@pytest.mark.parametrize("schedule", ["linear", "dream"])
@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
@pytest.mark.parametrize("shape", [{}, {"steps": 5}, {"block_length": 4}, {"block_length": 5, "steps": 7}])
def test_agrees_with_a_naive_decoder(model, backbone, schedule, remasking, shape):
    config = DiffusionGenerationConfig(max_new_tokens=12, schedule=schedule, remasking=remasking, **shape)
    decoded = generate_ids(model, PROMPTS, config, backbone)
    assert decoded == [naive_decode(model, prompt, config, backbone) for prompt in PROMPTS]


def test_guidance_agrees_with_a_naive_decoder(model, backbone):
    config = DiffusionGenerationConfig(max_new_tokens=10, cfg_scale=2.0)
    decoded = generate_ids(model, PROMPTS, config, backbone)
    assert decoded == [naive_decode(model, prompt, config, backbone) for prompt in PROMPTS]
    assert decoded != generate_ids(model, PROMPTS, replace(config, cfg_scale=0.0), backbone)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_response_does_not_depend_on_its_batch(model, backbone, sampler):
    config = DiffusionGenerationConfig(max_new_tokens=11, seed=3, **sampler)
    together = generate_ids(model, PROMPTS, config, backbone)
    assert generate_ids(model, PROMPTS, replace(config, batch_size=2), backbone) == together
    assert generate_ids(model, PROMPTS, replace(config, batch_size=1), backbone) == together
    assert generate_ids(model, PROMPTS[:1], config, backbone) == together[:1]  # nothing to do with later prompts


def test_the_seed_and_the_prompt_number_decide_what_is_drawn(model, backbone):
    config = DiffusionGenerationConfig(max_new_tokens=12, temperature=1.0)
    first, second = generate_ids(model, [PROMPTS[0], PROMPTS[0]], config, backbone)
    assert first != second
    assert generate_ids(model, PROMPTS[:1], replace(config, seed=1), backbone) != [first]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_row_ids_decode_a_part_as_it_is_among_all(model, backbone, sampler):
    config = DiffusionGenerationConfig(max_new_tokens=11, seed=3, **sampler)
    together = generate_ids(model, PROMPTS, config, backbone)
    part = [3, 1, 4]
    alone = generate_ids(model, [PROMPTS[row] for row in part], config, backbone, row_ids=part)
    assert alone == [together[row] for row in part]


def test_row_ids_may_repeat_and_must_fit(model, tokenizer, backbone):
    config = DiffusionGenerationConfig(max_new_tokens=12, temperature=1.0)
    first, second = generate_ids(model, [PROMPTS[0]] * 2, config, backbone, row_ids=[7, 7])
    assert first == second
    texts = generate(model, tokenizer, ["Who?", "Who?"], config, row_ids=[5, 6])
    assert generate(model, tokenizer, ["Who?"], config, row_ids=[6]) == texts[1:]
    with pytest.raises(ValueError, match="2 prompts and 1 row_ids"):
        generate_ids(model, [[20], [21]], config, backbone, row_ids=[0])


def test_a_given_beginning_is_as_good_as_a_longer_prompt(model, backbone):
    given = [[60 + i for i in range(length)] for length in (0, 3, 9, 1, 10)]
    decoded = generate_ids(model, PROMPTS, DiffusionGenerationConfig(max_new_tokens=10), backbone, given=given)
    for prompt, ids, found in zip(PROMPTS, given, decoded, strict=True):
        left = DiffusionGenerationConfig(max_new_tokens=max(10 - len(ids), 1))
        rest = generate_ids(model, [prompt + ids], left, backbone)[0]
        assert found == ids + (rest if len(ids) < 10 else [])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_what_is_given_stays_and_decides_the_rest(model, backbone, sampler):
    config = DiffusionGenerationConfig(max_new_tokens=11, seed=3, **sampler)
    given = [[None, 60, None, None, 61], [None] * 10 + [62], [], [63, 64, 65, 66, 67], [None, 68]]
    decoded = generate_ids(model, PROMPTS, config, backbone, given=given)
    for ids, found in zip(given, decoded, strict=True):
        assert all(token in (None, other) for token, other in zip(ids, found, strict=False))
    assert generate_ids(model, PROMPTS, replace(config, batch_size=1), backbone, given=given) == decoded
    plain = generate_ids(model, PROMPTS, config, backbone)
    assert decoded[2] == plain[2] and decoded[:2] != plain[:2]
    with pytest.raises(ValueError, match="5 prompts and 4 beginnings"):
        generate_ids(model, PROMPTS, config, backbone, given=given[1:])
    with pytest.raises(ValueError, match="12 ids are given of response 1, and max_new_tokens is 11"):
        generate_ids(model, PROMPTS[:2], config, backbone, given=[[], [None] * 12])


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_settled_response_is_the_prefix_of_the_full_one(model, backbone, sampler):
    config = DiffusionGenerationConfig(max_new_tokens=12, **sampler)
    full = generate_ids(model, PROMPTS, config, replace(backbone, end_token_ids=(10**6,)))
    assert all(len(response) == 12 for response in full)
    ends = (full[0][6], full[1][3])
    settled = generate_ids(model, PROMPTS, config, replace(backbone, end_token_ids=ends))
    for short, long in zip(settled, full, strict=True):
        assert short == long[: min([i for i, token in enumerate(long) if token in ends], default=12)]
    assert len(settled[0]) <= 6 and len(settled[1]) <= 3


def test_settled_rows_leave_the_batch():
    # the end token is the surest, but the response is not settled until the token before it is revealed
    model = Scripted(preferring([3, END, 4, 5], [2.0, 4.0, 3.0, 1.0]))
    config = DiffusionGenerationConfig(max_new_tokens=4)
    assert generate_ids(model, [[], []], config, SCRIPTED) == [[3], [3]]
    assert [len(ids) for ids in model.seen] == [2, 2, 2]  # the fourth step never runs


def test_blocks_are_decoded_from_left_to_right_and_the_surest_first():
    model = Scripted(preferring([1, 2, 3, 4], [1.0, 2.0, 4.0, 3.0]))
    generate_ids(model, [[]], DiffusionGenerationConfig(max_new_tokens=4, block_length=2), SCRIPTED)
    masked = [(ids[0] == MASK).nonzero().flatten().tolist() for ids in model.seen]
    assert masked == [[0, 1, 2, 3], [0, 2, 3], [2, 3], [3]]


@pytest.mark.parametrize("remasking", ["low_confidence", "margin", "entropy"])
@pytest.mark.parametrize("strength", [[3.0, 3.0 + 1e-7, 3.0], [20.0, 40.0, 30.0]])
def test_the_first_of_equal_positions_is_revealed_first(remasking, strength):
    model = Scripted(preferring([5, 5, 5], strength))
    config = DiffusionGenerationConfig(max_new_tokens=3, remasking=remasking)
    generate_ids(model, [[]], config, SCRIPTED)
    assert [(ids[0] != MASK).tolist() for ids in model.seen[1:]] == [[True, False, False], [True, True, False]]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_mask_and_padding_are_never_emitted(sampler):
    logits = torch.zeros(8, VOCABULARY)
    logits[:, MASK], logits[:, PAD] = 50.0, 40.0
    config = DiffusionGenerationConfig(max_new_tokens=8, **sampler)
    without_end = replace(SCRIPTED, end_token_ids=(10**6,))
    response = generate_ids(Scripted(logits), [[]], config, without_end)[0]
    assert len(response) == 8 and not {MASK, PAD} & set(response)
    padding_ends = replace(SCRIPTED, end_token_ids=(PAD,))
    assert generate_ids(Scripted(logits), [[]], config, padding_ends) == [[]]


def test_a_mask_token_in_the_prompt_stays():
    model = Scripted(preferring([1, 2], [1.0, 2.0]), prompt_length=3)
    assert generate_ids(model, [[7, MASK, 8]], DiffusionGenerationConfig(max_new_tokens=2), SCRIPTED) == [[1, 2]]
    assert all(ids[0, :3].tolist() == [7, MASK, 8] for ids in model.seen)


def test_linear_schedule_spreads_tokens_evenly():
    assert reveal_schedule(10, 4, "linear") == [3, 3, 2, 2]
    assert reveal_schedule(3, 5, "linear") == [1, 1, 1, 0, 0]


def test_dream_schedule_takes_a_share_of_what_is_left():
    # shares 1 - s/t of linspace(1, .001, 5): .24975, .33289, .49900, then all
    assert reveal_schedule(10, 4, "dream") == [2, 2, 2, 4]
    assert reveal_schedule(100, 4, "dream") == [24, 25, 25, 26]
    assert reveal_schedule(7, 1, "dream") == [7]
    model = Scripted(preferring([1] * 10, [float(i) for i in range(1, 11)]))
    generate_ids(model, [[]], DiffusionGenerationConfig(max_new_tokens=10, schedule="dream", steps=4), SCRIPTED)
    assert model.revealed() == [0, 2, 4, 6]


def test_steps_that_reveal_nothing_cost_no_forward_pass():
    model = Scripted(preferring([1, 2, 3], [1.0, 2.0, 3.0]))
    generate_ids(model, [[]], DiffusionGenerationConfig(max_new_tokens=3, steps=9), SCRIPTED)
    assert len(model.seen) == 3


def test_dreams_origin_reveals_each_token_with_the_share_as_probability():
    model = Scripted(preferring([1] * 50, [1.0] * 50))
    config = DiffusionGenerationConfig(max_new_tokens=50, remasking="random", schedule="dream", steps=4, batch_size=40)
    generate_ids(model, [[]] * 40, config, SCRIPTED)
    revealed = (torch.stack(model.seen[1:]) != MASK).float()
    assert revealed.mean(dim=(1, 2)).tolist() == pytest.approx([0.25, 0.5, 0.75], abs=0.04)  # 4 standard errors
    assert revealed.sum(dim=2).std(dim=1).tolist() == pytest.approx([3.06, 3.54, 3.06], abs=1.4)  # binomial


def test_random_remasking_reveals_every_position_equally_often():
    model = Scripted(preferring([1, 1, 1, 1], [1.0, 5.0, 1.0, 1.0]))
    config = DiffusionGenerationConfig(max_new_tokens=4, remasking="random", batch_size=2000)
    generate_ids(model, [[]] * 2000, config, SCRIPTED)
    first = (model.seen[1] != MASK).float()
    assert first.sum(dim=1).unique().tolist() == [1.0]
    assert first.mean(dim=0).tolist() == pytest.approx([0.25] * 4, abs=0.04)


def test_temperature_samples_from_the_softmax():
    logits = torch.linspace(0, 2, VOCABULARY)[None]
    config = DiffusionGenerationConfig(max_new_tokens=1, temperature=0.5, batch_size=4000)
    drawn = torch.tensor(generate_ids(Scripted(logits), [[]] * 4000, config, replace(SCRIPTED, end_token_ids=(99,))))
    expected = (logits[0, : min(PAD, MASK)] / 0.5).softmax(dim=0)
    frequency = torch.bincount(drawn[:, 0], minlength=VOCABULARY) / 4000
    assert frequency[: min(PAD, MASK)].tolist() == pytest.approx(expected.tolist(), abs=0.03)


@pytest.mark.parametrize(("cut", "kept"), [({"top_k": 3}, {1, 2, 3}), ({"top_p": 0.6}, {1, 2}), ({"top_p": 0.1}, {1})])
def test_top_k_and_top_p_cut_the_distribution(cut, kept):
    logits = torch.full((1, VOCABULARY), -10.0)
    logits[0, 1:5] = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    config = DiffusionGenerationConfig(max_new_tokens=1, temperature=1.0, batch_size=200, **cut)
    drawn = generate_ids(Scripted(logits), [[]] * 200, config, SCRIPTED)
    assert {token for ids in drawn for token in ids} == kept


def test_position_temperature_samples_positions_by_score():
    model = Scripted(preferring([1, 2], [5.0, 2.0]))
    config = DiffusionGenerationConfig(max_new_tokens=2, position_temperature=0.5, batch_size=2000)
    generate_ids(model, [[]] * 2000, config, SCRIPTED)
    logits = model.logits.detach()[:, [i for i in range(VOCABULARY) if i not in (MASK, PAD)]]
    expected = (logits.softmax(dim=1).amax(dim=1) / 0.5).softmax(dim=0)
    assert (model.seen[1][:, 0] != MASK).float().mean().item() == pytest.approx(expected[0].item(), abs=0.04)


def test_scores_are_taken_before_the_temperature_by_llada_and_after_it_by_dream():
    logits = torch.full((2, VOCABULARY), -30.0)
    logits[0, 1], logits[0, 2:10] = 3.0, 0.0  # surest when sharpened
    logits[1, 1:3] = torch.tensor([1.0, 0.0])  # surest as it is
    first = {}
    for schedule in ("linear", "dream"):
        model = Scripted(logits)
        config = DiffusionGenerationConfig(max_new_tokens=2, steps=2, temperature=0.05, schedule=schedule)
        generate_ids(model, [[]], replace(config, top_k=9), SCRIPTED)
        first[schedule] = [ids[0].tolist() for ids in model.seen]
    assert first["linear"][1] == [MASK, 1]
    assert len(first["dream"]) == 1  # half of two tokens, rounded down, is none: both in the last step


def test_shifted_logits_give_the_same_response(model, backbone):
    config = DiffusionGenerationConfig(max_new_tokens=10)
    shifted = generate_ids(Shifted(model), PROMPTS, config, replace(backbone, logit_shift=True))
    assert shifted == generate_ids(model, PROMPTS, config, backbone)


def test_prompts_are_texts_or_conversations(model, tokenizer, backbone):
    conversation = [{"role": "user", "content": "Who?"}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    from_turns, from_text, other = generate(model, tokenizer, [conversation, rendered, "Where?"], max_new_tokens=6)
    assert from_turns == from_text != other
    ids = generate_ids(model, [tokenizer(rendered)["input_ids"]], DiffusionGenerationConfig(6), backbone)[0]
    assert from_turns == tokenizer.decode(ids, skip_special_tokens=True)
    assert generate(model, tokenizer, []) == []


def test_the_model_is_evaluated_and_left_as_it_was(make_model, backbone):
    model = make_model(attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    config = DiffusionGenerationConfig(max_new_tokens=8)
    decoded = generate_ids(model, PROMPTS, config, backbone)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].self_attn.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert generate_ids(model.eval(), PROMPTS, config, backbone) == decoded


def test_the_progress_bar_counts_prompts_and_shows_no_text(model, tokenizer, capsys):
    generate(model, tokenizer, ["Zanzibar", "Quetzal"], max_new_tokens=4, show_progress=True)
    shown = capsys.readouterr().err
    assert "decoding: 2 prompts in" in shown and "Zanzibar" not in shown and "Quetzal" not in shown
    generate(model, tokenizer, ["Zanzibar"], max_new_tokens=4)
    assert capsys.readouterr().err == ""
