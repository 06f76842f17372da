"""Prints line coverage per package and fails when one is below its floor. Run after `coverage combine`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# package -> (folder, least percentage of lines that the tests must execute)
FLOORS = {
    "tgi_launcher": ("launcher/tgi_launcher", 90.0),
    "tgi_proto": ("proto/tgi_proto", 90.0),
    "tgi_router": ("router/tgi_router", 90.0),
    "tgi_shard": ("shard/tgi_shard", 85.0),
}


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        subprocess.run([sys.executable, "-m", "coverage", "json", "--quiet", "-o", str(report)], check=True)
        files = json.loads(report.read_text())["files"]
    failed = False
    print("line coverage:")
    for package, (folder_name, floor) in FLOORS.items():
        summaries = {name: data["summary"] for name, data in files.items() if f"{folder_name}/" in name}
        lines = sum(s["num_statements"] for s in summaries.values())
        covered = sum(s["covered_lines"] for s in summaries.values())
        percent = 100 * covered / lines if lines else 0.0
        print(f"  {package:<13} {percent:5.1f} %  of {lines} lines (floor {floor:.0f} %)")
        if percent < floor:
            failed = True
            worst = sorted(summaries, key=lambda n: summaries[n]["covered_lines"] - summaries[n]["num_statements"])[:8]
            for name in worst:
                s = summaries[name]
                print(f"      {name}: {s['num_statements'] - s['covered_lines']} lines missed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
