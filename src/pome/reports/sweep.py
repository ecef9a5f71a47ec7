"""What a sweep found, for people: words, heat maps of K and beta, a table, one HTML page. No torch."""

from __future__ import annotations

import csv
import html
import io
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from pome.config.outputs import Reports
from pome.errors import printable
from pome.reports.inspection import write_texts
from pome.reports.sheet import HeatMap, shade
from pome.sweeping.grid import describe_rank_choice
from pome.sweeping.trials import Outcome, Trial


def list_heat_maps(outcome: Outcome) -> list[HeatMap]:
    """One map for every pair of layers and scale that was tried, in the order of the grid."""
    grid = outcome.grid
    maps = []
    found: dict[tuple[str, str, str, str], float] = {}
    for trial in outcome.trials:
        if trial.candidate is not None and trial.score is not None:
            params = trial.candidate.params
            at = ("+".join(params["layers"]), params["scale"], trial.candidate.rank_choice, f"{params['beta']:g}")
            found[at] = trial.score.scored.value
    cuts = list(dict.fromkeys(describe_rank_choice(cut) for cut in grid["cuts"]))
    betas = [f"{beta:g}" for beta in grid["beta"]]
    for layers in ("+".join(item) for item in grid["layers"]):
        for scale in grid["scale"]:
            cells = tuple(tuple(found.get((layers, scale, cut, beta)) for beta in betas) for cut in cuts)
            if any(cell is not None for row in cells for cell in row):
                maps.append(HeatMap(f"{layers}, scale {scale}", tuple(cuts), tuple(betas), cells))
    return maps


def show_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def show_interval(trial: Trial) -> str:
    """`-0.0094 to -0.0031`, or a dash."""
    interval = trial.difference.interval if trial.difference else None
    return f"{interval[0]:+.2g} to {interval[1]:+.2g}" if interval else "-"


def describe_outcome(outcome: Outcome) -> list[str]:
    """What the sweep says, in sentences."""
    lines = []
    for trial in outcome.trials:
        if trial.failed is not None:
            lines.append(f"{trial.label}: no score: {trial.failed}")
    best = outcome.best
    if best is None or best.score is None or best.difference is None:
        return lines
    gain = best.difference.delta
    count = sum(trial.candidate is not None and trial.score is not None for trial in outcome.trials)
    said = f"best of {count}: {best.label}, score {show_number(best.score.scored.value)}, {gain:+.4g} to fine-tuned"
    among = best.difference.best_interval
    if among is not None:
        said += f" (95 % interval, allowing for the choice: {among[0]:+.2g} to {among[1]:+.2g})"
    lines.append(said)
    if outcome.beats and among is None:
        lines.append("the scorer gives no per-example results: whether that is more than noise is not known")
    elif outcome.beats:
        lines.append("it is better than the fine-tuned model beyond noise")
    else:
        lines.append("nothing beats the fine-tuned model beyond noise")
    if outcome.manifest is None:
        lines.append("nothing was written; --write-best writes the best all the same")
    return lines


def make_command(outcome: Outcome, base: str, ft: str, out: str) -> str:
    """The `pome edit` that makes the best candidate."""
    best = outcome.best
    if best is None or best.candidate is None:
        return ""
    words = ["pome", "edit", base, ft, out]
    for name, value in best.candidate.params.items():
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{name.replace('_', '-')}", str(item)]
    return shlex.join(words)


def list_metrics(outcome: Outcome) -> list[str]:
    """Names of what the scorer told beside the score."""
    return list(dict.fromkeys(name for trial in outcome.trials if trial.score for name in trial.score.metrics))


def list_rows(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """A header, and a row of texts for each model, best first."""
    trains = any(trial.score is not None and trial.score.train is not None for trial in outcome.trials)
    metrics = list_metrics(outcome)
    header = ["model", *(["train"] if trains else []), "score", "difference", "95 % interval", *metrics]
    rows = []
    for trial in outcome.trials:
        score = trial.score
        if score is None:
            rows.append([trial.label, *(["-"] if trains else []), "failed", "-", "-", *["-"] * len(metrics)])
            continue
        delta = f"{trial.difference.delta:+.4g}" if trial.difference and trial.key != "fine-tuned" else "-"
        train = [show_number(score.train.value if score.train else None)] if trains else []
        interval = "-" if trial.key == "fine-tuned" else show_interval(trial)
        numbers = [show_number(score.metrics.get(name)) for name in metrics]
        rows.append([trial.label, *train, show_number(score.scored.value), delta, interval, *numbers])
    return header, rows


def make_csv(outcome: Outcome) -> str:
    """The table as CSV."""
    file = io.StringIO()
    header, rows = list_rows(outcome)
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue()


STYLE = """
:root { --page: #f7f7f5; --card: #fff; --ink: #1c2126; --soft: #5d6670; --line: #dcdfe2; --low: #eaf1f9;
  --high: #0b3c78; --on-high: #fff; --mark: #b3541e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2125; --ink: #e8eaec; --soft: #9ba4ad;
  --line: #343a40; --low: #1f2e40; --high: #a9d0ff; --on-high: #10141a; --mark: #f0965e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 20px 12px 50px; }
h1 { font-size: 22px; margin: 0 0 6px; } h2 { font-size: 16px; margin: 0 0 8px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; margin: 14px 0; }
.scroll { overflow-x: auto; } .soft { color: var(--soft); } p { margin: 0 0 6px; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; margin: 8px 0 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.heat td { border: 2px solid var(--card); border-radius: 6px; text-align: center; }
.heat td.best { outline: 2px solid var(--mark); outline-offset: -2px; font-weight: 700; }
tr.best td { font-weight: 700; } tr.plain td { color: var(--soft); }
"""


def make_page(outcome: Outcome, base: str, ft: str, out: str) -> str:
    """One HTML page that needs nothing else: no script, no network. Every text is escaped."""

    def say(text: str) -> str:
        return html.escape(printable(text, 2000))

    values = [t.score.scored.value for t in outcome.trials if t.candidate and t.score]
    best = outcome.best
    sections = [f"<section>{''.join(f'<p>{say(line)}</p>' for line in describe_outcome(outcome))}"]
    sections.append(f"<pre>{say(make_command(outcome, base, ft, out))}</pre></section>")
    better = "lower" if outcome.minimize else "higher"
    for heat in list_heat_maps(outcome):
        head = "".join(f"<th>beta {say(beta)}</th>" for beta in heat.columns)
        body = ""
        for name, scores in zip(heat.rows, heat.cells, strict=True):
            cells = "".join(_draw_cell(value, values, outcome.minimize, best) for value in scores)
            body += f"<tr><th>{say(name)}</th>{cells}</tr>"
        sections.append(
            f'<section><h2>{say(heat.title)}</h2><p class="soft">score, {better} is better; darker is better here</p>'
            f'<div class="scroll"><table class="heat"><tr><th></th>{head}</tr>{body}</table></div></section>'
        )
    header, rows = list_rows(outcome)
    body = ""
    for trial, row in zip(outcome.trials, rows, strict=True):
        kind = "best" if best and trial.key == best.key else "plain" if trial.candidate is None else ""
        body += f'<tr class="{kind}">{"".join(f"<td>{say(cell)}</td>" for cell in row)}</tr>'
    head = "".join(f"<th>{say(name)}</th>" for name in header)
    sections.append(
        f'<section><h2>All models</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div></section>'
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="color-scheme" content="light dark"><title>pome sweep</title><style>{STYLE}</style></head>'
        f'<body><main><h1>pome sweep</h1><p class="soft">{say(base)} to {say(ft)}</p>{"".join(sections)}</main></body>'
        "</html>\n"
    )


def _draw_cell(value: float | None, values: Sequence[float], minimize: bool, best: Trial | None) -> str:
    if value is None:
        return "<td>-</td>"
    place = shade(value, values, minimize)
    ink = "var(--on-high)" if place > 0.55 else "var(--ink)"
    kind = ' class="best"' if best and best.score and best.score.scored.value == value else ""
    mixed = f"color-mix(in srgb, var(--high) {100 * place:.0f}%, var(--low))"
    return f'<td{kind} style="background:{mixed};color:{ink}">{show_number(value)}</td>'


def write_sweep_reports(outcome: Outcome, reports: Reports, base: str, ft: str, out: str) -> list[Path]:
    """Write what was asked for; returns the paths. Raises OutputError."""
    made = write_texts(reports, lambda: make_page(outcome, base, ft, out), lambda: make_csv(outcome))
    if reports.plots:
        from pome.reports.plots import write_heat_maps

        made += write_heat_maps(list_heat_maps(outcome), outcome.minimize, Path(os.path.expanduser(reports.plots)))
    return made
