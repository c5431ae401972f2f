"""A server that speaks OpenAI's API, in this process: the log-probabilities are a tiny model's."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


@contextmanager
def serving(model, tokenizer, **behavior):
    """Serve a model; yields the server, whose `behavior` can be changed and whose `requests` are kept.

    behavior: `form`, "vllm" (prompt_logprobs), "echo", or "echo 1" (which needs max_tokens of at least 1); `limit`, the
    tokens after which it truncates a prompt; `key`, the API key it asks for; `root`, `models`, `max_model_len` of
    /v1/models; `busy`, how many requests it turns away first; `nan`, whether the last log-probability is NaN.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.server.behavior.get("redirect"):
                self.send_response(302)
                self.send_header("Location", self.server.behavior["redirect"])
                self.end_headers()
                return
            self.server.requests.append((self.path, dict(self.headers), None))
            if not self._admitted():
                return
            names = self.server.behavior.get("models", ["tiny"])
            fields = {
                key: self.server.behavior[key] for key in ("root", "max_model_len") if key in self.server.behavior
            }
            self._answer({"object": "list", "data": [{"id": name, **fields} for name in names]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.requests.append((self.path, dict(self.headers), body))
            behavior = self.server.behavior
            if not self._admitted():
                return
            if behavior.get("busy", 0) > 0:
                behavior["busy"] -= 1
                self._answer({"message": "later"}, 503)
                return
            ids = body["prompt"][: behavior.get("limit")]
            logprobs = self._logprobs(ids)
            if behavior.get("nan"):
                logprobs[-1] = float("nan")
            tokens = [self.server.tokenizer.decode([token]) for token in ids]
            choice = {"text": "", "index": 0}
            form = behavior.get("form", "vllm")
            if form == "vllm" and "prompt_logprobs" in body:
                choice["prompt_logprobs"] = [None] + [
                    {str(token): {"logprob": logprob, "rank": 1, "decoded_token": text}}
                    for token, logprob, text in zip(ids[1:], logprobs, tokens[1:], strict=True)
                ]
            elif form.startswith("echo") and body.get("echo"):
                if form == "echo 1" and body["max_tokens"] < 1:
                    self._answer({"error": {"message": "max_tokens must be at least 1"}}, 400)
                    return
                generated = body["max_tokens"]
                choice["logprobs"] = {
                    "tokens": [*tokens, *["x"] * generated],
                    "token_logprobs": [None, *logprobs, *[-1.0] * generated],
                }
            self._answer({"choices": [choice], "usage": {"prompt_tokens": len(ids)}})

        def _admitted(self):
            key = self.server.behavior.get("key")
            if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
                self._answer({"error": {"message": "no such key"}}, 401)
                return False
            return True

        def _logprobs(self, ids):
            with torch.no_grad():
                logits = self.server.model(input_ids=torch.tensor([ids])).logits[0].double()
            logprobs = torch.log_softmax(logits, -1)[:-1]
            return logprobs.gather(-1, torch.tensor(ids)[1:, None])[:, 0].tolist()

        def _answer(self, content, status=200):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            """Not on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.model, server.tokenizer, server.behavior, server.requests = model, tokenizer, behavior, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
