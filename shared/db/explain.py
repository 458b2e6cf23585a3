"""The plan of a statement, executed as the program executes it, with bound parameters. For tests
and benchmarks.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Executable, event

from shared.db.session import ReadSession


def explain(session: ReadSession, statement: Executable, options: str) -> list[Any]:
    """Execute `EXPLAIN (options) statement`; return the lines of the plan, or the one object with
    FORMAT JSON.
    """
    connection = session.connection()
    lines: list[Any] = []

    def prefix(
        conn: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool
    ) -> tuple[str, Any]:
        return f"EXPLAIN ({options}) {sql}", parameters

    def collect(
        conn: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool
    ) -> None:
        lines.extend(row[0] for row in cursor.fetchall())

    event.listen(connection, "before_cursor_execute", prefix, retval=True)
    event.listen(connection, "after_cursor_execute", collect)
    try:
        connection.execute(statement)
    finally:
        event.remove(connection, "before_cursor_execute", prefix)
        event.remove(connection, "after_cursor_execute", collect)
    return lines
