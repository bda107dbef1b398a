"""The one loader of users' data: a file, a directory or a dataset of the hub, with the origin of its rows noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fdiv.errors import DataError
from fdiv.files import DATA_FORMATS, home_path, is_json_array, numbered_json_lines, one_line, read_json_lines
from fdiv.rows.sources import Source, mark_source
from fdiv.sealed import check_listed

__all__ = ["loaded", "named_dataset", "read_file"]


def read_file(
    path: Path, split: str = "train", streaming: bool = False, formats: Mapping[str, str] = DATA_FORMATS
) -> Any:
    """The rows of one file as a dataset.

    Args:
        path: the file. split: what its rows are called. streaming: do not read it whole.
        formats: suffix → loader of `datasets`.

    Raises:
        DataError: (a ValueError) a file of another kind, without rows, or damaged; a line that is no JSON, or that
            holds another type than the lines before it, by its number; one of ours that changed since we wrote it.
    """
    import datasets

    if path.suffix not in formats:
        raise DataError(f"{path}: a file must end in {', '.join(formats)}")
    check_listed(path)
    kind, options = formats[path.suffix], {"data_files": {split: str(path)}, "streaming": streaming}
    rows = loaded(lambda: datasets.load_dataset(kind, split=split, **options), str(path), quiet=True)
    return mark_source(rows, Source(str(path), path))


def named_dataset(name: str, config: str | None = None, streaming: bool = False) -> Any:
    """The splits that a name stands for, or one table where it has none.

    Args:
        name: a file (json, jsonl, parquet, csv), a directory of such files or of `save_to_disk`, or a dataset on the
            hub. config: the hub's configuration. streaming: do not read it whole.

    Raises:
        DataError: a file of another kind, no such file or directory, no such dataset, no table in it.
    """
    import datasets

    path = home_path(name)
    if path.is_file():
        rows = read_file(path, "train", streaming)
        kind = datasets.IterableDatasetDict if streaming else datasets.DatasetDict
        return kind({"train": rows})
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return loaded(lambda: datasets.load_from_disk(str(path)), str(path), quiet=True)
    looks_local = path.is_absolute() or name.startswith((".", "~")) or path.suffix in DATA_FORMATS
    if not path.exists() and (looks_local or name.count("/") > 1):
        raise DataError(f"dataset_name: no such file or directory: {name}")
    found = loaded(lambda: datasets.load_dataset(name, name=config, streaming=streaming), name, quiet=path.exists())
    if path.is_dir() and not streaming and hasattr(found, "keys"):
        for split in found:
            _mark_split(found[split], path, str(split))
    return found


def _mark_split(rows: Any, folder: Path, split: str) -> None:
    """Note the file of a split that comes from one file of its name."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in DATA_FORMATS]
    own = [path for path in files if path.stem == split] or (files if len(files) == 1 else [])
    if len(own) == 1:
        mark_source(rows, Source(str(own[0]), own[0]))


def loaded(load: Callable[[], Any], name: str, quiet: bool = False) -> Any:
    """Call a loader of `datasets`; its errors become one line that names what is at fault.

    Args:
        load: the call. name: path or hub name. quiet: no bars, for files of this machine.

    Raises:
        DataError: whatever the loader found.
    """
    import datasets

    hidden = datasets.utils.are_progress_bars_disabled()
    if quiet:
        datasets.disable_progress_bars()
    try:
        found = load()
        _check_text(found)
        return found
    except (IndexError, StopIteration) as error:
        # datasets 5.2: load_from_disk without rows, a json file without lines
        raise DataError(f"the dataset {name!r} is empty or damaged: no table could be read from it") from error
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        path = home_path(name)
        if path.exists():
            for file in [path] if path.is_file() else sorted(path.rglob("*.json*")):
                if DATA_FORMATS.get(file.suffix) == "json":
                    _check_json(file)
            raise DataError(f"cannot read the rows of {name}: {_reason(error)}") from error
        remedy = "give a local path, or a dataset of the hub (needs a connection, HF_HUB_OFFLINE unset)"
        raise DataError(f"cannot load the dataset {name!r}: {one_line(error)}; {remedy}") from error
    finally:
        if quiet and not hidden:
            datasets.enable_progress_bars()


def _check_text(found: Any) -> None:
    """Refuse tables with text that is not UTF-8, which Arrow's JSON reader passes on; streams are read later.

    Raises:
        ValueError: with the place.
    """
    import datasets

    tables = found.values() if isinstance(found, dict) else [found]
    for table in tables:
        if isinstance(table, datasets.Dataset):
            table.data.validate(full=True)


def _reason(error: BaseException) -> str:
    """The first cause of an error that only says that something failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def _check_json(path: Path) -> None:
    """Name the row of a JSON file that a table cannot hold.

    Raises:
        DataError: a line that is no JSON, a row that is no object, a column of another type than before.
    """
    source = Source(str(path), path)
    rows = (
        enumerate(read_json_lines(path)) if is_json_array(path) else enumerate(v for _, v in numbered_json_lines(path))
    )
    kinds: dict[str, str] = {}
    for index, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{source.row(index)} is {row!r:.60}, not an object with columns")
        for column, value in row.items():
            for place, one in _parts(column, value):
                kind = _KINDS[type(one)]
                if kinds.setdefault(place, kind) != kind:
                    inside = "" if place == column else f" ({place})"
                    raise DataError(
                        f"{source.row(index)}: column {column!r}{inside} is {kind} ({one!r:.60}), in the rows before "
                        f"it {kinds[place]}: use one type"
                    )


_KINDS = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def _parts(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(place, value) of a JSON value and of what is inside it; nothing for null."""
    if value is not None:
        yield place, value
    if isinstance(value, list):
        for one in value:
            yield from _parts(f"{place}[]", one)
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _parts(f"{place}.{name}", one)
