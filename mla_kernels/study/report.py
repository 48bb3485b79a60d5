"""The HTML report: an index with status, time and findings, and a page per executed notebook.

Everything is in the files themselves (style, figures, formulas as MathML), so it reads without a network.
"""

from html import escape
from pathlib import Path

from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from mla_kernels.study.findings import findings, table
from mla_kernels.study.outcome import Outcome

# nbconvert's own page, less the scripts that it loads from elsewhere; index.html leads back.
PAGE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block body_header -%}{{ super() }}<p><a href="index.html">All notebooks</a></p>{%- endblock -%}
"""

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; width: 100% }
th, td { border-bottom: 1px solid #ddd; padding: .35rem .7rem; text-align: left; vertical-align: top }
td.number, .findings td:nth-child(2) { text-align: right; font-variant-numeric: tabular-nums }
.ok { color: #126b2e } .failed { color: #a4161a; font-weight: 600 }
code { font-size: .9em }
"""


class _OfflineRenderer(IPythonRenderer):
    """Markdown whose formulas are MathML. A formula beyond the converter stays as its LaTeX source."""

    def _mathml(self, latex: str, display: str) -> str:
        try:
            return convert(latex.replace("{aligned}", "{align*}"), display=display)
        except Exception:  # the converter's errors share no base class
            return f"<code>{escape(latex)}</code>"

    def block_math(self, body: str) -> str:
        return self._mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return self._mathml(body, "inline")

    def latex_environment(self, name: str, body: str) -> str:
        return self._mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")


def _markdown_to_html(source: str) -> str:
    return MarkdownWithMath(renderer=_OfflineRenderer(escape=False)).render(source)


def _outcome_row(outcome: Outcome) -> str:
    chosen = ", ".join(f"{name}={value!r}" for name, value in outcome.parameters.items())
    error = f"<br><code>{escape(outcome.error)}</code>" if outcome.error else ""
    return (
        f'<tr><td><a href="{outcome.notebook}.html">{escape(outcome.title)}</a>{error}</td>'
        f'<td class="{outcome.status}">{outcome.status}</td><td class="number">{outcome.seconds:.1f} s</td>'
        f"<td>{outcome.finished:%Y-%m-%d %H:%M} UTC</td><td><code>{escape(chosen)}</code></td></tr>"
    )


def write_report(outcomes: list[Outcome], executed: Path, directory: Path) -> tuple[Path, str | None]:
    """Write index.html and a page per outcome, made from `executed`/NAME.ipynb, into `directory`.

    Returns the index's path, and one line on why the findings could not be derived, or None.
    """
    directory.mkdir(parents=True, exist_ok=True)
    exporter = HTMLExporter(raw_template=PAGE, embed_images=True)
    exporter.register_filter("markdown2html", _markdown_to_html)
    for outcome in outcomes:
        body, _ = exporter.from_filename(str(executed / f"{outcome.notebook}.ipynb"))
        (directory / f"{outcome.notebook}.html").write_text(body)
    derived, problem = [], None
    try:
        derived = findings()
    except Exception as failure:  # a bad record must not cost the report of the notebooks
        problem = " ".join(f"findings: {type(failure).__name__}: {failure}".split())
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>mla_kernels: report</title>',
        f"<style>{STYLE}</style></head><body><h1>mla_kernels: report</h1>",
        "<table>\n<tr><th>notebook</th><th>status</th><th>time</th><th>finished</th><th>parameters</th></tr>",
        *map(_outcome_row, outcomes),
        "</table>",
    ]
    if problem:
        parts.append(f'<p class="failed">{escape(problem)}</p>')
    if derived:
        parts += [
            "<h2>Findings</h2><p>Derived from the records.</p>",
            table(derived).to_html(index=False, border=0, justify="left", classes="findings"),
        ]
    index = directory / "index.html"
    index.write_text("\n".join(parts) + "\n</body></html>\n")
    return index, problem
