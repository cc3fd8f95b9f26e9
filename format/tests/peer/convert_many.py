"""Runs Xen's convert-legacy-stream on many images in one process.

usage: convert_many.py SCRIPT < requests > answers

A request is a line "WIDTH GUEST FORMAT LENGTH" and then LENGTH bytes. An answer is one
line of JSON, {"status": what the script would exit with, "error": the last line of its
traceback, or null, "length": of what it wrote}, and then what it wrote. The script is
loaded as it is; only where it reads from, where it writes to and what it says to the user
are replaced.
"""

import importlib.machinery
import importlib.util
import io
import json
import resource
import sys


def load(path):
    loader = importlib.machinery.SourceFileLoader("convert_legacy_stream", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def main():
    script = load(sys.argv[1])
    # It believes every length, and would take memory until none is left.
    resource.setrlimit(resource.RLIMIT_AS, (512 << 20, 512 << 20))
    said = []
    script.info = lambda _: None
    script.err = said.append
    requests = sys.stdin.buffer
    answers = sys.stdout.buffer
    for request in iter(requests.readline, b""):
        width, guest, fmt, length = request.decode().split()
        script.fin = io.BytesIO(requests.read(int(length)))
        script.fout = io.BytesIO()
        script.twidth = int(width)
        script.pv = guest == "pv"
        script.qemu = True
        del said[:]
        try:
            status = script.read_legacy_stream(script.VM(fmt))
        except Exception as error:  # what the script does not catch ends it, too; also MemoryError
            status = 1
            said.append(f"{type(error).__name__}: {error}")
        lines = [line for text in said for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if line != "Please fix me"]
        bytes = script.fout.getvalue()
        answer = {"status": status, "error": errors[-1] if errors else None,
                  "length": len(bytes)}
        answers.write(json.dumps(answer).encode() + b"\n" + bytes)
        answers.flush()


main()
