"""Fetches a source package from the index that pip is set up for, without building it as pip would.

Arguments: a Python with pip, the package, its file, the file's SHA-256, and the folder to put it in.
"""

import hashlib
import html.parser
import pathlib
import subprocess
import sys
import urllib.parse
import urllib.request


def index(python):
    """Returns the index of packages: pip's setting, or what pip has without one."""
    setting = subprocess.run([python, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True)
    if setting.returncode == 0:
        return setting.stdout.strip()
    own = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    return subprocess.check_output([python, "-c", own], text=True).strip()


class Links(html.parser.HTMLParser):
    """Collects where the links of a page lead."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self.found.extend(value for name, value in attrs if name == "href")


def main():
    python, package, file, sha256, folder = sys.argv[1:]
    page = f"{index(python).rstrip('/')}/{package}/"
    request = urllib.request.Request(page, headers={"accept": "text/html"})
    links = Links()
    with urllib.request.urlopen(request) as answer:
        page = answer.url
        links.feed(answer.read().decode())
    urls = [urllib.parse.urljoin(page, link) for link in links.found]
    url = next((url for url in urls if urllib.parse.urlparse(url).path.endswith(f"/{file}")), None)
    if url is None:
        sys.exit(f"{file} is not in the index of packages")
    with urllib.request.urlopen(url) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != sha256:
        sys.exit(f"{file} has another SHA-256 than {sha256}")
    pathlib.Path(folder, file).write_bytes(content)


main()
