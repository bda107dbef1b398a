"""Running recipes: a recipe resolved, one run, its directory and records, and sweeps over runs."""

from fdiv import lazy

__all__ = ["RunPlan", "check_blocks", "plan_run", "prepare", "run_plan", "run_recipe"]

__getattr__, __dir__ = lazy.attach(
    __name__,
    {
        "RunPlan": "fdiv.run.plan",
        "check_blocks": "fdiv.run.plan",
        "plan_run": "fdiv.run.plan",
        "prepare": "fdiv.run.plan",
        "run_plan": "fdiv.run.run",
        "run_recipe": "fdiv.run.run",
    },
)
