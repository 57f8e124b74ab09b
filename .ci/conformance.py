"""Checks a server against its own OpenAPI document with schemathesis: right and wrong requests, made up at random.

None may end in an error of the server, every answer must be as the document says, and what the document does not allow
must be refused. The first argument is the program, the second one how many seconds this may take."""

import subprocess
import sys
from pathlib import Path

from serving import serving


def main(program, seconds):
    # Answers are short, since few requests say how many tokens they want.
    with serving(program, "--parallel", "4", "--context", "512", "-n", "8", "--max-queue", "256") as url:
        tool = Path(sys.executable).with_name("schemathesis")
        config = Path(__file__).with_name("schemathesis.toml").absolute()
        args = [tool, "--config-file", config, "run", f"{url}/openapi.json", "--no-color", "--continue-on-failure"]
        # Other paths of the same endpoints.
        args += ["--exclude-tag", "alias", "--header", "Authorization: Bearer k", "--max-time", seconds]
        # It leaves a folder where it runs.
        ended = subprocess.run(args, cwd="target/clients", check=False)
    sys.exit(ended.returncode)


main(*sys.argv[1:])
