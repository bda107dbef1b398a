"""The wire: values arrive as they were, with identity and circles; whatever else arrives is refused, or a plain value."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fdiv.rl.rewards.sandbox.inside import wire
from fdiv.rl.rewards.sandbox.inside.wire import Decoder, Encoder, WireError

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.fractions()
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.datetimes().map(lambda moment: moment.replace(fold=0))
    | st.timedeltas()
)
KEYS = st.recursive(SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner), max_leaves=4)
VALUES = st.recursive(
    KEYS,
    lambda inner: (
        st.lists(inner) | st.tuples(inner) | st.dictionaries(KEYS, inner) | st.sets(KEYS) | st.binary().map(bytearray)
    ),
    max_leaves=10,
)


def refuse(form):
    raise WireError("not a value")


def sent(value):
    encoder = Encoder(refuse)
    form = encoder.value(value)
    form, nodes = json.loads(json.dumps([form, encoder.nodes]))
    return Decoder(nodes, refuse).value(form)


def whole(value):
    """A value with its types all the way down, in a form in which NaN equals itself and 0.0 is not -0.0."""
    if isinstance(value, float | complex):
        content = repr(value)
    elif isinstance(value, list | tuple):
        content = tuple(map(whole, value))
    elif isinstance(value, dict):
        content = tuple((whole(key), whole(item)) for key, item in value.items())
    elif isinstance(value, set | frozenset):
        content = frozenset(map(whole, value))
    else:
        content = bytes(value) if isinstance(value, bytearray) else value
    return type(value), content


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_values_arrive_as_they_were(value):
    assert whole(sent(value)) == whole(value)


def test_shared_and_circular_containers():
    shared = [1]
    value = {"a": shared, "b": (shared, {2})}
    value["self"] = value
    found = sent(value)
    assert found["self"] is found and found["a"] is found["b"][0]
    found["a"].append(2)
    assert found["b"][0] == [1, 2] and shared == [1]


LYING = {"__eq__": lambda *_: True, "__hash__": lambda *_: 0}


@pytest.mark.parametrize("kind", [type("Liar", (base,), LYING) for base in (int, str, float, list, tuple)])
def test_a_subclass_arrives_as_its_base(kind):
    value = kind()
    found = sent(value)
    assert type(found) is kind.__mro__[1]
    assert found != "something else"


TAGS = (
    "node", "tuple", "frozenset", "int", "float", "complex", "bytes", "range", "slice", "constant", "Fraction",
    "Decimal", "timedelta", "datetime", "date", "time", "type", "dict_keys", "dict_items", "dict_values", "yours", "mine",
)  # fmt: skip
KINDS = ("list", "dict", "set", "bytearray", "deque", "Counter", "OrderedDict", "defaultdict", "object")
FORMS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
        | st.tuples(st.sampled_from(TAGS), inner).map(list)
        | st.tuples(st.sampled_from(TAGS), inner, inner).map(list)
    ),
    max_leaves=8,
)
NODES = st.dictionaries(
    st.integers(0, 3).map(str), st.tuples(st.sampled_from(KINDS), FORMS, FORMS).map(list) | FORMS, max_size=3
)
ALLOWED = (
    type(None), bool, int, float, str, bytes, complex, tuple, list, dict, set, frozenset, bytearray, range, slice, type,
    type(...), type(NotImplemented), *wire.VIEWS, wire.collections.deque, wire.collections.Counter,
    wire.collections.OrderedDict, wire.collections.defaultdict, wire.fractions.Fraction, wire.decimal.Decimal,
    wire.datetime.date, wire.datetime.time, wire.datetime.datetime, wire.datetime.timedelta,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(FORMS, NODES | FORMS)
def test_whatever_arrives_is_refused_or_a_plain_value(form, nodes):
    try:
        found = Decoder(nodes, refuse).value(form)
    except WireError:
        return
    assert type(found) in ALLOWED


@pytest.mark.parametrize("line", [b"[1]\n", b"{\n", b"null\n", b"[" * 200_000 + b"\n", b"\xff\n", b"1" * 5000 + b"\n"])
def test_lines_that_are_no_message(line):
    ours, theirs = wire.socket.socketpair()
    with ours, theirs:
        ours.sendall(line) if len(line) < 100_000 else ours.sendall(line[:100_000] + b"\n")
        with pytest.raises(WireError):
            wire.Channel(theirs).receive()


def test_a_message_that_is_too_long(monkeypatch):
    monkeypatch.setattr(wire, "LONGEST", 1000)
    ours, theirs = wire.socket.socketpair()
    with ours, theirs:
        with pytest.raises(WireError, match="at most 1000"):
            wire.Channel(ours).send({"x": "y" * 1000})
        ours.sendall(b"x" * 2000)
        with pytest.raises(WireError, match="more than 1000"):
            wire.Channel(theirs).receive()
