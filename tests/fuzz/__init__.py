"""A fuzz suite: damaged and hostile input of every kind, tried on the real commands, each outcome judged.

    python -m tests.fuzz --minutes 10            # every kind of input; `make fuzz MINUTES=10`
    python -m tests.fuzz --only caches --case 17 # one case again

A kind of input (`tests.fuzz.kinds`) makes its members from a seed, so that case 17 of a kind is always the same, and
judges what the command made of each.
"""
