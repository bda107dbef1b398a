"""Module names of release 0.1 and where their contents are now. They import for one more release, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "install"]

MOVED: dict[str, tuple[str, ...]] = {
    "fdiv.adapter_merge": ("fdiv.training.merge",),
    "fdiv.alignment.anchors": ("fdiv.alignment.d2o.anchors",),
    "fdiv.alignment.closed_form": ("fdiv.recipes.tasks.tiny.closed_form",),
    "fdiv.alignment.d2o_config": ("fdiv.alignment.d2o.config",),
    "fdiv.alignment.d2o_metrics": ("fdiv.alignment.d2o.metrics",),
    "fdiv.alignment.f_dpg_batches": ("fdiv.alignment.f_dpg.data", "fdiv.training.rollouts"),
    "fdiv.alignment.f_dpg_config": ("fdiv.alignment.f_dpg.config",),
    "fdiv.alignment.f_dpg_metrics": ("fdiv.alignment.f_dpg.metrics", "fdiv.statistics.estimates"),
    "fdiv.alignment.f_dpg_objective": ("fdiv.alignment.f_dpg.loss",),
    "fdiv.alignment.f_dpg_proposal": ("fdiv.alignment.f_dpg.proposal",),
    "fdiv.alignment.hh_negatives": ("fdiv.recipes.tasks.negatives.hh",),
    "fdiv.alignment.losses": ("fdiv.alignment.f_dpo.loss", "fdiv.alignment.d2o.loss"),
    "fdiv.alignment.moment_matching": ("fdiv.alignment.f_dpg.moments", "fdiv.errors"),
    "fdiv.alignment.negatives": ("fdiv.alignment.d2o.data",),
    "fdiv.alignment.partition": ("fdiv.alignment.f_dpg.partition",),
    "fdiv.alignment.quasi_rejection": ("fdiv.alignment.f_dpg.quasi_rejection",),
    "fdiv.alignment.safe_rlhf_negatives": ("fdiv.recipes.tasks.negatives.safe_rlhf",),
    "fdiv.alignment.target_eval": ("fdiv.alignment.f_dpg.evaluation",),
    "fdiv.alignment.targets": ("fdiv.alignment.f_dpg.targets",),
    "fdiv.alignment.tiny_texts": ("fdiv.recipes.tasks.tiny.texts",),
    "fdiv.alignment.tiny_world": ("fdiv.recipes.tasks.tiny.preferences",),
    "fdiv.alignment.tiny_world_eval": ("fdiv.recipes.tasks.tiny.optimum",),
    "fdiv.alignment.tofu_preferences": ("fdiv.recipes.tasks.tofu.preferences",),
    "fdiv.checkpoints": ("fdiv.training.checkpoints", "fdiv.files"),
    "fdiv.child_processes": ("fdiv.cli.launch",),
    "fdiv.cli.merge_verb": ("fdiv.cli.verbs",),
    "fdiv.cli.run_verb": ("fdiv.cli.verbs",),
    "fdiv.completion_text": ("fdiv.inference.prompting",),
    "fdiv.context_length": ("fdiv.models.loading",),
    "fdiv.eval.aggregation": ("fdiv.eval.benchmark.aggregation",),
    "fdiv.eval.answer_likelihood": ("fdiv.eval.preferences.answer_likelihood",),
    "fdiv.eval.batched_pass": ("fdiv.inference.batches",),
    "fdiv.eval.calibration": ("fdiv.statistics.calibration",),
    "fdiv.eval.command_options": ("fdiv.eval.benchmark.options",),
    "fdiv.eval.context": ("fdiv.evaluation",),
    "fdiv.eval.diversity": ("fdiv.statistics.diversity",),
    "fdiv.eval.eval_log": ("fdiv.eval.benchmark.log",),
    "fdiv.eval.evaluation_output": ("fdiv.eval.benchmark.output",),
    "fdiv.eval.generation": ("fdiv.inference.greedy",),
    "fdiv.eval.gibberish": ("fdiv.eval.metrics.gibberish",),
    "fdiv.eval.gradient_norms": ("fdiv.eval.metrics.gradient_norms",),
    "fdiv.eval.item_cache": ("fdiv.inference.cache",),
    "fdiv.eval.item_metrics": ("fdiv.eval.benchmark.items",),
    "fdiv.eval.label_logits": ("fdiv.inference.label_logits",),
    "fdiv.eval.lm_eval_command": ("fdiv.eval.lm_eval.command",),
    "fdiv.eval.membership": ("fdiv.eval.metrics.membership",),
    "fdiv.eval.memorization": ("fdiv.eval.metrics.memorization",),
    "fdiv.eval.model_evaluation": ("fdiv.eval.benchmark.evaluation",),
    "fdiv.eval.model_loading": ("fdiv.models.loading", "fdiv.models.fingerprints"),
    "fdiv.eval.muse_aggregate": ("fdiv.eval.muse.aggregate",),
    "fdiv.eval.muse_command": ("fdiv.eval.muse.command",),
    "fdiv.eval.muse_data": ("fdiv.eval.muse.data",),
    "fdiv.eval.pass_at_k_command": ("fdiv.eval.pass_at_k.command",),
    "fdiv.eval.pass_at_k_metrics": ("fdiv.eval.pass_at_k.metrics",),
    "fdiv.eval.pass_at_k_plot": ("fdiv.eval.pass_at_k.plot",),
    "fdiv.eval.pass_at_k_records": ("fdiv.eval.pass_at_k.records",),
    "fdiv.eval.pass_at_k_run": ("fdiv.eval.pass_at_k.evaluation",),
    "fdiv.eval.pass_at_k_sampling": ("fdiv.eval.pass_at_k.sampling", "fdiv.models.fingerprints"),
    "fdiv.eval.pass_at_k_scoring": ("fdiv.eval.pass_at_k.scoring",),
    "fdiv.eval.pass_at_k_summary": ("fdiv.eval.pass_at_k.aggregate",),
    "fdiv.eval.pass_at_k_tasks": ("fdiv.eval.pass_at_k.data",),
    "fdiv.eval.plots": ("fdiv.eval.benchmark.plots",),
    "fdiv.eval.preferences_command": ("fdiv.eval.preferences.command",),
    "fdiv.eval.presets": ("fdiv.eval.benchmark.presets",),
    "fdiv.eval.processes": ("fdiv.inference.processes",),
    "fdiv.eval.prompting": ("fdiv.inference.prompting",),
    "fdiv.eval.sampling": ("fdiv.inference.sampling",),
    "fdiv.eval.scoring": ("fdiv.inference.scoring",),
    "fdiv.eval.settings": ("fdiv.eval.benchmark.settings",),
    "fdiv.eval.text_overlap": ("fdiv.eval.metrics.text_overlap",),
    "fdiv.eval.tofu_aggregate": ("fdiv.eval.tofu.aggregate",),
    "fdiv.eval.tofu_command": ("fdiv.eval.tofu.command",),
    "fdiv.eval.tofu_data": ("fdiv.eval.tofu.data",),
    "fdiv.eval.tofu_plan": ("fdiv.eval.tofu.plan",),
    "fdiv.eval.truth": ("fdiv.eval.metrics.truth",),
    "fdiv.fingerprints": ("fdiv.models.fingerprints",),
    "fdiv.four_bit_weights": ("fdiv.models.loading",),
    "fdiv.frozen_reference": ("fdiv.models.reference",),
    "fdiv.logprobs": ("fdiv.models.logprobs",),
    "fdiv.memory_plan": ("fdiv.memory.plan",),
    "fdiv.methods": ("fdiv.catalog",),
    "fdiv.model_count": ("fdiv.memory.count",),
    "fdiv.placement": ("fdiv.memory.placement",),
    "fdiv.preference_data": ("fdiv.training.data_checks",),
    "fdiv.recipe_check": ("fdiv.recipe.check", "fdiv.recipe.schema"),
    "fdiv.recipe_dump": ("fdiv.recipe.dump", "fdiv.files"),
    "fdiv.recipe_overrides": ("fdiv.recipe.overrides",),
    "fdiv.recipe_schema": ("fdiv.recipe.schema",),
    "fdiv.recipe_yaml": ("fdiv.recipe.document",),
    "fdiv.reporting": ("fdiv.report",),
    "fdiv.reporting.comparison": ("fdiv.report.comparison",),
    "fdiv.reporting.curves": ("fdiv.report.curves",),
    "fdiv.reporting.page": ("fdiv.report.page",),
    "fdiv.reporting.pass_at_k_curves": ("fdiv.report.pass_at_k_curves",),
    "fdiv.reporting.records": ("fdiv.report.records",),
    "fdiv.reporting.style": ("fdiv.report.style",),
    "fdiv.resumable": ("fdiv.training.resume", "fdiv.models.fingerprints"),
    "fdiv.rl.arithmetic_task": ("fdiv.recipes.tasks.arithmetic",),
    "fdiv.rl.bird": ("fdiv.recipes.tasks.sql.bird",),
    "fdiv.rl.chinook_task": ("fdiv.recipes.tasks.sql.chinook",),
    "fdiv.rl.dph_batches": ("fdiv.rl.dph.batches",),
    "fdiv.rl.dph_config": ("fdiv.rl.dph.config",),
    "fdiv.rl.dph_metrics": ("fdiv.rl.dph.metrics",),
    "fdiv.rl.dph_objective": ("fdiv.rl.dph.loss", "fdiv.rl.dph.batches"),
    "fdiv.rl.losses": ("fdiv.rl.dph.loss",),
    "fdiv.rl.presample_command": ("fdiv.rl.presample.command",),
    "fdiv.rl.presample_config": ("fdiv.rl.presample.config",),
    "fdiv.rl.presample_data": ("fdiv.rl.presample.data", "fdiv.models.fingerprints"),
    "fdiv.rl.presample_output": ("fdiv.rl.presample.output",),
    "fdiv.rl.rehearsal": ("fdiv.rl.dph.rehearsal",),
    "fdiv.rl.rehearsal_recipe": ("fdiv.recipes.tasks.rehearsal",),
    "fdiv.rl.rewards.math_reward": ("fdiv.rl.rewards.math.reward",),
    "fdiv.rl.rewards.math_verifier": ("fdiv.rl.rewards.math.verifier", "fdiv.rl.rewards.math.reward"),
    "fdiv.rl.rewards.pool_template": ("fdiv.rl.rewards.pool.template",),
    "fdiv.rl.rewards.python_child": (
        "fdiv.rl.rewards.sandbox.inside.confine",
        "fdiv.rl.rewards.sandbox.inside.server",
    ),
    "fdiv.rl.rewards.python_runner": ("fdiv.rl.rewards.sandbox.judge",),
    "fdiv.rl.rewards.sql_executor": ("fdiv.rl.rewards.sql.executor",),
    "fdiv.rl.rewards.sql_reward": ("fdiv.rl.rewards.sql.reward",),
    "fdiv.rl.rewards.worker_pool": ("fdiv.rl.rewards.pool.workers",),
    "fdiv.rl.rewards.worker_process": ("fdiv.rl.rewards.pool.processes",),
    "fdiv.rl.sample_sources": ("fdiv.inference.backends",),
    "fdiv.rollouts": ("fdiv.training.rollouts", "fdiv.errors"),
    "fdiv.run_data": ("fdiv.run.data",),
    "fdiv.run_directory": ("fdiv.run.directory", "fdiv.files"),
    "fdiv.run_evaluation": ("fdiv.run.evaluation", "fdiv.run.callbacks"),
    "fdiv.step_shape": ("fdiv.memory.step_shape",),
    "fdiv.sweep": ("fdiv.run.sweep", "fdiv.run.cells", "fdiv.report.table"),
    "fdiv.termination": ("fdiv.training.signals",),
    "fdiv.tiny_models": ("fdiv.models.tiny",),
    "fdiv.unlearning.assembly": ("fdiv.unlearning.data.assembly",),
    "fdiv.unlearning.baselines": ("fdiv.unlearning.methods",),
    "fdiv.unlearning.baselines.alt_po": ("fdiv.unlearning.methods.alt_po",),
    "fdiv.unlearning.baselines.ce_u": ("fdiv.unlearning.methods.ce_u",),
    "fdiv.unlearning.baselines.grad_ascent": ("fdiv.unlearning.methods.grad_ascent",),
    "fdiv.unlearning.baselines.grad_diff": ("fdiv.unlearning.methods.grad_diff",),
    "fdiv.unlearning.baselines.idk_dpo": ("fdiv.unlearning.methods.idk_dpo",),
    "fdiv.unlearning.baselines.jensun": ("fdiv.unlearning.methods.jensun",),
    "fdiv.unlearning.baselines.kl_retain": ("fdiv.unlearning.methods.kl_retain",),
    "fdiv.unlearning.baselines.npo": ("fdiv.unlearning.methods.npo",),
    "fdiv.unlearning.baselines.pdu": ("fdiv.unlearning.methods.pdu",),
    "fdiv.unlearning.baselines.rmu": ("fdiv.unlearning.methods.rmu",),
    "fdiv.unlearning.baselines.sat_imp": ("fdiv.unlearning.methods.sat_imp",),
    "fdiv.unlearning.baselines.simnpo": ("fdiv.unlearning.methods.simnpo",),
    "fdiv.unlearning.baselines.undial": ("fdiv.unlearning.methods.undial",),
    "fdiv.unlearning.baselines.wga": ("fdiv.unlearning.methods.wga",),
    "fdiv.unlearning.flat": ("fdiv.unlearning.methods.flat",),
    "fdiv.unlearning.pairing": ("fdiv.unlearning.data.pairing",),
    "fdiv.unlearning.scoring": ("fdiv.unlearning.roles",),
    "fdiv.unlearning.templates": ("fdiv.unlearning.data.templates",),
    "fdiv.unlearning.by_heart": ("fdiv.recipes.tasks.by_heart",),
    "fdiv.unlearning.novel_passages": ("fdiv.recipes.tasks.novels.passages",),
    "fdiv.unlearning.novels_unlearning": ("fdiv.recipes.tasks.novels.unlearning",),
    "fdiv.unlearning.tiny_authors": ("fdiv.recipes.tasks.tiny.authors",),
    "fdiv.unlearning.tofu_unlearning": ("fdiv.recipes.tasks.tofu.unlearning",),
    "fdiv.vllm_http": ("fdiv.inference.vllm_server",),
}
"""Old module → the modules that hold its names now."""


class _MovedModules(MetaPathFinder, Loader):
    """Answers an import of an old name with a module that looks every attribute up in the new ones."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MOVED:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in MOVED)
        return ModuleSpec(fullname, self, origin="moved", is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        old, homes = module.__name__, MOVED[module.__name__]
        warnings.warn(
            f"{old} is now {' and '.join(homes)}; the old name goes with release 0.3",
            DeprecationWarning,
            stacklevel=2,  # frames of importlib do not count
        )

        def look_up(name: str) -> Any:
            for home in homes:
                found = import_module(home)
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(f"module {old!r} has no attribute {name!r}; it is now {' and '.join(homes)}")

        module.__getattr__ = look_up  # type: ignore[method-assign]
        module.__doc__ = f"Moved to {' and '.join(homes)}."


def install() -> None:
    """Let the old names be found; first, for a folder that only holds stale bytecode counts as a package."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _MovedModules())
