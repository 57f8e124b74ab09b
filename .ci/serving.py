"""A server to check: started with the bundled model on a free port, and ended again."""

import contextlib
import re
import subprocess
import sys
import tempfile
import threading

MODEL = "profiles/demo/demo.gguf"

# In the manner of Hermes, so that the server finds calls of tools.
TEMPLATE = """{% if tools %}Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}

{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}
</tool_call>{% endfor %}

{% endfor %}assistant:"""


@contextlib.contextmanager
def serving(program, *more, key="k"):
    """Yields the URL of a server with a key. What it logs after it is ready is dropped."""
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write(TEMPLATE)
        template.flush()
        args = [program, "serve", MODEL, "--port", "0", "--api-key", key, "--chat-template", template.name, *more]
        server = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
        log = ""
        for line in server.stderr:
            log += line
            if found := re.search(r"http://127\.0\.0\.1:\d+(?=: ready)", line):
                break
        else:
            sys.exit(f"the server ended: {log}")
        # A full pipe would stop the server.
        threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()
        try:
            yield found[0]
            if server.poll() is not None:
                sys.exit(f"the server ended with {server.returncode}")
        finally:
            server.terminate()
            server.wait(30)
