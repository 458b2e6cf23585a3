"""A report as JSON, Markdown or one self-contained HTML page: of the same object,
`EvaluationReader.report`. Pure.

table.py      the rows that both show, as text markdown.py   Markdown page.py       HTML by Jinja2
with everything escaped (page.html.j2), plots as inline SVG, nothing loaded from anywhere
"""

from shared.evaluations.report.markdown import markdown
from shared.evaluations.report.page import POLICY, page

FORMATS = {"json": "application/json", "markdown": "text/markdown", "html": "text/html"}

__all__ = ["FORMATS", "POLICY", "markdown", "page"]
