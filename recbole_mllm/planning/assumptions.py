"""What a plan takes for granted, in words."""

from __future__ import annotations

from recbole_mllm.planning.devices import Device
from recbole_mllm.planning.models import STAGES, Models
from recbole_mllm.planning.prepared import Prepared
from recbole_mllm.planning.readers import CHARACTERS
from recbole_mllm.planning.request import Request
from recbole_mllm.planning.stages import Counted


def assumptions(p: Prepared, models: Models, counted: Counted, request: Request, named: Device | None) -> list[str]:
    """Return a line for each thing that is assumed."""
    texts, servers = _texts(p, models, counted), _servers(models, counted, request)
    return [*texts, *_rows(p, counted), *servers, *_machine(p, models, request, named)]


def _texts(p: Prepared, models: Models, counted: Counted) -> list[str]:
    out = []
    for kind, stage in (("item", "items"), ("user", "users")):
        if kind in counted.summaries.assumed and counted.counts[stage].prompts:
            most = getattr(p.settings.summary, f"{kind}_summary_tokens")
            better = "" if models.blueprint(stage) is None else "; --probe measures them"  # which asks no server
            out.append(f"{kind} summaries are {most} tokens long, their limit, as none is written yet{better}")
        elif counted.counts[stage].prompts:
            out.append(f"{kind} summaries not yet written are as long as those in the store, or as the probe's")
    return out


def _rows(p: Prepared, counted: Counted) -> list[str]:
    out = []
    if counted.sampled:
        out.append(
            f"tokens of {', '.join(s for s in STAGES if s in counted.sampled)} are those of a sample, scaled by prompts"
        )
    if p.is_trained and int(p.config["epochs"]) > 1:
        out.append("every epoch costs what the first does, and none is saved by early stopping")
    modes = p.config["eval_args"]["mode"].values()
    if "full" in modes and p.settings.ranking.full_sort != "brute":
        out.append("popular items stand for those the retriever will put first; what it costs itself is left out")
    if counted.counts["test"].images:
        out.append("images of one size become as many tokens; a vision tower's attention reaches over a whole tile")
    return out


def _servers(models: Models, counted: Counted, request: Request) -> list[str]:
    served = [stage for stage in STAGES if models.blueprint(stage) is None and counted.counts[stage].prompts]
    if not served:
        return []
    hours = (
        f"{request.requests_per_s:g} requests a second are answered, all servers together"
        if request.requests_per_s
        else "hours depend on the servers; --requests_per_s N prices them"
    )
    return [
        f"{', '.join(served)} ask servers: {CHARACTERS} characters are a token, and images' tokens are not known",
        hours,
    ]


def _machine(p: Prepared, models: Models, request: Request, named: Device | None) -> list[str]:
    out = []
    if named:
        out.append(
            f"{named.name} reaches {named.assumed_share_of_peak:.0%} of its peak arithmetic and "
            f"{named.assumed_share_of_bandwidth:.0%} of its memory's bandwidth; --probe measures this machine instead"
        )
    elif request.probe:
        out.append("seconds grow with the operations from what the probe measured here, on this machine as it was then")
    if request.workers > 1:
        out.append(
            f"work is split evenly over {request.workers} devices; loading and validation's metrics are left out"
        )
    if p.is_trained:
        out.append("memory of activations is an estimate by formula (docs/plan.md)")
    unknown = sorted(
        {
            a.family
            for s in models.anatomies()
            if (b := models.blueprint(s)) is not None and not b.body.architecture.known
            for a in [b.anatomy]
        }
    )
    out += [f"{family} is no family of docs/backbones.md: it is taken to share prefixes" for family in unknown]
    return out
