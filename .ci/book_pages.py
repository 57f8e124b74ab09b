#!/usr/bin/env python3
"""Makes documents that are right on GitHub right in the book, where nothing outside docs/ is.

As a preprocessor of mdBook, which book.toml names: links to other files of the repository lead to its address, which is
that of Cargo.toml, and pictures to copies in the book. With a folder, after mdBook:

    .ci/book_pages.py target/book        copies those pictures, and the documents as Markdown for programs (llms.txt)
"""

import json
import os
import shutil
import sys
import tomllib
from pathlib import Path

import markdown

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# Folder of the book with copies of files from outside docs/.
COPIES = "repository"


def repository():
    """Returns the address of the repository."""
    return tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["repository"]


def outside(path, text):
    """Yields the links of a document that leave docs/, with where they lead from the root of the repository."""
    for link in markdown.parse(text).links:
        file = link.target.partition("#")[0]
        if file and ":" not in file:
            found = markdown.resolve(path, file)
            if found and found != "docs" and not found.startswith("docs/"):
                yield link, found


def rewritten(path, text):
    """Returns a document of docs/ with its links out of there as the book has them."""
    for link, found in sorted(outside(path, text), key=lambda item: -item[0].start):
        if link.is_image:
            target = "../" * (len(Path(path).parts) - 2) + f"{COPIES}/{found}"
        else:
            kind = "tree" if (ROOT / found).is_dir() else "blob"
            _, sharp, anchor = link.target.partition("#")
            target = f"{repository()}/{kind}/main/{found}{sharp}{anchor}"
        text = text[: link.start] + target + text[link.start + len(link.target) :]
    return text


def chapters(value):
    """Yields every chapter of a book, at any depth."""
    if isinstance(value, dict):
        if isinstance(value.get("Chapter"), dict):
            yield value["Chapter"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from chapters(item)


def preprocess():
    _, book = json.load(sys.stdin)
    for chapter in chapters(book):
        path = chapter.get("source_path") or chapter.get("path")
        if path:
            path = f"docs/{path}"
            chapter["content"] = with_index(path, rewritten(path, chapter["content"]))
    json.dump(book, sys.stdout)


def with_index(path, text):
    """Returns a document whose links to a README.md of docs/ lead to the page that mdBook makes of it."""
    for link in reversed(markdown.parse(text).links):
        file, sharp, anchor = link.target.partition("#")
        if ":" not in file and (file == "README.md" or file.endswith("/README.md")):
            if (markdown.resolve(path, file) or "").startswith("docs/"):
                target = file[: -len("README.md")] + "index.md" + sharp + anchor
                text = text[: link.start] + target + text[link.start + len(link.target) :]
    return text


def finish(book):
    for document in sorted(DOCS.rglob("*.md")):
        path = document.relative_to(ROOT).as_posix()
        text = document.read_text(encoding="utf-8")
        for link, found in outside(path, text):
            if link.is_image:
                (book / COPIES / found).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / found, book / COPIES / found)
        copy = book / document.relative_to(DOCS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(rewritten(path, text), encoding="utf-8")


if len(sys.argv) > 1 and sys.argv[1] == "supports":
    sys.exit(0)
elif len(sys.argv) > 1:
    finish(Path(os.path.abspath(sys.argv[1])))
else:
    preprocess()
