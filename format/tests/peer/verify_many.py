"""Runs Xen's verify-stream-v2 on many images in one process.

usage: verify_many.py SCRIPT < requests > answers

A request is a line "FORMAT LENGTH" (FORMAT: xl, libxl or libxc) and then LENGTH bytes.
An answer is one line of JSON: {"status": what the script would exit with, "error": the
last line of its traceback, or null}. The script is loaded as it is; only where it reads
from and what it says to the user are replaced.
"""

import importlib.machinery
import importlib.util
import io
import json
import sys


def load(path):
    loader = importlib.machinery.SourceFileLoader("verify_stream_v2", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def main():
    script = load(sys.argv[1])
    said = []
    script.info = lambda _: None
    script.err = said.append
    requests = sys.stdin.buffer
    for request in iter(requests.readline, b""):
        fmt, length = request.decode().split()
        script.fin = io.BytesIO(requests.read(int(length)))
        del said[:]
        status = script.read_stream(fmt)
        lines = [line for text in said for line in text.splitlines() if line.strip()]
        # "Stream Error:" and a traceback; after a fault of the script, an apology.
        errors = [line for line in lines if line != "Please fix me"]
        print(json.dumps({"status": status, "error": errors[-1] if errors else None}))
        sys.stdout.flush()


main()
