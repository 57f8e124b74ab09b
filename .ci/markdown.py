"""Links, headings, anchors, and code blocks of a Markdown file, as GitHub reads them. Used by `links`, `book_pages.py`,
and `cookbook`. It knows the Markdown that this repository writes, not all that there is."""

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from urllib.parse import unquote

FENCE = re.compile(r"^( {0,11})(`{3,}|~{3,})\s*(.*)$")
LIST_ITEM = re.compile(r"^( *)([-*+]|\d{1,9}[.)])( +)\S")
HEADING = re.compile(r"^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$")
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)((?:(?!\n\s*\n).)+?)(?<!`)\1(?!`)", re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
TARGET = r"(<[^<>\n]*>|(?:[^()\s<>]|\([^()\s]*\))*)"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(\s*" + TARGET + r"(?:\s+\"[^\"]*\"|\s+'[^']*')?\s*\)", re.S)
REFERENCE = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])+)\]\[([^\[\]]+)\]", re.S)
DEFINITION = re.compile(r"^ {0,3}\[([^\[\]^]+)\]:\s*(\S+)", re.M)
HTML_LINK = re.compile(r"<(a|img|source)\b[^>]*?\b(href|src)\s*=\s*[\"']([^\"']*)[\"']", re.I | re.S)
HTML_ID = re.compile(r"<[a-z][^>]*?\b(?:id|name)\s*=\s*[\"']([^\"']+)[\"']", re.I | re.S)
BARE = re.compile(r"(?<![\w(\"'\[])<?(https?://[^\s<>)\]`|]+)")


@dataclass
class Link:
    """Where a link leads, as it is written."""

    line: int
    target: str
    # Where the target is in the text.
    start: int
    is_image: bool = False


@dataclass
class Block:
    """A fenced code block: its first line of code, its language with what follows it, and its text."""

    line: int
    info: str
    text: str


@dataclass
class Page:
    links: list = field(default_factory=list)
    anchors: set = field(default_factory=set)
    headings: list = field(default_factory=list)
    blocks: list = field(default_factory=list)
    problems: list = field(default_factory=list)


def slug(heading):
    """Returns the anchor that GitHub makes of a heading's text, without a number for repetitions."""
    kept = []
    for char in plain(heading).strip().lower():
        category = unicodedata.category(char)
        if char in " -" or category[0] in "LM" or category in ("Nd", "Pc"):
            kept.append("-" if char == " " else char)
    return "".join(kept)


def plain(heading):
    """Returns the text of a heading without its markup."""
    text = LINK.sub(lambda found: found[2], heading)
    text = re.sub(r"</?[a-zA-Z][^>]*>", "", text)
    return re.sub(r"(?<!\w)_(\S.*?\S|\S)_(?!\w)", r"\1", text)


def blanked(match):
    """Returns as many lines of nothing as there were."""
    return re.sub(r"[^\n]", " ", match if isinstance(match, str) else match[0])


def without_blocks(text, page):
    """Returns the text with the lines of code blocks blanked, and keeps fenced ones in the page."""
    lines, opened, content_indent, code, blank = [], None, 0, False, True
    for number, line in enumerate(text.split("\n"), 1):
        fence = FENCE.match(line)
        if opened:
            indent, mark, block = opened
            if fence and fence[2][0] == mark[0] and len(fence[2]) >= len(mark) and not fence[3]:
                page.blocks.append(block)
                opened = None
            else:
                block.text += re.sub(f"^ {{0,{indent}}}", "", line) + "\n"
            lines.append(blanked(line))
            continue
        if fence:
            opened = (len(fence[1]), fence[2], Block(number + 1, fence[3], ""))
            lines.append(blanked(line))
            continue
        indent = len(line) - len(line.lstrip(" "))
        if not line.strip():
            lines.append(line)
            blank = True
            continue
        code = indent >= content_indent + 4 and (blank or code)
        blank = False
        if code:
            lines.append(blanked(line))
            continue
        item = LIST_ITEM.match(line)
        if item:
            content_indent = len(item[1]) + len(item[2]) + len(item[3])
        elif indent < content_indent:
            content_indent = 0
        lines.append(line)
    if opened:
        page.problems.append((opened[2].line - 1, "a code block is not closed"))
    return "\n".join(lines)


def links_of(text, begin, end, page):
    """Adds the links of a stretch of text, those within the text of links included."""
    for found in LINK.finditer(text, begin, end):
        add_link(text, found, 3, found[1] == "!", page)
        links_of(text, *found.span(2), page)


def add_link(text, found, group, is_image, page):
    """Adds a link whose target is a group of a match."""
    target, start = found[group], found.start(group)
    if target.startswith("<"):
        target, start = target[1:-1], start + 1
    page.links.append(Link(line_of(text, found.start()), target, start, is_image))


def line_of(text, position):
    return 1 + text.count("\n", 0, position)


def resolve(path, link):
    """Returns the path that a relative link of a document leads to, from the root of the repository, or None."""
    parts = list(PurePosixPath(path).parent.parts)
    for part in unquote(link).split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return None if link.startswith("/") else "/".join(parts) or "."


def parse(text):
    """Returns what of a Markdown text leads elsewhere or is led to."""
    page = Page()
    text = COMMENT.sub(blanked, without_blocks(text, page))
    seen = {}
    for number, line in enumerate(text.split("\n"), 1):
        heading = HEADING.match(line)
        if heading:
            page.headings.append((number, len(heading[1]), plain(heading[2]).replace("`", "")))
            anchor = slug(heading[2])
            count = seen.get(anchor, 0)
            seen[anchor] = count + 1
            page.anchors.add(f"{anchor}-{count}" if count else anchor)
    text = CODE_SPAN.sub(blanked, text)
    links_of(text, 0, len(text), page)
    defined = {name.lower() for name, _ in DEFINITION.findall(text)}
    for found in DEFINITION.finditer(text):
        add_link(text, found, 2, False, page)
    for found in REFERENCE.finditer(text):
        if found[2].lower() not in defined:
            page.problems.append((line_of(text, found.start()), f"[{found[2]}] is not defined"))
    for found in HTML_LINK.finditer(text):
        add_link(text, found, 3, found[1].lower() != "a", page)
    page.anchors.update(HTML_ID.findall(text))
    rest = HTML_LINK.sub(blanked, DEFINITION.sub(blanked, LINK.sub(blanked, text)))
    for found in BARE.finditer(rest):
        page.links.append(Link(line_of(rest, found.start()), found[1].rstrip(".,;:!?'\""), found.start(1)))
    page.links.sort(key=lambda link: link.start)
    return page
