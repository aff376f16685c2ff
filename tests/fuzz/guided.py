"""The process that fuzzes one target, guided by coverage and short of memory; see __main__.py."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fedra_edge", "fedra_server", "tests.fuzz"]):
    from tests.fuzz.defects import DEFECTS
    from tests.fuzz.targets import TARGETS

ADDRESS_SPACE_BYTES = 2 * 2**30
"""No input is larger than a few kilobytes; what needs more than this has no bounds."""


def main() -> None:
    """Run until libFuzzer ends the process."""
    name, *options = sys.argv[1:]
    target = {**TARGETS, **DEFECTS}[name]
    words = Path("words.dict")
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words), encoding="utf-8")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
    atheris.Setup(
        [sys.argv[0], f"-dict={words}", *options],
        target.run,
        custom_mutator=_mutate_header if target.has_header else None,
    )
    atheris.Fuzz()


def _mutate_header(data: bytes, max_bytes: int, seed: int) -> bytes:
    """Change a file of tensors so that its length field is right again, but for one in eight."""
    end = 8 + int.from_bytes(data[:8], "little")
    if seed % 8 == 0 or end > len(data):
        return bytes(atheris.Mutate(data, max_bytes))
    header, values = data[8:end], data[end:]
    if seed % 8 == 1:
        values = atheris.Mutate(values, max_bytes - end)
    else:
        header = atheris.Mutate(header, max_bytes - len(values) - 8)
    return len(header).to_bytes(8, "little") + header + values


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace('"', '\\"')


if __name__ == "__main__":
    main()
