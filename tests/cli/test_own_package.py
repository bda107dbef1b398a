"""A project of one's own beside the installed package: the files of CONTRIBUTING.md, named in a recipe by
`module:attribute` and taken through `fdiv run`, `--dry_run`, `sweep`, `report` and `eval`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fdiv import catalog
from fdiv.cli import main
from fdiv.divergences import get_divergence
from fdiv.eval.pass_at_k.scoring import make_scorer

# File of the project → the section that shows it.
SECTIONS = {
    "my_divergences.py": "How to add a divergence",
    "my_method.py": "How to add an objective",
    "my_evaluation.py": "How to add an evaluation",
    "my_project/command.py": "How to add an evaluation",
    "my_rewards.py": "How to add a reward",
    "my_data.py": "How to add a builder of data",
    "my_unlearning.py": "How to add an unlearning method",
}
SHOWN_AS = {"my_unlearning.py": "unlearning/methods/NAME.py"}


def python_of(text: str, section: str, file: str) -> str:
    """The code that a section of CONTRIBUTING shows for a file: what follows its name, up to the next file or prose
    that shows something else."""
    body = text.split(f"## {section}\n")[1].split("\n## ")[0]
    after = body.split(f"`{file}`", 1)[1]
    blocks = re.findall(r"```(\w+)\n(.*?)```\n(.*?)(?=```|\Z)", after, re.DOTALL)
    code = []
    for language, block, prose in blocks:
        if language != "python":
            break
        code.append(block)
        if prose.strip():  # the file ends where prose begins
            break
    return "\n\n".join(code)


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model_dir):
    """The folder with the files and a recipe, entered; the modules are forgotten afterwards."""
    folder = tmp_path_factory.mktemp("project")
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for file, section in SECTIONS.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(python_of(text, section, SHOWN_AS.get(file, file)), encoding="utf-8")
    recipe = {
        "method": "my_method:MyTrainer",
        "divergence": "my_divergences:cubic_barrier",
        "beta": 0.5,
        "model_name_or_path": str(tiny_model_dir),
        "prepare": {"name": "my_data:Politeness", "rows": 4},
        "eval": {"name": "my_evaluation:ChosenLoss"},
        "report": {"title": "my own"},
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    (folder / "my_recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "path", list(sys.path))
        yield folder
    for file in SECTIONS:
        sys.modules.pop(file.removesuffix(".py").replace("/", "."), None)


@pytest.fixture(scope="module")
def finished(project) -> Path:
    assert main(["run", "my_recipe.yaml"]) == 0
    return project / "out"


def test_the_objective_is_what_its_formula_says(project):
    objective = catalog.METHODS.find("my_method:MyTrainer")
    import my_method

    chosen, rejected = torch.tensor([0.5, 0.0]).double(), torch.tensor([-0.5, 0.0]).double()
    loss = my_method.squared_margin_loss(chosen, rejected, "reverse_kl", 0.5)  # f'(u) of reverse KL: log u
    assert loss.tolist() == pytest.approx([(0.5 * (0.5 + 0.5) - 1) ** 2, 1.0])
    with pytest.raises(ValueError, match=r"cannot use total_variation"):
        objective.check_divergence("total_variation")


def test_a_run_of_it(finished):
    result = json.loads((finished / "result.json").read_text())
    assert (result["method"], result["divergence"]) == ("my_method:MyTrainer", "my_divergences:cubic_barrier")
    assert result["after/chosen_loss"] != result["before/chosen_loss"]
    assert result["before/chosen_loss_se"] > 0
    history = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in history if "margins" in entry]
    # At the reference both log-ratios are 0, so the margin is 0 and the loss 1.
    assert steps[0]["loss"] == pytest.approx(1.0, abs=1e-4) and steps[0]["margins"] == pytest.approx(0.0, abs=1e-4)
    assert steps[1]["margins"] > 0
    assert "my own" in (finished / "report.html").read_text()


def test_a_dry_run_of_it_is_no_traceback(project, capsys):
    words = ["--divergence", "{name: my_divergences:kl_blend, weight: 0.25}", "--prepare", "null"]
    assert main(["run", "my_recipe.yaml", "--dry_run", *words]) == 0
    printed = capsys.readouterr()
    resolved = yaml.safe_load(printed.out)
    assert resolved["method"] == "my_method:MyTrainer"
    assert resolved["divergence"] == {"name": "my_divergences:kl_blend", "weight": 0.25}
    assert "memory plan: unknown: not modelled: MyConfig has no step_shape" in printed.err


def test_a_sweep_and_a_report_of_it(project, finished, capsys):
    words = ["sweep", "my_recipe.yaml", "--output_dir", "swept", "--divergences"]
    assert main([*words, "my_divergences:cubic_barrier", "reverse_kl", "--seeds", "0"]) == 0
    assert len(list(Path("swept").glob("*/result.json"))) == 2
    assert main(["report", "swept", "out", "--output", "all.html"]) == 0
    assert "my_divergences:cubic_barrier" in Path("all.html").read_text()


def test_a_command_of_it(project, tiny_model_dir, capsys):
    assert main(["eval", "my_project:command", "--model", str(tiny_model_dir)]) == 0
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert int(capsys.readouterr().out.split()[-1]) == sum(p.numel() for p in model.parameters())
    with pytest.raises(SystemExit) as stop:
        main(["eval", "my_project:command", "--help"])
    assert stop.value.code == 0 and "Count the parameters of a model." in capsys.readouterr().out


def test_an_unlearning_method_of_it(project, tiny_model_dir):
    rows = [{"prompt": f"Who is {number}?", "completion": " No one of note."} for number in range(4)]
    Path("forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {"method": "my_unlearning:MineTrainer", "model_name_or_path": str(tiny_model_dir)}
    recipe |= {"dataset_name": "forget.jsonl", "retain_term": "none", "beta": 2.0, "output_dir": "unlearned"}
    recipe |= {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    recipe |= {"save_strategy": "no", "gradient_checkpointing": False, "lr_scheduler_type": "constant"}
    Path("unlearn.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["run", "unlearn.yaml"]) == 0
    history = [json.loads(line) for line in Path("unlearned/metrics.jsonl").read_text().splitlines()]
    terms = [(entry["forget_term"], entry["prob/forget"]) for entry in history if "forget_term" in entry]
    # β times the mean probability of a token, which is at least the geometric mean that is logged besides.
    assert all(term >= 2.0 * prob for term, prob in terms) and terms[-1][0] < terms[0][0]


def test_divergences_of_it(project):
    blend = get_divergence({"name": "my_divergences:kl_blend", "weight": 0.25})
    log_t = torch.tensor([-1.0, 0.0, 2.0]).double()
    expected = 0.25 * get_divergence("reverse_kl").generator(log_t) + 0.75 * get_divergence("forward_kl").generator(
        log_t
    )
    assert torch.allclose(blend.generator(log_t), expected, rtol=1e-12, atol=0)
    t = log_t.exp()  # t³ − log t, with f(1) = f'(1) = 0 arranged: minus 1 + 2(t − 1)
    cubic = get_divergence("my_divergences:cubic_barrier").generator(log_t)
    assert torch.allclose(cubic, t**3 - log_t - 1 - 2 * (t - 1), rtol=1e-10, atol=1e-12)


def test_rewards_of_it_serve_everything_that_scores(project):
    from fdiv.alignment.f_dpg.targets import build_target
    from fdiv.alignment.scorers import build_scorer
    from fdiv.rl.rewards import build_reward

    texts = {"prompts": ["p", "p"], "completions": ["one two three", " "]}
    short = {"name": "my_rewards:at_most", "words": 2, "as": "short"}
    for build in (build_reward, build_scorer):
        assert build("my_rewards:not_empty")(**texts) == [1.0, 0.0]
        assert build(short)(**texts) == [0.0, 1.0] and build(short).__name__ == "short"
    (factor,) = build_target({"name": "pointwise", "scorers": [short]}).scorers
    assert factor(**texts) == [0.0, 1.0]
    assert make_scorer("my_rewards:not_empty").reward(answer=["a", "b"], **texts) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "my_method:MyTrainr"], "'my_method' has no attribute 'MyTrainr'; did you mean 'MyTrainer'?"),
        (["--method", "my_methods:MyTrainer"], "No module named 'my_methods' in "),
        (["--method", "my_method:MyConfig"], "is the class MyConfig: it must be a trainer class"),
        (["--divergence", "my_divergences:kl_blend"], "missing a required argument: 'weight'"),
        (["--divergence", "my_divergences:torch"], "it must be a Divergence, or a function of its parameters"),
        (["--divergence", "total_variation"], "the squared margin cannot use total_variation"),
        (["--prepare.name", "my_evaluation:ChosenLoss"], "must be a dataclass with a method `build(output_dir)"),
        (["--eval.name", "my_data:Politeness"], "must be a dataclass with a method `evaluate(model"),
        (["--prepare.row", "3"], "unknown key '--prepare.row'; did you mean '--prepare.rows'?"),
        (["--eval.name", "os:system"], "os is a module of Python itself"),
        (["--method", "my_method:"], "write module:attribute"),
    ],
)
def test_mistakes_are_one_line(project, words, message, capsys):
    assert main(["run", "my_recipe.yaml", "--dry_run", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_a_module_that_fails_to_import_says_where(project, capsys):
    Path("broken.py").write_text("raise RuntimeError('no\\nluck')\n", encoding="utf-8")
    assert main(["run", "my_recipe.yaml", "--method", "broken:It"]) == 2
    assert "method 'broken:It': importing broken failed: RuntimeError: no luck\n" in capsys.readouterr().err
    Path("needy.py").write_text("import not_installed\n", encoding="utf-8")
    assert main(["run", "my_recipe.yaml", "--method", "needy:It"]) == 2
    assert "importing needy failed: No module named 'not_installed'" in capsys.readouterr().err
