"""An OpenAI-compatible endpoint on this machine that says what a test wants it to say, in every way it can."""

import contextlib
import http.server
import json
import threading


def completion(text, **choice):
    return (
        200,
        json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}]}).encode(),
        {},
    )


def says(*met, reason="so"):
    return completion(json.dumps({"reason": reason, "met": list(met)}))


class Server(http.server.ThreadingHTTPServer):
    """Gives the answers it was told, in order, the last one for ever; keeps the requests. An answer is (status, body, headers) or a
    function of the handler (its ``body`` is the request's) that gives one, or None where it wrote something itself."""

    daemon_threads = True
    answers: list

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.answers = [], [says(True)]
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that gave up


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        answer = self.server.answers.pop(0) if len(self.server.answers) > 1 else self.server.answers[0]
        if callable(answer):
            answer = answer(self)
        if answer is None:
            return
        status, body, headers = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(monkeypatch):
    """A server that runs until the end of the block."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()
