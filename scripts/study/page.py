"""docs/study.md and its plots, from the results: tables by the functions here, words by page.md.j2."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jinja2

from study import plots
from study.cells import COMPRESSED, LARGE_COUNT, RESULTS, list_cells
from study.edits import FIXED, Edit, pome
from study.evidence import (
    LEAST_GAIN,
    PREDICTORS,
    CellResult,
    Pooled,
    Setting,
    choose_rule,
    compare_choice,
    correct_holm,
    correlate_ranks,
    judge,
    list_role_effects,
    pool,
    read_results,
)
from study.scoring import COMPRESSIONS

DOCS = Path(__file__).resolve().parents[2] / "docs"
FIXED_NAMES = [edit.name for edit in FIXED]
GROUPED = [
    *(pome(roles).name for roles in ("up", "ffn")),
    Edit("truncate", "ffn", 0.25).name,
    Edit("scale", "ffn", beta=1.1).name,
    Edit("step", "ffn", bound=0.1).name,
]
CONTROLS = [
    pome("ffn").name,
    *(pome("ffn", power=power).name for power in (0.5, 1.0)),
    pome("ffn", 1.0, power=0.5).name,
    *(Edit("truncate", "ffn", K).name for K in (0.1, 0.25, 0.5)),
    *(Edit("scale", "ffn", beta=c).name for c in (0.8, 0.9, 1.1, 1.2, 1.3)),
    *(Edit("step", "ffn", bound=bound).name for bound in (0.05, 0.1, 0.2)),
    *(Edit(kind, "ffn").name for kind in ("equivalence", "rotate", "noise")),
]
EARLIER_LIMIT = 0.02  # nats of gain, which the page compares with


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def hundredfold(value: float, digits: int = 1) -> str:
    """100 times a value, with its sign; zero as +0.0."""
    return f"{round(100 * value, digits) + 0.0:+.{digits}f}"


def percent(value: float, digits: int = 1) -> str:
    return f"{hundredfold(value, digits)} %"


def span(interval: tuple[float, float]) -> str:
    return " to ".join(map(hundredfold, interval))


def by_setting(cells: Sequence[CellResult]) -> dict[Setting, list[CellResult]]:
    found: dict[Setting, list[CellResult]] = {}
    for cell in cells:
        found.setdefault(cell.setting, []).append(cell)
    return found


def tabulate_cells(cells: Sequence[CellResult]) -> str:
    """What was fine-tuned, how well, and how its deltas look."""

    def row(setting: Setting, seeds: list[CellResult]) -> list[str]:
        def mean(value: Callable[[CellResult], float]) -> float:
            return statistics.fmean(map(value, seeds))

        trained = mean(lambda c: c.tuned["train_accuracy"])
        return [
            setting.base, setting.task, setting.tuning, str(len(seeds)),
            f"{mean(lambda c: c.lines['base']['score']):.3f}", f"{mean(lambda c: c.tuned['score']):.3f}",
            f"{mean(lambda c: c.tuned['accuracy']):.3f}", f"{trained:.3f}",
            f"{mean(lambda c: c.feature('delta_over_weight')):.3f}", f"{mean(lambda c: c.feature('entropy_rank')):.2f}",
            f"{mean(lambda c: c.feature('departure')):.2f}",
        ]  # fmt: skip

    head = ["base", "task", "fine-tuning", "seeds", "loss of base", "loss", "right", "right in training"]
    head += ["delta / weight", "entropy rank", "departure"]
    return make_table(head, [row(*each) for each in by_setting(cells).items()])


def tabulate_small(cells: Sequence[CellResult]) -> str:
    """Cells whose fine-tuning gained too little for shares, in nats."""
    edits = [pome("up").name, pome("ffn").name, Edit("scale", "model", beta=1.1).name]
    rows = [
        [str(cell.setting), str(cell.seed), f"{cell.gain:+.3f}", *(f"{cell.change(edit):+.3f}" for edit in edits)]
        for cell in cells
    ]
    return make_table(["cell", "seed", "gain, nats", *edits], rows)


def count_words(cells: Sequence[CellResult], edit: str) -> Counter[str]:
    """In how many cells an edit was better or worse beyond noise, allowing for the number of edits."""
    return Counter(judge(cell, FIXED_NAMES)[edit].word for cell in cells if edit in cell.lines)


def pool_edits(cells: Sequence[CellResult], edits: Sequence[str]) -> dict[str, Pooled]:
    found = {edit: pool(cells, edit) for edit in edits}
    return {edit: pooled for edit, pooled in found.items() if pooled}


def tabulate_fixed(cells: Sequence[CellResult]) -> str:
    """The twelve edits over all cells."""
    pooled = pool_edits(cells, FIXED_NAMES)
    holm = correct_holm({edit: each.p for edit, each in pooled.items()})
    rows = []
    for edit, each in pooled.items():
        words = count_words(cells, edit)
        right = pool(cells, edit, "right", relative=False)
        assert right
        with_it = [cell for cell in cells if edit in cell.lines]
        forgot = [
            cell.lines[edit]["other_loss"] - cell.tuned["other_loss"] for cell in with_it if "other_loss" in cell.tuned
        ]
        gap = statistics.fmean(cell.lines[edit]["calibration"] - cell.tuned["calibration"] for cell in with_it)
        departure = statistics.median(cell.lines[edit]["departure"] for cell in with_it)
        rows.append([
            edit, f"{departure:.2f}", percent(each.mean), span(each.interval), f"{holm[edit]:.3f}",
            f"{each.fell} of {each.cells}", f"{words['better']} / {words['worse']}",
            f"{100 * right.mean:+.1f} ({span(right.interval)})",
            f"{statistics.fmean(forgot):+.3f}" if forgot else "", f"{100 * gap:+.1f}",
        ])  # fmt: skip
    head = ["edit", "departure", "share of the gain lost", "95 % interval", "p (Holm)", "loss fell in"]
    head += ["better / worse beyond noise", "points right", "other text, nats", "calibration error, points"]
    return make_table(head, rows)


def tabulate_groups(cells: Sequence[CellResult], key: str, edits: Sequence[str]) -> str:
    """Share of the gain that each edit loses, over the settings that share a base or a way of fine-tuning, and in how
    many cells the first edit lowers the loss."""
    rows = []
    for value in dict.fromkeys(getattr(cell.setting, key) for cell in cells):
        mine = [cell for cell in cells if getattr(cell.setting, key) == value]
        fell = sum(cell.share(edits[0]) < 0 for cell in mine)
        row = [value, f"{len(by_setting(mine))} / {len(mine)}", f"{fell} of {len(mine)}"]
        for edit in edits:
            each = pool(mine, edit)
            row.append(f"{100 * each.mean:+.1f} ({span(each.interval)})" if each else "")
        rows.append(row)
    return make_table([key, "settings / cells", f"loss fell by {edits[0]}", *edits], rows)


def tabulate_settings(cells: Sequence[CellResult], edits: Sequence[str]) -> str:
    """Share of the gain that each edit loses, by setting, with the interval over examples and seeds; for the first edit
    the loss before and after it too."""
    rows = []
    for setting, seeds in by_setting(cells).items():
        before = statistics.fmean(cell.tuned["score"] for cell in seeds)
        after = statistics.fmean(cell.lines[edits[0]]["score"] for cell in seeds)
        row = [setting.base, setting.task, setting.tuning, f"{before:.3f} to {after:.3f}"]
        for edit in edits:
            each = pool(seeds, edit)
            row.append(f"{100 * each.mean:+.1f} ({span(each.interval)})" if each else "")
        rows.append(row)
    return make_table(["base", "task", "fine-tuning", f"loss, by {edits[0]}", *edits], rows)


def with_grid(cells: Sequence[CellResult]) -> list[CellResult]:
    """Cells on which every edit was scored."""
    return [cell for cell in cells if pome("up", 0.25).name in cell.lines]


def list_edits(cells: Sequence[CellResult]) -> list[str]:
    """Names of all edits that a cell has, without those that are compressed too."""
    names = dict.fromkeys(name for cell in cells for name in cell.lines if "+" not in name)
    return [name for name in names if name not in ("base", "fine-tuned")]


def tabulate_wide(cells: Sequence[CellResult]) -> str:
    """Every edit of the grid on the cells that have it, the best mean first."""
    wide = with_grid(cells)
    pooled = pool_edits(wide, list_edits(wide))
    holm = correct_holm({edit: each.p for edit, each in pooled.items()})
    rows = [
        [edit, percent(each.mean), span(each.interval), f"{holm[edit]:.2f}", f"{each.fell} of {each.cells}"]
        for edit, each in sorted(pooled.items(), key=lambda item: item[1].mean)
    ]
    return make_table(["edit", "share of the gain lost", "95 % interval", "p (Holm)", "loss fell in"], rows)


def tabulate_routes(cells: Sequence[CellResult]) -> str:
    """How many choices of experts an edit changes on held-out examples, beside what fine-tuning changed."""
    mixed = [cell for cell in cells if "routes_moved" in cell.tuned]
    if not mixed:
        return ""
    tuned = statistics.fmean(cell.lines["base"]["routes_moved"] for cell in mixed)
    rows = [["the base (what fine-tuning moved)", f"{100 * tuned:.1f} %", ""]]
    for edit in FIXED_NAMES:
        moved = statistics.fmean(cell.lines[edit]["routes_moved"] for cell in mixed)
        rows.append([edit, f"{100 * moved:.1f} %", percent(mean_share(mixed, edit))])
    return make_table(
        ["edit", "choices of experts that differ from the fine-tuned model's", "share of the gain lost"], rows
    )


def tabulate_reward(cells: Sequence[CellResult]) -> str:
    """Fine-tuning by reward, by answers that are right: its loss need not fall."""
    rewarded = [cell for cell in cells if cell.setting.tuning == "reward"]
    if not rewarded:
        return ""
    rows = []
    for edit in ("base", "fine-tuned", *FIXED_NAMES):
        right = statistics.fmean(cell.lines[edit]["accuracy"] for cell in rewarded)
        loss = statistics.fmean(cell.change(edit) for cell in rewarded)
        change = pool(rewarded, edit, "right", relative=False)
        told = f"{100 * change.mean:+.1f} ({span(change.interval)})" if change and edit != "fine-tuned" else ""
        rows.append([edit, f"{100 * right:.1f}", told, f"{loss:+.3f}"])
    return make_table(["edit", "right, %", "points beside the fine-tuned model", "loss, nats"], rows)


def tabulate_large(cells: Sequence[CellResult]) -> str:
    """Edits of the reaction BERT's two fine-tunes on many held-out reactions, in nats and in points."""
    rows = []
    for cell in cells:
        names = [name for name in cell.lines if name not in ("base", "fine-tuned")]
        loss, right = (judge(cell, names, key) for key in ("loss", "right"))
        for name in names:
            nats = [f"{value:+.4f}" for value in (loss[name].change, *loss[name].interval)]
            points = [f"{100 * value:+.2f}" for value in (right[name].change, *right[name].interval)]
            told = [f"{each[0]} ({each[1]} to {each[2]})" for each in (nats, points)]
            rows.append([cell.setting.task, name, *told, percent(cell.share(name), 2), loss[name].word])
    head = ["task", "edit", "change of the loss, nats", "right answers, points", "share of the gain lost"]
    return make_table([*head, "beyond noise"], rows) if rows else ""


def tabulate_compression(cells: Sequence[CellResult]) -> str:
    """What compression costs, and what an edit changes before it and after it, in shares of the gain."""
    seen = [cell for cell in cells if any(name.endswith("8 bits") for name in cell.lines)]
    rows = []
    for edit in (None, *(each.name for each in COMPRESSED)):
        row = [edit or "no edit: cost of the compression", percent(mean_share(seen, edit)) if edit else ""]
        for how in COMPRESSIONS:
            rest = f"fine-tuned + {how}"
            after = f"{edit or 'fine-tuned'} + {how}"
            both = [cell for cell in seen if after in cell.lines]
            row.append(percent(statistics.fmean(c.share(after) - (c.share(rest) if edit else 0.0) for c in both)))
        rows.append(row)
    return make_table(["edit", "stored in full", *COMPRESSIONS], rows)


def mean_share(cells: Sequence[CellResult], edit: str) -> float:
    return statistics.fmean(cell.share(edit) for cell in cells if edit in cell.lines)


def tabulate_choice(cells: Sequence[CellResult]) -> str:
    """The edit chosen on training data."""
    rows = []
    for found in filter(None, map(compare_choice, cells)):
        cell = found["cell"]
        row = [str(cell.setting), str(cell.seed), str(found["edits"]), found["by_train"]]
        rows.append([*row, percent(found["change_by_train"] / cell.gain), found["best"],
                     percent(found["change_best"] / cell.gain)])  # fmt: skip
    head = ["cell", "seed", "edits", "best on training data", "its held-out share lost", "best held-out", "its share"]
    return make_table(head, rows)


def tabulate_rule(cells: Sequence[CellResult], edits: Sequence[str]) -> tuple[str, str, bool]:
    """What the rule of the choosing half does on the other half; the rule in words; whether it may be called safe."""
    shared = [edit for edit in edits if all(edit in cell.lines for cell in cells)]
    rule = choose_rule(cells, shared)
    rows, safe = [], True
    for half, wanted in (("choosing", True), ("judging", False)):
        mine = [cell for cell in cells if cell.setting.chooses is wanted]
        effects = [rule.effect(cell) for cell in mine]
        found = Counter(judge(cell, shared)[rule.edit].word for cell in mine if rule.effect(cell))
        better = sum(effect < 0 for effect in effects)
        rows.append([half, str(len(mine)), str(sum(map(bool, effects))), percent(statistics.fmean(effects), 2),
                     percent(max(effects), 2), str(better), str(found["better"]), str(found["worse"])])  # fmt: skip
        safe = safe and not found["worse"] and 2 * better > len(mine)
    head = ["half", "cells", "edited", "mean share lost", "worst", "loss fell in", "better beyond noise"]
    return make_table([*head, "worse beyond noise"], rows), rule.words, safe


def tabulate_predictors(cells: Sequence[CellResult]) -> str:
    """Rank correlation of each predictor with the harm of an edit of one role, on both halves."""
    effects = list_role_effects(cells)
    rows = []
    for name in (*PREDICTORS, "departure x delta/weight"):
        row = [name]
        for chooses in (True, False):
            mine = [each for each in effects if each["cell"].setting.chooses is chooses]
            value = correlate_ranks([each[name] for each in mine], [each["effect"] for each in mine])
            row.append(f"{value:+.2f} ({len(mine)})" if math.isfinite(value) else f"({len(mine)})")
        rows.append(row)
    return make_table(["predictor", "choosing half (pairs of cell and role)", "judging half"], rows)


def correlate_overfit(cells: Sequence[CellResult], edit: str) -> float:
    """Rank correlation of overfitting with the effect of an edit."""
    mine = [cell for cell in cells if edit in cell.lines]
    return correlate_ranks([cell.overfit for cell in mine], [cell.share(edit) for cell in mine])


def tabulate_overfit(cells: Sequence[CellResult]) -> str:
    """How the effect of each edit goes with overfitting, and in how many of the most overfitted cells the loss fell."""
    ordered = sorted(cells, key=lambda cell: -cell.overfit)
    third = len(ordered) // 3
    rows = []
    for edit in FIXED_NAMES:
        parts = [
            [cell.share(edit) for cell in part if edit in cell.lines] for part in (ordered[:third], ordered[third:])
        ]
        fell = [f"{sum(share < 0 for share in part)} of {len(part)}" for part in parts]
        rows.append([edit, f"{correlate_overfit(cells, edit):+.2f}", *fell])
    return make_table(["edit", "rank correlation", "loss fell in the most overfitted third", "in the others"], rows)


def tabulate_controls(cells: Sequence[CellResult]) -> str:
    """How far edits of the feed-forward block move it, and what that does."""
    rows = []
    for edit in CONTROLS:
        with_it = [cell for cell in cells if edit in cell.lines]
        pooled = pool(with_it, edit)
        if pooled:
            departure = statistics.median(cell.lines[edit]["departure"] for cell in with_it)
            rows.append([edit, str(len(with_it)), f"{departure:.2f}", percent(pooled.mean, 2), span(pooled.interval)])
    return make_table(["edit", "cells", "departure", "share of the gain lost", "95 % interval"], rows)


def list_missing() -> str:
    """Cells that were planned and are not finished, by base, part, fine-tuning and task, with their seeds."""
    groups: dict[str, dict[str, list[str]]] = {}
    for cell in list_cells():
        if not cell.path.exists():
            part = {"fixed": "the twelve edits", "wide": "the rest of the grid", "large": "many examples"}[cell.part]
            names = groups.setdefault(f"`{cell.base}`, {part}", {})
            names.setdefault(f"{cell.tuning} on {cell.task}", []).append(str(cell.seed))
    lines = []
    for group, names in groups.items():
        told = [f"{name} (seed {' '.join(seeds)})" for name, seeds in names.items()]
        lines.append(f"- {group}: {', '.join(told)}.")
    return "\n".join(lines) or "- none."


def make_page(everything: Sequence[CellResult]) -> str:
    """The page. A cell whose fine-tuning gained too little for shares of it is named there, and left out of them."""
    cells = [cell for cell in everything if cell.has_gained]
    small = [cell for cell in everything if not cell.has_gained]
    grid = with_grid(cells)
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        (Path(__file__).parent / "page.md.j2").read_text(encoding="utf-8")
    )
    rule_table, rule, safe = tabulate_rule(cells, FIXED_NAMES)
    halves = {cell.setting.chooses for cell in grid}
    grid_rule_table, grid_rule = tabulate_rule(grid, list_edits(grid))[:2] if len(halves) == 2 else ("", "")
    pooled = pool_edits(cells, FIXED_NAMES)
    choices = [found for found in map(compare_choice, cells) if found]
    planned = list_cells()
    shown = [pome("up"), pome("ffn"), Edit("scale", "model", beta=1.1), Edit("step", "ffn", bound=0.1)]
    return template.render(
        cells=tabulate_cells(cells),
        count=len(cells),
        settings=len(by_setting(cells)),
        lines=sum(len(cell.lines) for cell in cells),
        fixed=tabulate_fixed(cells),
        by_base=tabulate_groups(cells, "base", GROUPED),
        by_tuning=tabulate_groups(cells, "tuning", GROUPED),
        by_tuning_of_smollm2=tabulate_groups(
            [cell for cell in cells if cell.setting.base == "smollm2-135m"], "tuning", GROUPED
        ),
        by_setting=tabulate_settings(cells, [edit.name for edit in shown]),
        wide=tabulate_wide(cells),
        wide_count=len(grid),
        small=tabulate_small(small),
        small_count=len(small),
        least_gain=percent(LEAST_GAIN, 0).lstrip("+"),
        by_earlier_limit=pool([cell for cell in everything if cell.gain >= EARLIER_LIMIT], pome("up").name),
        routes=tabulate_routes(cells),
        reward=tabulate_reward(everything),
        large=tabulate_large(read_results(RESULTS, large=True)),
        large_count=f"{LARGE_COUNT:,}",
        grid_rule_table=grid_rule_table,
        grid_rule=grid_rule,
        compression=tabulate_compression(cells),
        choice=tabulate_choice(cells),
        rule_table=rule_table,
        rule=rule,
        safe=safe,
        predictors=tabulate_predictors(cells),
        role_pairs=len(list_role_effects(cells)),
        controls=tabulate_controls(cells),
        overfit=tabulate_overfit(cells),
        overfit_up=correlate_overfit(cells, pome("up").name),
        overfit_scaled=correlate_overfit(cells, Edit("scale", "model", beta=1.1).name),
        choice_hits=(
            sum(found["by_train"] == found["best"] for found in choices),
            len(choices),
            sum(found["change_by_train"] < 0 for found in choices),
        ),
        planned_count=len(planned),
        missing_count=sum(not cell.path.exists() for cell in planned),
        missing=list_missing(),
        pooled=pooled,
        percent=percent,
        span=span,
    )


def write_page() -> None:
    """Page and plots, from the results in the repository."""
    everything = read_results(RESULTS)
    cells = [cell for cell in everything if cell.has_gained]
    plots.draw_effects(cells, FIXED_NAMES, DOCS / "pictures" / "study-edits.png")
    plots.draw_departure(cells, DOCS / "pictures" / "study-departure.png")
    if with_grid(cells):
        plots.draw_curves(cells, DOCS / "pictures" / "study-curves.png")
    (DOCS / "study.md").write_text(make_page(everything), encoding="utf-8")
