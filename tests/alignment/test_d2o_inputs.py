"""D²O: metrics against enumeration, several processes, harmfulness, and what is refused with which words."""

from __future__ import annotations

import json
import math
import shutil
import warnings

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM

from fdiv.alignment import D2OConfig
from fdiv.alignment.d2o.anchors import Anchor, AnchorCache, instructed_prompt, prompt_key
from fdiv.alignment.d2o.metrics import divergence_terms, reduce_groups
from fdiv.divergences import get_divergence
from fdiv.errors import DataError, RolloutError, ScorerError
from fdiv.models.reference import Reference
from tests.support.processes import run_well
from tests.support.runs.d2o import history, make_trainer, negative_rows
from tests.support.scripts import d2o as run_d2o


# --------------------------------------------------------------------------------------------------------------- metrics
@pytest.mark.parametrize("name", ["jeffreys", "reverse_kl", "forward_kl", "jensen_shannon"])
def test_divergence_terms_are_unbiased_whoever_sampled(name):
    """E_q of the terms, summed over all outcomes, is D_f(π‖π_r) for q = π_r, q = π and a third q."""
    torch.manual_seed(1)
    policy, reference, other = torch.randn(3, 6, dtype=torch.float64).log_softmax(-1)
    divergence = get_divergence(name)
    exact = divergence.exact(policy, reference)
    if name == "jeffreys":
        assert exact.item() == pytest.approx(((policy.exp() - reference.exp()) * (policy - reference)).sum().item())
    for sampler in (reference, policy, other):
        terms = divergence_terms(divergence, policy, reference, sampler)
        torch.testing.assert_close((sampler.exp() * terms).sum(), exact, rtol=1e-10, atol=0)
    unknown = torch.full_like(reference, float("nan"))  # log q was not recorded: taken for the reference
    torch.testing.assert_close(
        divergence_terms(divergence, policy, reference, unknown),
        divergence_terms(divergence, policy, reference, reference),
    )


def test_divergences_are_averaged_where_they_are_defined():
    nothing = ["rejected_reward", "rejected_raw_reward", "rejected_log_prob", "rejected_log_ratio", "clamped"]
    nothing += ["anchor_reward", "anchor_raw_reward", "anchor_log_prob", "anchor_0_log_ratio", "online"]
    nothing += ["anchor_tokens", "anchor_cut"]
    examples = {name: torch.zeros(3).double() for name in nothing}
    examples["divergence_to_sampler"] = torch.tensor([1.0, float("nan"), 3.0]).double()
    found = reduce_groups(examples, get_divergence("reverse_kl"), anchors=1)
    key = "divergence/reverse_kl_to_sampler"
    assert (found[key], found[f"{key}_se"]) == (2.0, pytest.approx(1.0))  # s = sqrt 2, over sqrt 2


def test_harmfulness_and_the_share_of_harmful_anchors(tiny_model_dir, tmp_path):
    calls = iter(range(1000))
    rows = negative_rows(4)
    trainer = make_trainer(
        tiny_model_dir, rows, tmp_path, max_steps=1, num_generations=4, per_device_train_batch_size=4,
        # 16 anchors: scores 0, 1/16, …; two of them unknown (one None, one NaN)
        harmfulness_func=lambda prompts, completions, rejected, **_: [
            {3: None, 5: float("nan")}.get(number := next(calls), number / 16) for _ in completions
        ],
    )  # fmt: skip
    trainer.train()
    scores = [number / 16 for number in range(16) if number not in (3, 5)]
    log = trainer.state.log_history[0]
    assert log["harmfulness/unscored"] == 2
    assert log["harmfulness/harmful_share"] == pytest.approx(sum(score > 0.5 for score in scores) / 14)
    groups = [[n / 16 for n in range(4 * g, 4 * g + 4) if n not in (3, 5)] for g in range(4)]
    assert log["harmfulness/anchors"] == pytest.approx(sum(sum(g) / len(g) for g in groups) / 4)
    assert log["harmfulness/anchors_se"] > 0
    again = make_trainer(
        tiny_model_dir, rows, tmp_path, max_steps=1, num_generations=4, harmfulness_func=lambda completions, **_: 1 / 0
    )
    again.train()  # the scores were kept with the anchors: the scorer is not called again
    assert again.state.log_history[0]["harmfulness/harmful_share"] == log["harmfulness/harmful_share"]


def test_online_anchors_without_log_probs_are_the_policys(tiny_model_dir, tmp_path):
    """D_f(π‖π_r) from samples of π: the weights are π_r/π, whether or not the back end says what it sampled with."""

    def rollouts(prompts, trainer):
        ids = [[7 + n % 50, 9] for n in range(len(prompts))]
        return {"prompt_ids": None, "completion_ids": ids, "logprobs": None}

    trainer = make_trainer(
        tiny_model_dir, negative_rows(4), tmp_path, anchor_source="online", rollout_func=rollouts, num_generations=1,
        per_device_train_batch_size=1, max_steps=3,
    )  # fmt: skip
    trainer.train()
    last = trainer.state.log_history[2]
    log_ratio = last["log_ratio/anchors_p50"]
    assert abs(log_ratio) > 0.01
    for name in ("jeffreys", "reverse_kl"):
        term = get_divergence(name).generator(torch.tensor(log_ratio, dtype=torch.float64)).item()
        assert last[f"divergence/{name}"] == pytest.approx(term * math.exp(-log_ratio), rel=1e-3)


def test_a_scorer_can_be_named_in_the_config(tiny_model_dir, tmp_path):
    words = {"name": "contains_words", "words": ["never-there"]}
    trainer = make_trainer(tiny_model_dir, negative_rows(4), tmp_path, max_steps=1, harmfulness_scorer=words)
    trainer.train()
    assert trainer.state.log_history[0]["harmfulness/harmful_share"] == 0


# ------------------------------------------------------------------------------------------------------ several processes
def test_two_processes_equal_one_on_the_same_anchors(tiny_model_dir, tmp_path):
    cache = tmp_path / "anchors.jsonl"
    run_well(run_d2o.main, str(tiny_model_dir), str(cache), "4", str(tmp_path / "2.json"), processes=2)
    assert len(cache.read_text().splitlines()) == 25  # the two processes drew their shares
    run_d2o.main(str(tiny_model_dir), str(cache), "8", str(tmp_path / "1.json"))
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert (torch.tensor(one["weights"]) - torch.tensor(two["weights"])).abs().max() < 1e-5
    for first, second in [*zip(one["history"], two["history"], strict=True), (one["evaluated"], two["evaluated"])]:
        assert first.keys() == second.keys()
        for key in first:
            if not key.endswith(("runtime", "per_second", "step_time")) and key != "total_flos":
                assert first[key] == pytest.approx(second[key], abs=1e-4, rel=1e-4), key
    assert one["history"][0]["harmfulness/harmful_share"] > 0


# -------------------------------------------------------------------------------------------------------------- bad input
GOOD = negative_rows(4)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "train_dataset is a NoneType"),
        (GOOD.remove_columns("rejected"), "no column 'rejected'"),
        (GOOD.remove_columns("prompt"), "no column 'prompt'"),
        (GOOD.select([]), "train_dataset is empty"),
        (IterableDataset.from_generator(lambda: iter(GOOD)), "not a stream"),
        (Dataset.from_list([*GOOD, {"prompt": "Q:", "rejected": "  "}]), "row 4: column 'rejected' is empty"),
        (Dataset.from_list([{"prompt": "Q:", "rejected": "x", "anchors": ["a", "b"]}]), "holds 2 answers and num_gen"),
        (
            Dataset.from_list([{"prompt": "Q:", "rejected": "x", "anchors": ["a", "b", ""]}]),
            "column 'anchors' has an answer 2 that is empty",
        ),
    ],
    ids=["none", "rejected", "prompt", "empty", "stream", "empty_answer", "few_anchors", "empty_anchor"],
)
def test_bad_rows(tiny_model_dir, tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        make_trainer(tiny_model_dir, rows, tmp_path)


def test_more_anchors_than_were_generated(tiny_model_dir, tmp_path):
    cache = str(tmp_path / "anchors.jsonl")
    make_trainer(tiny_model_dir, GOOD, tmp_path, max_steps=1, num_generations=2, anchor_cache=cache).train()
    fewer = make_trainer(tiny_model_dir, GOOD, tmp_path, max_steps=1, num_generations=1, anchor_cache=cache)
    fewer.train()  # the first of the two
    more = make_trainer(tiny_model_dir, GOOD, tmp_path, max_steps=1, num_generations=3, anchor_cache=cache)
    with pytest.raises(DataError, match="holds 2 anchors .* num_generations=3 asks for 3: lower num_generations"):
        more.train()
    assert more.state.global_step == 0


def test_anchors_of_another_start_model_are_refused(tiny_model_dir, tmp_path):
    cache, changed = str(tmp_path / "anchors.jsonl"), tmp_path / "changed"
    make_trainer(tiny_model_dir, GOOD, tmp_path / "a", max_steps=1, num_generations=1, anchor_cache=cache).train()
    shutil.copytree(tiny_model_dir, changed)
    model = AutoModelForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(changed)
    with pytest.raises(DataError, match="was made with start_model='[0-9a-f]{24}', now it is '[0-9a-f]{24}'"):
        make_trainer(changed, GOOD, tmp_path / "b", max_steps=1, num_generations=1, anchor_cache=cache)


def test_offline_anchors_are_not_drawn_from_a_trained_model(tiny_model_dir, tmp_path):
    trainer = make_trainer(tiny_model_dir, GOOD, tmp_path, max_steps=1)
    trainer.train()
    other = Dataset.from_list([{"prompt": "Quite another question:", "rejected": " no"}])
    with pytest.raises(DataError, match="holds 0 anchors .* before the first step"):
        trainer.evaluate(other)


def test_anchor_file_of_other_settings_or_none_at_all(tmp_path):
    path = tmp_path / "anchors.jsonl"
    AnchorCache(path, {"temperature": 1.0}).add({"key": [Anchor([1, 2], -3.5, None)]})
    assert AnchorCache(path, {"temperature": 1.0})._groups == {"key": [Anchor([1, 2], -3.5, None)]}
    with pytest.raises(DataError, match="made with temperature=1.0, now it is 0.8: remove the file"):
        AnchorCache(path, {"temperature": 0.8})
    path.write_text(path.read_text().replace("[1, 2]", "[]"))
    with pytest.raises(DataError, match="does not agree with its digest"):
        AnchorCache(path, {"temperature": 1.0})
    AnchorCache(tmp_path / "empty.jsonl", {"temperature": 1.0}).add({"key": [Anchor([], None, None)]})
    with pytest.raises(DataError, match="empty completion"):
        AnchorCache(tmp_path / "empty.jsonl", {"temperature": 1.0})
    path.write_text("not json\n")
    with pytest.raises(DataError, match="line 1 is no JSON"):
        AnchorCache(path, {"temperature": 1.0})
    for content in (
        "",
        "[]\n",
        '{"prompt": "x"}\n',
        '{"fdiv_anchors": 2, "temperature": 1.0}\n{"a": 2}\n',
    ):
        path.write_text(content)
        with pytest.raises(DataError, match="no file of anchors"):
            AnchorCache(path, {"temperature": 1.0})
    path.write_text('{"fdiv_anchors": 9, "temperature": 1.0}\n')
    with pytest.raises(DataError, match="format 9, not 3"):
        AnchorCache(path, {"temperature": 1.0})


@pytest.mark.parametrize(
    ("completions", "message"),
    [([[7], [], [7]], "empty completion for prompt 1"), ([[7], [7]], "2 completions for 3 prompts")],
)
def test_a_back_end_that_fails(tiny_model_dir, tmp_path, completions, message):
    trainer = make_trainer(
        tiny_model_dir, GOOD.select([0]), tmp_path, per_device_train_batch_size=1,
        rollout_func=lambda prompts, trainer: {"prompt_ids": None, "completion_ids": completions, "logprobs": None},
    )  # fmt: skip
    with pytest.raises(RolloutError, match=message):
        trainer.train()


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda completions, **_: [0.5], "returned 1 scores for 12 completions"),
        (lambda completions, **_: {}["toxicity"], "raised KeyError: 'toxicity'"),
    ],
)
def test_a_scorer_that_fails(tiny_model_dir, tmp_path, scorer, message):
    scorer.__name__ = "harm"
    trainer = make_trainer(tiny_model_dir, GOOD, tmp_path, harmfulness_func=scorer)
    with pytest.raises(ScorerError, match=f"scorer 'harm' {message}"):
        trainer.train()


def test_no_room_for_anchors_in_the_context(tiny_model_dir, tmp_path):
    with pytest.raises(DataError, match=r"longest prompt .* has \d+ tokens and max_completion_length is 510"):
        make_trainer(tiny_model_dir, GOOD, tmp_path, max_completion_length=510)
    make_trainer(tiny_model_dir, GOOD, tmp_path, max_completion_length=450)
    with pytest.raises(DataError, match=r"the prompt .*Be kind.* more than the model's context of 512"):
        make_trainer(
            tiny_model_dir, GOOD, tmp_path, max_completion_length=450,
            anchor_instruction_templates=["{prompt}", "Be kind. " * 30 + "{prompt}"],
        )  # fmt: skip


def test_prompts_that_fill_max_length_leave_nothing(tiny_model_dir, tmp_path):
    with pytest.raises(DataError, match="fills max_length=3"):
        make_trainer(tiny_model_dir, GOOD, tmp_path, max_length=3)


def test_sharded_references_are_not_refreshed(tiny_model_dir, tmp_path):
    trainer = make_trainer(tiny_model_dir, GOOD, tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(DataError, match="cannot be refreshed while weights are sharded"):
        trainer.start_reference.refresh()
    with pytest.raises(DataError, match="holds no reference"):
        trainer.start_reference.load(tmp_path)
    assert isinstance(trainer.start_reference, Reference)


def test_refusals_of_the_instruction():
    with pytest.raises(DataError, match="no user message of plain text"):
        instructed_prompt([{"role": "system", "content": "x"}], "Kindly: {prompt}")
    assert instructed_prompt("a {b} c", "{prompt}?") == "a {b} c?"  # braces of a prompt are text
    assert prompt_key([1, 2]) == prompt_key((1, 2)) != prompt_key([12])


# ----------------------------------------------------------------------------------------------------------------- config
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha=0.0: must be above 0"),
        ({"beta": -1.0}, "beta=-1.0: must be at least 0"),
        ({"divergence": "total_variation"}, "D2O cannot use the divergence 'total_variation'"),
        ({"divergence": None}, "give the name"),
        ({"max_exponent": 100.0}, "max_exponent"),
        ({"num_generations": -1}, "num_generations=-1"),
        ({"anchor_source": "onlin"}, "anchor_source='onlin': must be one of offline, online"),
        ({"online_start_step": 5}, "belongs to anchor_source=online"),
        ({"refresh_every": 0}, "refresh_every=0: must be at least 1"),
        ({"refresh_every": 5, "ref_pos": "a", "ref_neg": "b"}, "ref_pos and ref_neg replace it"),
        ({"anchor_instruction_templates": ["Be kind."]}, r"'Be kind.' does not contain \{prompt\}"),
        ({"steps_per_generation": 4}, "steps_per_generation"),
        ({"num_iterations": 2}, "num_iterations=2 cannot be honoured"),
        ({"sync_ref_model": True}, "set refresh_every"),
        ({"loss_type": "grpo"}, "loss_type='grpo' cannot be honoured"),
        ({"entropy_target": 0.5}, "entropy_target=0.5 cannot be honoured"),
        ({"generation_kwargs": {"temperature": 0.5}}, "set 'temperature' as a key of its own"),
        ({"alpha": float("inf")}, "alpha=inf: must be a finite number"),
        ({"harmfulness_scorer": "contains_word"}, "did you mean 'contains_words'"),
        ({"rollout_server_url": "http://localhost:1", "use_vllm": True}, "two back ends"),
    ],
)
def test_config_refuses(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        D2OConfig(str(tmp_path), bf16=False, use_cpu=True, **options)


def test_config_defaults_are_the_papers_and_experimental_ones_warn(tmp_path):
    settings = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = D2OConfig(**settings, per_device_train_batch_size=1)
        D2OConfig(**settings, divergence="forward_kl")
        D2OConfig(**settings, alpha=0.3)
    assert (config.num_generations, config.alpha, config.beta) == (11, 0.1, 0.1)
    assert (config.steps_per_generation, config.generation_batch_size) == (1, 1)
    with pytest.warns(UserWarning, match="alpha=0.3 differs from beta=0.1"):
        D2OConfig(**settings, divergence="forward_kl", alpha=0.3)
    with pytest.warns(UserWarning, match="the two references differ"):
        D2OConfig(**settings, divergence="forward_kl", ref_pos="somewhere")


def test_model_card_names_the_objective(tiny_model_dir, tmp_path):
    trainer = make_trainer(tiny_model_dir, GOOD, tmp_path, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "2403.03419" in card and "| alpha | `0.1` |" in card and "| num_generations | `3` |" in card
    assert history(trainer, "num_tokens")[0] > 0
