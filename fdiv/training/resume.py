"""Checkpoints of our trainers: published whole, resumed only where they fit, with the state of the method in them."""

from __future__ import annotations

import copy
import copyreg
import json
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer_utils import rotate_checkpoints

from fdiv.errors import CheckpointError, FdivError
from fdiv.models.fingerprints import data_fingerprint
from fdiv.secrets import without_secrets
from fdiv.terminal import info
from fdiv.training.checkpoints import STAGING, checkpoint_fault, newest_checkpoint, publish, read_marker, recover
from fdiv.training.finite import check_weights, what_stands
from fdiv.training.sums import RunSumsMixin

__all__ = ["ResumableMixin"]

_SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_steps", "num_train_epochs"),
    *("seed", "data_seed", "bf16", "fp16", "max_length"),
)
# torch.save reports a full disk as a RuntimeError of its file writer, in one of these forms
_WRITER_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")


class ResumableMixin(RunSumsMixin):
    """Put it before a `transformers.Trainer` in the bases. See `fdiv.training.checkpoints` for what a checkpoint is.

    `train(resume_from_checkpoint=True)` takes the newest complete checkpoint of `output_dir` and says so; a path is
    checked in the same way. A checkpoint of another method, divergence, dataset, batch or number of processes is
    refused unless `force_resume` is set on the trainer first; other settings that changed are named in one line, and
    refused too under `exact_resume`.

    A subclass with state of its own overrides `save_method_state` and `load_method_state`; one with a further
    divergence or further data adds them to `run_identity`.
    """

    force_resume = False
    known_differences: tuple[str, ...] = ()  # entries of the identity that were compared before, in another way
    exact_resume = False  # whether settings that changed are refused too
    _staging: Path | None = None

    # ---------------------------------------------------------------- to be overridden
    def save_method_state(self, folder: Path) -> None:
        """Write what the method needs beside weights, optimizer and random state. Called on every process."""

    def load_method_state(self, folder: Path) -> None:
        """Read it back. Called on every process when model and optimizer have been loaded."""

    def run_identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote the checkpoint (JSON values)."""
        from fdiv.files import plain

        return {
            "trainer": type(self).__name__,
            "divergence": plain(getattr(self.args, "divergence", None)),
            "train dataset": data_fingerprint(self.train_dataset),
            "number of processes": self.accelerator.num_processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
        }

    def json_identity(self) -> dict[str, Any]:
        """`run_identity` as a marker holds it."""
        return _json_values(self.run_identity())

    def run_settings(self) -> dict[str, Any]:
        """What a resumed run may change, and is told of."""
        return {name: getattr(self.args, name, None) for name in _SETTINGS}

    # ---------------------------------------------------------------- saving
    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, which writes the options to `training_args.bin`: without secrets."""
        with self._options_for_disk():
            super()._save(*args, **kwargs)

    def _push_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """As in Trainer, which writes `training_args.bin` for the hub again."""
        with self._options_for_disk():
            super()._push_from_checkpoint(*args, **kwargs)

    @contextmanager
    def _options_for_disk(self) -> Iterator[None]:
        """The trainer's options with all that they hold, but secrets are left out where they are pickled."""
        options = self.args
        self.args = without = copy.copy(options)
        without.__class__ = _pickled_without_secrets(type(options))
        try:
            yield
        finally:
            self.args = options

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir = Path(super()._get_output_dir(trial))
        check_weights(self)  # before anything is written
        with self._saving_errors(output_dir):
            staged = self._write_staged(output_dir, model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(staged, output_dir, self.json_identity(), _json_values(self.run_settings()))
                shutil.rmtree(output_dir / STAGING, ignore_errors=True)  # NFS may have left something in it
                limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
                rotate_checkpoints(str(output_dir), limit, best, use_mtime=True)
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in Trainer, on all processes.

        Raises:
            NonFiniteLossError: a trained weight is NaN or infinite.
        """
        check_weights(self)
        super().save_model(output_dir, _internal_call)

    def _write_staged(self, output_dir: Path, model: Any, trial: Any) -> Path:
        """Everything of the checkpoint except its marker, by all processes, in the staging folder."""
        if self.args.should_save:
            output_dir.mkdir(parents=True, exist_ok=True)
            recover(output_dir)
        self.accelerator.wait_for_everyone()
        self._staging = output_dir / STAGING
        staged = self._staging / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(staged):
                self.state.best_model_checkpoint = str(output_dir / staged.name)
                if self.args.should_save:
                    self.state.save_to_json(str(staged / "trainer_state.json"))
            self._save_sums(staged)
            self.save_method_state(staged)
        finally:
            self._staging = None
        return staged

    @contextmanager
    def _saving_errors(self, output_dir: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in _WRITER_ERRORS):
                raise
            with suppress(OSError):  # then it stays aside, and resuming puts it back
                recover(output_dir)  # one that was being replaced may lie in the staging folder
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} could not be written to {output_dir}: {reason}. "
                f"Make room, or set another output_dir. {what_stands(self)}"
            ) from error

    # ---------------------------------------------------------------- resuming
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer.

        Raises:
            CheckpointError: no complete checkpoint, or one of another run.
        """
        if resume_from_checkpoint:
            resume_from_checkpoint = str(self._checked_checkpoint(resume_from_checkpoint))
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def _checked_checkpoint(self, wanted: str | bool) -> Path:
        output_dir = Path(self.args.output_dir)
        if self.args.should_save:
            recover(output_dir)
        self.accelerator.wait_for_everyone()
        if wanted is True:
            checkpoint, passed_over = newest_checkpoint(output_dir)
            for line in passed_over:
                info(f"resume: {line}")
            info(f"resume: from {checkpoint}, the newest complete checkpoint")
        else:
            checkpoint = Path(wanted)
            fault = checkpoint_fault(checkpoint) if checkpoint.is_dir() else "there is no such folder"
            if fault is not None:
                raise CheckpointError(
                    f"cannot resume from {checkpoint}: {fault}. Its pickled state is loaded only from a complete "
                    "checkpoint of fdiv; to start from its weights alone, give it as model_name_or_path"
                )
        with _reading_errors(checkpoint):
            TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        marker, identity = read_marker(checkpoint), self.json_identity()
        differences = _differences(marker["identity"], identity, known=self.known_differences)
        if differences and not self.force_resume:
            raise CheckpointError(
                f"{checkpoint} was written by another run: {'; '.join(differences)}. Restore these settings, or force "
                "it with force_resume: true (the run is then no continuation of the first)"
            )
        for line in differences:
            info(f"resume: forced, although {line}")
        changed = _differences(marker["settings"], _json_values(self.run_settings()), known=identity)
        if changed and self.exact_resume:
            raise CheckpointError(f"{checkpoint} was written under other settings: {'; '.join(changed)}")
        if changed:
            info(f"resume: changed since that checkpoint: {'; '.join(changed)}")
        return checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with _same_number_types(self.model), _reading_errors(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
            self._load_first_adapter(Path(resume_from_checkpoint))

    def _load_first_adapter(self, checkpoint: Path) -> None:
        """Load the trained adapter where a checkpoint holds a further one, such as the frozen start.

        PEFT writes `default` into the folder itself and others below it. Trainer of transformers below 5.18 then reads
        the others alone, and the run would go on from an untrained adapter.
        """
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled or not is_peft_model(model) or {"default"} >= model.peft_config.keys():
            return
        if any((checkpoint / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")):
            active = model.active_adapter
            model.load_adapter(str(checkpoint), "default", is_trainable=active == "default")
            model.set_adapter(active)

    def _load_best_model(self) -> None:
        with _same_number_types(self.model):
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading_errors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_sums(Path(checkpoint))
            self.load_method_state(Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading_errors(checkpoint):
            super()._load_rng_state(checkpoint)


@contextmanager
def _reading_errors(checkpoint: str | Path | None) -> Iterator[None]:
    """A file that agrees with its marker and is no state of a training (forged, or of another version) is named."""
    try:
        yield
    except (FdivError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # readers of torch, safetensors and transformers, which may raise anything
        reason = next(iter(str(error).strip().splitlines()), "")[:200]
        raise CheckpointError(
            f"{checkpoint} cannot be loaded ({type(error).__name__}: {reason}): remove it, and resume from the one "
            "before, or start again with --overwrite_output_dir true"
        ) from error


@cache
def _pickled_without_secrets(config: type) -> type:
    """A subclass whose instances are pickled as instances of `config`, without secrets."""

    def reduced(self: Any) -> tuple[Any, ...]:
        state = without_secrets(vars(self))
        state |= dict.fromkeys((name for name in vars(self) if name not in state), None)
        return copyreg._reconstructor, (config, object, None), state

    return type(config.__name__, (config,), {"__reduce__": reduced, "__reduce_ex__": lambda self, _: reduced(self)})


@contextmanager
def _same_number_types(model: Any) -> Iterator[None]:
    """Trained parameters keep their number type: PEFT turns a bfloat16 adapter (TRL's for QLoRA) into float32."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name]:
            parameter.data = parameter.data.to(before[name])


def _json_values(settings: dict[str, Any]) -> dict[str, Any]:
    """As they are read back from a marker: tuples as lists; what is no JSON counts by its type; without secrets."""
    from fdiv.files import plain

    return without_secrets(json.loads(json.dumps(plain(settings), default=lambda value: type(value).__name__)))


def _differences(stored: dict[str, Any], current: dict[str, Any], known: Container[str] = ()) -> list[str]:
    """One phrase for each entry that differs, but for those `known` to be compared elsewhere."""
    return [
        f"{name} is {current.get(name)!r} and was {stored[name]!r}"
        if name in stored
        else f"{name} is {current[name]!r} and was not recorded"
        for name in sorted(stored.keys() | current.keys())
        if name not in known and stored.get(name) != current.get(name)
    ]
