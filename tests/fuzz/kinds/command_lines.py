"""Command lines: wrong verbs, flags, names and places."""

from __future__ import annotations

import random
from pathlib import Path

from tests.fuzz.case import Edit, Kind, Outcome
from tests.fuzz.command import command, judged
from tests.fuzz.damage import misspelt
from tests.fuzz.world import write_rows

__all__ = ["CommandLines"]

# Right commands; FOLDER, RECIPE and SAMPLES are filled in. None takes long, or needs a network.
_RIGHT: tuple[tuple[str, ...], ...] = (
    ("run", "RECIPE", "--dry_run"),
    ("run", "RECIPE", "--dry_run", "--learning_rate", "1e-5"),
    ("run", "tiny/f_dpo", "--dry_run", "--eval.batch_size", "8"),
    ("sweep", "RECIPE", "--dry_run", "--divergences", "reverse_kl", "forward_kl", "--seeds", "1", "2"),
    ("divergences",),
    ("divergences", "{name: alpha, alpha: 0.3}"),
    ("methods",),
    ("recipes",),
    ("recipes", "tiny/f_dpo"),
    ("recipes", "tiny/f_dpo", "--copy", "FOLDER/copy.yaml"),
    ("recipes", "--keys", "f_dpo"),
    ("models",),
    ("eval", "passk", "--from_samples", "SAMPLES", "--k", "1,2", "--output", "FOLDER/out.json"),
    ("eval", "passk", "--from_samples", "SAMPLES", "--k", "1", "--output", "FOLDER/out", "--resamples", "10"),
)
# Commands that end in an error, for words to be added to.
_BROKEN: tuple[tuple[str, ...], ...] = (
    ("report", "FOLDER", "--output", "FOLDER/report.html"),
    ("merge", "FOLDER", "--output", "FOLDER/merged"),
    ("presample", "--model", "FOLDER", "--dataset", "SAMPLES", "--reward", "math", "--output", "FOLDER/presampled"),
    ("eval", "tofu", "--from_logs", "SAMPLES", "--output", "FOLDER/tofu.json"),
    ("eval", "preferences", "--model", "FOLDER/none", "--output", "FOLDER/out.json"),
    ("models", "fetch", "no-such-model"),
    ("run", "no/such/recipe"),
    ("sweep", "RECIPE", "--collect"),
)
_FLAGS = (
    *("--debug", "--dry_run", "--dry-run", "--accelerate", "--num_processes", "--output", "--title", "--k", "--seeds"),
    *(
        "--minutes",
        "--results",
        "--divergences",
        "--methods",
        "--copy",
        "--keys",
        "--no_bf16",
        "--bf16",
        "--resamples",
    ),
    *(
        "--learning_rate",
        "--eval.name",
        "--eval.0.name",
        "--divergence.alpha",
        "--sweep.seed",
        "--prepare",
        "--",
        "-",
        "-x",
    ),
    *(
        "--unscored",
        "--seed",
        "--temperature",
        "--base_samples",
        "--=",
        "--=x",
        "--.",
        "--a.b.c.d",
        "--eval..name",
        "---x",
    ),
)
_VALUES = (
    *(
        "",
        " ",
        "x",
        "-1",
        "0",
        "nan",
        "inf",
        "1e9",
        "1,2,0",
        "1;2",
        "[",
        "{name: alpha}",
        "{name: [}",
        "true",
        "null",
        "é",
    ),
    *(
        "\x00",
        "\udcff",
        "a" * 5000,
        "a/" * 200,
        "--",
        "-",
        "*",
        "~",
        "FOLDER",
        "RECIPE",
        "SAMPLES",
        "%s",
        "{0}",
        "\n",
        "\x1b[2J",
    ),
)
_PLACES = (
    *("/proc/nothing", "/proc/self/nothing/there", "/dev/null/below", "/sys/nothing", "SAMPLES", "SAMPLES/below"),
    *("FOLDER", "FOLDER/" + "n" * 300, "FOLDER/a\x00b", "", ".", "FOLDER/" + "deep/" * 60 + "x", "FOLDER/\udcff"),
)


class CommandLines(Kind):
    """A command with words left out, doubled, misspelt, replaced or added, and with impossible places."""

    name = "command_lines"
    what = "words left out, added or wrong, impossible places, every verb"
    few = 40

    def members(self, rng: random.Random) -> list[Edit]:
        commands = [*_RIGHT, *_BROKEN]
        number = rng.randrange(len(commands))
        words = commands[number]
        edits: list[Edit] = [("command", number)]
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            place = rng.randrange(len(words) + 1)
            edits.append(rng.choice([
                ("insert", place, rng.choice(_FLAGS)),
                ("insert", place, rng.choice(_VALUES)),
                ("insert", len(words), rng.choice(_FLAGS), rng.choice(_VALUES)),
                ("leave out", place),
                ("replace", place, rng.choice(_VALUES)),
                ("replace", place, misspelt(words[min(place, len(words) - 1)], rng)),
                ("place", rng.choice(_PLACES)),
                ("place", rng.choice(_PLACES)),
                ("verb", rng.choice([misspelt(words[0], rng), "", "x" * 3000, "RUN", "é", "--version", "-h", "--help"])),
            ]))  # fmt: skip
        return edits

    def judge(self, edits: list[Edit], folder: Path) -> Outcome:
        number = next((edit[1] for edit in edits if edit[0] == "command"), 0)
        words = list([*_RIGHT, *_BROKEN][number])
        for name, *values in edits:
            if name == "insert":
                words[values[0] : values[0]] = values[1:]
            elif name == "leave out":
                del words[values[0] : values[0] + 1]
            elif name == "replace":
                words[values[0] : values[0] + 1] = values[1:]
            elif name == "place":
                words = [values[0] if word.startswith("FOLDER/") else word for word in words]
            elif name == "verb":
                words[:1] = values
        if words[:1] == ["presample"] or words[:2] == ["eval", "lm_eval"]:
            words += ["--no_such_option", "x"]  # ends before anything is loaded
        if words[:1] in (["run"], ["sweep"]) and not {"--dry_run", "--collect"} & set(words):
            words.append("--dry_run")
        return judged(command(self._filled(words, folder), folder, 60))

    def _filled(self, words: list[str], folder: Path) -> list[str]:
        samples = write_rows(
            folder / "samples.jsonl", [{"task_id": i // 4, "correct": bool(i % 3)} for i in range(16)]
        )
        names = {"FOLDER": folder, "RECIPE": self.world.write_recipe(folder), "SAMPLES": samples}
        for name, value in names.items():
            words = [word.replace(name, str(value)) for word in words]
        return words
