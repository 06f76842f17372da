"""What the chat part of the training teaches: public names of the standard library and their documented summaries.

Owns which names count and what a name's summary is. Turning facts into conversations is chat.py's work.
The facts follow the running Python's docstrings, so another Python version gives slightly different ones.
"""

import importlib
import inspect
import re
import sys
import warnings
from dataclasses import dataclass

from corpus import STDLIB, Corpus

SKIPPED_MODULES = frozenset(
    """antigravity this idlelib lib2to3 test turtledemo encodings pydoc_data ensurepip distutils tkinter turtle msilib
    nt winreg winsound curses readline rlcompleter posix posixpath ntpath genericpath imp audioop cgi cgitb
    ossaudiodev spwd nis crypt sre_compile sre_constants sre_parse nturl2path pyexpat""".split()
)
SUBMODULES = """os.path urllib.parse urllib.request urllib.error collections.abc concurrent.futures email.message
    email.utils http.client http.server http.cookies importlib.metadata importlib.resources importlib.util json.decoder
    json.encoder logging.handlers logging.config html.parser multiprocessing.pool unittest.mock
    xml.etree.ElementTree xml.sax.saxutils xml.dom.minidom wsgiref.simple_server""".split()
# Types whose public methods are asked about too.
TYPES = """str bytes list dict set tuple int float bytearray frozenset collections.Counter collections.deque
    collections.OrderedDict collections.ChainMap pathlib.Path pathlib.PurePath datetime.date datetime.datetime
    datetime.timedelta decimal.Decimal fractions.Fraction threading.Thread threading.Event queue.Queue
    subprocess.Popen argparse.ArgumentParser re.Pattern re.Match string.Template random.Random
    configparser.ConfigParser zipfile.ZipFile tarfile.TarFile logging.Logger unittest.TestCase""".split()
# What a newcomer meets first: learned many times as often, and reported on its own. Exceptions are left out.
WELL_KNOWN_MODULES = frozenset(
    """builtins os.path json re math random time collections itertools functools textwrap copy glob heapq shutil
    str list dict""".split()
)
WELL_KNOWN_NAMES = frozenset(
    """os.getcwd os.listdir os.mkdir os.makedirs os.remove os.rename os.walk os.stat os.chdir os.getpid os.system
    os.urandom os.cpu_count os.getenv os.rmdir os.unlink os.replace os.scandir subprocess.run subprocess.Popen
    subprocess.call subprocess.check_output datetime.date datetime.datetime datetime.timedelta datetime.datetime.now
    datetime.date.today pathlib.Path csv.reader csv.writer csv.DictReader threading.Thread logging.getLogger
    logging.info logging.basicConfig argparse.ArgumentParser hashlib.sha256 base64.b64encode base64.b64decode
    tempfile.mkdtemp contextlib.contextmanager contextlib.suppress dataclasses.dataclass enum.Enum pickle.dumps
    pickle.loads statistics.mean statistics.median bisect.bisect_left urllib.parse.urlparse urllib.parse.quote
    operator.itemgetter inspect.signature pprint.pprint sys.exit sys.getsizeof uuid.uuid4 secrets.token_hex""".split()
)
MAX_SUMMARY = 200


@dataclass(frozen=True, slots=True)
class Fact:
    """`name` as users write it (`os.path.join`, `len`), and what its docstring says first."""

    name: str
    summary: str
    well_known: bool
    is_module: bool = False


def summary_of(doc: str, name: str) -> str | None:
    """The first paragraph of `doc` that is prose, on one line, cut after a sentence near MAX_SUMMARY characters.

    Docstrings that open with signatures (`max(iterable, ...) -> value`) are read past them; one that has nothing else
    gives its first line when that says something (`dict() -> new empty dictionary`).
    """
    short = re.escape(name.rsplit(".", 1)[-1])
    doc = inspect.cleandoc(doc)
    for paragraph in re.split(r"\n\s*\n", doc):
        text = " ".join(paragraph.split())
        if re.match(rf"(?:\w+\.)*{short}\(", text):
            continue
        if len(text) < 12 or not re.search(r"[a-z]{3}", text):
            return None
        while len(text) > MAX_SUMMARY:
            sentences = re.split(r"(?<=[.:;]) ", text)
            if len(sentences) == 1:
                return None
            text = " ".join(sentences[:-1])
        return text
    first = doc.splitlines()[0] if doc else ""
    return first if re.search(r" (?:->|--) \w+ \w+", first) and len(first) <= MAX_SUMMARY else None


def public_names(module: object) -> list[str]:
    return sorted(set(getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]))


def is_borrowed(value: object, module_name: str) -> bool:
    """Whether a module without `__all__` merely imported `value` from elsewhere."""
    home = getattr(value, "__module__", None)
    if module_name == "builtins":
        return False
    return isinstance(home, str) and home.split(".")[0].lstrip("_") != module_name.split(".")[0].lstrip("_")


def own_doc(value: object) -> str | None:
    """The docstring written for `value` itself, not for its type."""
    doc = getattr(value, "__doc__", None)
    if inspect.ismodule(value):
        return doc
    if not isinstance(doc, str) or not callable(value):
        return None
    return None if not inspect.isclass(value) and doc == type(value).__doc__ else doc


def candidates() -> list[tuple[str, str, object]]:
    """(module, name to ask about, object), in a fixed order; imports the modules concerned."""
    found: list[tuple[str, str, object]] = []
    modules = sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in SKIPPED_MODULES)
    for module_name in modules + SUBMODULES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module = importlib.import_module(module_name)
        except ImportError:
            continue  # another platform's module
        prefix = "" if module_name == "builtins" else f"{module_name}."
        found.append((module_name, module_name, module))
        for name in public_names(module):
            value = getattr(module, name, None)
            if module_name == "ast" and inspect.isclass(value):
                continue  # their docstrings are lines of grammar
            if inspect.ismodule(value) or (not hasattr(module, "__all__") and is_borrowed(value, module_name)):
                continue
            if own_doc(value):
                found.append((module_name, prefix + name, value))
    for type_name in TYPES:
        module_name, _, short = type_name.rpartition(".")
        owner = getattr(importlib.import_module(module_name or "builtins"), short)
        for name in sorted(n for n in dir(owner) if not n.startswith("_")):
            value = getattr(owner, name)
            if own_doc(value):
                found.append((type_name, f"{type_name}.{name}", value))
    return found


def source_name(value: object) -> str | None:
    """The file `value` is written in, relative to the standard library; None for C."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return path.removeprefix(f"{STDLIB}/") if path else None


def build_facts(corpus: Corpus) -> list[Fact]:
    """All facts, none of whose text stands in a held-out file."""
    held_files = corpus.held_out + corpus.held_out_tests
    held_names = {file.name for file in held_files}
    held_text = " ".join(" ".join(file.text.split()) for file in held_files)
    facts: dict[str, Fact] = {}
    for module_name, name, value in candidates():
        summary = summary_of(own_doc(value) or "", name)
        if summary is None or name in facts or source_name(value) in held_names or summary in held_text:
            continue
        is_exception = inspect.isclass(value) and issubclass(value, BaseException)
        well_known = name in WELL_KNOWN_NAMES or (module_name in WELL_KNOWN_MODULES and not is_exception)
        facts[name] = Fact(name, summary, well_known, inspect.ismodule(value))
    return list(facts.values())
