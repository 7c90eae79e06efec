"""Reject idioms that readers stumble over, in docs, configs and the code of the packages: part of `make lint`.

python tests/check_style.py            (exit code 1 and one line per finding)
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKED = ("*.md", "*.py", "*.yaml", "*.html", "*.cff", "*.txt", "*.ipynb", "Makefile", "Dockerfile", "examples/*")
EXEMPT = re.compile(r"tests/|constraints\.txt|docs/results/.*\.json|.*\.mp4")
IDIOMS = {
    "likewise": "the same",
    "as many": "the same number of",
    "rightly": "correctly",
    "told": "reported, given",
    "said": "stated",
    "stand|stands|stood": "is, are",
    "goes on|go on|went on": "continues, resumes",
    "mended|mends|mend": "fixed",
    "made anew": "resampled, regenerated",
    "in the box": "bundled, pretrained",
    "rebuilt|rebuild|rebuilds": "reconstructed",
    "shrunk": "downsampled",
    "but for": "except for",
    "its own": "a separate one, or the noun",
    "asked for": "requested",
    "is wanted|are wanted|wants": "is required, requires",
    "is to be had|to be had": "is available",
    "recipe|recipes": "config",
    "made so": "created",
    "of everything random": "random seed",
}
PATTERN = re.compile(r"(?<![\w-])(" + "|".join(IDIOMS) + r")(?![\w-])", re.IGNORECASE)
BRITISH = re.compile(
    r"\b\w*(colour|behaviour|centre[ds]?\b|normalis|initialis|optimis|grey\b|licence|labelled)\w*", re.I
)


def tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", *CHECKED], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.splitlines() if not EXEMPT.match(name) and (ROOT / name).is_file()]


def find_idioms(text: str) -> list[tuple[int, str]]:
    """The line number and the words of every idiom and British spelling, also where a line break divides it."""
    found = []
    for pattern in (PATTERN, BRITISH):
        # A line break with its indentation or comment sign counts as one blank.
        flat = re.sub(r"\n[ \t]*(?:#+ |\* |> )?", lambda m: "\0" + " " * (len(m[0]) - 1), text)
        joined = re.sub(r"\0 *", lambda m: " " + "\1" * (len(m[0]) - 1), flat)
        compact, places = [], []
        for place, character in enumerate(joined):
            if character != "\1":
                compact.append(character)
                places.append(place)
        found += [(text.count("\n", 0, places[m.start()]) + 1, m[0]) for m in pattern.finditer("".join(compact))]
    return sorted(found)


def main() -> int:
    findings = [
        f"{path.relative_to(ROOT)}:{line}: {words!r}; see CONTRIBUTING.md, Language"
        for path in tracked_files()
        for line, words in find_idioms(path.read_text(encoding="utf-8"))
    ]
    print("\n".join(findings) if findings else "style: no idioms found")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
