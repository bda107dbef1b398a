r"""What a `benchmark.yaml` says: which rows stand where, and how they are asked.

    name: records                    # what results are called
    kind: questions                  # questions: TOFU's measures, of rows in the trainers' columns; texts: MUSE's
    source: owner/dataset            # on the hub; left out: the folder of this file
    variables: {subject: Ada}        # filled into {subject} below; null: whoever evaluates must say
    sets:
      forget: forget.jsonl           # a file beside this one, or a configuration; a list: the first there is
      retain: {name: others, split: test, columns: {query: question}, where: {person: "{subject}"}}
      holdout: holdout.jsonl
      paraphrase: paraphrases.jsonl  # other wordings of forget rows, see `paraphrased`
    settings: {question_format: "Q: {question}\nA:", answer_format: " {answer}"}   # of the evaluation, unless stated
    tasks: [wmdp_cyber]              # of lm-eval, measured beside the sets

Every key but `sets` (or `tasks`) may be left out; without a `benchmark.yaml` the files of a folder are its sets by
their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fdiv.errors import DataError, RecipeError
from fdiv.eval.benchmark.sources import Rows, first_of
from fdiv.files import DATA_FORMATS
from fdiv.filling import check_template, fill
from fdiv.named import check_keys, hint, nearest
from fdiv.recipe.yaml_text import load_yaml
from fdiv.rows.sources import mark_source, source_of

__all__ = ["KINDS", "Layout", "RowSet", "load_layout", "packaged_layouts"]

FILE = "benchmark.yaml"
KINDS = {
    "questions": ("forget", "retain", "holdout", "paraphrase", "real_authors", "world_facts"),
    "texts": (
        *("forget", "holdout", "verbmem", "forget_knowmem", "retain_knowmem", "forget_examples", "retain_examples"),
    ),
}
"""Kinds of benchmarks and the sets that each can have."""

SETTINGS = (
    *("question_format", "answer_format", "chat_template", "system_prompt", "date_string", "chat_template_kwargs"),
    *("end_token", "preset", "attacks", "max_length"),
)
"""Settings of the evaluation that a layout may choose."""

_KEYS = ("name", "kind", "source", "variables", "sets", "settings", "tasks")
_SET_KEYS = ("name", "split", "file", "columns", "where", "unless")


@dataclass(frozen=True)
class RowSet:
    """Where one set of rows is.

    Args:
        names: files beside the layout, or configurations of its source; the first that exists is read.
        split: on the hub. file: its name in a local copy of the source; None: that of the configuration.
        columns: their name → ours. where: rows with these values of their columns. unless: rows without them.
    """

    names: tuple[str, ...]
    split: str = "train"
    file: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)
    unless: Mapping[str, Any] = field(default_factory=dict)

    def filled(self, variables: Mapping[str, str]) -> RowSet:
        """With the variables filled in."""

        def put(value: Any) -> Any:
            return fill(value, **variables) if isinstance(value, str) else value

        return replace(
            self,
            names=tuple(put(name) for name in self.names),
            split=put(self.split),
            file=put(self.file),
            where={column: put(value) for column, value in self.where.items()},
            unless={column: put(value) for column, value in self.unless.items()},
        )


@dataclass(frozen=True)
class Layout:
    """A benchmark: see the module. `folder` is where its files are; None for packaged layouts, whose rows are on the
    hub."""

    name: str
    kind: str
    sets: Mapping[str, RowSet]
    folder: Path | None = None
    source: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()

    def filled(self, variables: Mapping[str, Any] | None = None) -> Layout:
        """With its variables, or these in their place, filled in.

        Raises:
            DataError: a variable that it does not have, or one without a value.
        """
        check_keys(variables or {}, self.variables, f"benchmark {self.name!r}", "variable", error=DataError)
        values = {**self.variables, **(variables or {})}
        lacking = [name for name, value in values.items() if value is None]
        if lacking:
            raise DataError(
                f"benchmark {self.name!r}: say {lacking[0]} (--variables '{{{lacking[0]}: …}}', or the key variables)"
            )
        texts = {name: str(value) for name, value in values.items()}
        sets = {name: one.filled(texts) for name, one in self.sets.items()}
        source = self.source and fill(self.source, **texts)
        return replace(self, sets=sets, source=source, variables=values)

    def read(self, row_set: str, source: str | None = None) -> tuple[str, Rows]:
        """(name, rows) of one set, its columns renamed.

        Args:
            row_set: of `sets`. source: a local copy, or another dataset, in place of the layout's own.

        Raises:
            FileNotFoundError: the layout has no such set, or there is no such file or configuration.
            DataError: files that cannot be read; no row with the values of `where`.
        """
        one = self.sets.get(row_set)
        if one is None:
            raise FileNotFoundError(f"benchmark {self.name!r} has no set {row_set}")
        place = source or self.source or str(self.folder)
        names = list(one.names)
        if one.file is not None and Path(place).is_dir():
            names = [one.file]
        elif source is None and self.source is None and self.folder is not None:
            names = [str(self.folder / name) if Path(name).suffix in DATA_FORMATS else name for name in names]
        name, rows = first_of(place, names, one.split)
        if not (one.columns or one.where or one.unless):
            return name, rows
        origin = source_of(rows, name)
        kept = [row for row in rows if _holds(row, one.where) and not (one.unless and _holds(row, one.unless))]
        if not kept and rows:
            raise DataError(f"{origin}: {_no_row(rows, one)}")
        return name, mark_source(Rows(_renamed(row, one.columns) for row in kept), origin)


def _holds(row: Any, values: Mapping[str, Any]) -> bool:
    return isinstance(row, Mapping) and all(str(row.get(column)) == str(value) for column, value in values.items())


def _no_row(rows: Sequence[Mapping[str, Any]], one: RowSet) -> str:
    """Why no row is left, with the nearest value there is."""
    for column, value in one.where.items():
        there = sorted({str(row.get(column)) for row in rows})
        if str(value) not in there:
            near = nearest(value, there, cutoff=0.3)
            return f"no row has {column} = {value!r}; the nearest of {len(there)} is {(near or there)[0]!r}"
    return "no row is left by `where` and `unless`"


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        return row
    return {columns.get(name, name): value for name, value in row.items()}


def packaged_layouts() -> dict[str, Path]:
    """Name → file of the layouts that come with the package."""
    return {file.stem: file for file in sorted(Path(__file__).parent.glob("*.yaml"))}


def load_layout(data: str) -> Layout:
    """The layout of a folder, a `benchmark.yaml`, or a name of `packaged_layouts`; variables are not filled in yet.

    Raises:
        DataError: neither; a key, kind or set that there is not; a folder without rows to forget.
    """
    path, packaged = Path(data), packaged_layouts()
    if path.is_dir():
        file = path / FILE
        return _checked(_read(file), file, path) if file.is_file() else _of_folder(path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise DataError(f"no such file: {data}")
        return _checked(_read(path), path, path.parent)
    if data in packaged:
        return _checked(_read(packaged[data]), packaged[data], None)
    raise DataError(
        f"{data!r} is neither a folder of a benchmark, nor a {FILE}, nor a benchmark by name: {hint(data, packaged)}"
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        _, content = load_yaml(file.read_text(encoding="utf-8"), str(file))
    except (RecipeError, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}: {error}" if isinstance(error, OSError | UnicodeDecodeError) else str(error)
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: a benchmark is a mapping with the keys {', '.join(_KEYS)}")
    return content


def _of_folder(folder: Path) -> Layout:
    """A folder without `benchmark.yaml`: its files are the sets of their names."""
    files = _row_files(folder)
    sets = {name: RowSet((files[name],)) for name in KINDS["questions"] if name in files}
    if "forget" not in sets:
        held = ", ".join(list(files.values())[:8]) or "no files of rows"
        raise DataError(f"{folder} has no {FILE} and no forget{'|'.join(DATA_FORMATS)}; it holds {held}")
    return Layout(folder.resolve().name, "questions", sets, folder)


def _row_files(folder: Path) -> dict[str, str]:
    """Stem → name of the files of rows in a folder."""
    return {path.stem: path.name for path in sorted(folder.iterdir()) if path.suffix in DATA_FORMATS}


def _checked(content: Mapping[str, Any], file: Path, folder: Path | None) -> Layout:
    where = str(file)
    check_keys(content, _KEYS, where, "key", error=DataError)
    for key, kind, word in (
        ("name", str, "a text"), ("kind", str, "a text"), ("source", str, "a text"), ("variables", dict, "a mapping"),
        ("sets", dict, "a mapping"), ("settings", dict, "a mapping"), ("tasks", list, "a list"),
    ):  # fmt: skip
        if content.get(key) is not None and not isinstance(content[key], kind):
            raise DataError(f"{where}: {key}: {content[key]!r:.60} is not {word}")
    kind = content.get("kind") or "questions"
    if kind not in KINDS:
        raise DataError(f"{where}: kind: {kind!r}: choose {' or '.join(KINDS)}")
    sets, tasks = content.get("sets") or {}, content.get("tasks") or []
    if content.get("sets") is None and content.get("source") is None and folder is not None:
        files = _row_files(folder)  # as in a folder without this file
        sets = {name: files[name] for name in KINDS[kind] if name in files}
    check_keys(sets, KINDS[kind], f"{where}: sets ({kind})", "set", error=DataError)
    if not tasks and not {"forget", "verbmem", "forget_knowmem"} & set(sets):
        raise DataError(f"{where}: sets: there is no forget set")
    if not all(isinstance(task, str) for task in tasks):
        raise DataError(f"{where}: tasks: {tasks!r:.60} is not a list of names")
    variables, settings = content.get("variables") or {}, content.get("settings") or {}
    check_keys(settings, SETTINGS, f"{where}: settings", "key", error=DataError)
    name = content.get("name") or (folder or file.parent).resolve().name
    rows = {one: _row_set(spec, f"{where}: sets: {one}", variables) for one, spec in sets.items()}
    return Layout(name, kind, rows, folder, content.get("source"), variables, settings, tuple(tasks))


def _row_set(spec: Any, where: str, variables: Mapping[str, Any]) -> RowSet:
    if not isinstance(spec, Mapping):
        spec = {"name": spec}
    check_keys(spec, _SET_KEYS, where, "key", error=DataError)
    names = spec.get("name")
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: name: {names!r:.60}: a file, a configuration, or a list of such is due")
    for key in ("columns", "where", "unless"):
        if not isinstance(spec.get(key, {}), Mapping):
            raise DataError(f"{where}: {key}: {spec[key]!r:.60} is not a mapping")
    texts = [
        *names,
        spec.get("split"),
        spec.get("file"),
        *spec.get("where", {}).values(),
        *spec.get("unless", {}).values(),
    ]
    for text in texts:
        if isinstance(text, str):
            check_template(text, tuple(variables), what=where)
    return RowSet(
        tuple(names), spec.get("split") or "train", spec.get("file"), spec.get("columns", {}), spec.get("where", {}),
        spec.get("unless", {}),
    )  # fmt: skip
