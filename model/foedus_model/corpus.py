"""The text that `tiny` learns from: what any Python installation says about itself.

Docstrings and comments of the standard library modules named in ``corpus_modules.txt``, docstrings of a few
compiled modules, and the language reference topics of ``pydoc_data``. No download, and no text of a person.
The same Python version gives the same bytes, so a digest tells whether a measured figure can be repeated.

Left out: module bodies. Code compresses better than prose, and the base should have read prose.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType

from foedus_protocols.canonical import digest_json
from foedus_protocols.errors import DataError

# Compiled modules that every CPython build links in; their docstrings are read by import.
COMPILED_MODULES = ("builtins", "sys", "math", "itertools", "time", "_io")

# A document is held out when the first byte of its name's digest falls below this: about 5 % of the names.
_HELDOUT_BELOW = 13
_SHORTEST_COMMENT = 40
_SHORTEST_DOC = 20
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One described thing: ``name`` is a signature or a topic, ``text`` what is said about it."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """One module or topic with its entries in source order."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def text(self) -> str:
        """The document as plain text."""
        return "\n\n".join(f"{entry.name}\n{entry.text}" if entry.name else entry.text for entry in self.entries) + "\n"

    @property
    def held_out(self) -> bool:
        """Whether the document measures the base instead of training it: a threshold on the name alone."""
        return hashlib.sha256(f"held-out-2/{self.name}".encode()).digest()[0] < _HELDOUT_BELOW


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """All documents, in the order of their names."""

    documents: tuple[Document, ...]

    @property
    def train(self) -> tuple[Document, ...]:
        """The documents that the base is trained on."""
        return tuple(document for document in self.documents if not document.held_out)

    @property
    def heldout(self) -> tuple[Document, ...]:
        """The documents that it is measured on."""
        return tuple(document for document in self.documents if document.held_out)

    @property
    def digest(self) -> str:
        """Digest of every document's name and text."""
        return _digest(self.documents)

    @property
    def heldout_digest(self) -> str:
        """Digest of the held-out documents alone."""
        return _digest(self.heldout)

    def __bytes__(self) -> bytes:
        return "".join(document.text for document in self.documents).encode()


def read_corpus() -> Corpus:
    """Collect the corpus of the running Python.

    A module that this Python does not have is passed over; the digest then differs from the shipped one.

    Raises:
        DataError: Nothing could be read, as on an installation that carries no sources.
    """
    documents = [document for name in module_names() if (document := _source_document(name))]
    documents += [_compiled_document(name) for name in COMPILED_MODULES]
    documents += _topic_documents()
    if len(documents) < len(module_names()) // 2:
        raise DataError(
            f"expected the sources of {len(module_names())} library modules, found {len(documents)} documents: "
            "use a Python whose library is installed as source files"
        )
    return Corpus(documents=tuple(sorted(documents, key=lambda document: document.name)))


def module_names() -> tuple[str, ...]:
    """The names of the source modules that make up the corpus."""
    listed = resources.files("foedus_model").joinpath("corpus_modules.txt").read_text(encoding="utf-8")
    return tuple(listed.split())


def _digest(documents: tuple[Document, ...]) -> str:
    return digest_json([[document.name, document.text] for document in documents])


def _source_document(name: str) -> Document | None:
    """A module's docstrings and comments, read from its file without running it."""
    path = _source_path(name)
    if path is None:
        return None
    with tokenize.open(path) as file:
        source = file.read()
    found = [*_docstrings(name, ast.parse(source)), *_comments(source)]
    entries = [entry for _, entry in sorted(found, key=lambda item: item[0])]
    return Document(name=name, entries=tuple(entries)) if entries else None


def _source_path(name: str) -> Path | None:
    """The file of a module, found from its top package so that nothing is imported."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin)
    if rest:
        folder = folder.parent.joinpath(*rest)
        folder = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return folder if folder.suffix == ".py" and folder.is_file() else None


def _docstrings(module: str, tree: ast.Module) -> Iterator[tuple[int, Entry]]:
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        prefix, node = stack.pop()
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            stack.append((f"{prefix}.{child.name}" if named else prefix, child))  # type: ignore[attr-defined]
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = _clean(ast.get_docstring(node) or "")
        if len(text) >= _SHORTEST_DOC:
            yield getattr(node, "lineno", 0), Entry(name=_signature(prefix, node), text=text)


def _signature(name: str, node: ast.AST) -> str:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"{'class' if isinstance(node, ast.ClassDef) else 'module'} {name}"
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return f"{name}({', '.join(names)})"


def _comments(source: str) -> Iterator[tuple[int, Entry]]:
    """Comment blocks of whole lines, as paragraphs."""
    block: list[str] = []
    first = last = -2
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = (
        token for token in tokens if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
    )
    for token in comments:
        if token.start[0] != last + 1:
            yield from _paragraph(first, block)
            block, first = [], token.start[0]
        last = token.start[0]
        block.append(token.string.lstrip("#!:").strip())
    yield from _paragraph(first, block)


def _paragraph(line: int, block: list[str]) -> Iterator[tuple[int, Entry]]:
    text = _clean("\n".join(block))
    letters = sum(character.isalpha() or character == " " for character in text)
    if len(text) >= _SHORTEST_COMMENT and letters > 0.75 * len(text):
        yield line, Entry(name="", text=text)


def _compiled_document(name: str) -> Document:
    module = importlib.import_module(name)
    entries = []
    for path, value in _described(name, module):
        text = _clean(inspect.getdoc(value) or "")
        if len(text) >= _SHORTEST_DOC and not _ADDRESS.search(text):
            entries.append(Entry(name=path, text=text))
    return Document(name=name, entries=tuple(entries))


def _described(name: str, module: ModuleType) -> Iterator[tuple[str, object]]:
    """Public functions and classes of a compiled module, then each class's own methods."""
    for key in sorted(vars(module)):
        # `sys` keeps the original of each hook under a second name; a test runner or debugger replaces the first.
        value = vars(module).get(f"__{key}__", vars(module)[key])
        if key.startswith("_") or not callable(value) or getattr(value, "__module__", name) not in (name, "builtins"):
            continue
        yield f"{name}.{key}", value
        if inspect.isclass(value):
            for method in sorted(key for key in vars(value) if not key.startswith("_")):
                yield f"{name}.{key}.{method}", vars(value)[method]


def _topic_documents() -> list[Document]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return [
        Document(name=f"topic {name}", entries=(Entry(name=f"topic {name}", text=_clean(text)),))
        for name, text in sorted(topics.items())
    ]


def _clean(text: str) -> str:
    """Fold blank lines and trailing spaces; unprintable characters go."""
    text = "".join(character for character in text if character == "\n" or character.isprintable())
    lines = [line.rstrip() for line in text.strip().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
