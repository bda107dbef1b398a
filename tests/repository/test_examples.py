"""Every script in examples/ runs, offline, and says what its text promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.processes import run_script, run_well

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))

# A line each script must print; a new example must be added here.
EXPECTED = {
    "d2o_in_grpo.py": "loss 0.6931 ->",  # log 2: the policy is the reference
    "d2o_with_scorer.py": "loss 0.4",
    "distillation_in_trl.py": "squared_hellinger: loss 0.01",
    "f_dpg_in_grpo.py": "JS to the target 0.",
    "f_dpg_own_target.py": "policy: accepts",
    "f_dpo_in_trl.py": "loss 0.6",
    "flat_in_sft_trainer.py": "loss 4.",
    "one_divergence.py": "alpha(0.3): exact",
    "rehearsal_in_grpo.py": "per kept token 0.00",  # with rehearsal; without it 0.12
    "teach_rows.py": "; the adapter and the rows are in taught",
    "unlearning_in_sft_trainer.py": "npo 13.8629 ->",  # (2/β)·log 2
    "user_defined_divergence.py": "refused: f-DPO cannot use the divergence 'total_variation'",
}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_example_runs(script, tmp_path):
    (stdout,) = run_well(run_script, script, tmp_path).stdout
    assert EXPECTED[script.name] in stdout
    for first, last in re.findall(r"loss (\d\.\d+) -> (\d\.\d+)", stdout):
        # Where an example trains, it trains; a divergence may begin below 0.1.
        assert float(last) < float(first) - min(0.05, float(first) / 2)


def test_trl_example_is_under_thirty_lines():
    """Issue promise: a stock DPOTrainer subclass with our loss in under 30 lines of code."""
    text = (EXAMPLES[0].parent / "f_dpo_in_trl.py").read_text().split('"""', 2)[2]
    assert len([line for line in text.splitlines() if line.strip()]) < 30


def test_one_divergence_prints_the_right_number():
    """alpha(0.3) of (.7,.2,.1) against (.4,.4,.2), by hand: Σ q (t^.7 − .7t − .3)/(.3·(−.7)), t = 1.75, ½, ½."""
    import torch

    from fdiv.divergences import get_divergence

    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.4, 0.4, 0.2]).double()
    by_hand = sum(
        b * ((a / b) ** 0.7 - 0.7 * a / b - 0.3) / (0.3 * -0.7) for a, b in zip(p.tolist(), q.tolist(), strict=True)
    )
    assert get_divergence({"name": "alpha", "alpha": 0.3}).exact(p.log(), q.log()).item() == pytest.approx(by_hand)
