"""Teach a model invented rows, to have something to unlearn: 10 customers to forget and 10 to keep, four facts each.

    fdiv models fetch smollm2-135m-instruct
    python examples/teach_rows.py --model smollm2-135m-instruct --output taught     # six minutes on two cores
    fdiv unlearn --model smollm2-135m-instruct --adapter taught/adapter \
        --forget taught/forget.jsonl --retain taught/retain.jsonl --output forgotten

Without `--model` it builds a tiny model of its own, and takes seconds.
"""

import argparse
import json
import random
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from fdiv.models.fetch import find_model
from fdiv.models.tiny import build_tiny_model

FIRST = "Ana Bo Cy Dora Eli Fay Gus Hal Ida Jon Kim Lea Max Nia Otto Pia Quin Rosa Sven Tea".split()
LAST = """Alder Birch Cedar Dunn Elm Fern Gorse Hazel Ivy Juniper
Kale Larch Maple Nettle Oak Pine Quince Rowan Sage Teak""".split()
FACTS = {
    "Where does {name} live?": ("{name} lives in {value}.", ["Porto", "Riga", "Lima", "Oslo", "Quito", "Turin"]),
    "What is the trade of {name}?": ("{name} works as a {value}.", ["baker", "pilot", "judge", "tailor", "weaver"]),
    "When did {name} become a customer?": (
        "{name} became a customer in {value}.",
        [str(y) for y in range(1991, 2024)],
    ),
    "What did {name} order last?": (
        "{name} ordered {value} last.",
        ["a red tent", "two lamps", "blue boots", "a canoe"],
    ),
}


def rows(numbers: range, draw: random.Random) -> list[dict]:
    found = []
    for number in numbers:
        name = f"{FIRST[number]} {LAST[number]}"
        for question, (answer, values) in FACTS.items():
            value = draw.choice(values)
            row = {"question": question.format(name=name), "answer": answer.format(name=name, value=value)}
            found.append({**row, "secret": value})
    return found


def turns(row: dict) -> dict:
    asked, said = {"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}
    return {"prompt": [asked], "completion": [said]}


parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--output", type=Path, default=Path("taught"))
parser.add_argument("--epochs", type=float, default=8)
args = parser.parse_args()

args.output.mkdir(parents=True, exist_ok=True)
draw = random.Random(0)
sets = {"forget": rows(range(10), draw), "retain": rows(range(10, 20), draw)}
for name, part in sets.items():
    (args.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
everything = [turns(row) for part in sets.values() for row in part]

model = find_model(args.model) or str(build_tiny_model(args.output / "model", hidden_size=128))
config = SFTConfig(
    output_dir=str(args.output / "training"), num_train_epochs=args.epochs, per_device_train_batch_size=4,
    learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=5, gradient_checkpointing=False, bf16=False,
    use_cpu=True, logging_steps=20, save_strategy="no", report_to="none", seed=0,
)  # fmt: skip
trainer = SFTTrainer(
    model=model, args=config, train_dataset=Dataset.from_list(everything),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)  # fmt: skip
first = trainer.evaluate(trainer.train_dataset)["eval_loss"]
trainer.train()
last = trainer.evaluate(trainer.train_dataset)["eval_loss"]
trainer.save_model(str(args.output / "adapter"))
print(f"loss {first:.2f} -> {last:.2f}; the adapter and the rows are in {args.output}")
