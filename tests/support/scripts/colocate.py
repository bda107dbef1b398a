"""One trainer with vLLM in its own process, on the CPU: prints its log as JSON lines.

    python -m tests.support.scripts.colocate NAME MODEL OUTPUT [--lora] [--as_shipped]

vLLM's CPU layers pack their weights when they are loaded and drop the parameters, so that TRL, which hands weights over one
by one, stops at the first of them (`--as_shipped`). Here they go through vLLM's own reload, which packs again. TRL passes no
number type either, and vLLM would serve float32 weights in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import json
import os

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", TORCHDYNAMO_DISABLE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")


def for_the_cpu() -> None:
    """Replace TRL's hand-over of weights by vLLM's reload of all of them."""
    from trl.generation import vllm_generation

    def sync_weights(self) -> None:
        weights = [(name, parameter.detach().clone()) for name, parameter in self._iter_named_params()]
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.reset_prefix_cache()

    vllm_generation.VLLMGeneration.sync_weights = sync_weights


def main() -> None:
    """Train three steps and print what is logged."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--as_shipped", action="store_true")
    args = parser.parse_args()

    from peft import LoraConfig
    from trl.generation import vllm_generation

    from tests.support.runs.all_trainers import build

    vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32")
    if not args.as_shipped:
        for_the_cpu()
    lora = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])} if args.lora else {}
    trainer = build(
        args.name, args.model, args.output, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=128,
        max_steps=3, logging_steps=1, learning_rate=0.05, **lora,
    )  # fmt: skip
    trainer.train()
    for entry in trainer.state.log_history:
        print(json.dumps(entry))


if __name__ == "__main__":
    main()
