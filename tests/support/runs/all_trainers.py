"""The six trainers on the same tiny model behind one function, for the tests of scale and endurance.

Rollouts are sampled by the trainer itself unless `rollouts` gives recorded ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

TRAINERS = ("f_dpo", "f_dpg", "d2o", "flat", "dph")
EVERY = (*TRAINERS, "f_distill")  # with the one that has a teacher in place of a reference
ROLLOUT_TRAINERS = ("f_dpg", "d2o", "dph")
ROUNDING = {"f_dpo": 1e-5, "f_dpg": 1e-4, "d2o": 1e-5, "flat": 1e-5, "dph": 1e-5, "f_distill": 1e-5, "sinkhorn": 1e-5}
"""How far the losses of two runs that should be one may lie apart, on any processor.

Sums of 30 log-probabilities, 1e-5 apart, times β. f-DPG's loss is a mean of coefficient · log π(y) with log π(y) ≈ -25 and
coefficients of both signs, so it keeps fewer digits.
"""


def build(name: str, model_dir: Path, output: Path, **options: Any) -> Any:
    """Trainer `name` in float32 on the CPU, two optimizer steps an epoch or more; `options` go to its config or to itself.

    Its settings are those in which the method has state of its own (Z history, anchors sampled online, rehearsal rows).
    """
    options = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, **options}
    return _BUILDERS[name](Path(model_dir), Path(output), options)


def _f_dpo(model_dir: Path, output: Path, options: dict[str, Any]) -> Any:
    from datasets import Dataset

    from tests.support.runs.f_dpo import make_trainer, preference_rows

    rows = Dataset.from_list(preference_rows(options.pop("rows", 12)))
    return make_trainer(model_dir, rows, output, **{"divergence": "jensen_shannon", **options})


def _f_dpg(model_dir: Path, output: Path, options: dict[str, Any]) -> Any:
    from tests.support.runs.f_dpg import SOFT, load, trainer

    options = {"baseline": "history", "per_device_train_batch_size": 8, **options}
    return trainer(load(model_dir), output, SOFT, **options)


def _d2o(model_dir: Path, output: Path, options: dict[str, Any]) -> Any:
    from tests.support.runs.d2o import make_trainer, negative_rows

    anchors, rows = options.pop("given_anchors", 0), options.pop("rows", 8)
    sampled = {} if anchors else {"anchor_source": "online"}
    return make_trainer(model_dir, negative_rows(rows, anchors), output, **{**sampled, **options})


def _flat(model_dir: Path, output: Path, options: dict[str, Any]) -> Any:
    from tests.support.runs.unlearning import load, make_trainer

    return make_trainer("FLAT", load(model_dir), output, **{"retain_term": "nll", **options})


def _dph(model_dir: Path, output: Path, options: dict[str, Any]) -> Any:
    from tests.support.runs.dph import cache, load, trainer

    options = {"rehearsal_coefficient": 1.0, "per_device_train_batch_size": 8, **options}
    if "rehearsal_cache" not in options:
        options.setdefault("rehearsal", cache(model_dir, shift=0.5))
    return trainer(load(model_dir), output, **options)


def _f_distill(model_dir: Path, output: Path, options: dict[str, Any]) -> Any:
    from tests.support.runs.f_distill import make_trainer, rows

    # A teacher of the student's own size, from a folder or the student with other weights.
    teacher = options.pop("teacher", None) or _other_weights(model_dir)
    data = rows(options.pop("rows", 12))
    return make_trainer(model_dir, teacher, data, output, **{"divergence": "jensen_shannon", **options})


def _sinkhorn(model_dir: Path, output: Path, options: dict[str, Any]) -> Any:
    """Distillation with the Sinkhorn term over label words. The term of a micro-batch weighs with its tokens, so all
    completions are equally long; rows are groups of their own, for each process shuffles its rows."""
    from tests.support.runs.f_distill import make_trainer, rows

    data = [{**row, "completion": " of course it does."} for row in rows(12)]
    teacher = options.pop("teacher", None) or _other_weights(model_dir)
    term = {"sinkhorn_weight": 3.0, "sinkhorn_words": ["a", "o", "?"], "sinkhorn_group": 1}
    return make_trainer(model_dir, teacher, data, output, **{"divergence": "jensen_shannon", **term, **options})


def _other_weights(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return teacher


_BUILDERS = {
    **{"f_dpo": _f_dpo, "f_dpg": _f_dpg, "d2o": _d2o, "flat": _flat, "dph": _dph, "f_distill": _f_distill},
    "sinkhorn": _sinkhorn,
}


def flat_weights(trainer: Any) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])


def losses(trainer: Any) -> list[float]:
    """The logged losses in order."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
