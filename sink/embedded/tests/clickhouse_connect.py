"""clickhouse-connect, as it comes from PyPI, against the embedded engine: python clickhouse_connect.py HOST PORT"""

import datetime
import os
import sys

# The script has the name of the package; without this it would import itself.
sys.path = [p for p in sys.path if os.path.abspath(p or ".") != os.path.dirname(os.path.abspath(__file__))]

import clickhouse_connect  # noqa: E402
from clickhouse_connect.driver.exceptions import DatabaseError  # noqa: E402

host, port = sys.argv[1], int(sys.argv[2])


def check(what, got, want):
    if got != want:
        raise SystemExit(f"{what}: got {got!r}, wanted {want!r}")


def refused(what, code, call):
    try:
        call()
    except DatabaseError as error:
        text = str(error)
        if f"Code: {code}" not in text and f"code {code}" not in text:
            raise SystemExit(f"{what}: {text}")
        return
    raise SystemExit(f"{what}: was not refused")


for options in ({}, {"compress": False}, {"compress": "lz4"}, {"compress": "zstd"}, {"compress": "gzip"},
                {"autogenerate_session_id": False}):
    client = clickhouse_connect.get_client(host=host, port=port, **options)
    client.command("DROP TABLE IF EXISTS py")
    client.command("CREATE TABLE py (id UInt32, name String, at DateTime('UTC'), tags Array(String), note Nullable(String))"
                   " ENGINE = MergeTree ORDER BY id")
    at = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone.utc)
    rows = [[i, f"n\n\n{i}", at, ["a", "b"], None if i % 2 else "x"] for i in range(1000)]
    summary = client.insert("py", rows, column_names=["id", "name", "at", "tags", "note"])
    check("written rows", summary.written_rows, 1000)
    check("count", client.command("SELECT count() FROM py"), 1000)
    result = client.query("SELECT id, name, tags, note FROM py WHERE id = {id:UInt32}", parameters={"id": 7})
    check("row", result.result_rows, [(7, "n\n\n7", ["a", "b"], None)])
    result = client.query("SELECT {text:String}, {n:Nullable(Int8)}", parameters={"text": "tab\tquote'\nline\\", "n": None})
    check("parameters", result.result_rows, [("tab\tquote'\nline\\", None)])
    result = client.query("SELECT name FROM py WHERE name = %(name)s", parameters={"name": "n\n\n3"})
    check("client-side parameters", result.result_rows, [("n\n\n3",)])
    client.raw_insert("py", column_names=["id", "name"], insert_block="2000,raw\n2001,raw2\n", fmt="CSV")
    check("raw insert", client.command("SELECT count() FROM py WHERE id >= 2000"), 2)
    check("raw query", client.raw_query("SELECT 1 AS x FORMAT JSONEachRow"), b'{"x":1}\n')
    check("settings", client.query("SELECT getSetting('max_block_size')", settings={"max_block_size": 55}).result_rows, [(55,)])
    check("settings gone", client.query("SELECT getSetting('max_block_size')").result_rows != [(55,)], True)
    with client.query_row_block_stream("SELECT number FROM numbers(200000)") as stream:
        check("stream", sum(len(block) for block in stream), 200000)
    check("many columns", len(client.query("SELECT * FROM system.settings").result_rows) > 500, True)
    refused("unknown table", 60, lambda: client.query("SELECT * FROM nope"))
    refused("syntax", 62, lambda: client.command("SELEC 1"))
    refused("bad row", 117, lambda: client.raw_insert("py", column_names=["id"], insert_block="x\n", fmt="CSV"))
    check("nothing inserted", client.command("SELECT count() FROM py"), 1002)
    if options.get("autogenerate_session_id", True):
        client.command("CREATE TEMPORARY TABLE mine (a Int8) ENGINE = Memory")
        client.insert("mine", [[1], [2]], column_names=["a"])
        check("session", client.command("SELECT sum(a) FROM mine"), 3)
    client.close()

refused("user", 516, lambda: clickhouse_connect.get_client(host=host, port=port, username="alice", password="x"))
print("all passed")
