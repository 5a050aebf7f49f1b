"""A fragment of a page for each audit: a jinja2 template, always rendered with autoescape. Style as
in a run's report."""

from __future__ import annotations

import base64
import math

from jinja2 import Environment, StrictUndefined

from gipo_megatron.reports.audit import Audit, Exemplar, Label
from gipo_megatron.reports.figures import rendered
from gipo_megatron.reports.pages import number, printable
from gipo_megatron.reports.run_page import PAGE
from gipo_megatron.reports.style import NEUTRAL, colour, panels, style

FRAGMENT = """
{% macro table(header, rows) %}
<div class="wide"><table>
<thead><tr>{% for cell in header %}<th{% if loop.index0 %} class="n"{% endif %}>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for cell in row %}<td{% if loop.index0 %} class="n"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<section class="audit">
<h2>Group audit: {{ name }}</h2>
{% if alarms %}
<ul class="alerts">{% for alarm in alarms %}<li>{{ alarm }}</li>{% endfor %}</ul>
{% else %}
<p class="soft">No alarm: two groups, and posteriors that tell them apart.</p>
{% endif %}
<p>{{ facts }}</p>
<h3>What p(high group) follows</h3>
{{ table(["quantity", "Pearson", "Spearman", "responses"], associations) }}
<h3>By source</h3>
<p class="soft">AUC: chance that a response from the source has the larger p(high group) than one from elsewhere.
{% if ami %}AMI of source and group: {{ ami }}.{% else %}One source only: no AUC, no AMI.{% endif %}</p>
{{ table(["source", "responses", "mean p(high)", "AUC"], sources) }}
<h3>By first word of the last turn</h3>
{{ table(["word", "responses", "mean p(high)", "AUC"], words) }}
<h3>How sure it is{% if history %}, and over training{% endif %}</h3>
<figure><img src="data:image/png;base64,{{ image }}" width="{{ width }}" alt="posterior entropy"><figcaption>Entropy of the posteriors:
0 is certain, ln 2 = 0.693 undecided.{% if flips %} Flip rate: share of the probe prompts that changed their group since the iteration
before.{% endif %}</figcaption></figure>
{% if history %}
{{ table(["groups/", "first", "mean", "last"], history) }}
{% endif %}
{% for title, rows in exemplars if rows %}
<h3>{{ title }}</h3>
<table class="samples">
<thead><tr><th class="facts">figures</th><th>prompt</th><th>response</th></tr></thead>
<tbody>
{% for row in rows %}
<tr><td class="facts">{{ row.facts }}</td>
<td><div class="text">{{ row.prompt }}</div></td><td><div class="text">{{ row.response }}</div></td></tr>
{% endfor %}
</tbody></table>
{% endfor %}
</section>
"""

DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Group audit</title>
<style>
{{ style|safe }}</style>
</head>
<body>
<h1>Group audit</h1>
{% for fragment in fragments %}{{ fragment|safe }}{% endfor %}
</body>
</html>
"""

TITLES = {
    "high": "Surest of the high group",
    "low": "Surest of the low group",
    "uncertain": "Least sure",
}


def audit_html(audit: Audit) -> str:
    """A <section>, everything escaped; its classes are those of a run's report."""
    png, width = _chart(audit)
    template = _environment().from_string(FRAGMENT)
    return template.render(
        name=printable(audit.name),
        alarms=audit.alarms,
        facts=facts(audit),
        associations=[
            (a.quantity, signed(a.pearson), signed(a.spearman), a.count) for a in audit.associations
        ],
        sources=[_label(label) for label in audit.sources],
        words=[_label(label) for label in audit.first_words],
        ami=None if audit.source_ami is None else f"{audit.source_ami:.2f}",
        image=base64.b64encode(png).decode(),
        width=width,
        flips="flip_rate" in audit.history,
        history=[
            (name, number(y[0]), number(math.fsum(y) / len(y)), number(y[-1]))
            for name, (_, y) in audit.history.items()
        ],
        exemplars=[
            (TITLES[kind], [_exemplar(row) for row in rows])
            for kind, rows in audit.exemplars.items()
        ],
    )


def audit_document(audits: list[Audit]) -> str:
    """A page of its own: no script, no network."""
    css = PAGE.partition("<style>\n")[2].partition("</style>")[0]
    return (
        _environment()
        .from_string(DOCUMENT)
        .render(style=css, fragments=[audit_html(audit) for audit in audits])
    )


def facts(audit: Audit) -> str:
    """One sentence: how many responses, how they are split, what p(high) follows most."""
    where = f" of steps {audit.steps[0]}–{audit.steps[1]}" if audit.steps else ""
    strongest = max(audit.associations, key=lambda a: abs(a.spearman or 0.0))
    follows = (
        f"p(high) follows {strongest.quantity} most (Spearman {signed(strongest.spearman)})"
        if strongest.spearman
        else "it follows nothing"
    )
    return (
        f"{audit.rows} responses{where}: {100 * audit.share_high:.0f} % in the high group (mean"
        f" p(high) {audit.mass_high:.2f}), mean entropy {audit.entropy.mean:.3f} of"
        f" {math.log(2):.3f} nats; {follows}."
    )


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _exemplar(row: Exemplar) -> dict[str, str]:
    score = "" if row.score is None else f" · score {number(row.score)}"
    source = f" · {printable(row.source)}" if row.source else ""
    figures = f"p(high) {row.p_high:.2f}{score} · {number(row.length)} tokens{source}"
    return {"facts": figures, "prompt": printable(row.prompt), "response": printable(row.response)}


def _label(label: Label) -> tuple[str, int, str, str]:
    return (
        printable(label.name) or "(none)",
        label.count,
        f"{label.p_high:.2f}",
        "–" if label.auc is None else f"{label.auc:.2f}",
    )


def _environment() -> Environment:
    return Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _chart(audit: Audit) -> tuple[bytes, int]:
    """PNG and its width in pixels on the page: histogram of the entropies and, of a training run,
    the flip rate over the steps."""
    with style():
        flips = audit.history.get("flip_rate")
        figure, axes = panels(
            ["posterior entropy (nats)", *(["flip rate over training"] if flips else [])]
        )
        edges = [
            math.log(2) * k / len(audit.entropy.bins) for k in range(len(audit.entropy.bins) + 1)
        ]
        axes[0].stairs(audit.entropy.bins, edges, fill=True, color=colour(0), alpha=0.6)
        axes[0].axvline(math.log(2), color=NEUTRAL, linewidth=0.8, linestyle=":")
        axes[0].set_ylabel("responses")
        if flips:
            axes[1].plot(*flips, color=colour(0))
            axes[1].set_xlabel("step")
            axes[1].set_ylim(0, None)
        return rendered(figure, "png"), round(figure.get_figwidth() * 105)
