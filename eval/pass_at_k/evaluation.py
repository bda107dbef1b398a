"""Pass@k of a model: sample, score, keep the samples, summarise. In a recipe `eval: {name: passk, …}`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from fdiv.catalog import REWARDS
from fdiv.errors import DataError
from fdiv.eval.pass_at_k.aggregate import compare_with_base, distinct_correct, parse_k, summarise
from fdiv.eval.pass_at_k.data import EvalTask, LoadedTasks, load_tasks, tasks_of_rows
from fdiv.eval.pass_at_k.decoding import DecodeOptions
from fdiv.eval.pass_at_k.records import TaskCounts, Unscored, compare_made_with, counts_of_samples, read_counts
from fdiv.eval.pass_at_k.sampling import SamplingSettings, completion_record, sampling_requests
from fdiv.eval.pass_at_k.scoring import Scorer, make_scorer, score_completions
from fdiv.files import write_bytes
from fdiv.filling import check_template
from fdiv.inference.cache import ItemCache, fingerprint
from fdiv.inference.encoding import Encoding, encoding_stamp
from fdiv.inference.processes import process_state
from fdiv.inference.prompting import CHAT_TEMPLATE, PromptFormat
from fdiv.models.fingerprints import tokenizer_fingerprint
from fdiv.named import is_path, lookup
from fdiv.rl.modes import resolve_mode
from fdiv.rows.report import RowReport
from fdiv.sealed import listed
from fdiv.secrets import without_secrets

if TYPE_CHECKING:
    from fdiv.evaluation import EvalContext

__all__ = ["PassKEvalConfig", "SamplingPass", "draw_with_transformers", "write_samples"]

Draw = Callable[[list[Any], SamplingSettings, ItemCache], Mapping[str, Any]]
"""(requests, settings, cache) → by key the token ids, or a record with `ids`, or one as of `completion_record`;
temperature 0 is greedy."""

GREEDY = -1


@dataclass(frozen=True)
class SamplingPass:
    """What is sampled in one go.

    Args:
        kind: `samples` or `greedy`, which names its cache. requests: one for each completion.
        settings: of the sampling. digest: of everything the completions depend on but the kind.
    """

    kind: str
    requests: list[Any]
    settings: SamplingSettings
    digest: str


@dataclass
class PassKEvalConfig(DecodeOptions):
    """The `passk` evaluation.

    Values: `pass@K` (unbiased), `pass^K`, `g_pass@K_τ`, `mg_pass@K`, `mean@n`, `maj@n` (scorers `exact` and `math`),
    `greedy_accuracy`, each with `_se` (bootstrap over tasks); after training also `keep_rate@K` and `explore_rate@K`
    against the start; `distinct_correct` (different correct completions per task); `unscored_samples`. The samples are
    kept as `passk_samples.jsonl` in `OUTPUT_DIR/eval/STAGE/`.

    Args:
        dataset: A benchmark (gsm8k, math500, aime24, aime25, amc23, olympiadbench, svamp, humaneval, sql_defog), a
            JSON-lines file with prompt and answer, or in a recipe a split of the run's own data.
        data: Local folder of a benchmark. None: the hub.
        answer_column: Column of the gold answers, in a file or split of one's own.
        scorer: exact, math, sql, code, or module:function with TRL's reward signature; correct is a score of at least
            1. None: the benchmark's own, exact for a file or a split.
        databases: For sql: an SQLite file, or a folder with one per `database` of the rows.
        allow_code_execution: Must be true for code (humaneval): programs written by the model are run here.
        sandbox: Of code: bubblewrap, or none (no protection but limits). None: bubblewrap.
        numpy: Programs and tests of code may import numpy.
        n: Samples per task.
        k: The k of pass@k; none above n.
        temperature: Of sampling.
        top_p: Of sampling.
        max_new_tokens: Longest completion.
        stop: Texts that end a completion. None: the benchmark's own.
        batch_size: Completions sampled at once.
        max_tasks: Use the first N tasks, after those of `skip_tasks`. None: all.
        skip_tasks: Leave out the first N tasks (a validation half and a test half of one file).
        chat_template: auto, always or never. None: auto for a benchmark, never for text prompts of one's own.
        question_format: Prompt without a chat template, with {question}. None: the question as it stands.
        system_prompt: System turn before conversations that have none; not before text that is continued as it stands.
        date_string: Date in chat templates that print one.
        chat_template_kwargs: Further variables of the chat template.
        greedy: Also draw one greedy completion per task.
        unscored: What a sample that could not be scored does to its task: reduce (n is one less), wrong, or leave_out
            (the task is left out). It is counted in any case.
        resamples: Bootstrap samples behind the standard errors.
        min_used_fraction: Smallest share of the tasks that must have a scored sample.
        label: Written before the names, as LABEL/pass@8, where a recipe has several passk evaluations.
        mode: What makes two correct completions the same in `distinct_correct`: answer, expression, sql, text, or
            module:function of a completion. None: that they are equal.
        decode, stripped_prompt, contrast_gate, contrast_threshold, contrast_eta, contrast_cutoff: see `DecodeOptions`.
    """

    dataset: str = "test"
    data: str | None = None
    answer_column: str = "answer"
    scorer: str | None = None
    databases: str | None = None
    allow_code_execution: bool = False
    sandbox: Literal["bubblewrap", "none"] | None = None
    numpy: bool = False
    n: int = 64
    k: list[int] = field(default_factory=lambda: [1, 8, 64])
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    stop: list[str] | None = None
    batch_size: int = 64
    max_tasks: int | None = None
    skip_tasks: int = 0
    chat_template: Literal["auto", "always", "never"] | None = None
    question_format: str | None = None
    system_prompt: str | None = None
    date_string: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    greedy: bool = True
    unscored: Literal["reduce", "wrong", "leave_out"] = "reduce"
    resamples: int = 1000
    label: str | None = None
    mode: str | None = None

    summary_metrics: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "max_new_tokens", "batch_size", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_tasks is not None and self.max_tasks < 1:
            raise ValueError(f"max_tasks={self.max_tasks}: must be at least 1, or empty for all")
        if self.skip_tasks < 0:
            raise ValueError(f"skip_tasks={self.skip_tasks}: must be at least 0")
        self.k = parse_k(self.k)
        if self.k[-1] > self.n:
            raise ValueError(f"k={self.k[-1]} is more than n={self.n}: pass@{self.k[-1]} needs as many samples")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: must be above 0; `greedy: true` adds greedy accuracy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must lie in (0, 1]")
        if self.chat_template not in (None, *CHAT_TEMPLATE):
            raise ValueError(f"chat_template={self.chat_template!r}: choose {', '.join(CHAT_TEMPLATE)}")
        if self.question_format is not None:
            check_template(self.question_format, ("question",), needs=("question",), what="question_format")
        if self.sandbox not in (None, "bubblewrap", "none"):
            raise ValueError(f"sandbox={self.sandbox!r}: choose bubblewrap or none")
        if self.unscored not in get_args(Unscored):
            raise ValueError(f"unscored={self.unscored!r}: choose {', '.join(get_args(Unscored))}")
        if self.scorer is not None:
            if not is_path(self.scorer):
                lookup(REWARDS, self.scorer, "scorer", error=DataError)
            self._refuse_code(self.scorer)
        self._mode = None if self.mode is None else resolve_mode(self.mode)
        names = ["greedy_accuracy", *(f"{name}@{k}" for name in ("pass", "keep_rate", "explore_rate") for k in self.k)]
        self.summary_metrics = tuple(self._named(name) for name in names)
        self._base: TaskCounts | None = None

    def _refuse_code(self, scorer: str) -> None:
        if scorer == "code" and not self.allow_code_execution:
            make_scorer("code")  # raises, with the reason

    def _named(self, name: str) -> str:
        return f"{self.label}/{name}" if self.label else name

    # ---------------------------------------------------------------- in a recipe
    def evaluate(
        self, model: Any, tokenizer: Any, datasets: Mapping[str, Any], context: EvalContext
    ) -> dict[str, Any]:
        """Measure `model`; call it on all processes.

        Raises:
            DataError: data, scorer or prompts cannot be used; a task with fewer scored samples than max(k).
        """
        from fdiv.inference.greedy import stop_token_ids

        loaded = self.load(datasets)
        inner = model.module if hasattr(model, "module") else model
        stop_ids = stop_token_ids(inner.get_base_model() if hasattr(inner, "get_base_model") else inner, tokenizer)
        draw = draw_with_transformers(model, tokenizer, self.batch_size)
        rows = self.samples(loaded, tokenizer, draw, stop_ids, seed=context.seed)
        context.report_rows(self.report(loaded, rows), self.min_used_fraction)
        name = f"{self.label.replace('/', '_')}_samples.jsonl" if self.label else "passk_samples.jsonl"
        number_type = str(next(model.parameters()).dtype)
        made_with = self.made_with(loaded, tokenizer, stop_ids, seed=context.seed, dtype=number_type)
        if process_state().is_main_process:
            write_samples(context.output_dir / name, rows, made_with)
        context.keep_examples(self._named("passk"), _examples(loaded, rows))
        counts = dataclasses.replace(self.counts(rows, str(context.output_dir / name)), made_with=made_with)
        found = self.metrics(rows, counts, context.seed, str(context.output_dir / name))
        notes: list[str] = []
        if context.stage == "before":
            self._base = counts
        else:
            earlier = context.output_dir.parent / "before" / name
            if self._base is None and earlier.is_file():  # a resumed run
                self._base = read_counts(earlier, self.unscored)
                notes = compare_made_with(made_with, self._base, str(earlier))
            if self._base is not None:
                found |= compare_with_base(
                    counts, self._base, self.k, source="this model", base_source="the start of training",
                    resamples=self.resamples, seed=context.seed,
                )  # fmt: skip
        flat: dict[str, Any] = {"unscored_samples": float(sum(counts.unscored.values()))}
        flat["distinct_correct"] = distinct_correct(rows, self._mode)
        for metric, entry in found.items():
            flat |= {metric: entry["value"], f"{metric}_se": entry["se"]}
        said = {self._named("base_samples"): "; ".join(notes)} if notes else {}
        return {self._named(metric): value for metric, value in flat.items()} | {"notes": said}

    # ---------------------------------------------------------------- the parts
    def load(self, splits: Mapping[str, Any] | None = None) -> LoadedTasks:
        """The tasks these settings name, cut by `skip_tasks` and `max_tasks`; `splits` are the run's own rows by name.

        Raises:
            DataError: see `load_tasks`; a benchmark that runs code without `allow_code_execution`; no task left.
        """
        if splits is not None and self.dataset in splits:
            tasks = tasks_of_rows(splits[self.dataset], f"split {self.dataset!r}", self.answer_column)
            loaded = LoadedTasks(tasks, "exact", chat="never")
        else:
            loaded = load_tasks(self.dataset, self.data, self.answer_column)
        scorer = self.scorer or loaded.scorer
        self._refuse_code(scorer)
        databases = self.databases or loaded.databases
        stop = loaded.stop if self.stop is None else tuple(self.stop)
        cut = loaded.tasks[self.skip_tasks :][: self.max_tasks]
        if not cut:
            raise DataError(
                f"skip_tasks={self.skip_tasks} leaves no task: {self.dataset} has {len(loaded.tasks)} of them"
            )
        return LoadedTasks(cut, scorer, stop, self.chat_template or loaded.chat, databases, len(loaded.tasks))

    def report(self, loaded: LoadedTasks, rows: Sequence[Mapping[str, Any]]) -> RowReport:
        """What became of the tasks of `loaded`, of which `rows` are the scored samples."""
        scored = {row["task_id"] for row in rows if row["correct"] is not None}
        silent = sum(task.task_id not in scored for task in loaded.tasks)
        read = len(loaded.tasks) if loaded.read is None else loaded.read
        signal = {"without a scored sample": silent}
        name = self._named("tasks of passk")
        return RowReport(name, read, read - len(loaded.tasks), without_signal=signal, unit="tasks")

    def make_scorer(self, loaded: LoadedTasks) -> Scorer:
        """The scorer of these tasks, which the caller closes."""
        return make_scorer(
            loaded.scorer,
            databases=loaded.databases,
            allow_code_execution=self.allow_code_execution,
            sandbox=self.sandbox,
            numpy=self.numpy,
        )

    def settings(self, loaded: LoadedTasks, seed: int) -> SamplingSettings:
        """How completions are sampled."""
        return SamplingSettings(self.temperature, self.top_p, self.max_new_tokens, loaded.stop, seed, self.contrast())

    def _prompts(self, loaded: LoadedTasks) -> tuple[PromptFormat, Encoding]:
        prompt = PromptFormat(
            chat_template=loaded.chat,  # type: ignore[arg-type]
            question_format=self.question_format or "{question}",
        )
        return prompt, Encoding(self.system_prompt, self.date_string, self.chat_template_kwargs)

    def made_with(
        self,
        loaded: LoadedTasks,
        tokenizer: Any,
        stop_ids: set[int],
        *,
        seed: int,
        dtype: str,
        backend: str = "transformers",
    ) -> dict[str, Any]:
        """The stamp of the samples: how prompts are encoded, how completions are sampled and scored."""
        prompt, encoding = self._prompts(loaded)
        chat = prompt.uses_chat(tokenizer) or any(not isinstance(task.prompt, str) for task in loaded.tasks)
        plain = {} if chat else {"question_format": prompt.question_format}
        return {
            **encoding_stamp(tokenizer, encoding, chat=chat, **plain),
            **self.settings(loaded, seed).stamp(),
            **self.decode_stamp(),
            "stop": list(loaded.stop),
            "scorer": without_secrets(loaded.scorer),
            "dtype": dtype,
            "backend": backend,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "end_tokens": sorted(stop_ids),
        }

    def samples(
        self,
        loaded: LoadedTasks,
        tokenizer: Any,
        draw: Draw,
        stop_ids: set[int],
        *,
        seed: int,
        cache_dir: Path | None = None,
        identity: Any = "",
    ) -> list[dict[str, Any]]:
        """Sample and score; call it on all processes.

        Args:
            loaded: the tasks.
            tokenizer: encodes prompts, decodes completions.
            draw: the back end.
            stop_ids: end tokens.
            seed: with task and sample number, determines a completion.
            cache_dir: where finished batches are stored and looked up; None: in memory only.
            identity: what completions depend on besides prompts and settings (the model).
        Returns:
            Rows of `samples.jsonl`, by task and sample; greedy completions have sample −1.
        """
        scorer = self.make_scorer(loaded)
        try:
            planned = self.passes(loaded, tokenizer, stop_ids, seed=seed, identity=identity)
            drawn: dict[str, Any] = {}
            for one in planned:
                cache = ItemCache(cache_dir, one.kind, planned[0].digest, process_state().process_index)
                drawn |= draw(one.requests, one.settings, cache)
            stop = planned[0].settings.stop
            texts = {key: _completion(found, tokenizer, stop_ids, stop) for key, found in drawn.items()}
            return self._scored(loaded.tasks, texts, scorer, cache_dir, planned[0].digest)
        finally:
            scorer.close()

    def passes(
        self, loaded: LoadedTasks, tokenizer: Any, stop_ids: set[int], *, seed: int, identity: Any = ""
    ) -> list[SamplingPass]:
        """The sampling pass, and with `greedy` the greedy one; arguments as of `samples`."""
        settings = self.settings(loaded, seed)
        prompt, encoding = self._prompts(loaded)
        requests = sampling_requests(loaded.tasks, tokenizer, prompt, settings, self.n, encoding, self.stripped_prompt)
        first = {request.key.rpartition("#")[0]: request for request in requests[:: self.n]}
        prompts = [[task, list(request.prompt_ids)] for task, request in first.items()]
        if settings.contrast is not None:
            prompts += [[task, list(request.stripped_ids)] for task, request in first.items()]
        digest = fingerprint(identity, prompts, settings.stamp() | self.decode_stamp(), sorted(stop_ids))
        planned = [SamplingPass("samples", requests, settings, digest)]
        if self.greedy:
            greedy = [dataclasses.replace(r, key=f"{task}#greedy") for task, r in first.items()]
            planned.append(SamplingPass("greedy", greedy, dataclasses.replace(settings, temperature=0.0), digest))
        return planned

    def _scored(
        self, tasks: Sequence[EvalTask], texts: Mapping[str, Mapping[str, Any]], scorer: Scorer,
        cache_dir: Path | None, digest: str,
    ) -> list[dict[str, Any]]:  # fmt: skip
        by_id = {task.task_id: task for task in tasks}
        wanted = {key: (by_id[key.rpartition("#")[0]], record["completion"]) for key, record in texts.items()}
        golds = [[task.answer, repr(sorted(task.columns.items()))] for task in tasks]
        digest = fingerprint(digest, scorer.name, self.databases, golds)
        cache = ItemCache(cache_dir, "scores", digest, process_state().process_index)
        scores = score_completions(scorer, wanted, cache=cache)
        rows = []
        for task in tasks:
            for number in [*([GREEDY] if self.greedy else []), *range(self.n)]:
                key = f"{task.task_id}#{'greedy' if number == GREEDY else f'{number:06d}'}"
                score = {name: value for name, value in scores[key].items() if name != "key"}
                rows.append({"task_id": task.task_id, "sample": number, **texts[key], **score})
        return rows

    def counts(self, rows: Sequence[Mapping[str, Any]], source: str) -> TaskCounts:
        """n and c per task of the sampled rows, greedy ones apart."""
        return counts_of_samples((row for row in rows if row["sample"] != GREEDY), self.unscored, source)

    def metrics(
        self, rows: Sequence[Mapping[str, Any]], counts: TaskCounts, seed: int, source: str
    ) -> dict[str, dict[str, float | None]]:
        """Every metric as `{"value", "se"}`; greedy accuracy is over tasks whose greedy completion has a score."""
        found = summarise(counts, self.k, source=source, resamples=self.resamples, seed=seed)
        greedy = [row for row in rows if row["sample"] == GREEDY]
        if greedy:
            unscored = "wrong" if self.unscored == "wrong" else "leave_out"
            if unscored == "wrong" or any(row["correct"] is not None for row in greedy):
                once = counts_of_samples(greedy, unscored, source)
                accuracy = summarise(once, [1], source=source, resamples=self.resamples, seed=seed)["pass@1"]
            else:
                accuracy = {"value": None, "se": None}
            found["greedy_accuracy"] = accuracy
        return found


def _completion(found: Any, tokenizer: Any, stop_ids: set[int], stop: Sequence[str]) -> dict[str, Any]:
    """What a back end gave as the record of a completion."""
    if not isinstance(found, Mapping):
        return completion_record(found, tokenizer, stop_ids, stop)
    if "ids" in found:
        return completion_record(found["ids"], tokenizer, stop_ids, stop)
    return {name: found[name] for name in ("completion", "tokens", "finish_reason")}


def _examples(loaded: LoadedTasks, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first completion of every task, the greedy one where there is one, with its prompt."""
    first = {row["task_id"]: row for row in reversed(rows)}
    return [
        {
            "prompt": task.prompt
            if isinstance(task.prompt, str)
            else "\n".join(turn["content"] for turn in task.prompt),
            "completion": first[task.task_id]["completion"],
            "truth": str(task.answer),
            "score": first[task.task_id]["correct"],
        }
        for task in loaded.tasks
    ]


def draw_with_transformers(model: Any, tokenizer: Any, batch_size: int) -> Draw:
    """Completions from a loaded model, on all processes."""

    def draw(requests: list[Any], settings: SamplingSettings, cache: ItemCache) -> dict[str, tuple[int, ...]]:
        from fdiv.inference.sampling import sample_completions

        # The coldest nucleus is the likeliest token: greedy decoding through the same, resumable pass.
        greedy = settings.temperature == 0
        return sample_completions(
            model,
            tokenizer,
            requests,
            temperature=1.0 if greedy else settings.temperature,
            top_p=1e-9 if greedy else settings.top_p,
            seed=settings.seed,
            batch_size=batch_size,
            contrast=settings.contrast,
            cache=cache,
            title="greedy completions" if greedy else "sampling",
        )

    return draw


def write_samples(path: Path, rows: Sequence[Mapping[str, Any]], made_with: Mapping[str, Any] | None = None) -> None:
    """Write the samples to `path` and greedy completions, where there are some, to `greedy.jsonl` (or
    `NAME_greedy.jsonl`) beside it; each file whole or not at all, and listed in `digests.json` with what it was
    `made_with`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    greedy = [{name: v for name, v in row.items() if name != "sample"} for row in rows if row["sample"] == GREEDY]
    beside = path.with_name(path.name.replace("samples.jsonl", "greedy.jsonl"))
    with listed(path, beside, made_with=made_with):
        _write_lines(path, [row for row in rows if row["sample"] != GREEDY])
        if greedy:
            _write_lines(beside, greedy)


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
