"""A local server that speaks the OpenAI chat protocol, with faults on order.

`python -m tests.judge_server 8123` runs one that rates by arithmetic on the text: no judgement, only the protocol.
"""

import json
import math
import sys
import threading
import time
import zlib
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-test-0123456789abcdef"


class JudgeServer:
    """Answers with `reply(body)`; before that, each fault in `faults(number, body)` comes once.

    Attributes:
        requests: bodies received, in order.
        answered: number of whole answers sent, by the text of the last message.
    """

    def __init__(self, reply, faults):
        self.reply = reply
        self.faults = faults
        self.requests = []
        self.keys = []
        self.answered = Counter()
        self.lock = threading.Lock()
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        judge = self.server.judge
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with judge.lock:
            number = len(judge.requests)
            judge.requests.append(body)
            judge.keys.append(self.headers.get("authorization", ""))
        fault = judge.faults(number, body)
        if fault == "cut":
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"id": "half an ')
            self.close_connection = True
        elif fault == "refuse":
            self.connection.close()
            self.close_connection = True
        elif fault == "slow":
            time.sleep(1.5)
            self.close_connection = True
        elif fault == "broken":
            self._send(200, b'{"choices": [')
        elif fault == "html":
            self._send(200, b"<html>busy</html>", kind="text/html")
        elif fault == "other":
            self._send(200, b'{"detail": "not a completion"}')
        elif isinstance(fault, int):
            key = self.headers.get("authorization", "").removeprefix("Bearer ")
            error = {"error": {"message": f"fault {fault} for key {key}", "type": "fault"}}
            self._send(fault, json.dumps(error).encode(), {"retry-after": "0.05"} if fault == 429 else {})
        else:
            answer = json.dumps(completion(body, judge.reply(body))).encode()
            with judge.lock:
                judge.answered[body["messages"][-1]["content"]] += 1
            self._send(200, answer)

    def _send(self, status, body, headers=None, kind="application/json"):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def completion(body, reply):
    """`reply` is a text, or (text, {token: logprob}) with the log-probabilities of its first token."""
    text, tops = reply if isinstance(reply, tuple) else (reply, None)
    logprobs = None
    if tops is not None:
        listed = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in tops.items()]
        logprobs = {"content": [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": listed}]}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": text},
                "logprobs": logprobs,
            }
        ],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


@contextmanager
def serving(reply, faults=lambda number, body: None, port=0):
    """A running server on 127.0.0.1."""
    judge = JudgeServer(reply, faults)
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.daemon_threads = True
    server.judge = judge
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def arithmetic(body):
    """A reply that depends on the question alone."""
    number = zlib.crc32(body["messages"][-1]["content"].encode())
    if body.get("logprobs"):
        chance = (1 + number % 98) / 100
        return "m", {"m": math.log(chance), "M": math.log(1 - chance)}
    return f"Rating: [[{1 + number % 10}]]"


if __name__ == "__main__":
    # Every 20th request fails, so that it can be seen that nothing is lost.
    faults = [429, 500, "broken", "cut", "slow"]
    with serving(
        arithmetic, lambda n, body: faults[n // 20 % 5] if n % 20 == 19 else None, int(sys.argv[1])
    ) as running:
        sys.stdout.write(f"{running.url}\n")
        sys.stdout.flush()
        threading.Event().wait()
