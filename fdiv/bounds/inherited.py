"""Bounds of the keys that our configs take from transformers, TRL and PEFT.

What is outside would end in a traceback after the model has been loaded, train nothing or something else, or never be
noticed. A key that one of our configs declares itself follows that declaration.
"""

from __future__ import annotations

from fdiv.bounds import Declaration, declare

__all__ = ["INHERITED"]

_COUNT = declare(least=1, most=2**31 - 1)  # of rows, steps, processes
# The sampler makes a list as long as a batch before it looks at the data: 2**31 rows are 16 GiB of nothing.
_ROWS = declare(
    least=1, most=2**20, why="More rows at once fit no machine; gradient_accumulation_steps adds up batches"
)
_FROM_ZERO = declare(least=0, most=2**31 - 1)
_POSITIVE = declare(above=0)
_NOT_NEGATIVE = declare(least=0)
_SHARE = declare(least=0, most=1)
_SEED = declare(least=0, most=2**32 - 1, why="NumPy takes no other seed")
_EVERY = declare(above=0, most=2**31 - 1, why="A whole number of steps, or a share of all of them below 1")
_FILE = declare(file=True)
_PORT = declare(least=1, most=65_535)

INHERITED: dict[str, Declaration] = {
    # How much is trained.
    "num_train_epochs": declare(above=0, most=2**31 - 1, why="Without an epoch nothing is trained"),
    "max_steps": declare(least=1, most=2**31 - 1, also=(-1,), why="-1 leaves it to num_train_epochs"),
    "per_device_train_batch_size": _ROWS,
    "per_device_eval_batch_size": _ROWS,
    "gradient_accumulation_steps": _COUNT,
    # The step.
    "learning_rate": declare(
        above=0, most=1e6, why="At 0 nothing is trained; `fdiv eval` measures a model without training"
    ),
    "warmup_steps": _FROM_ZERO,
    "weight_decay": declare(least=0, most=1e3),
    "adam_beta1": declare(least=0, below=1),
    "adam_beta2": declare(least=0, below=1),
    "adam_epsilon": declare(above=0, most=1e3),
    "max_grad_norm": declare(least=0, why="0 turns clipping off"),
    "label_smoothing_factor": declare(least=0, below=1),
    "label_smoothing": declare(least=0, below=1),
    "neftune_noise_alpha": declare(above=0, most=1e6),
    "router_aux_loss_coef": declare(least=0, most=1e6),
    "torch_empty_cache_steps": _COUNT,
    "torch_compile_mode": declare(
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    ),
    "seed": _SEED,
    "data_seed": _SEED,
    # Logs, evaluations, checkpoints.
    "logging_steps": _EVERY,
    "eval_steps": _EVERY,
    "save_steps": _EVERY,
    "eval_delay": _FROM_ZERO,
    "eval_accumulation_steps": _COUNT,
    "save_total_limit": declare(least=1, most=2**31 - 1, why="null keeps all checkpoints"),
    "include_num_input_tokens_seen": declare(choices=("all", "non_padding", "no", True, False)),
    "report_to": declare(
        choices=(
            "none", "all", "azure_ml", "comet_ml", "mlflow", "neptune", "tensorboard", "trackio", "wandb",
            "codecarbon", "clearml", "dagshub", "flyte", "dvclive", "swanlab", "kubeflow",
        )
    ),
    "include_for_metrics": declare(choices=("inputs", "loss")),
    # Loading rows, several processes.
    "dataloader_num_workers": declare(least=0, most=4_096),
    "dataloader_prefetch_factor": _COUNT,
    "dataset_num_proc": declare(least=1, most=4_096),
    "accelerator_config": _FILE,
    "deepspeed": _FILE,
    "fsdp_config": _FILE,
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "local_rank": declare(least=-1, most=2**31 - 1),
    "test_split_size": declare(above=0, below=1),
    # Lengths.
    "max_length": _COUNT,
    "pad_to_multiple_of": declare(least=1, most=2**31 - 1, also=("auto",)),
    "max_completion_length": declare(least=1, most=2**31 - 1, null=False, why="Sampling has to end"),
    "vllm_max_model_length": _COUNT,
    # Preference pairs.
    "precompute_ref_batch_size": _ROWS,
    "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": _COUNT,
    "f_alpha_divergence_coef": _NOT_NEGATIVE,
    "discopop_tau": _POSITIVE,
    "ld_alpha": _SHARE,
    # Sampling.
    "num_generations": declare(
        least=2, most=2**31 - 1, null=False, why="A group of one has no advantage to learn from"
    ),
    "num_generations_eval": _COUNT,
    "generation_batch_size": _COUNT,
    "steps_per_generation": _COUNT,
    "temperature": _POSITIVE,
    "top_p": declare(above=0, most=1),
    "top_k": declare(least=0, most=2**31 - 1, why="0 takes all tokens"),
    "min_p": _SHARE,
    "repetition_penalty": _POSITIVE,
    "cache_implementation": declare(
        choices=("static", "offloaded_static", "dynamic", "offloaded", "quantized", "paged")
    ),
    "num_completions_to_print": _COUNT,
    "max_tool_calling_iterations": _COUNT,
    # GRPO's loss.
    "num_iterations": _COUNT,
    "epsilon": _NOT_NEGATIVE,
    "epsilon_high": _NOT_NEGATIVE,
    "delta": _POSITIVE,
    "importance_sampling_level": declare(choices=("token", "sequence")),
    "multi_objective_aggregation": declare(choices=("sum_then_normalize", "normalize_then_sum")),
    "scale_rewards": declare(choices=("group", "batch", "none", True, False)),
    "sapo_temperature_neg": _POSITIVE,
    "sapo_temperature_pos": _POSITIVE,
    "vespo_k_pos": _POSITIVE,
    "vespo_k_neg": _POSITIVE,
    "vespo_lambda_pos": _POSITIVE,
    "vespo_lambda_neg": _POSITIVE,
    "top_entropy_quantile": declare(above=0, most=1),
    "entropy_coef": _NOT_NEGATIVE,
    "entropy_coef_min": _NOT_NEGATIVE,
    "entropy_coef_max": _NOT_NEGATIVE,
    "entropy_coef_delta": _NOT_NEGATIVE,
    "entropy_target": _NOT_NEGATIVE,
    "off_policy_mask_threshold": _POSITIVE,
    # vLLM.
    "vllm_mode": declare(choices=("server", "colocate")),
    "vllm_model_impl": declare(choices=("vllm", "transformers")),
    "vllm_server_port": _PORT,
    "vllm_group_port": _PORT,
    "vllm_server_timeout": _POSITIVE,
    "vllm_gpu_memory_utilization": declare(above=0, most=1),
    "vllm_tensor_parallel_size": _COUNT,
    "vllm_importance_sampling_mode": declare(
        choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
    "vllm_importance_sampling_clip_max": _POSITIVE,
    "vllm_importance_sampling_clip_min": _NOT_NEGATIVE,
    "vllm_importance_sampling_cap": _POSITIVE,
    # Adapters and quantization.
    "lora_r": declare(least=1, most=65_536),
    "lora_alpha": declare(least=1, most=2**31 - 1, why="At 0 the adapter does nothing"),
    "lora_dropout": declare(least=0, below=1),
    "lora_task_type": declare(choices=("CAUSAL_LM",), why="The methods train causal language models"),
    "bnb_4bit_quant_storage": declare(choices=("uint8", "int8", "float16", "bfloat16", "float32", "float64")),
}  # fmt: skip
