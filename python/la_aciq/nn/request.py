"""The language of a request: what `with la_aciq.language("sw")` sets for the model calls inside.

It is a context variable, so each thread and each asyncio task has its own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from ..tags import canonical

# A tag for the whole batch, one tag per row of the batch, or None: no language was set.
REQUESTED: ContextVar[str | tuple[str, ...] | None] = ContextVar("la_aciq_language", default=None)
# Whether `generate` runs: it repeats each row of the batch for its beams or return sequences.
GENERATING: ContextVar[bool] = ContextVar("la_aciq_generating", default=False)


@contextmanager
def language(tag: str) -> Iterator[None]:
    """Run the model calls inside under one language.

    An asyncio task started inside inherits the language; a thread does not, neither threading.Thread (as with
    TextIteratorStreamer) nor loop.run_in_executor. Hand it the context, or enter `language` in the function it runs:

        Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=inputs)

    (asyncio.to_thread does this by itself.)

    Args:
        tag: A BCP-47 tag such as "sw" or "pt-BR". A language that the model has no entry for is served by the pooled
            entry `und`, and counted in `LanguageState.unserved`.

    Yields:
        Nothing.

    Raises:
        LaAciqError: The tag is not BCP-47.
    """
    token = REQUESTED.set(canonical(tag))
    try:
        yield
    finally:
        REQUESTED.reset(token)


@contextmanager
def languages(tags: Sequence[str]) -> Iterator[None]:
    """Run the model calls inside with one language per row of the batch; calls with another batch size are refused.

    Args:
        tags: BCP-47 tags, one per row of the batch.

    Yields:
        Nothing.

    Raises:
        LaAciqError: A tag is not BCP-47.
        TypeError: `tags` is a single string.
    """
    if isinstance(tags, str):
        raise TypeError(
            f"languages takes one tag per row of the batch, got the string {tags!r}; for one language use language()"
        )
    token = REQUESTED.set(tuple(canonical(tag) for tag in tags))
    try:
        yield
    finally:
        REQUESTED.reset(token)
