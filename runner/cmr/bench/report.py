"""Rows as JSON with llama-bench's field names, as CSV, as a Markdown table, and as bars for a terminal."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmr.bench.devices import cuda_devices
from cmr.bench.forward import CHUNK
from cmr.bench.machine import describe
from cmr.bench.measure import Row

BAR = 40


def as_json(path: str, row: Row) -> dict[str, Any]:
    """Return a row as llama-bench's JSON has it, and what CMR adds: medians, roofs, ratio, divergence."""
    case, work, rates = row.case, row.work, row.rates
    far = row.far and row.far.divergence
    times = [round(seconds * 1e9) for seconds in row.seconds]
    speeds = [case.tokens / seconds for seconds in row.seconds]
    mean_ns = sum(times) / len(times)
    return {
        **{key: value for key, value in describe().items() if key != "versions"},
        "build_commit": row.version or f"cmr {describe()['versions']['cmr']}",  # type: ignore[index]
        "build_number": 0,
        "gpu_info": ", ".join(cuda_devices()),
        "backends": row.device.upper(),
        "devices": row.device,
        "engine": row.name,
        "model_filename": str(path),
        "model_type": work.model_type,
        "model_size": work.model_size,
        "model_n_params": work.model_n_params,
        "n_batch": CHUNK,
        "n_ubatch": CHUNK,
        "n_threads": case.threads,
        "type_k": None if row.plugins else "f16",
        "type_v": None if row.plugins else "f16",
        "plugins": list(row.plugins),
        "n_gpu_layers": 99 if row.device == "cuda" else 0,  # llama-bench's number for all of them
        "use_mmap": row.mapped,
        "n_prompt": case.n_prompt,
        "n_gen": case.n_gen,
        "n_depth": case.depth,
        "n_parallel": case.parallel,
        "test": case.name,
        "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "avg_ns": round(mean_ns),
        "stddev_ns": round(_deviation(times, mean_ns)),
        "avg_ts": rates.mean,
        "stddev_ts": rates.stddev,
        "median_ts": rates.median,
        "min_ts": rates.low,
        "max_ts": rates.high,
        "samples_ns": times,
        "samples_ts": speeds,
        "rounds_rejected": row.rejected,
        "rounds_disturbed": row.disturbed,
        **_held_against(row),
        "against": row.against,
        "ratio": row.ratio and row.ratio.value,
        "ratio_low": row.ratio and row.ratio.low,
        "ratio_high": row.ratio and row.ratio.high,
        "kv_bytes": row.kv_bytes,
        "kv_bytes_per_token": row.far and row.far.kv_bytes,
        "kl_depth": row.far and row.far.depth,
        "kl_tokens": far and far.tokens,
        "kl_mean": far and far.mean,
        "kl_p999": far and far.p999,
        "same_top": far and far.same_top,
    }


def _deviation(values: Sequence[float], mean: float) -> float:
    if len(values) < 2:
        return 0.0
    return (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def _held_against(row: Row) -> dict[str, float | None]:
    """What was reached of the roofs: weight GB/s beside streaming reads, GOPS beside the arithmetic peak."""
    seconds = row.case.tokens / row.rates.median
    read, dots = row.work.read_bytes / seconds, row.work.operations / seconds
    gen, prompt = row.case.n_gen and not row.case.n_prompt, row.case.n_prompt and not row.case.n_gen
    roofs = row.roofs
    return {
        "weight_gbs": read / 1e9 if gen else None,
        "read_gbs": roofs["read"] / 1e9 if "read" in roofs else None,
        "prefetched_read_gbs": roofs["prefetched"] / 1e9 if "prefetched" in roofs else None,
        "of_read": read / roofs["read"] if gen and "read" in roofs else None,
        "gops": dots / 1e9 if prompt else None,
        "peak_gops": roofs["dots"] / 1e9 if "dots" in roofs else None,
        "of_peak": dots / roofs["dots"] if prompt and "dots" in roofs else None,
    }


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return JSON rows as CSV; lists are written with spaces."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})
    return out.getvalue()


COLUMNS = ("model", "size", "threads", "test", "engine", "tok/s", "spread", "roof", "ratio", "KL")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return JSON rows as a Markdown table; columns that would be empty are left out."""
    cells = [_cells(row) for row in rows]
    kept = [i for i, _ in enumerate(COLUMNS) if any(line[i] for line in cells)]
    lines = [[COLUMNS[i] for i in kept], *([line[i] for i in kept] for line in cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])


def _cells(row: dict[str, Any]) -> list[str]:
    marks = f" ({row['rounds_disturbed']} disturbed)" if row["rounds_disturbed"] else ""
    return [
        Path(row["model_filename"]).stem,
        f"{row['model_size'] / 1e6:.0f} MB",
        str(row["n_threads"]),
        row["test"],
        row["engine"] if row["devices"] == "cpu" else f"{row['engine']} on {row['devices']}",
        number(row["median_ts"]),
        f"{number(row['min_ts'])} to {number(row['max_ts'])}{marks}",
        roof(row),
        _ratio(row),
        f"{row['kl_mean']:.2g}, top {row['same_top']:.1%}" if row["kl_mean"] is not None else "",
    ]


def roof(row: dict[str, Any]) -> str:
    if row["of_read"] is not None:
        return f"{row['weight_gbs']:.1f} GB/s, {row['of_read']:.0%} of reading"
    if row["of_peak"] is not None:
        return f"{row['gops']:.0f} GOPS, {row['of_peak']:.0%} of peak"
    return ""


def _ratio(row: dict[str, Any]) -> str:
    if row["ratio"] is None:
        return ""
    return f"{row['ratio']:.2f}x {row['against']} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


def number(value: float) -> str:
    """Write a speed with three digits, more where it is large."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def bars(rows: Sequence[dict[str, Any]]) -> str:
    """Draw the speeds of each test as bars, the longest the fastest of that test."""
    most: dict[tuple[str, int], float] = {}
    for row in rows:
        key = (row["test"], row["n_threads"])
        most[key] = max(most.get(key, 0.0), row["median_ts"])
    names = [f"{row['test']}, {row['n_threads']}t, {row['engine']}" for row in rows]
    width = max(map(len, names))
    lengths = [round(BAR * row["median_ts"] / most[row["test"], row["n_threads"]]) for row in rows]
    return "\n".join(
        f"{name:{width}} {'█' * length:{BAR}} {number(row['median_ts'])}"
        for name, length, row in zip(names, lengths, rows)
    )
