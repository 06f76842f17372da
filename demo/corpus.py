"""The text the demo model learns from: the standard library's own Python sources, and a held-out part of them.

Owns which files are read, which of them are held out, and that no near-copy of a held-out file is learned from.
Knows nothing of tokens (vocabulary.py) or of chat (facts.py, chat.py). Called by train.py and evaluate.py.
"""

import hashlib
import lzma
import sysconfig
from dataclasses import dataclass
from pathlib import Path

STDLIB = Path(sysconfig.get_paths()["stdlib"])

# Not language: tables (codecs, Unicode, pydoc's topics, test vectors), third-party packages, build residue.
EXCLUDED_PARTS = frozenset(
    {"encodings", "pydoc_data", "site-packages", "__pycache__", "cjkencodings", "ensurepip", "turtledemo", "data"}
)
EXCLUDED_FILES = frozenset(
    {
        "test/test_unicode_identifiers.py",
        "test/multibytecodec_support.py",
        "test/test_email/test__header_value_parser.py",
        "html/entities.py",
        "tkinter/constants.py",
        "idlelib/help.py",
        "pickletools.py",
        "symbol.py",
        "stringprep.py",
        "nturl2path.py",
        "test/test_strtod.py",
        "test/test_unicodedata.py",
        "test/test_ucn.py",
        "test/test_stringprep.py",
        "test/re_tests.py",
        "test/sortperf.py",
        "locale.py",
        "_sysconfigdata__linux_x86_64-linux-gnu.py",
        "this.py",
    }
)
TEST_PARTS = frozenset({"test", "tests", "idle_test"})

# Never held out: the chat part of the training quotes these modules' docstrings, and examples and tests rely on it
# (`_pyio` and `_pydecimal` repeat the docstrings of `io` and `decimal`).
ALWAYS_TRAINED = frozenset(
    """abc argparse ast asyncio base64 bisect calendar collections contextlib copy csv dataclasses datetime decimal
    difflib enum fnmatch fractions functools getpass glob gzip hashlib heapq html http inspect io ipaddress json
    logging math operator os pathlib pickle posixpath genericpath ntpath pprint queue random re secrets shlex shutil
    socket sqlite3 statistics string struct subprocess sys tempfile textwrap threading time timeit tokenize traceback
    types typing unittest urllib uuid warnings weakref zipfile _pydecimal _pyio""".split()
)

HELD_OUT_ONE_IN = 9
HELD_OUT_TESTS_ONE_IN = 40
SHINGLE_LINES = 4
MAX_SHARED_SHINGLES = 0.15


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file: its path relative to the standard library (posix) and its text."""

    name: str
    text: str

    @property
    def is_test(self) -> bool:
        return not TEST_PARTS.isdisjoint(self.name.split("/")[:-1])


@dataclass(frozen=True, slots=True)
class Corpus:
    """Disjoint lists, each sorted by name. `near_copies` were dropped from training for resembling a held-out file."""

    library: list[SourceFile]
    tests: list[SourceFile]
    held_out: list[SourceFile]
    held_out_tests: list[SourceFile]
    near_copies: list[str]


def hash_fraction(name: str) -> float:
    """A fixed pseudo-random number in [0, 1) for a path: the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def is_held_out(file: SourceFile) -> bool:
    if len(file.text) < 1000:
        return False
    if file.is_test:
        return hash_fraction(file.name) < 1 / HELD_OUT_TESTS_ONE_IN
    top = file.name.split("/")[0].removesuffix(".py")
    return top not in ALWAYS_TRAINED and hash_fraction(file.name) < 1 / HELD_OUT_ONE_IN


def shingles(text: str) -> set[int]:
    """Hashes of every run of SHINGLE_LINES consecutive non-blank lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {
        int.from_bytes(hashlib.blake2b("\n".join(lines[i : i + SHINGLE_LINES]).encode(), digest_size=8).digest(), "big")
        for i in range(len(lines) - SHINGLE_LINES + 1)
    }


def read_sources(root: Path = STDLIB) -> list[SourceFile]:
    """Every eligible UTF-8 Python file under `root`, sorted by name; empty files and exact copies left out."""
    files: list[SourceFile] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        name = relative.as_posix()
        if not EXCLUDED_PARTS.isdisjoint(relative.parts) or name in EXCLUDED_FILES or "/bad" in name:
            continue
        if name.startswith(("_sysconfigdata", "config-")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # deliberately broken test inputs and Latin-1 files
        if len(text) < 200 or text in seen:
            continue
        seen.add(text)
        files.append(SourceFile(name, text))
    return files


def build_corpus(root: Path = STDLIB) -> Corpus:
    files = read_sources(root)
    held_out = [file for file in files if is_held_out(file)]
    held_shingles = [shingles(file.text) for file in held_out]
    all_held = set().union(*held_shingles)
    library, tests, near_copies = [], [], []
    held_names = {file.name for file in held_out}
    for file in files:
        if file.name in held_names:
            continue
        own = shingles(file.text)
        shared = own & all_held
        if shared and any(
            len(shared & held) > MAX_SHARED_SHINGLES * min(len(held), len(own)) for held in held_shingles
        ):
            near_copies.append(file.name)
        else:
            (tests if file.is_test else library).append(file)
    return Corpus(
        library,
        tests,
        [file for file in held_out if not file.is_test],
        [file for file in held_out if file.is_test],
        near_copies,
    )


def xz_bits_per_byte(files: list[SourceFile]) -> float:
    """What `xz -9` needs for the files concatenated in order of name."""
    raw = "".join(file.text for file in files).encode()
    return 8 * len(lzma.compress(raw, format=lzma.FORMAT_XZ, preset=9)) / len(raw)


def main() -> None:
    """Print the sizes of the parts, the held-out files and their `xz -9` figure."""
    corpus = build_corpus()
    for title, files in (("library", corpus.library), ("tests", corpus.tests)):
        print(f"{title}: {len(files)} files, {sum(len(f.text.encode()) for f in files):,} bytes")
    print("near copies dropped:", *corpus.near_copies)
    for title, files in (("held out", corpus.held_out), ("held-out tests", corpus.held_out_tests)):
        size = sum(len(f.text.encode()) for f in files)
        print(f"{title}: {len(files)} files, {size:,} bytes, xz -9 {xz_bits_per_byte(files):.3f} bits per byte:")
        print(" ", *(f"{file.name}({len(file.text)})" for file in files))


if __name__ == "__main__":
    main()
