"""A child that speaks the protocol of mla_kernels.device.child without torch; a case's name says what it does.

Words of a name, in order: "right", "wrong", "slow" are contestants that answer; "hang", "die", "fault" end the process
there, unless they are to be skipped; "refuse" ends the case, "unbuildable" the process before any contestant.
"""

import json
import os
import sys
import time


def say(**words):
    print(json.dumps(words), flush=True)


def main():
    if "never-ready" in sys.argv:
        sys.exit(9)
    say(loading="Peer")
    if "--without=Bad" not in sys.argv:
        say(loading="Bad")
        if "loading-dies" in sys.argv:
            os._exit(6)
        if "loading-hangs" in sys.argv:
            time.sleep(600)
    say(ready=True, versions={"Peer": "1.0"}, missing={})
    for line in sys.stdin:
        request = json.loads(line)
        words, skip = request["case"].split(), request["skip"]
        say(begin="", kind="")
        if "unbuildable" in words:
            os._exit(5)
        if "refuse" in words:
            say(end=True, problem="OutOfMemoryError: too large")
            continue
        say(bytes=1e6, flops=2e6)
        for word in words:
            if word in skip:
                continue
            say(begin=word, kind="peer")
            if word == "hang":
                time.sleep(600)
            if word == "die":
                os._exit(7)
            if word == "slow":
                time.sleep(0.3)
            if word in ("wrong", "fault"):
                say(contestant={"name": word, "kind": "peer", "problem": f"RuntimeError: {word}"})
            else:
                name = {"right": "mla_kernels"}.get(word, word)
                kind = "ours" if word == "right" else "peer"
                say(contestant={"name": name, "kind": kind, "us": 20.0, "error": 1e-3, "limit": 2e-2, "graph": True})
            if word == "fault":
                say(fault="cudaErrorIllegalAddress")
                sys.exit(3)
        say(end=True)


if __name__ == "__main__":
    main()
