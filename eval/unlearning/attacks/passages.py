"""Text that has nothing to do with any forget row: openings of books out of copyright."""

__all__ = ["UNRELATED"]

_PASSAGES = """
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.

Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, I thought I
would sail about a little and see the watery part of the world.

It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.

Happy families are all alike; every unhappy family is unhappy in its own way.

Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do.

You will rejoice to hear that no disaster has accompanied the commencement of an enterprise which you have regarded
with such evil forebodings.

No one would have believed in the last years of the nineteenth century that this world was being watched keenly and
closely.

The Time Traveller (for so it will be convenient to speak of him) was expounding a recondite matter to us.

To Sherlock Holmes she is always the woman. I have seldom heard him mention her under any other name.

All children, except one, grow up. They soon know that they will grow up, and the way Wendy knew was this.

The Mole had been working very hard all the morning, spring-cleaning his little home.

Whether I shall turn out to be the hero of my own life, or whether that station will be held by anybody else, these
pages must show.

My father's family name being Pirrip, and my Christian name Philip, my infant tongue could make of both names nothing
longer than Pip.

In the year 1878 I took my degree of Doctor of Medicine, and proceeded to go through the course prescribed for
surgeons in the army.

When in the course of human events, it becomes necessary for one people to dissolve the political bands which have
connected them with another.

Four score and seven years ago our fathers brought forth on this continent a new nation, conceived in liberty.

We hold these truths to be self-evident, that all men are created equal, that they are endowed with certain
unalienable rights.
"""

UNRELATED = tuple({"text": " ".join(passage.split())} for passage in _PASSAGES.split("\n\n"))
"""Rows of `text`."""
