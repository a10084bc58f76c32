"""Fill the tables of docs/benchmarks.md from the JSON files in benchmarks/results.

python benchmarks/table.py
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"


def load(name):
    return json.loads((HERE / "results" / name).read_text())


def ours():
    """One row per shape: what gradient methods cost as multiples of their floors."""
    rows = ["| shape | pairs x tokens | floor F | method | seconds | of its floor | allowed | extra memory |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for path in sorted((HERE / "results").glob("edge_scores_*.json")):
        r = json.loads(path.read_text())
        for name, allowed in (("eap", "1.5"), ("eap-ig", "1.5")):
            m = r[name]
            rows.append(
                f"| {r['shape']}, {r['edges']:,} edges, {r['device']} | {r['pairs']} x {r['length']} "
                f"| {r['floor_s']:.2f} s | {name}{', 5 steps' if name == 'eap-ig' else ''} | {m['seconds']:.2f} "
                f"| {m['ratio']:.2f} | {allowed} | {m['peak_extra_bytes'] / 1e9:.2f} GB |"
            )
    return rows


def per_pair():
    rows = ["| shape | 1x the pairs | 2x | 4x |", "|---|---|---|---|"]
    for path in sorted((HERE / "results").glob("edge_scores_*.json")):
        r = json.loads(path.read_text())
        times = [f"{1000 * r['eap'][f'seconds_per_pair_x{k}']:.1f} ms" for k in (1, 2, 4)]
        rows.append(f"| {r['shape']}, {r['pairs']} pairs | {' | '.join(times)} |")
    return rows


def exact():
    rows = [
        "| shape | pairs x tokens | two passes an edge | one pass an edge | edges as rows | ratios |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted((HERE / "results").glob("edge_scores_*.json")):
        r = json.loads(path.read_text())
        two, one, fast = (r["exact"][k] for k in ("two_passes_edges_per_s", "one_pass_edges_per_s", "edges_per_s"))
        rows.append(
            f"| {r['shape']} | {r['pairs']} x {r['length']} | {two:.1f} edges/s | {one:.1f} edges/s "
            f"| {fast:.1f} edges/s | {fast / two:.1f} and {fast / one:.1f} |"
        )
    return rows


def peer():
    mine, theirs = load("edge_scores_gpt2-small_10.json"), load("peer_auto_circuit_gpt2_small_cpu.json")
    rows = ["| | circuitkit | auto-circuit | ratio |", "|---|---|---|---|"]
    for label, name in (("edge attribution patching", "eap"), ("integrated gradients", "eap-ig")):
        a, b = mine[name], theirs[name]
        rows.append(
            f"| {label}, seconds | {a['seconds']:.2f} | {b['seconds']:.2f} | {b['seconds'] / a['seconds']:.1f} |"
        )
        memory = a["peak_extra_bytes"] / 1e9, b["peak_extra_bytes"] / 1e9
        rows.append(
            f"| {label}, extra memory | {memory[0]:.2f} GB | {memory[1]:.2f} GB | {memory[1] / memory[0]:.1f} |"
        )
    return rows


def main():
    text = PAGE.read_text()
    for name, rows in (("ours", ours()), ("per-pair", per_pair()), ("exact", exact()), ("peer", peer())):
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        assert mark.search(text), name
        text = mark.sub(lambda m, rows=rows: m[1] + "\n".join(rows) + "\n" + m[2], text)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
