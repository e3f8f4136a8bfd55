"""A vLLM server elsewhere, through its OpenAI-compatible completions endpoint.

Notable: the server has to return the log-probabilities of the ids it is asked for (`logprob_token_ids`, vLLM). It is
asked for some at the start; one that ignores the field, as OpenAI's own and most others do, is refused there with what
to do, because a reranker that silently misses candidates is worse than none. The endpoint takes no pictures.

    EngineConfig(model=FOLDER, backend="remote", url="http://10.0.0.5:8000")      `model` gives the tokenizer here
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raydr.errors import ConfigError
from raydr.llm.engine import EngineConfig, EngineError, count_answer, load_llm_tokenizer, without_end
from raydr.llm.pictures import check_placeholders

if TYPE_CHECKING:
    from PIL.Image import Image

_RETRY_STATUSES = (429, 502, 503, 504)


class RemoteEngine:
    """An `Engine` behind HTTP."""

    pictures = None

    def __init__(self, config: EngineConfig) -> None:
        import httpx

        self.tokenizer: Any = load_llm_tokenizer(config.model)
        key = None
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env)
            if not key:
                raise ConfigError(f"api_key_env: the environment variable {config.api_key_env} is not set")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = str(config.url).rstrip("/")
        limits = httpx.Limits(max_connections=config.max_batch_prompts)
        with httpx.Client(base_url=self._url, headers=headers, timeout=config.timeout_s) as client:
            card = _model_card(client, self._url)
            self._name: str = card["id"]
            self._probe(client)
        own = int(card.get("max_model_len") or 4096)
        self.max_model_tokens = min(own, config.max_model_tokens or own)
        self._client = httpx.AsyncClient(base_url=self._url, headers=headers, timeout=config.timeout_s, limits=limits)

    async def next_token_logprobs(
        self, prompt: Sequence[int], candidates: Sequence[int], pictures: Sequence[Image] = ()
    ) -> list[float]:
        check_placeholders(self.pictures, prompt, pictures)
        wanted = list(dict.fromkeys(candidates))
        found = self._logprobs(await self._complete(prompt, **_asking_for(wanted)), wanted)
        return [found[token] for token in candidates]

    def _logprobs(self, choice: Mapping[str, Any], wanted: Sequence[int]) -> dict[int, float]:
        top = ((choice.get("logprobs") or {}).get("top_logprobs") or [{}])[0] or {}
        if any(f"token_id:{token}" not in top for token in wanted):
            raise ConfigError(
                f"{self._url} does not return the log-probabilities of the token ids it is asked for "
                "(logprob_token_ids); it must be a vLLM server of version 0.29 or later"
            )
        return {token: float(top[f"token_id:{token}"]) for token in wanted}

    def _probe(self, client: Any) -> None:
        """Raises `ConfigError` for a server that cannot answer for given ids, whatever its reason."""
        import httpx

        wanted = [1, 2, 3]  # in every vocabulary, and hardly all of them among the best
        try:
            response = client.post("/v1/completions", json=self._body([1], **_asking_for(wanted)))
            choice = response.json()["choices"][0] if response.status_code == 200 else {}
        except (httpx.HTTPError, KeyError, IndexError, ValueError):
            choice = {}
        self._logprobs(choice, wanted)

    async def generate(self, prompt: Sequence[int], *, max_tokens: int, stop: Sequence[int] = ()) -> list[int]:
        choice = await self._complete(prompt, max_tokens=max_tokens, stop_token_ids=list(stop), return_token_ids=True)
        made = choice.get("token_ids")
        if made is None:
            raise ConfigError(f"{self._url} does not return token ids (return_token_ids); it must be a vLLM server")
        return without_end(made, {*stop, self.tokenizer.eos_token_id})

    async def _complete(self, prompt: Sequence[int], **settings: Any) -> dict[str, Any]:
        import httpx

        try:
            response = await self._client.post("/v1/completions", json=self._body(prompt, **settings))
        except httpx.TransportError as error:
            raise EngineError(f"{self._url} does not answer: {type(error).__name__}") from error
        if response.status_code in _RETRY_STATUSES or response.status_code >= 500:
            raise EngineError(f"{self._url} answered {response.status_code}")
        if response.status_code != 200:
            raise ConfigError(f"{self._url} refused a prompt with {response.status_code}: {response.text[:300]}")
        answer = response.json()
        usage = answer.get("usage") or {}
        count_answer(
            prompt=len(prompt),
            generated=usage.get("completion_tokens") or 0,
            cached=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        )
        return answer["choices"][0]

    def _body(self, prompt: Sequence[int], **settings: Any) -> dict[str, Any]:
        return {"model": self._name, "prompt": list(prompt), "temperature": 0.0, **settings}

    async def check(self) -> None:
        import httpx

        try:
            response = await self._client.get("/health")
        except httpx.TransportError as error:
            raise EngineError(f"{self._url} does not answer: {type(error).__name__}") from error
        if response.status_code != 200:
            raise EngineError(f"{self._url}/health answered {response.status_code}")

    def close(self) -> None:
        """The connections end with the process."""


def _asking_for(token_ids: Sequence[int]) -> dict[str, Any]:
    """Of a request: one token, and the log-probabilities of these ids."""
    return {
        "max_tokens": 1,
        "logprobs": 1,
        "logprob_token_ids": list(token_ids),
        "return_tokens_as_token_ids": True,
    }


def _model_card(client: Any, url: str) -> dict[str, Any]:
    import httpx

    try:
        response = client.get("/v1/models")
        response.raise_for_status()
        return response.json()["data"][0]
    except (httpx.HTTPError, KeyError, IndexError, ValueError) as error:
        raise ConfigError(f"{url}: no OpenAI-compatible server answers there ({type(error).__name__})") from error
