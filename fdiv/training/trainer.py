"""What our trainers add to TRL's: per-example metrics, the stop on a non-finite loss, the model card section.

A trainer derives from `ObjectiveTrainerMixin` and its TRL class, hands the per-example values of each micro-batch to
`record_examples`, and says in `reduce_examples` what to log of them. One gather and one host read per micro-batch; the
rest is reduced when TRL logs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fdiv.divergences import Divergence, get_divergence
from fdiv.divergences.saturation import TRAINING_MAX_EXPONENT, check_max_exponent
from fdiv.errors import DataError, FdivError, NonFiniteLossError
from fdiv.files import write_text
from fdiv.inference.padding import longrope_note
from fdiv.models.loading import check_causal, keep_trainable_layout
from fdiv.models.logprobs import aux_loss_fault, check_fused_head
from fdiv.rows.report import MIN_USED_FRACTION, RowReport
from fdiv.terminal import info
from fdiv.training.finite import broken_weight, broken_weights_stop, what_stands
from fdiv.training.places import PlacesMixin
from fdiv.training.resume import ResumableMixin

if TYPE_CHECKING:
    from fdiv.memory.step_shape import StepShape

__all__ = ["ObjectiveTrainerMixin", "overflow_note", "own_options"]


#: Gradient norms of float32 overflow when exponentials near this exponent are squared and summed.
_OVERFLOWING_EXPONENT = 40.0


def overflow_note(divergence: Divergence, exponents: tuple[float, ...], max_exponent: float | None) -> str | None:
    """The overflow policy in a line; None where there is no unbounded exponential e^(k·log u), k of `exponents`."""
    places = [
        f"log u {'above' if k > 0 else 'below'} {check_max_exponent(max_exponent) / k:.4g}" for k in exponents if k
    ]
    if not places:
        return None
    cap = check_max_exponent(max_exponent)
    note = (
        f"max_exponent={cap:g}: the exponentials of {divergence.label} go on as logarithms at {' and '.join(places)}"
    )
    if cap >= _OVERFLOWING_EXPONENT:
        return f"{note}; gradient norms can overflow float32 with it: {TRAINING_MAX_EXPONENT:g} is known to train"
    return f"{note}; clamped_fraction in the log says how often"


def own_options(trainer: type[ObjectiveTrainerMixin], args: Any, model: Any) -> Any:
    """The options a trainer works with: a copy of `args`, so that whoever passed them finds them unchanged.

    Args:
        trainer: the trainer's class; its `config_class` is what `args` must be.
        args: the options, or None for the defaults, with a folder named after the model and the method to write to,
            and float32 on a machine without an accelerator.
        model: the model or its name.

    Raises:
        TypeError: `args` is something else.
        ValueError: the defaults leave out what the method needs (a reward, a target); the message names it. A
            DataError for an encoder-decoder model.
    """
    check_causal(model, ((getattr(args, "model_init_kwargs", None) or {}).get("revision")))
    config = trainer.config_class
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        machine = {} if torch.accelerator.is_available() else {"bf16": False, "use_cpu": True}
        return config(f"{Path(name).name or type(model).__name__}-{trainer._name}", **machine)
    if not isinstance(args, config):
        raise TypeError(
            f"args is a {type(args).__name__}: {trainer.__name__} needs {_article(config.__name__)} {config.__name__}"
        )
    return copy.copy(args)


def _article(name: str) -> str:
    return "an" if name[0] in "AEFIO" else "a"


class ObjectiveTrainerMixin(PlacesMixin, ResumableMixin):
    """Per-example metrics, guards and whole checkpoints for a TRL trainer; put it before the TRL class in the bases.

    A subclass calls `record_examples` once per micro-batch from its loss, overrides `reduce_examples`, and may
    override `objective_settings`, which goes to error messages, the model card and checkpoints.

    What listings, recipes and the model card say of a method stands on its trainer class, and only there:

    Attributes:
        config_class: the dataclass of its options; `args=None` makes one.
        title: one line for listings. paper: where the method comes from, as `arXiv:NUMBER`.
        columns: columns that the training rows must have. optional_columns: columns used where they are there.
        check_divergence: a static method that raises ValueError, with the reason, for a divergence that the objective
            cannot use; None for a method that has no `divergence`.
        tags: of the model card; the name of the method's file or folder is added.

    The name and the paper of the model card follow from the class, too (`NPOTrainer`: "NPO"), unless it gives TRL's
    `_name`, `_tag_names` or `_paper` itself.
    """

    config_class: ClassVar[type]
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    optional_columns: ClassVar[tuple[str, ...]] = ()
    check_divergence: ClassVar[Callable[[Any], Any] | None] = None
    tags: ClassVar[tuple[str, ...]] = ("trl", "fdiv")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if "_name" not in own:
            cls._name = cls.__name__.removesuffix("Trainer")
        if "_tag_names" not in own:
            home = [part for part in cls.__module__.split(".") if part != "trainer"][-1]
            cls._tag_names = [*cls.tags, home.strip("_").replace("_", "-")]
        if "_paper" not in own and "paper" in own:
            cls._paper = {"title": cls.paper, "id": cls.paper.removeprefix("arXiv:")}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._examples: dict[str, list[Tensor]] = {"train": [], "eval": []}
        self._example_columns: tuple[str, ...] = ()
        try:
            super().__init__(*args, **kwargs)
        except ValueError as error:
            if "Please specify `target_modules`" not in str(error):
                raise
            model = kwargs.get("model", args[0] if args else None)
            name = model if isinstance(model, str) else type(model).__name__
            raise DataError(
                f"PEFT has no default layers for an adapter on {name}: set `lora_target_modules` (`target_modules` of "
                "a peft_config) to `all-linear`, or to names of its layers"
            ) from error
        keep_trainable_layout(self.model)
        self.check_heads()
        if hasattr(self.args, "max_length") and (line := longrope_note(self.model, self.args.max_length)):
            self.note("longrope", [line])

    def check_heads(self) -> None:
        """Compare the fused heads that TRL put on the models with their own logits, and the load-balancing loss."""
        for model in (self.model, getattr(self, "ref_model", None)):
            if isinstance(model, torch.nn.Module):
                check_fused_head(model)
        if getattr(self, "aux_loss_enabled", False) and (fault := aux_loss_fault(self.model)) is not None:
            info(f"the load-balancing loss of {type(self.model).__name__} is left out ({fault})")
            self.aux_loss_enabled = False

    # ---------------------------------------------------------------- rows
    @property
    def notes(self) -> dict[str, str]:
        """What was said of the records this run uses, by name; they go to `result.json`."""
        return self.__dict__.setdefault("_notes", {})

    def note(self, name: str, lines: Sequence[str]) -> None:
        """Print `lines` and keep them among the notes."""
        for line in lines:
            info(line)
        if lines:
            self.notes[name] = "; ".join(lines)

    @property
    def row_reports(self) -> list[RowReport]:
        """What became of the rows of each data path, in the order in which they were read; `result.json` has them."""
        return self.__dict__.setdefault("_row_reports", [])

    def report_rows(self, report: RowReport, args: Any = None) -> None:
        """Keep and print what became of the rows of a data path.

        Args:
            report: the counts. args: the options, before TRL's constructor has set `self.args`.

        Raises:
            DataError: (a ValueError) fewer are left than `min_used_fraction` of the config asks for.
        """
        self.row_reports.append(report)
        report.show()
        report.check(getattr(args or self.args, "min_used_fraction", MIN_USED_FRACTION))

    # ---------------------------------------------------------------- to be overridden
    def reduce_examples(self, examples: dict[str, Tensor], mode: str) -> dict[str, float]:
        """What to log of `examples`: the recorded columns since the last log, `[N]` float64 on the host."""
        raise NotImplementedError

    def objective_settings(self) -> dict[str, Any]:
        """The settings that define the objective (divergence, β, …), for error messages and the model card."""
        return {}

    def overflow_exponents(self, divergence: Divergence) -> tuple[float, ...]:
        """The k of every e^(k·log u) that `max_exponent` caps: those of f′."""
        return divergence.exponents

    def run_settings(self) -> dict[str, Any]:
        """What a resumed run may change, and is told of: the objective's settings and the optimizer's."""
        return super().run_settings() | self.objective_settings()

    @classmethod
    def step_shape(cls, args: Any, *, peft: bool, processes: int, prompt_tokens: int | None = None) -> StepShape:
        """One micro-batch under `args`, for the memory plan.

        Args:
            args: the trainer's config. peft: whether an adapter is trained. processes: how many share the work.
            prompt_tokens: length of the prompts of rollouts, where it is known.

        Raises:
            FdivError: the config does not say (it has no `step_shape`), so the memory plan is not modelled.
        """
        shape = getattr(args, "step_shape", None)
        if shape is None:
            raise FdivError(f"not modelled: {type(args).__name__} has no step_shape (see fdiv.memory.step_shape)")
        return shape(peft=peft, processes=processes, prompt_tokens=prompt_tokens)

    @classmethod
    def freeze_untrained(cls, args: Any, model: torch.nn.Module) -> None:
        """Freeze the parameters of `model` that the method does not train; most train what they are given."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; the overflow cap is stated first, where the divergence has exponentials."""
        if hasattr(self.args, "max_exponent") and getattr(self.args, "divergence", None) is not None:
            divergence = get_divergence(self.args.divergence)
            note = overflow_note(divergence, self.overflow_exponents(divergence), self.args.max_exponent)
            if note is not None:
                info(note)
        return super().train(*args, **kwargs)

    # ---------------------------------------------------------------- metrics
    def record_examples(self, columns: dict[str, Tensor]) -> None:
        """Keep the per-example values of one micro-batch, gathered over the processes, until the next log.

        Args:
            columns: `[B]` tensors, the same names each time; `"loss"` is required and is what training stops on.

        Raises:
            NonFiniteLossError: when any example's loss, on any process, is NaN or infinite. All processes raise, in
                training before the backward pass, so no weight is touched.
        """
        training = self.model.training
        self._example_columns = tuple(columns)
        rows = torch.stack([column.detach().float() for column in columns.values()], dim=1)
        # Rows that the sampler repeats to fill the last batch are trained on, so they count in training only.
        rows = self.accelerator.gather(rows) if training else self.accelerator.gather_for_metrics(rows)
        finite = torch.isfinite(rows[:, self._example_columns.index("loss")])
        if not finite.all():
            self._raise_non_finite(rows[~finite][0].tolist(), training)
        self._examples["train" if training else "eval"].append(rows)

    def _raise_non_finite(self, row: list[float], training: bool) -> None:
        example = dict(zip(self._example_columns, row, strict=True))
        value = example.pop("loss")
        settings = ", ".join(f"{name}={setting}" for name, setting in self.objective_settings().items())
        last = self.state.log_history[-1] if self.state.log_history else {}
        shown = [key for key in ("loss", "grad_norm", "learning_rate") if key in last]
        last_metrics = ", ".join(f"{key}={last[key]:.4g}" for key in shown) or "none yet"
        step = self.state.global_step
        place = f"step {step + 1}" if training else f"evaluation at step {step}"
        raise NonFiniteLossError(
            f"{place}: the loss is {value} ({settings}); the example that made it so: "
            + ", ".join(f"{name}={number:.6g}" for name, number in example.items())
            + f"; last logged metrics: {last_metrics}. {self._stopped(training)}"
        )

    def _stopped(self, training: bool = True) -> str:
        """The state that a loss or gradient which is not finite leaves behind, and what to do."""
        broken = broken_weight(self.model, trained=False)
        if broken is not None:
            return broken_weights_stop(self, broken)
        stopped = "Training stopped before the optimizer step: the" if training else "The"
        return (
            f"{stopped} weights in memory are those after step {self.state.global_step}, and finite. Remedies: a "
            "lower learning_rate, max_exponent or max_grad_norm, float32 instead of half precision. "
            f"{what_stands(self)}"
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As in Trainer; a gradient that is not finite stops the run before the optimizer step.

        Under fp16 the gradient scaler meets such gradients by skipping the step, which is left to it; so it is to
        DeepSpeed, which has made its step by now.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self.args.fp16 and not self.is_deepspeed_enabled and not math.isfinite(float(norm)):
            settings = ", ".join(f"{name}={setting}" for name, setting in self.objective_settings().items())
            raise NonFiniteLossError(
                f"step {self.state.global_step + 1}: the gradient norm is {float(norm)} with a finite loss "
                f"({settings}). {self._stopped()}"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Reduce what was recorded since the last log and add it to `logs` under TRL's naming."""
        mode = "train" if self.model.training else "eval"
        recorded = self._examples[mode]
        if recorded:
            table = torch.cat(recorded).cpu().double()
            recorded.clear()
            examples = dict(zip(self._example_columns, table.unbind(1), strict=True))
            for name, value in self.reduce_examples(examples, mode).items():
                self._metrics[mode][name] = [value]  # TRL averages this list, adds the prefix, and clears it
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in TRL, from a clean slate: a `predict` before it leaves nothing behind."""
        self._examples["eval"].clear()
        return super().evaluate(*args, **kwargs)

    # ---------------------------------------------------------------- model card
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's model card with the settings of the objective and, for a local base model, its path."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero():
            return
        from huggingface_hub import ModelCard

        path = Path(self.args.output_dir) / "README.md"
        card = ModelCard.load(path)
        base = getattr(self.model.config, "_name_or_path", "") or "a model built in memory"
        card.text = card.text.replace("[None](https://huggingface.co/None)", f"`{base}`")
        rows = "\n".join(f"| {name} | `{value}` |" for name, value in self.objective_settings().items())
        section = f"### Objective\n\n| setting | value |\n| --- | --- |\n{rows}\n\n"
        card.text = card.text.replace("### Framework versions", section + "### Framework versions")
        write_text(path, str(card))
