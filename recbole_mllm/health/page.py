"""The dataset's health as one HTML file: no network, no script, readable in the dark, on a phone and on paper."""

from __future__ import annotations

from pathlib import Path

from recbole_mllm.health.findings import findings
from recbole_mllm.health.measure import Health
from recbole_mllm.health.plot import plots
from recbole_mllm.health.text import facts
from recbole_mllm.health.wording import many, quantiles
from recbole_mllm.pages import environment

SPREADS = ("history length", "item popularity")  # facts that have a table of their own


def page(health: Health) -> str:
    """Return the page; every text in it is escaped."""
    told = findings(health)
    size = (
        many(health.n_users, "user", "users"), many(health.n_items, "item", "items"),
        many(health.n_interactions, "interaction", "interactions"),
    )  # fmt: skip
    of_users, of_items = quantiles(health.lengths), quantiles(health.popularity)
    return (
        environment(Path(__file__).parent / "templates")
        .get_template("health.html")
        .render(
            name=health.layout.name,
            summary=f"{', '.join(size)}: {many(len(told), 'warning', 'warnings') if told else 'nothing to warn of'}.",
            findings=told,
            facts=[(name, value) for name, value in facts(health) if name not in SPREADS],
            spread=[(name, a, b) for (name, a), (_, b) in zip(of_users, of_items, strict=True)],
            plots=plots(health),
        )
    )
