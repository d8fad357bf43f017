"""`make demo` and `make test` in a clean clone, for each Python that is promised and there: `make pythons`."""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMISED = [f"3.{minor}" for minor in range(10, 15)]


def works(interpreter: str, version: str) -> bool:
    """Tell whether an interpreter is there and of that version; a version manager's name may lead nowhere."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() == version


def tried(interpreter: str) -> str:
    """Run both commands in a clean clone and say what came of them."""
    with tempfile.TemporaryDirectory(prefix="pythons") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        said = []
        for target in ("demo", "test"):
            command = ["make", target, f"PYTHON={interpreter}"]
            done = subprocess.run(command, cwd=clone, capture_output=True, text=True, errors="replace")
            if done.returncode:
                return f"`make {target}` failed:\n{(done.stdout + done.stderr)[-3000:]}"
            said.append(f"`make {target}` passes")
            said += re.findall(r"\d+ passed.*", done.stdout)
        return ", ".join(said)


def main() -> None:
    """Try every interpreter; end with status 1 if one fails or none is there."""
    results = {}
    for version in PROMISED:
        interpreter = shutil.which(f"python{version}")
        found = interpreter is not None and works(interpreter, version)
        results[version] = tried(interpreter) if found else "not here"
        print(f"Python {version}: {results[version]}", flush=True)
    if any("failed" in said for said in results.values()) or all(said == "not here" for said in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
