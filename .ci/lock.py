"""Writes requirements.lock: every package of the tested environment, with the sha256 of its file.

python .ci/lock.py        # after a change of constraints.txt or of pyproject.toml's dependencies

For Linux x86-64, Python 3.11 and PyTorch's CPU build, which is what `.ci/run` installs. Other
machines install by constraints.txt.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
HEAD = (
    "# Made by `python .ci/lock.py`, for Linux x86-64, Python 3.11 and PyTorch's CPU build. Do "
    "not edit.\n"
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            "install",
            "--dry-run",
            "--ignore-installed",
            "--quiet",
            "--report",
            str(report),
        ]
        # hatchling builds the project itself, so that nothing is fetched besides what is listed.
        asked = ["--constraint", str(ROOT / "constraints.txt"), "hatchling", f"{ROOT}[dev]"]
        subprocess.run([sys.executable, "-m", "pip", *command, *asked], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    lines = []
    for each in found:
        name, version = each["metadata"]["name"], each["metadata"]["version"]
        if name == "ctrak-lightning":
            continue
        lines.append(
            f"{name}=={version} \\\n    "
            f"--hash=sha256:{each['download_info']['archive_info']['hashes']['sha256']}\n"
        )
    (HERE / "requirements.lock").write_text(
        HEAD + "".join(sorted(lines, key=str.lower)), encoding="utf-8"
    )
    print(f"{HERE / 'requirements.lock'}: {len(lines)} packages")


if __name__ == "__main__":
    main()
