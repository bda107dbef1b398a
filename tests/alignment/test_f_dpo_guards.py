"""FDPOTrainer: what it logs, when it stops, what it refuses, the private hooks it relies on."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from fdiv.alignment import FDPOTrainer
from fdiv.divergences import get_divergence
from fdiv.errors import NonFiniteLossError
from fdiv.models.logprobs import mean_log_prob, sequence_log_prob, token_scores
from fdiv.statistics.calibration import length_normalised_calibration, margin_calibration
from tests.support.runs.f_dpo import make_trainer, preference_rows
from tests.support.same_run import weights


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return Dataset.from_list(preference_rows())


# ------------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("architecture", ["tiny_model_dir", "tiny_gpt2_dir"])
def test_evaluation_metrics_equal_an_independent_calculation(request, architecture, rows, tmp_path):
    """Each sequence scored alone, without padding: also right for learned positions (GPT-2)."""
    tiny_model_dir = request.getfixturevalue(architecture)
    torch.manual_seed(5)
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    beta, cap, divergence = 0.3, {"llama": 0.7, "gpt2": 4.0}[policy.config.model_type], get_divergence("jeffreys")
    trainer = make_trainer(
        tiny_model_dir, rows, tmp_path, model=policy, ref_model=reference, eval_dataset=rows.select(range(11)),
        divergence="jeffreys", beta=beta, max_exponent=cap, per_device_eval_batch_size=4,
    )  # fmt: skip
    logged = trainer.evaluate()

    def score(model, row, half):
        ids = torch.tensor([row["prompt_ids"] + row[f"{half}_ids"]])
        mask = torch.ones_like(ids)
        completion = mask.clone()
        completion[:, : len(row["prompt_ids"])] = 0
        return token_scores(model, ids, mask, completion, outputs=("entropy", "is_top1", "mean_logits"), fused=False)

    with torch.no_grad():
        policy_scores = {h: [score(policy, r, h) for r in trainer.eval_dataset] for h in ("chosen", "rejected")}
        log_ratio = {
            half: torch.stack(
                [
                    (sequence_log_prob(s) - sequence_log_prob(score(reference, r, half)))[0]
                    for s, r in zip(policy_scores[half], trainer.eval_dataset, strict=True)
                ]
            ).double()
            for half in ("chosen", "rejected")
        }
    rewards = {half: beta * divergence.score(log_ratio[half], cap) for half in log_ratio}
    margin = rewards["chosen"] - rewards["rejected"]
    expected = {"clamped_fraction": (torch.stack(list(log_ratio.values())) < -cap).any(0).double().mean()}
    assert 0 < expected["clamped_fraction"] < 1
    expected |= {"rewards/margins": margin.mean(), "rewards/accuracies": (margin > 0).double().mean()}
    expected["rewards_raw/margins"] = beta * (log_ratio["chosen"] - log_ratio["rejected"]).mean()
    tokens = {half: torch.cat([s.mask[s.mask] for s in policy_scores[half]]).sum() for half in log_ratio}
    for half, values in log_ratio.items():
        expected[f"rewards/{half}"] = rewards[half].mean()
        expected[f"rewards_raw/{half}"] = beta * values.mean()
        expected[f"logps/{half}"] = torch.cat([sequence_log_prob(s) for s in policy_scores[half]]).mean()
        expected[f"logits/{half}"] = sum(s.mean_logits.sum() for s in policy_scores[half]) / tokens[half]
        for name, q in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95)):
            expected[f"log_ratio/{half}_{name}"] = torch.quantile(values, q)
    expected["entropy"] = sum(s.entropy.sum() for h in log_ratio for s in policy_scores[h]) / sum(tokens.values())
    expected["mean_token_accuracy"] = sum(s.is_top1.sum() for s in policy_scores["chosen"]) / tokens["chosen"]
    pairs = divergence.generator(torch.stack(list(log_ratio.values()), 1)).mean(1)
    expected["mean_f/jeffreys"] = pairs.mean()
    expected["mean_f/jeffreys_se"] = pairs.std() / math.sqrt(11)
    means = {half: torch.cat([mean_log_prob(s) for s in policy_scores[half]]) for half in log_ratio}
    expected["ece_length_normalised"] = torch.tensor(length_normalised_calibration(means["chosen"], means["rejected"]))
    expected["ece_margin"] = torch.tensor(margin_calibration(margin))
    expected["loss"] = torch.log1p(torch.exp(-margin)).mean()
    for name, value in expected.items():
        assert logged[f"eval_{name}"] == pytest.approx(value.item(), abs=2e-4, rel=2e-4), name


def test_one_host_read_per_micro_batch(tiny_model_dir, rows, tmp_path, monkeypatch):
    """The non-finite check is the only `bool()` of a tensor in the loss; metrics wait for the log."""
    trainer = make_trainer(tiny_model_dir, rows, tmp_path)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    reads = []
    for method in ("item", "tolist", "__bool__", "__float__"):
        original = getattr(torch.Tensor, method)
        monkeypatch.setattr(
            torch.Tensor, method, lambda self, *a, _o=original, _m=method: (reads.append(_m), _o(self, *a))[1]
        )
    columns = {"loss": torch.ones(4), "other": torch.zeros(4)}
    trainer.record_examples(columns)
    assert reads == ["__bool__"]
    monkeypatch.undo()
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))


# ------------------------------------------------------------------------------------------------ stopping and cards


def test_non_finite_loss_stops_before_the_optimizer_step(tiny_model_dir, rows, tmp_path):
    trainer = make_trainer(tiny_model_dir, rows, tmp_path, divergence="forward_kl", max_steps=6)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    trainer.model.lm_head.weight[5, 0] = float("nan")
                self.before = weights(trainer).clone()

    poison = Poison()
    trainer.add_callback(poison)
    with pytest.raises(
        NonFiniteLossError, match=r"step 4: the loss is nan \(divergence=forward_kl.*learning_rate"
    ) as e:
        trainer.train()
    assert "chosen_log_ratio=nan" in str(e.value) and "last logged metrics: loss=0." in str(e.value)
    after = weights(trainer)
    assert torch.equal(torch.nan_to_num(after, nan=7.0), torch.nan_to_num(poison.before, nan=7.0))


def test_non_finite_loss_in_evaluation_is_an_error_too(tiny_model_dir, rows, tmp_path):
    trainer = make_trainer(tiny_model_dir, rows, tmp_path, eval_dataset=rows)
    with torch.no_grad():
        trainer.model.lm_head.weight[5, 0] = float("inf")
    with pytest.raises(NonFiniteLossError, match="evaluation at step 0: the loss is nan"):
        trainer.evaluate()


def test_model_card_names_the_divergence_and_the_paper(tiny_model_dir, rows, tmp_path):
    trainer = make_trainer(tiny_model_dir, rows, tmp_path, divergence={"name": "alpha", "alpha": 0.3}, beta=0.05)
    trainer.create_model_card(model_name="mine", tags="extra")
    text = (tmp_path / "README.md").read_text()
    for piece in (
        "- f-dpo",
        "- alpha",
        "- extra",
        "2309.16240",
        "| beta | `0.05` |",
        "{'name': 'alpha', 'alpha': 0.3}",
    ):
        assert piece in text
    assert "huggingface.co/None" not in text and str(tiny_model_dir) in text


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"train_dataset is empty"),
        (
            [{"prompt": "a", "completion": "b"}],
            r"no column 'chosen' and no column 'rejected'; it has: prompt, completion",
        ),
        ([{"prompt": "a", "chosen": "b"}], r"no column 'rejected'"),
        ([{"prompt": "a", "chosen": 3, "rejected": "x"}], r"row 0: column 'chosen' is 3"),
        (
            [{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}],
            r"column 'chosen' holds text, the rows before it .* messages",
        ),
    ],
)
def test_bad_data_is_named(tiny_model_dir, tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_model_dir, Dataset.from_list(data), tmp_path)


def test_bad_evaluation_data_is_named(tiny_model_dir, rows, tmp_path):
    with pytest.raises(ValueError, match=r"eval_dataset\['held'\].*no column 'chosen'"):
        make_trainer(tiny_model_dir, rows, tmp_path, eval_dataset={"held": rows.remove_columns("chosen")})


def test_precomputing_for_several_processes_needs_data_with_files(rows):
    from fdiv.alignment.f_dpo.trainer import _check_data

    args = SimpleNamespace(precompute_ref_log_probs=True, world_size=2)
    with pytest.raises(ValueError, match="train_dataset lies in memory only, so 2 processes"):
        _check_data(rows, None, args)
    _check_data(rows, None, SimpleNamespace(precompute_ref_log_probs=True, world_size=1))


def test_prompts_that_fill_max_length_are_an_error_when_nothing_is_left(tiny_model_dir, rows, tmp_path):
    with pytest.raises(ValueError, match="max_length=2"):
        make_trainer(tiny_model_dir, rows, tmp_path, max_length=2)


def test_model_without_pad_token_is_refused_and_pad_token_is_the_remedy(tiny_model_dir, rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"tiny-llama.*has no pad token: set `pad_token`"):
        make_trainer(tiny_model_dir, rows, tmp_path, processing_class=tokenizer)
    with pytest.raises(ValueError, match=r"pad_token '<nope>' is not in the vocabulary"):
        make_trainer(tiny_model_dir, rows, tmp_path, processing_class=tokenizer, pad_token="<nope>")
    trainer = make_trainer(tiny_model_dir, rows, tmp_path, processing_class=tokenizer, pad_token="<|bos|>")
    assert trainer.data_collator.pad_token_id == tokenizer.convert_tokens_to_ids("<|bos|>")


def test_plain_dpo_config_is_refused(tiny_model_dir, rows, tmp_path):
    with pytest.raises(TypeError, match="FDPOConfig"):
        make_trainer(tiny_model_dir, rows, tmp_path, config=DPOConfig)


# ------------------------------------------------------------------------------------------------ private hooks


@pytest.mark.smoke
def test_signatures_of_the_private_hooks():
    """What FDPOTrainer overrides or calls inside TRL 1.16; an upgrade that changes one must be looked at."""

    def parameters(function) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(DPOTrainer._compute_loss) == ["self", "model", "inputs", "return_outputs"]
    assert parameters(DPOTrainer._precompute_ref_logps) == ["self", "dataset", "name", "batch_size"]
    assert parameters(DPOTrainer.compute_ref_log_probs) == ["self", "model", "inputs"]
    assert parameters(DPOTrainer.log) == ["self", "logs", "start_time"]
    assert parameters(DPOTrainer.evaluate) == ["self", "eval_dataset", "ignore_keys", "metric_key_prefix"]
    assert parameters(DPOTrainer._prepare_dataset) == ["self", "dataset", "processing_class", "args", "dataset_name"]
    assert parameters(DPOTrainer.create_model_card) == ["self", "model_name", "dataset_name", "tags"]
    assert parameters(DPOTrainer.__init__) == parameters(FDPOTrainer.__init__)
    source = inspect.getsource(DPOTrainer)
    for attribute in ("self._metrics[mode]", "self._total_train_tokens", "self._tp_size", "self.aux_loss_enabled",
                      "self.router_aux_loss_coef", "self.precompute_ref_logps", '"ref_chosen_logps"'):  # fmt: skip
        assert attribute in source
