"""HTML of audits: a section for a page, or a whole page."""

from __future__ import annotations

import math

from markupsafe import Markup

from gipo_megatron.reports.audit import Audit, Label
from gipo_megatron.reports.figures import rendered
from gipo_megatron.reports.pages import number, render
from gipo_megatron.reports.style import NEUTRAL, colour, panels, pixels, style

TITLES = {
    "high": "Most certain of the high group",
    "low": "Most certain of the low group",
    "uncertain": "Least certain",
}


def audit_html(audit: Audit) -> Markup:
    """Return a <section>; its classes are those of a run's report."""
    chart, width = _chart(audit)
    section = render(
        "audit.html.j2",
        audit=audit,
        facts=facts(audit),
        associations=[
            (a.quantity, signed(a.pearson), signed(a.spearman), a.count) for a in audit.associations
        ],
        sources=[_label(label) for label in audit.sources],
        words=[_label(label) for label in audit.first_words],
        ami=None if audit.source_ami is None else f"{audit.source_ami:.2f}",
        chart=chart,
        width=width,
        history=[
            (name, number(y[0]), number(math.fsum(y) / len(y)), number(y[-1]))
            for name, (_, y) in audit.history.items()
        ],
        exemplars=[(TITLES[kind], rows) for kind, rows in audit.exemplars.items()],
    )
    return Markup(section)


def audit_document(audits: list[Audit]) -> str:
    sections = [audit_html(audit) for audit in audits]
    return render("audit_page.html.j2", title="Group audit", sections=sections)


def facts(audit: Audit) -> str:
    """Return one sentence: the number of responses, the split, what p(high) follows most."""
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


def _label(label: Label) -> tuple[str, int, str, str]:
    auc = "–" if label.auc is None else f"{label.auc:.2f}"
    return label.name or "(none)", label.count, f"{label.p_high:.2f}", auc


def _chart(audit: Audit) -> tuple[bytes, int]:
    """Return the PNG and its width: a histogram of the entropies and, of a training run, the flip
    rate over the steps."""
    flips = audit.history.get("flip_rate")
    with style():
        titles = ["posterior entropy (nats)", "flip rate over training"]
        figure, axes = panels(titles if flips else titles[:1])
        counts = audit.entropy.bins
        edges = [math.log(2) * k / len(counts) for k in range(len(counts) + 1)]
        axes[0].stairs(counts, edges, fill=True, color=colour(0), alpha=0.6)
        axes[0].axvline(math.log(2), color=NEUTRAL, linewidth=0.8, linestyle=":")
        axes[0].set_ylabel("responses")
        if flips:
            axes[1].plot(*flips, color=colour(0))
            axes[1].set_xlabel("step")
            axes[1].set_ylim(0, None)
        return rendered(figure, "png"), pixels(figure)
