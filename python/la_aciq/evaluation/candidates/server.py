"""A candidate behind a server that speaks OpenAI's API and gives log-probabilities of the prompt."""

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...calibration import Window
from ...errors import LaAciqError
from ...models import load_tokenizer
from ..from_losses import Description
from .candidate import OTHER_VOCABULARY, Candidate, TextsToRead, UnreachableError, comparable

API_KEY = "LA_ACIQ_API_KEY"
_SECONDS = 600.0  # for one window
_PAUSES = (1.0, 4.0, 16.0)  # seconds before a request is sent again
_BUSY = (408, 429, 500, 502, 503, 504)
_PROBE = 64  # ids of each language that the vocabularies are compared on
_DIFFERENT = 0.2  # share of tokens whose text may differ, because a server may decode each one in its context


class Server(Candidate):
    """The URL of a server, with "#MODEL" at its end where it serves several models."""

    certain = False  # another model may be served under the same name

    def __init__(self, url: str) -> None:
        address, _, self._model = url.partition("#")
        try:
            parts = urllib.parse.urlsplit(address)
            host = parts.hostname and parts.netloc
        except ValueError as error:
            raise LaAciqError(f"server {url!r} is not a URL: {error}") from error
        if not host or parts.query:
            raise LaAciqError(f"server {url!r}: expected a URL such as http://localhost:8000")
        if parts.username is not None or parts.password is not None:
            raise LaAciqError(f"a server's URL must not hold a password; put the API key into {API_KEY}")
        path = parts.path.rstrip("/").removesuffix("/v1")
        self._base = f"{parts.scheme}://{parts.netloc}{path}/v1"
        self._host = parts.netloc
        self._root: str | None = None
        self._positions: int | None = None
        self._ask: _Form | None = None
        if not self._model:
            self._find_model()
        self.name = f"{self._model} at {self._host}"

    def identity(self) -> dict[str, Any]:
        return {"kind": "server", "url": self._base, "model": self._model}

    def tokenizer(self) -> Any:
        self._find_model()
        try:
            return load_tokenizer(self._root or self._model)
        except LaAciqError as error:
            raise LaAciqError(
                f"the tokenizer of the server {self._base} is not at hand: {error}; give --tokenizer, or serve the "
                "model under the name of its folder"
            ) from error

    def check(self, texts: TextsToRead) -> None:
        self._find_model()
        # One position is for the token that some servers must generate.
        texts.check_limits(self.name, None if self._positions is None else self._positions - 1, None)
        probes = [(windows[0], tag) for tag, windows in texts.windows.items()]
        self._ask = self._find_form(_shortened(probes[0][0]), probes[0][1])
        for window, tag in probes:
            prompt = self._ask.read(self, _shortened(window), tag)
            pairs = [
                (comparable(token), comparable(texts.tokenizer.decode([expected])))
                for token, expected in zip(prompt.tokens[1:], window.ids[1:_PROBE].tolist(), strict=True)
            ]
            whole = [(token, expected) for token, expected in pairs if token and expected]
            if sum(token != expected for token, expected in whole) > _DIFFERENT * len(pairs):
                raise LaAciqError(f"{self.name}: {OTHER_VOCABULARY}")

    @contextmanager
    def opened(self) -> Iterator["_Opened"]:
        assert self._ask is not None  # `check` comes first
        yield _Opened(self, self._ask, Description({"server": self._base, "model": self._model}, None))

    def _find_model(self) -> None:
        models = self.request("models")
        served = {entry["id"]: entry for entry in models.get("data") or [] if isinstance(entry, dict) and "id" in entry}
        if not self._model and len(served) != 1:
            raise LaAciqError(
                f"the server {self._base} serves {', '.join(served) or 'no model'}; name one: {self._base}#MODEL"
            )
        self._model = self._model or next(iter(served))
        if self._model not in served:
            raise LaAciqError(f"the server {self._base} serves {', '.join(served)}, and not {self._model!r}")
        self._root = served[self._model].get("root")
        self._positions = served[self._model].get("max_model_len")

    def _find_form(self, window: Window, tag: str) -> "_Form":
        """The first form of request whose answer has log-probabilities of the prompt."""
        reason = ""
        for form in _FORMS:
            try:
                form.read(self, window, tag)
            except _NoLogProbabilities as error:
                reason = str(error)
            else:
                return form
        raise LaAciqError(
            f"the server {self._base} gives no log-probabilities of a prompt of token ids, neither as prompt_logprobs "
            f"nor with echo and logprobs: {reason}"
        )

    def request(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers. A busy server is asked again.

        Raises:
            LaAciqError: it cannot be reached, or answers something else.
            _NoLogProbabilities: it does not accept the request.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._base}/{path}", data=data, headers=headers)
        for pause in (*_PAUSES, None):
            try:
                with _OPENER.open(request, timeout=_SECONDS) as answer:
                    content = json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if error.code in _BUSY and pause is not None and data is not None:
                    time.sleep(pause)
                    continue
                message = f"the server {self._base} answers {error.code} {error.reason}: {_message(error)}"
                if error.code in (400, 404, 405, 422, 501) and body is not None:
                    raise _NoLogProbabilities(message) from error
                hint = f"; the API key is read from {API_KEY}" if error.code in (401, 403) else ""
                raise LaAciqError(message + hint) from error
            except (OSError, http.client.HTTPException) as error:
                if pause is not None and data is not None:
                    time.sleep(pause)
                    continue
                reason = getattr(error, "reason", None) or error
                raise UnreachableError(f"the server {self._base} cannot be reached: {reason}") from error
            except ValueError as error:
                raise LaAciqError(f"the server {self._base} does not answer with JSON") from error
            if not isinstance(content, dict):
                raise LaAciqError(f"the server {self._base} does not answer with a JSON object")
            return content
        raise AssertionError("the last attempt returns or raises")

    def complete(self, window: Window, **settings: Any) -> tuple[dict[str, Any], int]:
        """The first choice of a completion of a window, and how many tokens its prompt had."""
        body = {"model": self._model, "prompt": window.ids.tolist(), "temperature": 0, **settings}
        answer = self.request("completions", body)
        try:
            choice = answer["choices"][0]
            count = int(answer.get("usage", {}).get("prompt_tokens", len(window.ids)))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise _NoLogProbabilities(f"the server {self._base} answers without choices") from error
        if count != len(window.ids):
            raise LaAciqError(
                f"the server {self._base} read {count} of a window's {len(window.ids)} tokens: it truncates or adds "
                "some; choose a smaller --seqlen, or start the server with a longer context"
            )
        return choice, count


class _NoLogProbabilities(LaAciqError):
    """The server does not understand this form of request, or its answer has no log-probabilities of the prompt."""


@dataclass(frozen=True)
class _Prompt:
    """What a server says of the prompt's tokens; of the first one there is no log-probability."""

    logprobs: list[Any]
    tokens: list[str]


@dataclass(frozen=True)
class _Form:
    """A form of request."""

    read: Callable[[Server, Window, str], _Prompt]


def _prompt_logprobs(server: Server, window: Window, tag: str) -> _Prompt:
    """vLLM's own field: an object for each token of the prompt, with that token's id among its keys."""
    # The language of the request is for a model of LA-ACIQ. vLLM ignores it for other models.
    choice, _ = server.complete(window, max_tokens=1, prompt_logprobs=0, vllm_xargs={"language": tag})
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list):
        raise _NoLogProbabilities("the answer has no prompt_logprobs")
    _check_length(entries, window)
    logprobs: list[Any] = [None]
    tokens = [""]
    for token, entry in zip(window.ids[1:].tolist(), entries[1:], strict=True):
        try:
            logprobs.append(entry[str(token)]["logprob"])
            tokens.append(str(entry[str(token)].get("decoded_token") or ""))
        except (KeyError, TypeError, AttributeError) as error:
            raise _NoLogProbabilities(f"the answer's prompt_logprobs lack the token {token} of the prompt") from error
    return _Prompt(logprobs, tokens)


def _echo(max_tokens: int) -> Callable[[Server, Window, str], _Prompt]:
    """OpenAI's completions with the prompt in the answer."""

    def read(server: Server, window: Window, tag: str) -> _Prompt:
        choice, count = server.complete(window, max_tokens=max_tokens, echo=True, logprobs=1)
        fields = choice.get("logprobs")
        values = fields.get("token_logprobs") if isinstance(fields, dict) else None
        tokens = fields.get("tokens") if isinstance(fields, dict) else None
        if not isinstance(values, list) or not isinstance(tokens, list) or len(values) <= max_tokens:
            raise _NoLogProbabilities("the answer has no token_logprobs of the prompt")
        # What was generated comes last.
        _check_length(values[:count], window)
        _check_length(tokens[:count], window)
        return _Prompt(values[:count], [str(token) for token in tokens[:count]])

    return read


_FORMS = (_Form(_prompt_logprobs), _Form(_echo(0)), _Form(_echo(1)))


@dataclass(frozen=True)
class _Opened:
    server: Server
    form: _Form
    description: Description

    def nats(self, window: Window, tag: str) -> NDArray[np.float32]:
        logprobs = self.form.read(self.server, window, tag).logprobs[1:]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in logprobs):
            raise LaAciqError(f"a log-probability that the server gives for the text for {tag!r} is no finite number")
        return -np.asarray(logprobs, dtype=np.float32)


def _check_length(values: list[Any], window: Window) -> None:
    if len(values) != len(window.ids):
        raise LaAciqError(
            f"the server gives log-probabilities of {len(values)} of a window's {len(window.ids)} tokens: it truncates "
            "the prompt; choose a smaller --seqlen, or start the server with a longer context"
        )


def _shortened(window: Window) -> Window:
    return Window(window.ids[:_PROBE], None)


def _message(error: urllib.error.HTTPError) -> str:
    """The message in the body of an error, or the beginning of the body."""
    text = error.read().decode("utf-8", errors="replace")
    try:
        content = json.loads(text)
        message = content.get("message") or content["error"]["message"]
    except (ValueError, KeyError, TypeError, AttributeError):
        message = text
    return " ".join(str(message).split())[:200]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The API key goes to the server that was named, and to no other."""

    def redirect_request(self, *arguments: Any, **keywords: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)
