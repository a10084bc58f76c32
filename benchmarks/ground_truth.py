"""Every method on every model whose circuit is known: what `circuitkit benchmark methods` measures, into the docs.

    python benchmarks/ground_truth.py [--out runs/benchmark-methods]

Writes benchmarks/results/ground_truth.json, the table of docs/benchmarks.md and its figure. A run that was stopped goes
on where it was. The figure needs plotly's kaleido; without it, the page methods.html in the folder shows the same.
"""

import argparse
import re
import sys
from pathlib import Path

from circuitkit.atomic import write_atomic
from circuitkit.runs.benchmark import TABLE, benchmark_methods, unexplained
from circuitkit.runs.benchmark_table import figure_of, markdown

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
MARK = re.compile(r"(<!-- ground-truth -->\n).*?(<!-- /ground-truth -->)", re.S)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-methods"))
    args = parser.parse_args()
    found = benchmark_methods(args.out)
    write_atomic(HERE / "results" / "ground_truth.json", (args.out / TABLE).read_text())
    text = PAGE.read_text()
    assert MARK.search(text), "docs/benchmarks.md has lost its marks"
    write_atomic(PAGE, MARK.sub(lambda m: m[1] + "\n".join(markdown(found)) + "\n" + m[2], text))
    try:
        figure_of(found).write_image(PAGE.parent / "images" / "methods.png", scale=2)
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"no figure written: {error}\n")
    lost = unexplained(found.cells)
    sys.stderr.write("".join(f"loses to random, no reason given yet: {loss}\n" for loss in lost))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
