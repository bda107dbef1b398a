"""SQLReward: row multisets, the attacks of a hostile query, and the gold queries of two real collections."""

import csv
import hashlib
import importlib.util
import sqlite3
from pathlib import Path

import pytest

import fdiv.rl.rewards
from fdiv.errors import DataError
from fdiv.rl.rewards import SQLReward, extract_sql
from tests.support.dated import asks_for_the_day


@pytest.fixture(scope="module")
def executor():
    path = Path(fdiv.rl.rewards.__file__).parent / "sql" / "executor.py"
    spec = importlib.util.spec_from_file_location("sql_executor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    path = tmp_path_factory.mktemp("databases") / "shop.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE item (name TEXT, price REAL, stock INTEGER)")
    rows = [("pen", 1.5, 10), ("ink", 4.25, 3), ("pad", 1.5, 0), ("pen", 2.0, None), ("box", 0.1 + 0.2, 7)]
    connection.executemany("INSERT INTO item VALUES (?, ?, ?)", rows)
    connection.execute("CREATE VIEW cheap AS SELECT * FROM item WHERE price < 2")
    connection.executescript("CREATE TABLE big (n INTEGER); " + "INSERT INTO big VALUES (1);" * 200)
    connection.commit()
    connection.close()
    return path


@pytest.fixture(scope="module")
def reward(shop):
    reward = SQLReward(shop, workers=1, time_limit=1.0, memory_limit=200 << 20, failure_limit=None)
    yield reward
    reward.close()


def verdict(reward, query, gold="SELECT count(*) FROM item"):
    before = dict(reward.counts)
    score = reward(["?"], [query], query=[gold])[0]
    (name,) = [name for name, count in reward.counts.items() if count != before.get(name, 0)]
    return score, name


@pytest.mark.parametrize(
    ("gold", "query", "expected"),
    [
        ("SELECT name FROM item", "SELECT name FROM item ORDER BY name;", 1.0),
        ("SELECT name FROM item", "SELECT DISTINCT name FROM item", 0.0),  # pen twice
        ("SELECT name, price FROM item", "SELECT name AS a, price AS b FROM item", 1.0),
        ("SELECT name, price FROM item", "SELECT price, name FROM item", 0.0),  # by position
        ("SELECT name FROM item", "SELECT name, price FROM item", 0.0),
        ("SELECT price FROM item WHERE name = 'box'", "SELECT 0.3 FROM item WHERE name = 'box'", 1.0),
        ("SELECT price FROM item WHERE name = 'box'", "SELECT 0.3001 FROM item WHERE name = 'box'", 0.0),
        ("SELECT 5 FROM item", "SELECT 5.0 FROM item", 1.0),
        ("SELECT 5 FROM item", "SELECT '5' FROM item", 0.0),
        ("SELECT stock FROM item", "SELECT coalesce(stock, 0) FROM item", 0.0),  # NULL is not 0
        ("SELECT count(*) FROM item", "WITH c AS (SELECT * FROM item) SELECT count(*) FROM c", 1.0),
        ("SELECT count(*) FROM cheap", "SELECT count(*) FROM item WHERE price < 2", 1.0),
        ("SELECT name FROM item LIMIT 1; SELECT price FROM item LIMIT 1", "SELECT price FROM item LIMIT 1", 1.0),
        (
            "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c WHERE n<5) SELECT DISTINCT n FROM c, item",
            "SELECT 1 FROM item",
            0.0,
        ),
    ],
)
def test_rows(reward, gold, query, expected):
    assert verdict(reward, query, gold)[0] == expected


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("ATTACH '{folder}/other.sqlite' AS other", "denied"),
        ("PRAGMA table_info(item)", "denied"),
        ("SELECT count(*) FROM pragma_table_info('item')", "denied"),
        ("SELECT name FROM pragma_database_list", "denied"),
        ("SELECT sql FROM sqlite_master", "denied"),
        ("SELECT count(*) FROM sqlite_schema", "denied"),
        ("SELECT count(*) FROM item WHERE EXISTS (SELECT 1 FROM sqlite_master)", "denied"),
        ("SELECT count(*) FROM dbstat", "denied"),
        ("DELETE FROM item", "denied"),
        ("INSERT INTO item VALUES ('x', 1, 1)", "denied"),
        ("UPDATE item SET price = 0", "denied"),
        ("DROP TABLE item", "denied"),
        ("CREATE TEMP TABLE t AS SELECT 1", "denied"),
        ("CREATE TABLE t (x)", "denied"),
        ("VACUUM INTO '{folder}/copy.sqlite'", "denied"),
        ("BEGIN", "denied"),
        ("SELECT load_extension('x')", "denied"),
        ("SELECT random() FROM item", "denied"),
        ("SELECT randomblob(900000000)", "denied"),
        ("SELECT hex(zeroblob(400000000))", "denied"),
        ("SELECT fts3_tokenizer('simple')", "denied"),
        ("SELECT writefile('{folder}/x', 'y')", "invalid"),
        ("SELECT count(*) FROM item; DROP TABLE item", "invalid"),
        ("SELECT count(*) FROM item; SELECT 5", "invalid"),
        ("SELEC 1", "invalid"),
        ("SELECT absent FROM item", "invalid"),
        ("SELECT CAST(x'ff' AS TEXT) FROM item", "invalid"),
        ("SELECT '\ud800' FROM item", "invalid"),
        ("SELECT 'a\0b' FROM item", "invalid"),
        ("SELECT printf('%2000000d', 1) FROM item", "wrong"),
        ("SELECT replace(hex(replace(printf('%9000d', 1), ' ', '11111111')), '3', '222222222222222222') FROM item", "invalid"),
        ("SELECT " + "(" * 500 + "1" + ")" * 500, "invalid"),
        ("SELECT 1" + " UNION ALL SELECT 1" * 100, "invalid"),
        ("SELECT 1," + " " * 30_000 + "2", "invalid"),
        ("SELECT 5", "reads_no_table"),
        ("VALUES (5)", "reads_no_table"),
        ("SELECT (SELECT 5) WHERE 1", "reads_no_table"),
        ("SELECT 1 FROM item WHERE 0", "wrong"),  # rows there are none
        ("EXPLAIN SELECT count(*) FROM item", "wrong"),
        ("", "no_answer"),
    ],
)  # fmt: skip
def test_refused_with_zero(reward, shop, query, expected):
    content = hashlib.sha256(shop.read_bytes()).hexdigest()
    assert verdict(reward, query.replace("{folder}", str(shop.parent))) == (0.0, expected)
    assert [path.name for path in shop.parent.iterdir()] == ["shop.sqlite"]
    assert hashlib.sha256(shop.read_bytes()).hexdigest() == content


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n+1 FROM c) SELECT count(*) FROM c", {"over_time"}),
        ("SELECT count(*) FROM big a, big b, big c, big d, big e", {"over_time"}),
        ("SELECT group_concat(a.n) FROM big a, big b, big c, big d", {"invalid", "over_time"}),
        (
            "WITH RECURSIVE c(n, t) AS (SELECT 1, printf('%900000d', 1) UNION ALL SELECT n+1, t||n FROM c) "
            "SELECT t FROM c ORDER BY t",
            {"over_memory", "over_time", "invalid"},
        ),
        # One opcode: the progress handler never gets a turn. The pool's own limit ends it.
        (
            "SELECT length(printf('%.*c', 2000000000, 'x')), n FROM big",
            {"over_time", "invalid", "over_memory", "wrong"},
        ),
    ],
)
def test_bombs_cost_one_answer(reward, query, expected):
    completions = ["SELECT count(*) FROM item", query, "SELECT count(*) FROM item"]
    before = dict(reward.counts)
    scores = reward(["?"] * 3, completions, query=["SELECT count(*) FROM item"] * 3)
    assert scores[0] == scores[2] == 1.0
    new = {name for name, count in reward.counts.items() if count != before.get(name, 0)} - {"correct"}
    assert new and new <= expected
    assert scores[1] == 0.0


def test_written_out_results(shop):
    hard_coded = "SELECT 5 FROM item LIMIT 1"
    plain, halves = (SQLReward(shop, workers=1, time_limit=5.0, check_on_halves=on) for on in (False, None))
    assert verdict(plain, hard_coded) == (1.0, "correct")  # one database cannot tell
    assert verdict(halves, hard_coded) == (0.0, "wrong_on_half")
    assert verdict(halves, "SELECT count(name) FROM item") == (1.0, "correct")
    plain.close(), halves.close()


TABLES = [
    "CREATE TABLE t (id TEXT PRIMARY KEY, v INTEGER) WITHOUT ROWID",
    "CREATE TABLE t (a TEXT, b INTEGER, v INTEGER, PRIMARY KEY (b, a)) WITHOUT ROWID",
    'CREATE TABLE t (v INTEGER, "a ""b" TEXT, PRIMARY KEY ("a ""b")) WITHOUT ROWID',
    "CREATE TABLE t (v INTEGER); CREATE TRIGGER keep BEFORE DELETE ON t BEGIN SELECT raise(ABORT, 'no'); END",
    "CREATE TABLE t (v INTEGER, id INTEGER PRIMARY KEY)",
]


@pytest.mark.parametrize("table", TABLES)
def test_every_table_is_halved(table, tmp_path):
    """Also one without rowids, and one whose trigger refuses that rows go."""
    path = tmp_path / "t.sqlite"
    connection = sqlite3.connect(path)
    connection.executescript(table)
    columns = [row[1] for row in connection.execute("PRAGMA table_info(t)")]
    for number in range(6):
        values = [number + 1 if name in ("v", "id", "b") else f"k{number}" for name in columns]
        connection.execute(f"INSERT INTO t VALUES ({', '.join('?' * len(columns))})", values)
    connection.commit()
    connection.close()
    reward = SQLReward(path, workers=1, time_limit=5.0)
    for gold, constant in (("SELECT count(*) FROM t", 6), ("SELECT sum(v) FROM t", 21)):
        assert verdict(reward, f"SELECT {constant} FROM t LIMIT 1", gold) == (0.0, "wrong_on_half")
    assert verdict(reward, "SELECT sum(1) FROM t", "SELECT count(*) FROM t") == (1.0, "correct")
    reward.close()


SHADOWS = [
    "WITH item AS (SELECT 1) SELECT 5 FROM item",
    "WITH item(name) AS (SELECT 5) SELECT name FROM item",
    "WITH item AS MATERIALIZED (SELECT 5 AS a) SELECT a FROM item",
    "WITH RECURSIVE item(n) AS (SELECT 5 UNION ALL SELECT n FROM item WHERE 0) SELECT n FROM item",
    "SELECT 5 FROM (SELECT 1) AS item",
    "WITH big AS (SELECT 1), item AS (SELECT * FROM big) SELECT 5 FROM item, big",
    "WITH ITEM AS (SELECT 1) SELECT count(*) + 4 FROM ITEM",
    "WITH cheap AS (VALUES (1)) SELECT 5 FROM cheap",
    "WITH a AS (WITH item AS (SELECT 5 AS x) SELECT x FROM item) SELECT x FROM a",
    'WITH "item" AS (SELECT 5 AS x) SELECT x FROM "ITEM"',
    "WITH [item] AS (SELECT 5 AS x) SELECT x FROM `item`",
    "SELECT (WITH item AS (SELECT 5 AS x) SELECT x FROM item)",
    "SELECT x FROM (WITH item(x) AS (VALUES (5)) SELECT x FROM item)",
    "WITH RECURSIVE item(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM item WHERE n < 5) SELECT max(n) FROM item",
    "WITH item AS (SELECT 5 AS x), other AS (SELECT x FROM item) SELECT x FROM other",
    "SELECT 5 WHERE 1 IN (1)",
]

#: Constants beside a table that they do not depend on: one database cannot tell, its halves can.
CONSTANTS = [
    "SELECT 5 UNION SELECT 5 FROM item WHERE 0",
    "SELECT count(*) + 5 FROM item WHERE 0",
    "SELECT coalesce((SELECT 5 FROM item LIMIT 1), 0)",
    "SELECT 5 FROM (SELECT 1) LEFT JOIN item ON 0",
    "SELECT 5 WHERE (SELECT count(*) FROM item) >= 0",
]


def test_constants_beside_a_table_fail_on_its_halves(shop):
    reward = SQLReward(shop, workers=1, time_limit=5.0)
    for query in CONSTANTS:
        assert verdict(reward, query) == (0.0, "wrong_on_half"), query
    reward.close()


@pytest.mark.parametrize("query", SHADOWS)
def test_a_name_that_shadows_a_table_reads_no_table(shop, query):
    with SQLReward(shop, workers=1, check_on_halves=False).pool as pool:
        reward = SQLReward(shop, check_on_halves=False)
        reward.pool = pool
        assert verdict(reward, query) == (0.0, "reads_no_table")
        assert verdict(reward, "WITH c AS (SELECT * FROM item) SELECT count(*) FROM c") == (1.0, "correct")


def test_whole_numbers_are_exact_and_others_within_the_tolerance(executor):
    """Every pair of neighbours: n and n + 1 at every size, as integers, as floats, and one of each."""
    for exponent in range(1, 16):
        number = 10**exponent + 3
        for first in (number, float(number)):
            assert executor.same_rows([(first,)], [(number,)], 1e-6)
            assert executor.same_rows([(first,)], [(float(number),)], 1e-6)
            for step in {1, number // 10**7 + 1, -1}:
                if abs(step) > number * 1e-12:
                    assert not executor.same_rows([(first,)], [(number + step,)], 1e-6)
                    assert not executor.same_rows([(first,)], [(float(number + step),)], 1e-6)
    assert executor.same_rows([(0.1 + 0.2,)], [(0.3,)], 1e-6)
    assert executor.same_rows([(2328.6000000000004,)], [(2328.6,)], 1e-6)
    assert executor.same_rows([(3,)], [(3.0000000000000004,)], 1e-6)
    assert not executor.same_rows([(3,)], [(3.000001,)], 1e-6)


def test_slow_answers_are_wrong_and_slow_golds_are_unusable(shop):
    """None of them ends the run, under the default failure_limit."""
    slow = "SELECT count(*) FROM big a, big b, big c, big d, big e"
    reward = SQLReward(shop, workers=1, time_limit=0.4)
    rows = [("SELECT count(*) FROM item", slow), (slow, "SELECT count(*) FROM item"), (slow, slow)]
    reward._recent.extend([False] * 200)
    scores = reward(["?"] * 30, [answer for _, answer in rows] * 10, query=[gold for gold, _ in rows] * 10)
    assert scores == [0.0, None, None] * 10
    assert (reward.counts["over_time"], reward.counts["unusable_gold"], reward.counts["timeout"]) == (10, 20, 0)
    assert "TimeoutError" in reward.unusable_golds[slow]
    reward.close()


def test_halves_are_left_out_where_the_copies_do_not_fit(shop, caplog):
    small = {"workers": 1, "memory_limit": 48 << 10}
    with pytest.raises(ValueError, match=r"check_on_halves: two copies of shop.sqlite .* raise memory_limit"):
        SQLReward(shop, check_on_halves=True, **small)(["?"], ["SELECT 1"], query=["SELECT 1"])
    assert SQLReward(shop, **small)._on_halves(shop) is False
    assert "answers are not checked on halves" in caplog.text
    assert SQLReward(shop)._on_halves(shop) is True


def test_a_gold_that_fails_on_a_half_decides_nothing_there(tmp_path):
    path = tmp_path / "two.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x TEXT)")
        connection.executemany("INSERT INTO t VALUES (?)", [("[1]",), ("[1, 2]",), ("nonsense",)])
    gold = "SELECT json_array_length(x) FROM t WHERE rowid < (SELECT count(*) FROM t)"
    reward = SQLReward(path, workers=1)
    assert verdict(reward, gold + " ORDER BY 1", gold) == (1.0, "correct")
    reward.close()


def test_order_counts_only_when_asked_for(shop):
    gold, up, down = "SELECT stock FROM item WHERE stock > 0 ORDER BY stock", "ORDER BY stock", "ORDER BY stock DESC"
    reward = SQLReward(shop, workers=1, time_limit=5.0, ordered="gold")
    query = "SELECT stock FROM item WHERE stock > 0 "
    assert [verdict(reward, query + order, gold)[0] for order in (up, down)] == [1.0, 0.0]
    assert verdict(reward, query + down, query)[0] == 1.0  # the gold has no order
    reward.close()


@pytest.mark.parametrize(
    ("gold", "reason"),
    [
        ("", "no statement in it"),
        ("SELECT absent FROM item", "no such column: absent"),
        ("SELECT name FROM item WHERE 0", "no rows"),
        ("DELETE FROM item", "PermissionError"),
        ("SELECT a.n FROM big a, big b", "more than max_rows=10000 rows"),
    ],
)
def test_a_gold_that_cannot_be_used_is_not_scored_and_is_named(reward, gold, reason):
    assert verdict(reward, "SELECT 1 FROM item", gold) == (None, "unusable_gold")
    assert reason in reward.unusable_golds[gold]


def test_no_such_database_and_names_that_lead_out(shop, tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        SQLReward(tmp_path / "none.sqlite")
    reward = SQLReward(shop.parent, workers=1, time_limit=5.0)
    row = {"query": ["SELECT count(*) FROM item"]}
    assert reward(["?"], ["SELECT count(*) FROM cheap UNION SELECT 5"], **row, db_id=["shop"]) == [0.0]
    assert reward(["?"], ["SELECT count(*) FROM item"], **row, db_id=["shop"]) == [1.0]
    for name in ("../shop", "/etc/passwd", "", "shop/../shop"):
        with pytest.raises(DataError, match="is no name of a database"):
            reward(["?"], ["SELECT 1"], **row, db_id=[name])
    with pytest.raises(DataError, match=r"no absent.sqlite"):
        reward(["?"], ["SELECT 1"], **row, db_id=["absent"])
    with pytest.raises(DataError, match="no column 'db_id'; it has: query"):
        reward(["?"], ["SELECT 1"], **row)
    reward.close()


@pytest.mark.parametrize(
    ("completion", "query"),
    [
        ("SELECT 1", "SELECT 1"),
        ("<think>SELECT 2</think>\nSELECT 1", "SELECT 1"),
        ("First\n```sql\nSELECT 2\n```\nno:\n```sql\nSELECT 1\n```\nDone.", "SELECT 1"),
        ("```\nSELECT 1\n```\n```python\nx\n```", "SELECT 1"),
        ("so <answer>SELECT 1</answer>", "SELECT 1"),
        ("```sql\nSELECT 2\n```\n<answer>\n```sql\nSELECT 1\n```\n</answer>", "SELECT 1"),
        ("```sql\nSELECT 1", ""),  # cut off
        ("<answer>SELECT 1", ""),
        ("", ""),
    ],
)
def test_extraction(completion, query):
    assert extract_sql(completion) == query


def test_numbers_that_round_differently_do_not_drag_their_row_along(executor):
    tiny = 1e-9
    golds = [("a", 1.0, 5.0), ("a", 1.0 + tiny, 7.0)]
    assert executor.same_rows(golds, [("a", 1.0, 7.0), ("a", 1.0 + tiny, 5.0)], 1e-6)
    assert not executor.same_rows(golds, [("a", 1.0, 5.0), ("a", 1.0, 5.0)], 1e-6)
    assert not executor.same_rows(golds, [("a", 1.0, 5.0), ("b", 1.0, 7.0)], 1e-6)
    assert not executor.same_rows([(1, 2), (3, 4)], [(1, 4), (3, 2)], 1e-6)  # each column alone agrees
    assert executor.same_rows([(None, b"x"), (2**60, "t")], [(2**60, "t"), (None, b"x")], 1e-6)
    assert executor.same_rows([(float("inf"),)], [(float("inf"),)], 1e-6)


@pytest.mark.parametrize(
    ("query", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT 'order by' FROM t -- order by", False),
        ("SELECT rank() OVER (ORDER BY a) FROM t", False),
        ("WITH c AS (SELECT 1) SELECT * FROM c order\n by 1 LIMIT 3", True),
    ],
)
def test_outermost_order(executor, query, ordered):
    assert executor.ordered_at_top(query) is ordered


def test_every_gold_query_of_sql_defog_matches_itself(shared_data):
    folder = shared_data / "data" / "sql_defog"
    rows = []
    for path in sorted((folder / "questions").glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as lines:
            rows += list(csv.DictReader(lines))
    assert len(rows) == 314
    reward = SQLReward(folder / "sqlite", database_column="db_name", workers=1, time_limit=20.0)
    names, golds = [row["db_name"] for row in rows], [row["query"] for row in rows]
    last = [gold.rstrip("; \n").split(";")[-1] for gold in golds]
    scores = reward(["?"] * 314, [f"```sql\n{query}\n```" for query in last], query=golds, db_name=names)
    # A gold that asks for the day may have no rows today: it is not scored, and never wrong.
    differ = [
        (name, query, score)
        for name, query, gold, score in zip(names, last, golds, scores, strict=True)
        if score != 1.0 and not (score is None and asks_for_the_day(gold))
    ]
    assert not differ
    # Another question's query on the same database is right only by chance.
    others = reward(["?"] * 313, last[1:], query=golds[:-1], db_name=names[:-1])
    assert sum(score == 1.0 for score in others) < 10
    reward.close()


def test_chinook(shared_data):
    path = shared_data / "data" / "chinook_sqlite" / "Chinook_Sqlite.sqlite"
    reward = SQLReward(path, workers=1, time_limit=20.0, check_on_halves=True)
    gold = (
        "SELECT ar.Name, count(*) FROM Artist ar JOIN Album al ON al.ArtistId = ar.ArtistId "
        "GROUP BY ar.ArtistId HAVING count(*) > 10"
    )
    other = (
        "SELECT Name, n FROM Artist JOIN (SELECT ArtistId, count(AlbumId) n FROM Album GROUP BY ArtistId) "
        "USING (ArtistId) WHERE n > 10"
    )
    written_out = "SELECT 'Led Zeppelin', 14 FROM Artist WHERE ArtistId = 1 UNION ALL SELECT 'Iron Maiden', 21 FROM Artist WHERE ArtistId = 1 UNION ALL SELECT 'Deep Purple', 11 FROM Artist WHERE ArtistId = 1"
    assert reward(["?"] * 3, [gold, other, written_out], query=[gold] * 3) == [1.0, 1.0, 0.0]
    assert reward.summary()["wrong_on_half"] + reward.summary()["wrong"] == 1
    reward.close()
