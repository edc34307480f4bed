"""Make a run the baseline of its device, or compare a run with it.

python -m benchmarks.baselines --record FIGURES           a run of `nox -s benchmarks -- --figures FIGURES`
python -m benchmarks.baselines --compare FIGURES          1 unless every benchmark is as good as it was
python -m benchmarks.baselines --compare FIGURES --summary SUMMARY.md
"""

import argparse
import sys
from pathlib import Path

from benchmarks.engine.baseline import as_markdown, baseline_for, judge, record
from benchmarks.engine.device import Device
from benchmarks.engine.runfile import RunFileError, read_run

FOLDER = Path(__file__).parent


def main(arguments: list[str], folder: Path = FOLDER) -> int:
    """1 if something is not green, or cannot be told."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baselines")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--record", type=Path, metavar="FIGURES")
    action.add_argument("--compare", type=Path, metavar="FIGURES")
    parser.add_argument("--summary", type=Path, help="append the table to this file, as markdown")
    options = parser.parse_args(arguments)
    try:
        run = read_run(options.record or options.compare)
        if options.record:
            print(f"Written: {record(run, folder, Device(**run['device']).slug)}. Commit it.")
            return 0
        findings = judge(run, baseline_for(run, folder))
    except RunFileError as error:
        print(f"Error: {error}")
        if options.summary:
            _append(options.summary, f"### Benchmarks: nothing was compared\n\n{error}\n")
        return 1
    table = as_markdown(findings, run)
    print(table)
    if options.summary:
        _append(options.summary, table)
    return 0 if findings and all(finding.outcome.is_green for finding in findings) else 1


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
