"""Tiny wheels and source distributions, made on the spot: tests of installations need no network."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


def write_wheel(
    directory: Path,
    name: str,
    version: str,
    *,
    requires: Sequence[str] = (),
    tag: str = "py3-none-any",
    body: str = "",
    scripts: Sequence[str] = (),
) -> Path:
    """A wheel with one module, which knows its version; `scripts` are commands that call its `main`."""
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    information = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n{body}",
        f"{information}/METADATA": metadata + "".join(f"Requires-Dist: {each}\n" for each in requires),
        f"{information}/WHEEL": f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    if scripts:
        lines = "".join(f"{script} = {name}:main\n" for script in scripts)
        files[f"{information}/entry_points.txt"] = f"[console_scripts]\n{lines}"
    record = f"{information}/RECORD"
    files[record] = "".join(f"{path},,\n" for path in (*files, record))
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(zipfile.ZipInfo(file), text)
    return path


BUILDS_ITSELF = """
import zipfile
from pathlib import Path

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    {before}
    name, version = {name!r}, {version!r}
    information = f"{{name}}-{{version}}.dist-info"
    path = Path(wheel_directory, f"{{name}}-{{version}}-py3-none-any.whl")
    files = {{
        f"{{name}}/__init__.py": f"__version__ = {{version!r}}\\n",
        f"{{information}}/METADATA": f"Metadata-Version: 2.1\\nName: {{name}}\\nVersion: {{version}}\\n",
        f"{{information}}/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }}
    files[f"{{information}}/RECORD"] = "".join(f"{{file}},,\\n" for file in files)
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(zipfile.ZipInfo(file), text)
    return path.name

build_editable = build_wheel
"""


def source_files(name: str, version: str, before: str = "pass") -> dict[str, str]:
    """The source of a package that needs nothing to be built; `before` runs whenever it is."""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    return {
        "pyproject.toml": project,
        "backend.py": BUILDS_ITSELF.format(name=name, version=version, before=before),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
    }


def write_sdist(directory: Path, name: str, version: str, before: str = "pass") -> Path:
    """A source distribution of such a package."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}-{version}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for file, text in source_files(name, version, before).items():
            member = tarfile.TarInfo(f"{name}-{version}/{file}")
            content = text.encode()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sha256_of(path: Path) -> str:
    """The digest of a file, as requirements name it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def as_any_pip_says(text: str) -> str:
    """pip's words without what only newer versions add."""
    return re.sub(r"\n +Additionally, some packages in these conflicts .*\n +\w+(?=\n|$)", "", text)
