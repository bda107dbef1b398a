"""A task for the worker pool that does what its items say."""

import os
import signal
import sys
import time


def prepare(settings):
    if settings.get("broken"):
        raise ImportError("no module of that name")
    if settings.get("stillborn"):
        os.register_at_fork(after_in_child=lambda: os._exit(1))


def answer(item):
    match item:
        case {"hang": True}:
            while True:
                pass
        case {"sleep": seconds}:
            time.sleep(seconds)
            return {"slept": seconds}
        case {"exit": status}:
            os._exit(status)
        case {"kill": number}:
            os.kill(os.getpid(), number)
        case {"segfault": True}:
            signal.raise_signal(signal.SIGSEGV)
        case {"allocate": size}:
            blocks = []
            for _ in range(size):
                blocks.append(bytearray(os.urandom(1024)) * 1024)
                time.sleep(0.001)
            return {"allocated": len(blocks)}
        case {"memory_error": True}:
            raise MemoryError
        case {"raise": text}:
            raise ValueError(text)
        case {"print": text}:
            sys.stdout.write(text)
            sys.stdout.flush()
            os.write(1, text.encode())
            return {"printed": True}
        case {"environment": name}:
            return {"value": os.environ.get(name)}
        case {"pid": True}:
            return {"pid": os.getpid()}
    return {"square": item["number"] ** 2, "length": len(item.get("text", ""))}
