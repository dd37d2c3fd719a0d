"""Format measurements: lines on the screen, rows of results/*.csv, and the README's tables."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import hardware
from benchmarks.attention import ratios
from benchmarks.harness import MIB, NOT_MEASURED, RESULTS, Verdict, at_most, read_csv, spread
from benchmarks.registry import OURS, requirements
from benchmarks.training_step import speed

Row = dict[str, Any]


def attention_rows(measured: dict[str, Any], load: float) -> list[Row]:
    """Return one flat row per contestant."""
    row = measured["row"]
    own = next(result for result in measured["results"] if result["contestant"] == OURS.name)
    shape = {name: row[name] for name in ("dtype", "ranks", "heads", "kv_heads", "head_dim")}
    flat = []
    for result in measured["results"]:
        timed = bool(result["cpu"])
        compared = timed and bool(own["cpu"])
        flat.append({
            "row": row["name"], "tokens": row["length"], **shape, "contestant": result["contestant"],
            "version": result["version"], "turns": len(result["cpu"]),
            "cpu_seconds": f"{median(result['cpu']):.4f}" if timed else NOT_MEASURED,
            "cpu_spread": f"{spread(result['cpu']):.3f}" if timed else "",
            "wall_seconds": f"{median(result['wall']):.4f}" if timed else NOT_MEASURED,
            "exposed_share": f"{median(result['blocked']):.3f}" if timed else "",
            "peak_bytes_per_rank": result["peak"] if timed else "",
            "ours_over_theirs_cpu": f"{ratios(own, result):.3f}" if compared else "",
            "ours_over_theirs_wall": f"{ratios(own, result, 'wall'):.3f}" if compared else "",
            "largest_error": f"{max(result['errors']):.1e}" if result["errors"] else "",
            "note": result["reason"], **_origin(load),
        })  # fmt: skip
    return flat


def memory_rows(measured: list[dict[str, Any]], load: float) -> list[Row]:
    """Return one flat row per length and number of ranks."""
    return [
        {
            "local_tokens": entry["row"]["local"], "ranks": entry["row"]["ranks"], "peak_bytes_per_rank": entry["peak"],
            "peak_in_local_tensors": f"{entry['peak_in_tensors']:.3f}", **_origin(load),
        }
        for entry in measured
    ]  # fmt: skip


def step_rows(measured: dict[str, Any], load: float) -> list[Row]:
    """Return one flat row per engine."""
    row, ours, flat = measured["row"], measured["results"][0], []
    for result in measured["results"]:
        timed = bool(result["cpu"])
        cpu, wall, blocked = (median(result[key]) if timed else 0.0 for key in ("cpu", "wall", "blocked"))
        flat.append({
            "row": f"step-{row['length']}", "tokens": row["length"], "ranks": row["ranks"],
            "parameters": measured["parameters"], "contestant": result["contestant"], "version": result["version"],
            "steps": len(result["cpu"]),
            "tokens_per_cpu_second": f"{row['length'] / cpu:.0f}" if timed else NOT_MEASURED,
            "tokens_per_second": f"{row['length'] / wall:.0f}" if timed else NOT_MEASURED,
            "cpu_seconds": f"{cpu:.3f}" if timed else "", "wall_seconds": f"{wall:.3f}" if timed else "",
            "exposed_share": f"{blocked:.3f}" if timed else "", "peak_bytes_per_rank": result.get("peak", ""),
            "ours_over_theirs_speed": f"{speed(ours, result, 'wall'):.3f}" if timed and ours["wall"] else "",
            "ours_over_theirs_speed_cpu": f"{speed(ours, result, 'cpu'):.3f}" if timed and ours["cpu"] else "",
            "loss_difference": f"{result['loss_difference']:.1e}" if "loss_difference" in result else "",
            "note": result["note"], **_origin(load),
        })  # fmt: skip
    return flat


def _origin(load: float) -> dict[str, str]:
    return {"load_at_start": f"{load:.2f}", "commit": hardware.commit(), "hardware": hardware.describe()}


def verdicts(measured: dict[str, Any]) -> list[Verdict]:
    """Return the verdicts on a row's requirements; what was not measured is not judged."""
    row, by_name = measured["row"], {result["contestant"]: result for result in measured["results"]}
    own, said = by_name[OURS.name], []
    for required in requirements(row["length"], row["dtype"]):
        other = by_name[required.against.name]
        if own["cpu"] and other["cpu"]:
            text = f"{row['name']}: CPU time ÷ {required.against.name}"
            said.append(at_most(text, ratios(own, other), required.ratio))
    return said


def show(rows: list[Row], columns: tuple[str, ...]) -> None:
    """Print rows as an aligned table."""
    table = [columns, *(tuple(str(row.get(column, "")) for column in columns) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "  ".join(cells).rstrip(), flush=True)


STEP_COLUMNS = {
    "tokens": "tokens", "contestant": "", "tokens_per_second": "tokens/s", "tokens_per_cpu_second": "tokens/CPU s",
    "ours_over_theirs_speed": "ours ÷ theirs", "peak_bytes_per_rank": "peak MiB per rank",
    "loss_difference": "loss difference",
}  # fmt: skip


def readme_tables() -> dict[str, str]:
    """Return the README's tables by the names of their marks; a table without measurements is left out."""
    makers = {"attention": ("attention_cpu", pivot), "step": ("step_cpu", listing)}
    paths = {name: (RESULTS / f"{file}.csv", make) for name, (file, make) in makers.items()}
    return {name: make(path) for name, (path, make) in paths.items() if path.is_file()}


def update_readme() -> None:
    """Put the newest measurements into the README, between their marks."""
    path = Path(__file__).parents[1] / "README.md"
    text = path.read_text(encoding="utf-8")
    for name, table in readme_tables().items():
        start, end = f"<!-- bench:{name} -->\n", "<!-- bench:end -->"
        before, rest = text.split(start)
        text = before + start + table + "\n" + end + rest.split(end, 1)[1]
    path.write_text(text, encoding="utf-8")


def pivot(path: Path) -> str:
    """Format the attention rows, one line per shape: our figures, then ours ÷ theirs in CPU time for everyone else."""
    rows = read_csv(path)
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    found = {(row["row"], row["contestant"]): row for row in rows}
    lines = []
    for shape in dict.fromkeys(row["row"] for row in rows):
        own = found[shape, names[0]]
        lines.append([
            own["tokens"], own["dtype"], f"{own['heads']}:{own['kv_heads']}", own["cpu_seconds"], own["exposed_share"],
            f"{int(own['peak_bytes_per_rank']) / MIB:.0f}",
            *(found[shape, name]["ours_over_theirs_cpu"] or "–" for name in names[1:]),
        ])  # fmt: skip
    notes = dict.fromkeys(f"{row['contestant']}: {row['note'].split(' (')[0]}" for row in rows if row["note"])
    headings = ["tokens", "dtype", "heads", "CPU s", "exposed", "peak MiB per rank"]
    headings += [f"÷ {name}" for name in names[1:]]
    said = ("\n\n– not measured, or see the results file. " + "; ".join(notes) + ".") if notes else ""
    return _table(headings, lines) + said + _measured_on(rows)


def listing(path: Path) -> str:
    """Format the training-step rows."""
    rows = read_csv(path)
    for row in rows:
        if row["peak_bytes_per_rank"]:
            row["peak_bytes_per_rank"] = f"{int(row['peak_bytes_per_rank']) / MIB:.0f}"
    lines = [[row[key] for key in STEP_COLUMNS] for row in rows]
    return _table(list(STEP_COLUMNS.values()), lines) + _measured_on(rows)


def _table(headings: list[str], lines: list[list[str]]) -> str:
    marks = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*marks, *("| " + " | ".join(line) + " |" for line in lines)])


def _measured_on(rows: list[dict[str, str]]) -> str:
    return "\n\nMeasured on: " + "; ".join(sorted({row["hardware"] for row in rows})) + "."


if __name__ == "__main__":
    update_readme()
