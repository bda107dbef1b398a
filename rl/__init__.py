"""Reinforcement learning with verifiable rewards: DPH-RL."""

if __name__ != "fdiv.rl":
    raise ImportError("this folder is installed as fdiv.rl: use `import fdiv.rl`, not `import rl`")

__all__: list[str] = []
